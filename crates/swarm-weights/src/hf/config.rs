//! `config.json` to [`ModelConfig`].
//!
//! What transformers' own class of a family reads is read here, with the same defaults, except that
//! sizes must be given. Options that would change the maths and are not built are errors by name.

use serde_json::Value;

use super::json::{Object, short, type_error};
use super::rope::rope;
use crate::config::{ConfigError, Family, ModelConfig};

const FAMILIES: [(Family, &str); 4] = [
    (Family::Llama, "LlamaForCausalLM"),
    (Family::Mistral, "MistralForCausalLM"),
    (Family::Qwen2, "Qwen2ForCausalLM"),
    (Family::Qwen3, "Qwen3ForCausalLM"),
];
const SUPPORTED: &str = "llama, mistral, qwen2, qwen3 (as causal language models)";

/// Options of other models that are sometimes grafted onto these types. Absent, `null`, `false`, 0 and 1
/// (for factors) mean that nothing is asked.
const OPTIONS_NOT_BUILT: [&str; 18] = [
    "quantization_config",
    "compression_config",
    "per_layer_config",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "no_rope_layers",
    "use_bidirectional_attention",
    "alibi",
    "multi_query_group_num",
];

pub(crate) fn config_from(json: &Value) -> Result<ModelConfig, ConfigError> {
    let config = Object::new("config.json", json)?;
    let family = family(config)?;
    refuse_options(config)?;

    let hidden_size = config.required_size("hidden_size")?;
    let num_hidden_layers = config.required_size("num_hidden_layers")?;
    let num_attention_heads = config.required_size("num_attention_heads")?;
    let head_dim = match (config.size("head_dim")?, family) {
        (Some(head_dim), _) => head_dim,
        (None, Family::Qwen3) => 128,
        (None, _) => even_share(hidden_size, num_attention_heads)?,
    };
    let max_position_embeddings = config.size("max_position_embeddings")?.unwrap_or(match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 => 32_768,
    });
    let flag = |key: &str| Ok(config.bool(key)?.unwrap_or(false));
    let attention_bias = match family {
        Family::Llama | Family::Qwen3 => flag("attention_bias")?,
        Family::Mistral => false,
        Family::Qwen2 => true,
    };
    let parsed = ModelConfig {
        family,
        hidden_size,
        intermediate_size: config.required_size("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: kv_heads(config, family, num_attention_heads)?,
        head_dim,
        vocab_size: config.required_size("vocab_size")?,
        rms_norm_eps: config.float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(config, head_dim, max_position_embeddings)?,
        max_position_embeddings,
        layer_windows: layer_windows(config, family, num_hidden_layers)?,
        tie_word_embeddings: flag("tie_word_embeddings")?,
        attention_bias,
        o_proj_bias: attention_bias && family != Family::Qwen2,
        mlp_bias: family == Family::Llama && flag("mlp_bias")?,
        qk_norm: family == Family::Qwen3,
    };
    parsed.validate()?;
    Ok(parsed)
}

fn family(config: Object<'_>) -> Result<Family, ConfigError> {
    let unsupported = |what: String| Err(ConfigError::Unsupported { what, supported: SUPPORTED });
    let architectures = config.strings("architectures")?.unwrap_or_default();
    let model_type = config.string("model_type")?;
    let found = match (model_type, architectures.first()) {
        (Some(model_type), _) => FAMILIES.iter().find(|(family, _)| family.name() == model_type),
        (None, Some(architecture)) => FAMILIES.iter().find(|(_, name)| name == architecture),
        (None, None) => return Err(ConfigError::Missing { key: "model_type".into() }),
    };
    match (found, architectures.as_slice()) {
        (Some((family, name)), [only]) if name == only => Ok(*family),
        (Some((family, _)), []) => Ok(*family),
        (Some(_), others) => unsupported(format!("architectures {others:?}")),
        (None, others) => unsupported(match model_type {
            Some(model_type) => format!("model_type {model_type:?}"),
            None => format!("architectures {others:?}"),
        }),
    }
}

fn refuse_options(config: Object<'_>) -> Result<(), ConfigError> {
    let unsupported = |what: String, supported| Err(ConfigError::Unsupported { what, supported });
    // transformers writes both spellings of SiLU.
    if let Some(act) = config.string("hidden_act")?
        && !matches!(act, "silu" | "swish")
    {
        return unsupported(format!("hidden_act {act:?}"), "silu");
    }
    if config.bool("is_causal")? == Some(false) {
        return unsupported("is_causal false".into(), "causal attention");
    }
    for key in OPTIONS_NOT_BUILT {
        if let Some(value) = config.value(key)
            && !is_off(value)
        {
            return unsupported(format!("{key} {}", short(value)), "models without it");
        }
    }
    Ok(())
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => matches!(number.as_f64(), Some(0.0 | 1.0)),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn even_share(hidden_size: usize, heads: usize) -> Result<usize, ConfigError> {
    if heads == 0 || !hidden_size.is_multiple_of(heads) {
        let why = format!("{heads} attention heads cannot share it evenly, and head_dim is not given");
        return Err(ConfigError::Range { key: "hidden_size", got: hidden_size.to_string(), why });
    }
    Ok(hidden_size / heads)
}

/// `null` means as many as attention heads; an absent key means the class's own default.
fn kv_heads(config: Object<'_>, family: Family, heads: usize) -> Result<usize, ConfigError> {
    let key = "num_key_value_heads";
    Ok(match config.size(key)? {
        Some(kv_heads) => kv_heads,
        None if config.is_null(key) => heads,
        None => match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        },
    })
}

fn layer_windows(
    config: Object<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let layers = layers.min(1 << 16); // validate() knows the real limit
    let window = match config.size("sliding_window")? {
        Some(window) => Some(window),
        None if config.is_null("sliding_window") => None,
        None => Some(4096),
    };
    match family {
        Family::Llama => {
            // The class knows no window; a configuration that asks for one means another model.
            let off = config.bool("use_sliding_window")? == Some(false);
            if let Some(window) = config.value("sliding_window").filter(|value| !off && !is_off(value)) {
                let what = format!("sliding_window {} in a llama model", short(window));
                return Err(ConfigError::Unsupported { what, supported: "full attention" });
            }
            uniform(config, layers, None)
        }
        Family::Mistral => uniform(config, layers, window),
        Family::Qwen2 | Family::Qwen3 => {
            let on = config.bool("use_sliding_window")?.unwrap_or(false);
            let window = window.filter(|_| on);
            let from = config.size("max_window_layers")?.unwrap_or(28);
            let by_depth = || (0..layers).map(|layer| window.filter(|_| layer >= from)).collect();
            explicit(config, layers, window).map(|explicit| explicit.unwrap_or_else(by_depth))
        }
    }
}

/// One kind of attention in all layers. The class ignores `layer_types`, so it must not disagree.
fn uniform(
    config: Object<'_>,
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let windows = vec![window; layers];
    match explicit(config, layers, window)? {
        Some(explicit) if explicit != windows => Err(ConfigError::Unsupported {
            what: "layer_types that differ between layers or from sliding_window".into(),
            supported: "one kind for all layers of llama and mistral models",
        }),
        _ => Ok(windows),
    }
}

/// `layer_types`, when given.
fn explicit(
    config: Object<'_>,
    layers: usize,
    window: Option<usize>,
) -> Result<Option<Vec<Option<usize>>>, ConfigError> {
    let Some(types) = config.strings("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        let why = format!("num_hidden_layers is {layers}");
        return Err(ConfigError::Range { key: "number of layer_types", got: types.len().to_string(), why });
    }
    let one = |kind: &&str| match (*kind, window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => Err(ConfigError::Missing { key: "sliding_window".into() }),
        (other, _) => Err(ConfigError::Unsupported {
            what: format!("layer type {other:?}"),
            supported: "full_attention, sliding_attention",
        }),
    };
    types.iter().map(one).collect::<Result<_, _>>().map(Some)
}

/// A token id or a list of them under `key`, as `eos_token_id` is written.
pub(crate) fn token_ids(config: Object<'_>, key: &str) -> Result<Vec<u32>, ConfigError> {
    let want = "a token id or a list of them";
    let Some(value) = config.value(key) else { return Ok(Vec::new()) };
    let one = |id: &Value| {
        id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| type_error(key, want, value))
    };
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        single => Ok(vec![one(single)?]),
    }
}
