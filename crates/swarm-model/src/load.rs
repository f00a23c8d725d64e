//! Reading a stage's tensors: each is checked, packed, and its raw bytes dropped before the next.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use swarm_kernels::{Matrix, dequantize};
use swarm_weights::{Checkpoint, EMBED, HEAD, ModelConfig, NORM, Tensor};

use crate::LoadError;
use crate::decoder::{DecoderLayer, Linear};
use crate::scratch::Widths;
use crate::stage::LoadProgress;

/// What a stage reads.
#[derive(Default)]
pub(crate) struct Weights {
    pub embed_tokens: Option<Matrix>, // [vocab, width], on the first stage, and on the tail when tied
    pub decoder: Vec<DecoderLayer>,
    pub norm: Option<Vec<f32>>,  // [width], on the tail
    pub lm_head: Option<Matrix>, // [vocab, width], on the tail unless tied
}

/// A piece of a stage that one thread reads.
#[derive(Clone, Copy)]
enum Piece {
    Embedding,
    Layer(usize),
    Norm,
    Head,
}

enum Loaded {
    Embedding(Matrix),
    Layer(usize, Box<DecoderLayer>),
    Norm(Vec<f32>),
    Head(Matrix),
}

enum Event {
    /// A tensor of so many bytes is done.
    Bytes(u64),
    Piece(Result<Loaded, LoadError>),
}

/// Loads the pieces of a stage on `threads` threads, in any order; the result does not depend on it.
/// `progress` is called on this thread.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    threads: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights, LoadError> {
    let pieces = pieces(checkpoint.config(), &layers);
    let bytes_total = checkpoint.stage_tensors(layers.clone()).iter().map(|tensor| tensor.bytes).sum();
    let mut done = LoadProgress { bytes_done: 0, bytes_total };
    let next = AtomicUsize::new(0);
    let (events, received) = channel();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, pieces.len()) {
            let (events, next, pieces) = (events.clone(), &next, &pieces);
            scope.spawn(move || {
                let loader = Loader { checkpoint, events };
                while let Some(&piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let loaded = loader.piece(piece);
                    if loaded.is_err() {
                        next.store(pieces.len(), Ordering::Relaxed); // the others stop after their piece
                    }
                    loader.send(Event::Piece(loaded));
                }
            });
        }
        drop(events); // so that the last thread to end ends the loop
        let mut weights = Weights::default();
        let mut decoder: Vec<(usize, DecoderLayer)> = Vec::with_capacity(layers.len());
        let mut failed = None;
        for event in received {
            match event {
                Event::Bytes(bytes) => {
                    done.bytes_done = done.bytes_done.saturating_add(bytes);
                    progress(done);
                }
                Event::Piece(Ok(Loaded::Embedding(matrix))) => weights.embed_tokens = Some(matrix),
                Event::Piece(Ok(Loaded::Layer(layer, loaded))) => decoder.push((layer, *loaded)),
                Event::Piece(Ok(Loaded::Norm(norm))) => weights.norm = Some(norm),
                Event::Piece(Ok(Loaded::Head(matrix))) => weights.lm_head = Some(matrix),
                Event::Piece(Err(error)) => failed = failed.or(Some(error)),
            }
        }
        decoder.sort_by_key(|&(layer, _)| layer);
        weights.decoder = decoder.into_iter().map(|(_, loaded)| loaded).collect();
        failed.map_or(Ok(weights), Err)
    })
}

/// The largest pieces first, so that threads end together.
fn pieces(config: &ModelConfig, layers: &Range<usize>) -> Vec<Piece> {
    let (first, tail) = (layers.start == 0, layers.end == config.num_hidden_layers);
    let tied = config.tie_word_embeddings;
    let embedding = (first || tail && tied).then_some(Piece::Embedding);
    let head = (tail && !tied).then_some(Piece::Head);
    let norm = tail.then_some(Piece::Norm);
    embedding.into_iter().chain(head).chain(layers.clone().map(Piece::Layer)).chain(norm).collect()
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    events: Sender<Event>,
}

impl Loader<'_> {
    fn piece(&self, piece: Piece) -> Result<Loaded, LoadError> {
        let (vocab, width) = (self.checkpoint.config().vocab_size, self.checkpoint.config().hidden_size);
        Ok(match piece {
            Piece::Embedding => Loaded::Embedding(self.matrix(EMBED, vocab, width)?),
            Piece::Layer(layer) => Loaded::Layer(layer, Box::new(self.decoder_layer(layer)?)),
            Piece::Norm => Loaded::Norm(self.vector(NORM, width)?),
            Piece::Head => Loaded::Head(self.matrix(HEAD, vocab, width)?),
        })
    }

    fn send(&self, event: Event) {
        let _gone = self.events.send(event); // the receiver outlives the scope's threads
    }

    /// Layer `layer` of the model, with the parts its configuration says it has.
    fn decoder_layer(&self, layer: usize) -> Result<DecoderLayer, LoadError> {
        let config: &ModelConfig = self.checkpoint.config();
        let Widths { width, q, kv, intermediate } = Widths::of(config);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let qkv_bias = config.attention_bias;
        let head_norm =
            |part: &str| config.qk_norm.then(|| self.vector(&name(part), config.head_dim)).transpose();
        Ok(DecoderLayer {
            input_layernorm: self.vector(&name("input_layernorm.weight"), width)?,
            q_proj: self.linear(&name("self_attn.q_proj"), q, width, qkv_bias)?,
            k_proj: self.linear(&name("self_attn.k_proj"), kv, width, qkv_bias)?,
            v_proj: self.linear(&name("self_attn.v_proj"), kv, width, qkv_bias)?,
            o_proj: self.linear(&name("self_attn.o_proj"), width, q, config.o_proj_bias)?,
            q_norm: head_norm("self_attn.q_norm.weight")?,
            k_norm: head_norm("self_attn.k_norm.weight")?,
            post_attention_layernorm: self.vector(&name("post_attention_layernorm.weight"), width)?,
            gate_proj: self.linear(&name("mlp.gate_proj"), intermediate, width, config.mlp_bias)?,
            up_proj: self.linear(&name("mlp.up_proj"), intermediate, width, config.mlp_bias)?,
            down_proj: self.linear(&name("mlp.down_proj"), width, intermediate, config.mlp_bias)?,
            window: config.layer_window(layer),
        })
    }

    fn linear(&self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear, LoadError> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: bias.then(|| self.vector(&format!("{name}.bias"), rows)).transpose()?,
        })
    }

    /// A matrix `[rows, cols]`, packed for this CPU.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        let tensor = self.read(name, rows, cols)?;
        Matrix::new(tensor.dtype, rows, cols, &tensor.bytes)
            .map_err(|source| LoadError::Pack { name: name.to_owned(), source })
    }

    /// A vector `[len]`, as f32.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.read(name, 1, len)?;
        let mut out = vec![0.0; len];
        dequantize(tensor.dtype, &tensor.bytes, &mut out)
            .map_err(|source| LoadError::Pack { name: name.to_owned(), source })?;
        Ok(out)
    }

    fn read(&self, name: &str, want_rows: usize, want_cols: usize) -> Result<Tensor, LoadError> {
        let Some(info) = self.checkpoint.tensor(name) else {
            let model = self.checkpoint.name().to_owned();
            return Err(LoadError::MissingTensor { name: name.to_owned(), model });
        };
        let (rows, cols, bytes) = (info.rows, info.cols, info.bytes);
        if (rows, cols) != (want_rows, want_cols) {
            return Err(LoadError::Shape { name: name.to_owned(), rows, cols, want_rows, want_cols });
        }
        let tensor = self
            .checkpoint
            .read(name)
            .map_err(|source| LoadError::Read { name: name.to_owned(), source: Box::new(source) })?;
        self.send(Event::Bytes(bytes));
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
