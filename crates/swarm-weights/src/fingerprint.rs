//! The identity of a model, cheap enough to compute at every start.

use crate::config::{ModelConfig, RopeScaling};
use crate::error::WeightsError;
use crate::layout::TensorInfo;

/// Changes whenever the hashed bytes change their meaning.
const DOMAIN: &[u8] = b"swarm-os model fingerprint 1";
/// The same for the other way to tell a model.
const ORIGIN_DOMAIN: &[u8] = b"swarm-os model origin 1";
const SAMPLE_BYTES: u64 = 4096;

/// Hashes `config` and samples of `tensors`, which come in order of name.
pub(crate) fn of<'a>(
    config: &ModelConfig,
    tensors: impl Iterator<Item = &'a TensorInfo>,
    read: impl Fn(&TensorInfo, u64, &mut [u8]) -> Result<(), WeightsError>,
) -> Result<[u8; 32], WeightsError> {
    let mut hash = Hash(blake3::Hasher::new());
    hash.bytes(DOMAIN);
    hash.config(config);
    let mut sample = [0; SAMPLE_BYTES as usize];
    for info in tensors {
        hash.bytes(info.name.as_bytes());
        hash.bytes(info.dtype.name().as_bytes());
        for number in [info.rows as u64, info.cols as u64, info.bytes] {
            hash.number(number);
        }
        let len = info.bytes.min(SAMPLE_BYTES);
        for offset in [0, info.bytes - len] {
            let out = sample.get_mut(..len as usize).unwrap_or_default();
            read(info, offset, out)?;
            hash.bytes(out);
        }
    }
    Ok(*hash.0.finalize().as_bytes())
}

/// Hashes which model it is and what its headers say, and no weight: two that are of one commit have the same bytes.
pub(crate) fn of_origin<'a>(
    origin: [&str; 3],
    config: &ModelConfig,
    tensors: impl Iterator<Item = &'a TensorInfo>,
) -> [u8; 32] {
    let mut hash = Hash(blake3::Hasher::new());
    hash.bytes(ORIGIN_DOMAIN);
    origin.iter().for_each(|part| hash.bytes(part.as_bytes()));
    hash.config(config);
    for info in tensors {
        hash.bytes(info.name.as_bytes());
        hash.bytes(info.dtype.name().as_bytes());
        for number in [info.rows as u64, info.cols as u64, info.bytes] {
            hash.number(number);
        }
    }
    *hash.0.finalize().as_bytes()
}

/// Every part is hashed with its length, so that no two different lists of parts read alike.
struct Hash(blake3::Hasher);

impl Hash {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn float(&mut self, float: f64) {
        self.number(float.to_bits());
    }

    fn optional(&mut self, float: Option<f64>) {
        self.number(u64::from(float.is_some()));
        self.float(float.unwrap_or(0.0));
    }

    /// Destructured, so that a new field cannot be forgotten.
    fn config(&mut self, config: &ModelConfig) {
        let ModelConfig {
            family,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            rms_norm_eps,
            rope,
            max_position_embeddings,
            layer_windows,
            tie_word_embeddings,
            attention_bias,
            o_proj_bias,
            mlp_bias,
            qk_norm,
        } = config;
        self.bytes(family.name().as_bytes());
        for size in [
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            max_position_embeddings,
            &rope.rotary_dim,
        ] {
            self.number(*size as u64);
        }
        for flag in [tie_word_embeddings, attention_bias, o_proj_bias, mlp_bias, qk_norm] {
            self.number(u64::from(*flag));
        }
        self.float(f64::from(*rms_norm_eps));
        self.float(rope.theta);
        for window in layer_windows {
            self.number(window.map_or(0, |window| window as u64)); // 0 is no window
        }
        self.scaling(&rope.scaling);
    }

    fn scaling(&mut self, scaling: &RopeScaling) {
        match scaling {
            RopeScaling::None => self.bytes(b"none"),
            RopeScaling::Linear { factor } => {
                self.bytes(b"linear");
                self.float(*factor);
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                self.bytes(b"llama3");
                self.float(*factor);
                self.float(*low_freq_factor);
                self.float(*high_freq_factor);
                self.number(*original_max_position_embeddings as u64);
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                self.bytes(b"yarn");
                self.float(*factor);
                self.number(*original_max_position_embeddings as u64);
                self.float(*beta_fast);
                self.float(*beta_slow);
                self.optional(*attention_factor);
                self.optional(*mscale);
                self.optional(*mscale_all_dim);
                self.number(u64::from(*truncate));
            }
            RopeScaling::Factors(factors) => {
                self.bytes(b"factors");
                self.number(factors.len() as u64);
                for factor in factors {
                    self.float(f64::from(*factor));
                }
            }
        }
    }
}
