//! A stage: a contiguous range of decoder layers, with the embedding on the first and the final norm
//! and head on the tail.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use swarm_kernels::{Job, KvType, Matrix, Pool, dequantize, matmul, rms_norm};
use swarm_weights::{Checkpoint, ModelConfig, QuantizedStore, TensorRows};

use crate::decoder::{DecoderLayer, Shape, Step, each_row};
use crate::kept::Kept;
use crate::load::{self, Weights};
use crate::rope::RopeTable;
use crate::scratch::{Scratch, Widths};
use crate::size::kv_layout;
use crate::{KvLayout, LoadError, SessionKv, StepError, families};

/// Query heads that may share a kv head; published models have up to 16.
const HEADS_PER_KV_HEAD_MAX: usize = 64;

/// How a stage is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Positions a session may have; the model's own maximum when `None`. The RoPE table is as long.
    pub context: Option<usize>,
    /// Threads that read and pack; 0 and 1 both mean one.
    pub threads: usize,
    /// Hold quantized and 16-bit matrices as f32: the reference that quantized arithmetic is held against. Takes four
    /// bytes a weight.
    pub dequantized: bool,
    /// Where matrices that are quantized while they are loaded may lie in that form, and may come to lie.
    pub quantized: Option<Arc<QuantizedStore>>,
    /// Loading ends with [`LoadError::Aborted`] soon after somebody sets this, before the next tensor is read.
    pub abort: Option<Arc<AtomicBool>>,
}

/// How far loading has come, in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// Loaded layers `start..end` of a model, ready to compute. Immutable; share it freely.
pub struct Stage {
    config: ModelConfig,
    layers: Range<usize>,
    context: usize,
    shape: Shape,
    rope: RopeTable,
    weights: Weights,
}

/// Consecutive positions of one session in a step.
pub struct Segment<'a> {
    pub kv: &'a mut SessionKv,
    /// The first position; must be `kv.len()`.
    pub position: usize,
    /// How many rows: the prompt chunk in prefill, 1 in decode, 1 + drafted in verify.
    pub tokens: usize,
    /// Of how many of them, the last ones, somebody will ask for the logits: none of a prompt chunk that others follow. Means
    /// nothing to a stage that is not the tail.
    pub logits: usize,
}

impl Stage {
    /// Reads and packs the tensors of `layers` from the file's beginning to its end, some 512 KiB at a time on each
    /// thread: memory peaks at the packed weights plus that. `progress` is called on the caller's thread.
    ///
    /// # Errors
    /// [`LoadError`]: a range that is no stage, a family or option that is not supported, a tensor
    /// that is missing, unreadable or of another shape than the configuration says.
    pub fn load(
        checkpoint: &Checkpoint,
        layers: Range<usize>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        Self::load_rest(checkpoint, layers, options, &mut Kept::default(), progress)
    }

    /// As [`Stage::load`], with what is in memory already: weights of the same model, held alike. What the stage does not
    /// need goes first, what it needs is not read again, and `kept` is empty afterwards. When the stage cannot be loaded,
    /// what of `kept` it needs stays there.
    ///
    /// # Errors
    /// As [`Stage::load`].
    pub fn load_rest(
        checkpoint: &Checkpoint,
        layers: Range<usize>,
        options: &LoadOptions,
        kept: &mut Kept,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        check_layers(&config, &layers)?;
        check_group(&config)?;
        families::check(&config)
            .map_err(|source| LoadError::Family { model: checkpoint.name().to_owned(), source })?;
        let max = config.max_position_embeddings;
        let context = options.context.unwrap_or(max);
        if context == 0 || context > max {
            return Err(LoadError::Context { context, max });
        }
        let rope = RopeTable::new(&config.rope, context)?;

        kept.trim(&config, &layers);
        let weights = load::load(checkpoint, layers.clone(), options, kept, progress)?;
        let shape = Shape {
            widths: Widths::of(&config),
            head_dim: config.head_dim,
            kv_heads: config.num_key_value_heads,
            eps: config.rms_norm_eps,
            // Division and square root of f64 are exact IEEE operations, the same everywhere.
            scale: (1.0 / (config.head_dim as f64).sqrt()) as f32,
        };
        Ok(Self { config, layers, context, shape, rope, weights })
    }

    /// Its layers and their weights; the rest goes.
    pub(crate) fn into_weights(self) -> (Range<usize>, Weights) {
        (self.layers, self.weights)
    }

    /// The configuration of the whole model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layers held.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Positions a session may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// True when the stage turns token ids into hidden rows.
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    /// True when the stage turns hidden rows into logits.
    pub fn is_tail(&self) -> bool {
        self.layers.end == self.config.num_hidden_layers
    }

    /// The pages sessions on this stage need.
    pub fn kv_layout(&self, kv_type: KvType) -> KvLayout {
        kv_layout(&self.config, self.weights.decoder.len(), kv_type)
    }

    /// Bytes the weights take in memory. An embedding that is only looked up in stays in its file.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.weights.decoder.iter().map(DecoderLayer::weight_bytes).sum();
        let norm = self.weights.norm.as_ref().map_or(0, |norm| size_of_val(norm.as_slice()));
        layers + norm + self.weights.head.as_ref().map_or(0, Matrix::bytes)
    }

    /// Weight bytes one decode step reads: all, and not counting the one embedded row.
    pub fn bytes_per_token(&self) -> usize {
        self.weight_bytes()
    }

    /// The hidden rows of `ids`: row `ids[i]` of the embedding. `hidden` is `[ids.len(), width]`.
    ///
    /// An embedding that is also the head is in memory; any other is read from its file, one row per id.
    ///
    /// # Errors
    /// [`StepError::NotThisStage`] on any but the first stage, [`StepError::TokenOutsideVocab`],
    /// [`StepError::WidthMismatch`], [`StepError::Embedding`] when the file cannot be read any more.
    pub fn embed(&self, ids: &[u32], hidden: &mut [f32]) -> Result<(), StepError> {
        if !self.is_first() {
            return Err(self.not_here("embedding"));
        }
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size);
        want_len("the embedded rows", ids.len() * width, hidden.len())?;
        let mut stored = vec![0; self.weights.embed_tokens.as_ref().map_or(0, TensorRows::row_bytes)];
        for (&token, row) in ids.iter().zip(hidden.chunks_exact_mut(width)) {
            if token as usize >= vocab {
                return Err(StepError::TokenOutsideVocab { token, vocab });
            }
            let unread = |why: String| StepError::Embedding { token, why };
            match (&self.weights.embed_tokens, &self.weights.head) {
                (Some(rows), _) => {
                    rows.read(token as usize, &mut stored).map_err(|error| unread(chain(&error)))?;
                    dequantize(rows.info().dtype, &stored, row).map_err(|error| unread(error.to_string()))?;
                }
                (None, Some(tied)) => {
                    tied.dequantize_row(token as usize, row).map_err(|error| unread(error.to_string()))?;
                }
                (None, None) => return Err(self.not_here("embedding")),
            }
        }
        Ok(())
    }

    /// Runs this stage's layers over one step, in place.
    ///
    /// `hidden` is `[sum of tokens, width]`, row-major f32: the residual stream of each segment's
    /// `position .. position + tokens`, one segment after the other. On return it holds the rows the
    /// next stage wants. A row's bits depend on its own session only: not on the other segments, nor
    /// on how the prompt was cut, nor on the threads of `pool`. The tail's last layer computes keys and values of all rows,
    /// and beyond that the rows alone whose logits are wanted; what it leaves in the other ones means nothing.
    ///
    /// Each session grows by exactly its `tokens`, or none does: a step that fails leaves every `kv`
    /// as it was. Costs one pass over the stage's weights; allocates nothing but KV pages once
    /// `scratch` has grown.
    ///
    /// # Errors
    /// [`StepError::OutOfOrder`], [`StepError::EmptySegment`] and [`StepError::WidthMismatch`]: the
    /// previous stage's fault. [`StepError::ContextFull`]: the request's. [`StepError::Kv`]: no pages
    /// left now. [`StepError::ForeignKv`]: ours.
    pub fn forward(
        &self,
        pool: &Pool,
        segments: &mut [Segment<'_>],
        hidden: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        self.admit(segments, hidden)?;
        if segments.is_empty() {
            return Ok(());
        }
        reserve(segments)?;
        scratch.place_rows(segments);
        let mut step = Step { pool, shape: &self.shape, rope: &self.rope, segments };
        for (index, layer) in self.weights.decoder.iter().enumerate() {
            if self.layers.start + index + 1 == self.config.num_hidden_layers {
                scratch.want_logits(step.segments);
            }
            layer.forward(index, &mut step, hidden, scratch);
        }
        for segment in step.segments {
            segment.kv.commit(segment.tokens); // the step counts from here, after the last layer
        }
        Ok(())
    }

    /// The logits of hidden rows that left the last layer: final norm, then the head.
    ///
    /// `rows` is `[n, width]`, `out` is `[n, vocab]`. Costs one pass over the head's weights.
    ///
    /// # Errors
    /// [`StepError::NotThisStage`] on any but the tail, [`StepError::WidthMismatch`].
    pub fn logits(
        &self,
        pool: &Pool,
        rows: &[f32],
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        let (Some(norm), Some(head)) = (&self.weights.norm, &self.weights.head) else {
            return Err(self.not_here("head"));
        };
        let width = self.config.hidden_size;
        let n = rows.len() / width;
        want_len("the rows", n * width, rows.len())?;
        want_len("the logits", n * self.config.vocab_size, out.len())?;
        if n == 0 {
            return Ok(());
        }
        let normed = scratch.floats.take(rows.len());
        each_row(pool, normed, width, |row, out| {
            rms_norm(&rows[row * width..][..width], norm, self.config.rms_norm_eps, out);
        });
        matmul(pool, &mut scratch.matmul, normed, n, &mut [Job { matrix: head, out }]);
        Ok(())
    }

    fn not_here(&self, what: &'static str) -> StepError {
        StepError::NotThisStage { layers: self.layers(), what }
    }

    /// Checks a step before anything is touched.
    fn admit(&self, segments: &[Segment<'_>], hidden: &[f32]) -> Result<(), StepError> {
        let mut tokens = 0usize;
        for segment in segments {
            let &Segment { ref kv, position, tokens: more, .. } = segment;
            if kv.layout() != self.kv_layout(kv.layout().kv_type) {
                return Err(StepError::ForeignKv);
            }
            if more == 0 {
                return Err(StepError::EmptySegment { position });
            }
            if position != kv.len() {
                return Err(StepError::OutOfOrder { want: kv.len(), got: position });
            }
            if more > self.context.saturating_sub(position) {
                return Err(StepError::ContextFull { context: self.context, position, tokens: more });
            }
            tokens = tokens.saturating_add(more);
        }
        want_len("the hidden rows", tokens.saturating_mul(self.config.hidden_size), hidden.len())
    }
}

/// A stage is a range of at least one layer of the model.
pub(crate) fn check_layers(config: &ModelConfig, layers: &Range<usize>) -> Result<(), LoadError> {
    let num_layers = config.num_hidden_layers;
    if layers.start < layers.end && layers.end <= num_layers {
        Ok(())
    } else {
        Err(LoadError::Layers { layers: layers.clone(), num_layers })
    }
}

/// The attention kernel keeps one total per query head of a group in registers and has a limit.
fn check_group(config: &ModelConfig) -> Result<(), LoadError> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    if heads / kv_heads <= HEADS_PER_KV_HEAD_MAX {
        Ok(())
    } else {
        Err(LoadError::Group { heads, kv_heads, max: HEADS_PER_KV_HEAD_MAX })
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn want_len(what: &'static str, want: usize, got: usize) -> Result<(), StepError> {
    if want == got { Ok(()) } else { Err(StepError::WidthMismatch { what, want, got }) }
}

/// Takes the pages every segment needs, or none.
fn reserve(segments: &mut [Segment<'_>]) -> Result<(), StepError> {
    for index in 0..segments.len() {
        let Segment { kv, position, tokens, .. } = &mut segments[index];
        if let Err(full) = kv.reserve(*position + *tokens) {
            segments[..index].iter_mut().for_each(|segment| segment.kv.release_spare());
            return Err(full.into());
        }
    }
    Ok(())
}
