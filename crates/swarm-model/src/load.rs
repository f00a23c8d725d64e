//! Reading a stage's tensors: each is checked, packed, and its raw bytes dropped before the next.

use std::ops::Range;

use swarm_kernels::{Matrix, dequantize};
use swarm_weights::{Checkpoint, ModelConfig, Tensor};

use crate::LoadError;
use crate::decoder::{DecoderLayer, Linear};
use crate::scratch::Widths;
use crate::stage::LoadProgress;

pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(LoadProgress),
    done: LoadProgress,
}

impl<'a> Loader<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        layers: Range<usize>,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let bytes_total = checkpoint.stage_tensors(layers).iter().map(|tensor| tensor.bytes).sum();
        Self { checkpoint, progress, done: LoadProgress { bytes_done: 0, bytes_total } }
    }

    /// Layer `layer` of the model, with the parts its configuration says it has.
    pub fn decoder_layer(&mut self, layer: usize) -> Result<DecoderLayer, LoadError> {
        let config: &ModelConfig = self.checkpoint.config();
        let Widths { width, q, kv, intermediate } = Widths::of(config);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let qkv_bias = config.attention_bias;
        let head_norm = |loader: &mut Self, part: &str| {
            config.qk_norm.then(|| loader.vector(&name(part), config.head_dim)).transpose()
        };
        Ok(DecoderLayer {
            input_layernorm: self.vector(&name("input_layernorm.weight"), width)?,
            q_proj: self.linear(&name("self_attn.q_proj"), q, width, qkv_bias)?,
            k_proj: self.linear(&name("self_attn.k_proj"), kv, width, qkv_bias)?,
            v_proj: self.linear(&name("self_attn.v_proj"), kv, width, qkv_bias)?,
            o_proj: self.linear(&name("self_attn.o_proj"), width, q, config.o_proj_bias)?,
            q_norm: head_norm(self, "self_attn.q_norm.weight")?,
            k_norm: head_norm(self, "self_attn.k_norm.weight")?,
            post_attention_layernorm: self.vector(&name("post_attention_layernorm.weight"), width)?,
            gate_proj: self.linear(&name("mlp.gate_proj"), intermediate, width, config.mlp_bias)?,
            up_proj: self.linear(&name("mlp.up_proj"), intermediate, width, config.mlp_bias)?,
            down_proj: self.linear(&name("mlp.down_proj"), width, intermediate, config.mlp_bias)?,
            window: config.layer_window(layer),
        })
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear, LoadError> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: bias.then(|| self.vector(&format!("{name}.bias"), rows)).transpose()?,
        })
    }

    /// A matrix `[rows, cols]`, packed for this CPU.
    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        let tensor = self.read(name, rows, cols)?;
        Matrix::new(tensor.dtype, rows, cols, &tensor.bytes)
            .map_err(|source| LoadError::Pack { name: name.to_owned(), source })
    }

    /// A vector `[len]`, as f32.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.read(name, 1, len)?;
        let mut out = vec![0.0; len];
        dequantize(tensor.dtype, &tensor.bytes, &mut out)
            .map_err(|source| LoadError::Pack { name: name.to_owned(), source })?;
        Ok(out)
    }

    fn read(&mut self, name: &str, want_rows: usize, want_cols: usize) -> Result<Tensor, LoadError> {
        let Some(info) = self.checkpoint.tensor(name) else {
            let model = self.checkpoint.name().to_owned();
            return Err(LoadError::MissingTensor { name: name.to_owned(), model });
        };
        let (rows, cols, bytes) = (info.rows, info.cols, info.bytes);
        if (rows, cols) != (want_rows, want_cols) {
            return Err(LoadError::Shape { name: name.to_owned(), rows, cols, want_rows, want_cols });
        }
        let tensor =
            self.checkpoint.read(name).map_err(|source| LoadError::Read { name: name.to_owned(), source })?;
        self.done.bytes_done = self.done.bytes_done.saturating_add(bytes);
        (self.progress)(self.done);
        Ok(tensor)
    }
}

impl DecoderLayer {
    /// Bytes in memory, all of which a step reads.
    pub fn weight_bytes(&self) -> usize {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        let linears = [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj];
        let vectors = linears.iter().filter_map(|linear| linear.bias.as_ref()).chain(&self.q_norm);
        let vectors =
            vectors.chain(&self.k_norm).chain([&self.input_layernorm, &self.post_attention_layernorm]);
        let matrices: usize = linears.iter().map(|linear| linear.weight.bytes()).sum();
        matrices + vectors.map(|vector| size_of_val(vector.as_slice())).sum::<usize>()
    }
}
