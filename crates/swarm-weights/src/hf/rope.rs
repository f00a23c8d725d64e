//! RoPE parameters as transformers reads them: `rope_parameters` (version 5) or `rope_theta` with
//! `rope_scaling` (version 4 and before).

use super::json::{Object, short};
use crate::config::{ConfigError, RopeConfig, RopeScaling};

const DEFAULT_THETA: f64 = 10_000.0;
const SUPPORTED: &str = "default, linear, llama3, yarn";

/// `context` is `max_position_embeddings`.
pub(super) fn rope(config: Object<'_>, head_dim: usize, context: usize) -> Result<RopeConfig, ConfigError> {
    // transformers lets a non-empty rope_scaling win over rope_parameters.
    let scaling = config.object("rope_scaling")?.filter(|scaling| !scaling.is_empty());
    let parameters = match scaling {
        Some(scaling) => Some(scaling),
        None => config.object("rope_parameters")?,
    };
    let inner = |key: &str| match parameters {
        Some(parameters) => parameters.float(key),
        None => Ok(None),
    };
    if let Some(parameters) = parameters {
        refuse_nested(parameters)?;
    }
    let theta = match inner("rope_theta")? {
        Some(theta) => theta,
        None => config.float("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    let part = match inner("partial_rotary_factor")? {
        Some(part) => part,
        None => config.float("partial_rotary_factor")?.unwrap_or(1.0),
    };
    if !(part > 0.0 && part <= 1.0) {
        let why = "above 0 and at most 1 is possible".to_owned();
        return Err(ConfigError::Range { key: "partial_rotary_factor", got: part.to_string(), why });
    }
    Ok(RopeConfig {
        theta,
        rotary_dim: (head_dim as f64 * part) as usize, // rounds down, as transformers does
        scaling: match parameters {
            Some(parameters) => scaling_from(config, parameters, context)?,
            None => RopeScaling::None,
        },
    })
}

/// Parameters per kind of layer belong to models whose layers rotate differently.
fn refuse_nested(parameters: Object<'_>) -> Result<(), ConfigError> {
    match parameters.first_object_key() {
        Some(key) => Err(ConfigError::Unsupported {
            what: format!("rope_parameters for each kind of layer ({key})"),
            supported: "one set for all layers",
        }),
        None => Ok(()),
    }
}

fn scaling_from(
    config: Object<'_>,
    parameters: Object<'_>,
    context: usize,
) -> Result<RopeScaling, ConfigError> {
    let kind = match parameters.string("rope_type")? {
        Some(kind) => kind,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    // The top-level key has priority, as in transformers.
    let original = || -> Result<usize, ConfigError> {
        let key = "original_max_position_embeddings";
        Ok(match config.size(key)? {
            Some(length) => length,
            None => parameters.size(key)?.unwrap_or(context),
        })
    };
    match kind {
        "default" | "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: parameters.required_float("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: parameters.required_float("factor")?,
            low_freq_factor: parameters.required_float("low_freq_factor")?,
            high_freq_factor: parameters.required_float("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        }),
        "yarn" => {
            let original = original()?;
            // Zero means "not set" for these in transformers, which asks `if value`.
            let set = |key: &str| Ok(parameters.float(key)?.filter(|&value| value != 0.0));
            Ok(RopeScaling::Yarn {
                factor: match parameters.float("factor")? {
                    Some(factor) => factor,
                    None => context as f64 / original.max(1) as f64,
                },
                original_max_position_embeddings: original,
                beta_fast: set("beta_fast")?.unwrap_or(32.0),
                beta_slow: set("beta_slow")?.unwrap_or(1.0),
                attention_factor: parameters.float("attention_factor")?,
                mscale: set("mscale")?,
                mscale_all_dim: set("mscale_all_dim")?,
                truncate: parameters.bool("truncate")?.unwrap_or(true),
            })
        }
        other => {
            let what = format!("rope scaling type {}", short(&other.into()));
            Err(ConfigError::Unsupported { what, supported: SUPPORTED })
        }
    }
}
