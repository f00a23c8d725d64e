//! Configurations as transformers writes them, version 4 and 5, and the ones that must be refused.

use serde_json::{Value, json};

use super::config_from;
use crate::config::{ConfigError, Family, ModelConfig, RopeScaling};

fn base(family: Family) -> Value {
    json!({
        "model_type": family.name(), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    })
}

/// `base` with the keys of `more`.
fn with(family: Family, more: Value) -> Value {
    let mut config = base(family);
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn parsed(family: Family, more: Value) -> ModelConfig {
    config_from(&with(family, more)).unwrap()
}

fn refused(family: Family, more: Value) -> String {
    config_from(&with(family, more)).expect_err("must be refused").to_string()
}

#[test]
fn absent_keys_mean_what_the_class_says() {
    for (family, context, head_dim) in [
        (Family::Llama, 2048, 16),
        (Family::Mistral, 131_072, 16),
        (Family::Qwen2, 32_768, 16),
        (Family::Qwen3, 32_768, 128),
    ] {
        let config = parsed(family, json!({}));
        assert_eq!((config.max_position_embeddings, config.head_dim), (context, head_dim), "{family:?}");
        assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-6, 10_000.0));
        assert_eq!((config.rope.rotary_dim, &config.rope.scaling), (head_dim, &RopeScaling::None));
        assert!(!config.tie_word_embeddings && !config.o_proj_bias && !config.mlp_bias);
        assert_eq!(
            (config.attention_bias, config.qk_norm),
            (family == Family::Qwen2, family == Family::Qwen3)
        );
        let window = (family == Family::Mistral).then_some(4096);
        assert_eq!(config.layer_windows, [window; 4]);
    }
}

#[test]
fn absent_kv_heads_differ_between_families() {
    for (family, heads, absent, null) in [
        (Family::Llama, 32, 32, 32),
        (Family::Mistral, 32, 8, 32),
        (Family::Qwen2, 64, 32, 64),
        (Family::Qwen3, 64, 32, 64),
    ] {
        let mut config =
            with(family, json!({"num_attention_heads": heads, "num_key_value_heads": null, "head_dim": 2}));
        assert_eq!(config_from(&config).unwrap().num_key_value_heads, null, "{family:?}");
        config.as_object_mut().unwrap().remove("num_key_value_heads");
        assert_eq!(config_from(&config).unwrap().num_key_value_heads, absent, "{family:?}");
    }
}

#[test]
fn the_family_comes_from_type_and_architecture() {
    let of = |architectures: Value| {
        let mut config = with(Family::Llama, json!({"architectures": architectures}));
        config.as_object_mut().unwrap().remove("model_type");
        config_from(&config).map(|config| config.family)
    };
    assert_eq!(of(json!(["MistralForCausalLM"])), Ok(Family::Mistral));
    assert_eq!(of(json!(["Qwen3ForCausalLM"])), Ok(Family::Qwen3));
    assert!(of(json!(["GemmaForCausalLM"])).unwrap_err().to_string().contains("GemmaForCausalLM"));
    assert!(matches!(of(json!(null)), Err(ConfigError::Missing { .. })));
    for (more, word) in [
        (json!({"model_type": "mixtral"}), "\"mixtral\""),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "LlamaForSequenceClassification"),
        (json!({"architectures": ["MistralForCausalLM"]}), "MistralForCausalLM"),
        (json!({"architectures": ["LlamaForCausalLM", "Other"]}), "Other"),
        (json!({"model_type": 3}), "model_type is 3"),
    ] {
        let text = refused(Family::Llama, more);
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn biases_follow_the_family() {
    let on = json!({"attention_bias": true, "mlp_bias": true});
    let flags = |family| {
        let config = parsed(family, on.clone());
        (config.attention_bias, config.o_proj_bias, config.mlp_bias)
    };
    assert_eq!(flags(Family::Llama), (true, true, true));
    assert_eq!(flags(Family::Mistral), (false, false, false));
    assert_eq!(flags(Family::Qwen2), (true, false, false));
    assert_eq!(flags(Family::Qwen3), (true, true, false));
}

#[test]
fn head_dim_may_be_given() {
    for family in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3] {
        assert_eq!(parsed(family, json!({"head_dim": 24})).head_dim, 24);
        assert!(refused(family, json!({"head_dim": 25})).contains("head_dim is 25"));
    }
    let odd = json!({"num_attention_heads": 6, "head_dim": 10});
    assert_eq!(parsed(Family::Llama, odd).q_width(), 60);
    assert!(refused(Family::Llama, json!({"num_attention_heads": 6})).contains("cannot share it evenly"));
    assert!(refused(Family::Llama, json!({"num_attention_heads": 0})).contains("cannot share it evenly"));
}

#[test]
fn windows_are_per_layer() {
    let windows = |family, more| parsed(family, more).layer_windows;
    let (full, all) = (vec![None; 4], vec![Some(8); 4]);
    assert_eq!(windows(Family::Mistral, json!({"sliding_window": null})), full);
    assert_eq!(windows(Family::Mistral, json!({"sliding_window": 8})), all);
    for family in [Family::Qwen2, Family::Qwen3] {
        let off = json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 2});
        assert_eq!(windows(family, off), full);
        let on = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(windows(family, on), [None, None, None, Some(8)]);
        let deep = json!({"sliding_window": 8, "use_sliding_window": true});
        assert_eq!(windows(family, deep), full, "28 layers without a window by default");
        let types = json!(["sliding_attention", "full_attention", "full_attention", "sliding_attention"]);
        let explicit = json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": types});
        assert_eq!(windows(family, explicit), [Some(8), None, None, Some(8)]);
        assert!(refused(family, json!({"layer_types": types})).contains("sliding_window is missing"));
        assert!(
            refused(family, json!({"layer_types": ["full_attention"]}))
                .contains("number of layer_types is 1")
        );
        let linear = json!({"layer_types": ["linear_attention", "a", "b", "c"]});
        assert!(refused(family, linear).contains("\"linear_attention\""));
    }
    let full_types =
        json!({"layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"]});
    assert_eq!(windows(Family::Llama, full_types.clone()), full);
    assert!(refused(Family::Mistral, full_types).contains("layer_types that differ"));
    assert!(refused(Family::Llama, json!({"sliding_window": 8})).contains("sliding_window 8"));
    assert_eq!(windows(Family::Llama, json!({"sliding_window": 8, "use_sliding_window": false})), full);
    assert!(refused(Family::Mistral, json!({"sliding_window": 0})).contains("sliding_window is 0"));
}

#[test]
fn options_that_change_the_maths_are_named() {
    for (more, word) in [
        (json!({"hidden_act": "gelu"}), "hidden_act \"gelu\""),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config {\"quant_method\":\"gptq\"}",
        ),
        (json!({"per_layer_config": {"0": {"head_dim": 8}}}), "per_layer_config"),
        (json!({"num_local_experts": 8}), "num_local_experts 8"),
        (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping 30"),
        (json!({"is_causal": false}), "is_causal false"),
        (json!({"partial_rotary_factor": 0.0}), "partial_rotary_factor is 0"),
        (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor is 1.5"),
        (json!({"partial_rotary_factor": 0.2}), "rotary dimension is 3"),
    ] {
        let text = refused(Family::Llama, more);
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    let harmless = json!({
        "hidden_act": "silu", "quantization_config": null, "num_experts": 0, "pretraining_tp": 2,
        "is_causal": true, "torch_dtype": "bfloat16", "use_cache": true, "attention_dropout": 0.1,
        "partial_rotary_factor": 0.5, "some_new_key": [1, 2],
    });
    assert_eq!(parsed(Family::Llama, harmless).rope.rotary_dim, 8);
}

#[test]
fn wrong_types_and_missing_sizes_are_named() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    {
        assert!(refused(Family::Llama, json!({key: null})).contains(&format!("{key} is missing")));
        for bad in [json!(-1), json!(1.5), json!("64"), json!([64]), json!(1e300)] {
            let text = refused(Family::Llama, json!({key: bad}));
            assert!(text.contains(&format!("{key} is {bad}")), "{text}");
        }
    }
    assert!(refused(Family::Llama, json!({"rms_norm_eps": "small"})).contains("rms_norm_eps"));
    assert!(refused(Family::Llama, json!({"tie_word_embeddings": 1})).contains("tie_word_embeddings"));
    assert!(
        refused(Family::Llama, json!({"num_hidden_layers": 1_000_000_000})).contains("num_hidden_layers")
    );
    let long = refused(Family::Llama, json!({"hidden_act": ["\u{1b}[31m", "x".repeat(1000)]}));
    assert!(long.len() < 200 && !long.contains('\u{1b}'), "{long}");
}

fn scaling(more: Value) -> RopeScaling {
    parsed(Family::Llama, more).rope.scaling
}

#[test]
fn rope_is_read_in_both_spellings() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let want = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let old = parsed(Family::Llama, json!({"rope_theta": 500_000.0, "rope_scaling": llama3}));
    assert_eq!((old.rope.theta, &old.rope.scaling), (500_000.0, &want));
    let mut parameters = llama3;
    parameters["rope_theta"] = json!(500_000.0);
    assert_eq!(parsed(Family::Llama, json!({"rope_parameters": parameters})).rope, old.rope);
    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7}});
    assert_eq!(parsed(Family::Llama, plain).rope.theta, 7.0);
    let outside = json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0});
    assert_eq!(parsed(Family::Llama, outside).rope.theta, 9.0);
    let empty =
        json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5}});
    assert_eq!(scaling(empty), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(
        scaling(json!({"rope_scaling": {"type": "linear", "factor": 4}})),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(scaling(json!({"rope_scaling": null, "rope_parameters": null})), RopeScaling::None);
    let part = json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}});
    assert_eq!(parsed(Family::Llama, part).rope.rotary_dim, 8);
}

#[test]
fn yarn_is_read_with_its_defaults() {
    let yarn = |more: Value| {
        let mut parameters = json!({"rope_type": "yarn"});
        for (key, value) in more.as_object().unwrap() {
            parameters[key] = value.clone();
        }
        scaling(json!({"max_position_embeddings": 4096, "rope_scaling": parameters}))
    };
    let plain = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 1024,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    assert_eq!(yarn(json!({"factor": 4.0, "original_max_position_embeddings": 1024})), plain);
    assert_eq!(yarn(json!({"original_max_position_embeddings": 1024, "beta_fast": 0, "mscale": 0})), plain);
    let full = yarn(json!({
        "factor": 2, "original_max_position_embeddings": 2048, "beta_fast": 16, "beta_slow": 2.0,
        "attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": false,
    }));
    let want = RopeScaling::Yarn {
        factor: 2.0,
        original_max_position_embeddings: 2048,
        beta_fast: 16.0,
        beta_slow: 2.0,
        attention_factor: Some(1.25),
        mscale: Some(0.7),
        mscale_all_dim: Some(1.0),
        truncate: false,
    };
    assert_eq!(full, want);
    let default_length = yarn(json!({"factor": 2.0}));
    assert!(matches!(default_length, RopeScaling::Yarn { original_max_position_embeddings: 4096, .. }));
    let outside = json!({
        "original_max_position_embeddings": 512,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    });
    assert!(matches!(scaling(outside), RopeScaling::Yarn { original_max_position_embeddings: 512, .. }));
}

#[test]
fn rope_that_is_not_built_is_named() {
    for (more, word) in [
        (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "\"dynamic\""),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), "\"longrope\""),
        (json!({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}), "\"mrope\""),
        (json!({"rope_scaling": {"type": "linear"}}), "factor is missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope scaling factor is 0"),
        (json!({"rope_scaling": {"type": "linear", "factor": "2"}}), "factor is \"2\""),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "low_freq_factor is missing"),
        (json!({"rope_scaling": "linear"}), "rope_scaling is \"linear\""),
        (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "full_attention"),
        (json!({"rope_theta": 0}), "rope_theta is 0"),
    ] {
        let text = refused(Family::Llama, more);
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    let order = json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
    }});
    assert!(refused(Family::Llama, order).contains("high_freq_factor is 4"));
}
