//! Models: loading a stage, running its layers, the KV cache, the sampler.
//!
//! A [`Stage`] is a contiguous range of decoder layers. [`Stage::forward`] runs a batch of
//! [`Segment`]s over it; the first stage also [embeds](Stage::embed) token ids, the tail also gives
//! [logits](Stage::logits), from which [`sample`] picks a token. The KV rows of a session on a stage are
//! a [`SessionKv`], made of pages from a [`KvPool`].
//!
//! Invariant: the bits of a row are a function of the weights and its own session's tokens. Cuts,
//! batches, prompt chunks and threads do not enter. The room does no IO of its own (a
//! [`Checkpoint`](swarm_weights::Checkpoint) reads its tensors), reads no clock, and is never async.

#![forbid(unsafe_code)]

mod decoder;
mod error;
mod families;
mod kept;
mod kv;
mod load;
mod random;
mod rope;
mod sampler;
mod score;
mod scratch;
mod size;
mod slice;
mod stage;

pub use error::{Blame, LoadError, StepError};
pub use families::FamilyError;
pub use kept::Kept;
pub use kv::{KvError, KvLayout, KvPool, SessionKv};
pub use load::keep_quantized;
pub use random::{philox4x32, uniform_bits};
pub use rope::RopeTable;
pub use sampler::{SampleError, SampleScratch, Sampling, sample};
pub use score::{Score, log_probability, score};
pub use scratch::Scratch;
pub use size::{StageSize, WeightSizes, kv_layout, stage_size, weight_sizes};
pub use stage::{LoadOptions, LoadProgress, Segment, Stage};
pub use swarm_kernels::KvType;
