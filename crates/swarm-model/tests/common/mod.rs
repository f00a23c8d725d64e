//! Toy models opened from real files, and stages chained in one process.
#![allow(dead_code)] // each test file uses its own part

pub mod counting;
pub mod naive;

use std::ops::Range;

use swarm_kernels::Pool;
use swarm_model::{KvPool, KvType, LoadOptions, Scratch, Segment, SessionKv, Stage, StepError};
use swarm_testkit::toy::{GgufType, Storage, ToyModel};
use swarm_weights::Checkpoint;
use tempfile::TempDir;

/// A toy model on disk. The folder goes when this goes.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub dir: TempDir,
}

impl Opened {
    pub fn path(&self) -> &std::path::Path {
        self.dir.path()
    }
}

pub fn open_hf(model: &ToyModel, storage: Storage) -> Opened {
    let dir = tempfile::tempdir().unwrap();
    model.write_hf(dir.path(), storage).unwrap();
    Opened { checkpoint: Checkpoint::open(dir.path()).unwrap(), dir }
}

pub fn open_gguf(model: &ToyModel, matrices: GgufType) -> Opened {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("toy.gguf");
    model.write_gguf(&path, matrices).unwrap();
    Opened { checkpoint: Checkpoint::open(&path).unwrap(), dir }
}

pub fn load(checkpoint: &Checkpoint, layers: Range<usize>) -> Stage {
    Stage::load(checkpoint, layers, &LoadOptions::default(), &mut |_| {}).unwrap()
}

/// All stages of a model, chained by function calls instead of links.
pub struct Chain {
    stages: Vec<Stage>,
    kv_pools: Vec<KvPool>,
}

/// A session's KV on every stage.
pub struct ChainSession(pub Vec<SessionKv>);

impl ChainSession {
    pub fn len(&self) -> usize {
        self.0[0].len()
    }

    pub fn truncate(&mut self, len: usize) {
        self.0.iter_mut().for_each(|kv| kv.truncate(len).unwrap());
    }
}

impl Chain {
    /// `lengths` layers per stage, in order.
    pub fn new(checkpoint: &Checkpoint, lengths: &[usize], kv_type: KvType) -> Self {
        let mut start = 0;
        let stages: Vec<Stage> = lengths
            .iter()
            .map(|length| {
                let stage = load(checkpoint, start..start + length);
                start += length;
                stage
            })
            .collect();
        assert_eq!(start, checkpoint.config().num_hidden_layers);
        Self::of(stages, kv_type)
    }

    /// Stages that are loaded.
    pub fn of(stages: Vec<Stage>, kv_type: KvType) -> Self {
        let kv_pools = stages.iter().map(|stage| KvPool::new(stage.kv_layout(kv_type), 1 << 30)).collect();
        Self { stages, kv_pools }
    }

    /// The whole model as one stage.
    pub fn single(checkpoint: &Checkpoint, kv_type: KvType) -> Self {
        Self::new(checkpoint, &[checkpoint.config().num_hidden_layers], kv_type)
    }

    pub fn open(&self) -> ChainSession {
        ChainSession(self.kv_pools.iter().map(KvPool::open).collect())
    }

    /// One step of several sessions in one batch; the logits of the last rows of each, as many as the batch says.
    pub fn try_batch(
        &self,
        pool: &Pool,
        batch: &mut [(&mut ChainSession, &[u32], usize)],
        scratch: &mut Scratch,
    ) -> Result<Vec<f32>, StepError> {
        let ids: Vec<u32> = batch.iter().flat_map(|(_, ids, _)| ids.iter().copied()).collect();
        let (first, tail) = (&self.stages[0], &self.stages[self.stages.len() - 1]);
        let width = first.config().hidden_size;
        let mut hidden = vec![0.0; ids.len() * width];
        first.embed(&ids, &mut hidden)?;
        for (index, stage) in self.stages.iter().enumerate() {
            let mut segments: Vec<Segment<'_>> = batch
                .iter_mut()
                .map(|(session, ids, logits)| {
                    let kv = &mut session.0[index];
                    Segment { position: kv.len(), tokens: ids.len(), logits: *logits, kv }
                })
                .collect();
            stage.forward(pool, &mut segments, &mut hidden, scratch)?;
        }
        let (mut rows, mut rest) = (Vec::new(), &hidden[..]);
        for (_, ids, logits) in batch {
            let (here, after) = rest.split_at(ids.len() * width);
            rows.extend_from_slice(&here[(ids.len() - *logits) * width..]);
            rest = after;
        }
        let mut logits = vec![0.0; rows.len() / width * tail.config().vocab_size];
        tail.logits(pool, &rows, &mut logits, scratch)?;
        Ok(logits)
    }

    /// One step of one session.
    pub fn step(&self, pool: &Pool, session: &mut ChainSession, ids: &[u32]) -> Vec<f32> {
        self.try_batch(pool, &mut [(session, ids, ids.len())], &mut Scratch::default()).unwrap()
    }

    /// The logits of `ids` fed to a new session in steps of the given sizes, the last repeated.
    pub fn logits(&self, pool: &Pool, ids: &[u32], steps: &[usize]) -> Vec<f32> {
        let mut session = self.open();
        let mut scratch = Scratch::default();
        let mut logits = Vec::new();
        let mut rest = ids;
        let mut sizes = steps.iter().copied().chain(std::iter::repeat(steps[steps.len() - 1]));
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(sizes.next().unwrap().clamp(1, rest.len()));
            logits.extend(
                self.try_batch(pool, &mut [(&mut session, chunk, chunk.len())], &mut scratch).unwrap(),
            );
            rest = after;
        }
        logits
    }
}

pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// The id of the largest of each row, the lowest among equals.
pub fn argmax_rows(logits: &[f32], vocab: usize) -> Vec<usize> {
    logits
        .chunks_exact(vocab)
        .map(|row| (0..vocab).reduce(|best, id| if row[id] > row[best] { id } else { best }).unwrap())
        .collect()
}

/// Largest difference, relative to the largest |want|.
pub fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|x| x.is_finite()));
    let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
    got.iter().zip(want).fold(0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

/// All ways to cut `layers` layers into `stages` stages, as lengths.
pub fn cuts(layers: usize, stages: usize) -> Vec<Vec<usize>> {
    if stages == 1 {
        return vec![vec![layers]];
    }
    (1..=layers.saturating_sub(stages - 1))
        .flat_map(|first| {
            cuts(layers - first, stages - 1).into_iter().map(move |rest| [vec![first], rest].concat())
        })
        .collect()
}
