//! How fast this node computes a model: probed once, then learned from real layers, and kept on disk.
//!
//! A profile belongs to a shape of layer on this hardware with this build and numeric contract; `docs/placement.md` says
//! how it is measured. Losing a file costs one probe.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use swarm_kernels::{DType, Job, KernelPath, MatmulScratch, Matrix, Pool, matmul, rms_norm, silu_mul};
use swarm_ring::{NodeSpeed, Percentiles, SpeedSource};
use swarm_weights::{Checkpoint, EMBED, HEAD};
use swarm_wire::{LayerShape, MatrixShape};

use crate::deadlines::PROBE;
use crate::machine;

/// Weights that a probe goes through at least, where the model has so many: more than caches hold.
const PROBE_BYTES: usize = 96 << 20;
/// A layer or head above this is probed by some of its rows.
const MATRICES_BYTES_MAX: usize = 256 << 20;
/// Passes of a probe at least.
const PASSES_MIN: usize = 3;
/// Rows of a prompt chunk in a probe; as many a step must have to count as one.
const CHUNK_ROWS: usize = 32;
/// Decode steps that make a measurement.
const STEPS_MIN: u64 = 8;
/// A profile is a few hundred bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The folder of this user's profiles; nothing is kept without one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Profiles {
    folder: Option<PathBuf>,
}

/// What is on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    /// All that the times depend on, for people, and against files that were copied.
    key: String,
    layer_ns: u64,
    row_ns: u64,
    head_ns: u64,
    /// From real layers.
    layers: bool,
}

/// What a speed depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProfileKey(String);

impl ProfileKey {
    pub fn new(shape: &LayerShape, threads: usize) -> Self {
        let matrix = |matrix: &MatrixShape| format!("{} {}x{}", matrix.dtype, matrix.rows, matrix.cols);
        let layer: Vec<String> = shape.layer.iter().map(matrix).collect();
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        Self(format!(
            "{}\n{} {build}\n{}\n{}, {threads} threads\nlayer {} x {}\nhead {}",
            swarm_kernels::NUMERICS,
            env!("CARGO_PKG_VERSION"),
            hardware(),
            KernelPath::current().name(),
            shape.layers,
            layer.join(", "),
            matrix(&shape.head)
        ))
    }

    fn file(&self) -> String {
        let hash = blake3::hash(self.0.as_bytes());
        format!("{}.json", &hash.to_hex()[..24])
    }
}

/// The processor, its cores and the memory, as the system names them.
fn hardware() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(std::env::consts::ARCH);
    let memory = machine::memory_total().map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
    format!("{}, {} cores, {memory} MiB", model.trim_start_matches([' ', '\t', ':']), machine::cores())
}

impl Profiles {
    /// Profiles in `state/profiles`.
    pub fn new(state: Option<&Path>) -> Self {
        Self { folder: state.map(|state| state.join("profiles")) }
    }

    fn load(&self, key: &ProfileKey) -> Option<Kept> {
        let path = self.folder.as_ref()?.join(key.file());
        if std::fs::metadata(&path).ok()?.len() > FILE_BYTES_MAX {
            return None;
        }
        let kept: Kept = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
        (kept.key == key.0).then_some(kept)
    }

    /// In one step, so that no reader sees half a file. A profile that cannot be kept is measured again.
    fn keep(&self, key: &ProfileKey, kept: &Kept) {
        let Some(folder) = &self.folder else { return };
        let write = || {
            std::fs::create_dir_all(folder)?;
            let part = folder.join(format!("{}.{}", key.file(), std::process::id()));
            std::fs::write(&part, serde_json::to_string_pretty(kept)?)?;
            std::fs::rename(part, folder.join(key.file()))
        };
        if let Err(error) = write() {
            tracing::debug!("the profile cannot be kept in {}: {error}", folder.display());
        }
    }

    /// How fast this node computes `shape`: what was learned from real layers, else what a probe says.
    /// `None` when nothing is known and `memory` is too small for a probe. A probe takes about a second.
    pub fn speed(
        &self,
        shape: &LayerShape,
        threads: usize,
        cores: Option<Vec<usize>>,
        memory: u64,
    ) -> Option<NodeSpeed> {
        let key = ProfileKey::new(shape, threads);
        let kept = match self.load(&key) {
            Some(kept) => kept,
            None => {
                let shape = shape.clone();
                // On a thread of its own, so that pinning does not stay with this one.
                let probe = std::thread::Builder::new().name("probe".into()).spawn(move || {
                    machine::pin_caller(cores.as_deref());
                    probe(&shape, &machine::pool(threads, cores), memory)
                });
                let NodeSpeed { layer_ns, row_ns, head_ns, .. } = probe.ok()?.join().ok()??;
                let kept = Kept { key: key.0.clone(), layer_ns, row_ns, head_ns, layers: false };
                self.keep(&key, &kept);
                kept
            }
        };
        let source = if kept.layers { SpeedSource::Layers } else { SpeedSource::Probe };
        Some(NodeSpeed { layer_ns: kept.layer_ns, row_ns: kept.row_ns, head_ns: kept.head_ns, source })
    }
}

/// The shapes of a model's matrices, of the layer whose size is nearest to the mean.
pub(crate) fn layer_shape(model: &Checkpoint) -> Option<LayerShape> {
    let layers = model.config().num_hidden_layers;
    let sizes: Vec<u64> = (0..layers).map(|layer| model.layer_bytes(layer)).collect();
    let mean = sizes.iter().sum::<u64>() / layers.max(1) as u64;
    let typical = (0..layers).min_by_key(|&layer| sizes[layer].abs_diff(mean))?;
    let matrix = |name: &str| {
        let tensor = model.tensor(name)?;
        Some(MatrixShape {
            dtype: tensor.held.name().to_owned(),
            rows: u32::try_from(tensor.rows).ok()?,
            cols: u32::try_from(tensor.cols).ok()?,
        })
    };
    let part = |part: &str| matrix(&format!("model.layers.{typical}.{part}.weight"));
    let tied = model.config().tie_word_embeddings;
    Some(LayerShape {
        layer: [
            part("self_attn.q_proj")?,
            part("self_attn.k_proj")?,
            part("self_attn.v_proj")?,
            part("self_attn.o_proj")?,
            part("mlp.gate_proj")?,
            part("mlp.up_proj")?,
            part("mlp.down_proj")?,
        ],
        head: matrix(if tied { EMBED } else { HEAD })?,
        layers: u32::try_from(layers).ok()?,
    })
}

/// Matrices of one layer, or some of their rows.
struct ProbeLayer {
    matrices: Vec<Matrix>,
}

/// A matrix of made-up weights: `part` of its rows. Their values do not matter for the time they take, as long as they
/// are ordinary numbers.
fn matrix(shape: &MatrixShape, part: f64) -> Option<Matrix> {
    let dtype = DType::ALL.into_iter().find(|dtype| dtype.name() == shape.dtype)?;
    let rows = ((f64::from(shape.rows) * part) as usize).max(1);
    let len = dtype.row_bytes(shape.cols as usize)?.checked_mul(rows)?;
    let bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 & 0x3b).collect();
    Matrix::new(dtype, rows, shape.cols as usize, &bytes).ok()
}

fn bytes_of(matrices: &[MatrixShape]) -> Option<usize> {
    let bytes = |shape: &MatrixShape| {
        let dtype = DType::ALL.into_iter().find(|dtype| dtype.name() == shape.dtype)?;
        Matrix::bytes_needed(dtype, shape.rows as usize, shape.cols as usize)
    };
    matrices.iter().try_fold(0usize, |sum, shape| sum.checked_add(bytes(shape)?))
}

/// Runs matrices of the model's shapes and formats, as many layers as caches cannot hold, and times them as decode (one
/// row) and as prefill (many). Attention is not in it: at the start of a session there is nothing to attend to.
fn probe(shape: &LayerShape, pool: &Pool, memory: u64) -> Option<NodeSpeed> {
    let (layer_bytes, head_bytes) = (bytes_of(&shape.layer)?, bytes_of(std::slice::from_ref(&shape.head))?);
    // Three times what is read: the bytes before they are packed, and everybody else.
    let limit = usize::try_from(memory / 3).unwrap_or(usize::MAX).min(MATRICES_BYTES_MAX);
    let part = |bytes: usize| (limit as f64 / bytes.max(1) as f64).min(1.0);
    let (layer_part, head_part) = (part(layer_bytes), part(head_bytes));
    if limit < 1 << 20 && layer_part < 1.0 {
        return None;
    }
    let copies = PROBE_BYTES.min(limit).div_ceil(layer_bytes.max(1)).clamp(1, shape.layers as usize);
    let layer = || {
        let matrices: Option<Vec<Matrix>> =
            shape.layer.iter().map(|shape| matrix(shape, layer_part)).collect();
        Some(ProbeLayer { matrices: matrices? })
    };
    let layers: Option<Vec<ProbeLayer>> = (0..copies).map(|_| layer()).collect();
    let (layers, head) = (layers?, matrix(&shape.head, head_part)?);
    let mut buffers = ProbeBuffers::default();
    let mut decode = (Percentiles::default(), Percentiles::default());
    let mut rows = Percentiles::default();
    let started = Instant::now();
    let mut pass = 0;
    // The first pass touches memory and wakes the pool; it does not count.
    while pass <= PASSES_MIN || started.elapsed() < PROBE {
        let layer_ns = timed(|| layers.iter().for_each(|layer| buffers.layer(pool, layer, 1)));
        let head_ns = timed(|| buffers.product(pool, &head, 1));
        if pass > 0 {
            decode.0.add((layer_ns as f64 / copies as f64 / layer_part) as u64);
            decode.1.add((head_ns as f64 / head_part) as u64);
        }
        if pass < PASSES_MIN {
            let one = layers.get(pass % copies)?;
            let ns = timed(|| buffers.layer(pool, one, CHUNK_ROWS));
            rows.add((ns as f64 / CHUNK_ROWS as f64 / layer_part) as u64);
        }
        pass += 1;
    }
    // The faster passes: what disturbs one is not this node's speed.
    Some(NodeSpeed {
        layer_ns: decode.0.at(25)?.max(1),
        row_ns: rows.at(0)?.max(1),
        head_ns: decode.1.at(25)?,
        source: SpeedSource::Probe,
    })
}

fn timed(work: impl FnOnce()) -> u64 {
    let start = Instant::now();
    work();
    nanos(start.elapsed())
}

pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Default)]
struct ProbeBuffers {
    scratch: MatmulScratch,
    x: Vec<f32>,
    out: [Vec<f32>; 3],
}

impl ProbeBuffers {
    /// The products of a layer, grouped as the forward pass groups them, its norms and its activation.
    fn layer(&mut self, pool: &Pool, layer: &ProbeLayer, rows: usize) {
        let [q, k, v, o, gate, up, down] = layer.matrices.as_slice() else { return };
        self.norm(q.cols(), rows);
        self.products(pool, &[q, k, v], rows);
        self.products(pool, &[o], rows);
        self.norm(gate.cols(), rows);
        self.products(pool, &[gate, up], rows);
        let [gate, up, _] = &mut self.out;
        silu_mul(gate, up);
        self.products(pool, &[down], rows);
    }

    fn norm(&mut self, width: usize, rows: usize) {
        self.input(width, rows);
        let weight = vec![1.0; width];
        self.out[0].resize(width, 0.0);
        for row in self.x.chunks_exact(width) {
            rms_norm(row, &weight, 1e-5, &mut self.out[0][..width]);
        }
    }

    fn product(&mut self, pool: &Pool, matrix: &Matrix, rows: usize) {
        self.products(pool, &[matrix], rows);
    }

    fn input(&mut self, cols: usize, rows: usize) {
        if self.x.len() != cols * rows {
            self.x = (0..cols * rows).map(|i| ((i % 37) as f32 - 18.0) * 0.05).collect();
        }
    }

    /// Products of one input. The outputs keep the matrices' rows.
    fn products(&mut self, pool: &Pool, matrices: &[&Matrix], rows: usize) {
        let Some(first) = matrices.first() else { return };
        self.input(first.cols(), rows);
        let mut jobs = Vec::with_capacity(matrices.len());
        for (matrix, out) in matrices.iter().zip(&mut self.out) {
            out.resize(matrix.rows() * rows, 0.0);
            jobs.push(Job { matrix, out });
        }
        matmul(pool, &mut self.scratch, &self.x, rows, &mut jobs);
    }
}

/// Watches a stage compute and keeps what it learns of this node's speed.
pub(crate) struct Meter {
    profiles: Profiles,
    key: ProfileKey,
    /// Layers of the stage, each weighed against the mean layer of the model.
    layers: f64,
    layer_ns: Percentiles,
    row_ns: Percentiles,
    head_ns: Percentiles,
}

impl Meter {
    pub fn new(profiles: Profiles, shape: &LayerShape, threads: usize, layers: f64) -> Self {
        let key = ProfileKey::new(shape, threads);
        let [layer_ns, row_ns, head_ns] = std::array::from_fn(|_| Percentiles::default());
        Self { profiles, key, layers: layers.max(f64::MIN_POSITIVE), layer_ns, row_ns, head_ns }
    }

    /// A forward over `tokens` rows took so long.
    pub fn forward(&mut self, tokens: usize, time: Duration) {
        let per_layer = nanos(time) as f64 / self.layers;
        match tokens {
            1 => self.layer_ns.add(per_layer as u64),
            CHUNK_ROWS.. => self.row_ns.add((per_layer / tokens as f64) as u64),
            _ => {}
        }
    }

    /// Head and sampler for one token took so long.
    pub fn head(&mut self, time: Duration) {
        self.head_ns.add(nanos(time));
    }

    /// Keeps what was learned since the last time, if that is enough: half of it, half of what was known from layers
    /// before. Called when the stage has nothing else to do.
    pub fn keep(&mut self) {
        let Some(layer_ns) = self.layer_ns.p50().filter(|_| self.layer_ns.count() >= STEPS_MIN) else {
            return;
        };
        // A stage without a head does not know how long one takes, so there must have been a probe.
        let Some(mut kept) = self.profiles.load(&self.key) else { return };
        let blend = |old: u64, new: Option<u64>| match new {
            Some(new) if kept.layers => old / 2 + new / 2,
            new => new.unwrap_or(old),
        };
        (kept.layer_ns, kept.row_ns, kept.head_ns) = (
            blend(kept.layer_ns, Some(layer_ns)).max(1),
            blend(kept.row_ns, self.row_ns.p50()).max(1),
            blend(kept.head_ns, self.head_ns.p50()),
        );
        kept.layers = true;
        self.profiles.keep(&self.key, &kept);
        for seen in [&mut self.layer_ns, &mut self.row_ns, &mut self.head_ns] {
            *seen = Percentiles::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dtype: &str) -> LayerShape {
        let matrix = |rows, cols| MatrixShape { dtype: dtype.to_owned(), rows, cols };
        let layer = [
            matrix(64, 64),
            matrix(32, 64),
            matrix(32, 64),
            matrix(64, 64),
            matrix(96, 64),
            matrix(96, 64),
            matrix(64, 96),
        ];
        LayerShape { layer, head: matrix(300, 64), layers: 3 }
    }

    #[test]
    fn a_probe_is_kept_and_real_layers_replace_it() {
        let folder = tempfile::tempdir().unwrap();
        let profiles = Profiles::new(Some(folder.path()));
        let speed = |threads| profiles.speed(&shape("Q8_0"), threads, None, 1 << 30).unwrap();
        let first = speed(1);
        assert!(first.layer_ns > 0 && first.row_ns > 0 && first.head_ns > 0, "{first:?}");
        assert_eq!(first.source, SpeedSource::Probe);
        // The second time it is the same number, which a new measurement hardly is.
        assert_eq!(speed(1), first);
        let mut meter = Meter::new(profiles.clone(), &shape("Q8_0"), 1, 2.0);
        for _ in 0..STEPS_MIN {
            meter.forward(1, Duration::from_micros(80));
            meter.forward(64, Duration::from_micros(1280));
            meter.forward(5, Duration::from_secs(1));
            meter.head(Duration::from_micros(7));
        }
        meter.keep();
        let learned = speed(1);
        let want = NodeSpeed { layer_ns: 40_000, row_ns: 10_000, head_ns: 7000, source: SpeedSource::Layers };
        assert_eq!(learned, want);
        // Too few steps teach nothing.
        meter.forward(1, Duration::from_secs(1));
        meter.keep();
        assert_eq!(speed(1), learned);
        (0..STEPS_MIN).for_each(|_| meter.forward(1, Duration::from_micros(40)));
        meter.keep();
        assert!(speed(1).layer_ns > 20_000, "half of what was known stays");
        // Another number of threads is another profile.
        assert_eq!(speed(2).source, SpeedSource::Probe);
    }

    #[test]
    fn files_that_are_not_ours_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let profiles = Profiles::new(Some(folder.path()));
        let key = ProfileKey::new(&shape("F32"), 1);
        assert!(profiles.load(&key).is_none());
        let path = folder.path().join("profiles").join(key.file());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        for text in ["", "{}", "[1", &"9".repeat(100_000)] {
            std::fs::write(&path, text).unwrap();
            assert!(profiles.load(&key).is_none());
        }
        profiles
            .keep(&key, &Kept { key: "another".into(), layer_ns: 1, row_ns: 1, head_ns: 1, layers: true });
        assert!(profiles.load(&key).is_none());
    }

    #[test]
    fn what_cannot_be_probed_is_not_made_up() {
        let none = Profiles::default();
        assert!(none.speed(&shape("Q9_9"), 1, None, 1 << 30).is_none());
        let mut odd = shape("Q8_0");
        odd.layer[0].cols = 33;
        assert!(none.speed(&odd, 1, None, 1 << 30).is_none());
        let mut huge = shape("F32");
        huge.head.rows = 1 << 22;
        huge.head.cols = 1 << 22;
        assert!(none.speed(&huge, 1, None, 1 << 18).is_none());
    }
}
