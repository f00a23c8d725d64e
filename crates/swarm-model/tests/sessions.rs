//! What a stage refuses, and that refusing changes nothing.

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Chain, bits, load, open_hf};
use swarm_kernels::{Pool, TILE};
use swarm_model::{
    Blame, KvError, KvPool, KvType, LoadError, LoadOptions, LoadProgress, Scratch, Segment, SessionKv, Stage,
    StepError, stage_size,
};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, Storage};
use swarm_weights::{Checkpoint, FileSource, Source, SourceError};

/// A file that notes what is read of it.
struct Noting {
    inner: FileSource,
    reads: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Source for Noting {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        self.reads.lock().unwrap().push(offset..offset + out.len() as u64);
        self.inner.read_at(offset, out)
    }
}

#[test]
fn twenty_tokens_truncated_to_seven_and_replayed_are_the_same() {
    let opened = open_hf(&toy::spec("qwen2"), Storage::F32);
    let chain = Chain::single(&opened.checkpoint, KvType::F16);
    let (pool, ids) = (Pool::new(1), golden("qwen2").ids);
    let mut session = chain.open();
    let first: Vec<u32> =
        ids[..20].iter().flat_map(|&id| bits(&chain.step(&pool, &mut session, &[id]))).collect();
    session.truncate(7);
    assert_eq!(session.len(), 7);
    let again: Vec<u32> =
        ids[7..20].iter().flat_map(|&id| bits(&chain.step(&pool, &mut session, &[id]))).collect();
    assert!(first[7 * toy::VOCAB_SIZE..] == again);
}

/// One stage of a toy, a pool for it, and rows to feed it.
struct Bench {
    stage: Stage,
    pool: Pool,
    hidden: Vec<f32>,
}

impl Bench {
    fn new() -> Self {
        let opened = open_hf(&toy::spec("llama"), Storage::F32);
        let stage = load(&opened.checkpoint, 0..2);
        let ids: Vec<u32> = (0..100).collect();
        let mut hidden = vec![0.0; ids.len() * stage.config().hidden_size];
        stage.embed(&ids, &mut hidden).unwrap();
        Self { stage, pool: Pool::new(1), hidden }
    }

    /// Runs segments over the first rows; the rows it gave.
    fn run(&self, mut segments: Vec<Segment<'_>>) -> Result<Vec<f32>, StepError> {
        let tokens: usize = segments.iter().map(|segment| segment.tokens).sum();
        let mut hidden = self.hidden[..(tokens * 64).min(self.hidden.len())].to_vec();
        self.stage.forward(&self.pool, &mut segments, &mut hidden, &mut Scratch::default())?;
        Ok(hidden)
    }
}

#[test]
fn a_refused_step_names_its_reason_and_leaves_the_session_as_it_was() {
    let bench = Bench::new();
    let layout = bench.stage.kv_layout(KvType::F16);
    let kv_pool = KvPool::new(layout, 3 * layout.page_bytes());
    let (mut a, mut b) = (kv_pool.open(), kv_pool.open());
    bench.run(vec![Segment { kv: &mut a, position: 0, tokens: 5, logits: 0 }]).unwrap();

    let lost = bench.run(vec![Segment { kv: &mut a, position: 6, tokens: 1, logits: 0 }]).unwrap_err();
    assert_eq!((lost.clone(), lost.blame()), (StepError::OutOfOrder { want: 5, got: 6 }, Blame::Peer));
    let repeated = bench.run(vec![Segment { kv: &mut a, position: 4, tokens: 1, logits: 0 }]).unwrap_err();
    assert_eq!(repeated, StepError::OutOfOrder { want: 5, got: 4 });
    let empty = bench.run(vec![Segment { kv: &mut a, position: 5, tokens: 0, logits: 0 }]).unwrap_err();
    assert_eq!(empty, StepError::EmptySegment { position: 5 });
    let long = bench.run(vec![Segment { kv: &mut a, position: 5, tokens: 508, logits: 0 }]).unwrap_err();
    assert_eq!(long, StepError::ContextFull { context: 512, position: 5, tokens: 508 });
    assert_eq!(long.blame(), Blame::Caller);
    let huge =
        bench.run(vec![Segment { kv: &mut b, position: 0, tokens: usize::MAX / 64, logits: 0 }]).unwrap_err();
    assert_eq!(huge.blame(), Blame::Caller);
    let mut narrow = vec![0.0; 63];
    let mut segments = [Segment { kv: &mut a, position: 5, tokens: 1, logits: 0 }];
    let width = bench.stage.forward(&bench.pool, &mut segments, &mut narrow, &mut Scratch::default());
    assert_eq!(width, Err(StepError::WidthMismatch { what: "the hidden rows", want: 64, got: 63 }));

    assert_eq!((a.len(), a.bytes(), b.len(), b.bytes()), (5, layout.page_bytes(), 0, 0));
}

#[test]
fn a_full_cache_refuses_the_whole_batch_and_the_step_succeeds_once_there_is_room() {
    let bench = Bench::new();
    let layout = bench.stage.kv_layout(KvType::F32);
    let kv_pool = KvPool::new(layout, 3 * layout.page_bytes());
    let (mut a, mut b, mut other) = (kv_pool.open(), kv_pool.open(), kv_pool.open());
    bench.run(vec![Segment { kv: &mut other, position: 0, tokens: 1, logits: 0 }]).unwrap();

    fn batch<'a>(a: &'a mut SessionKv, b: &'a mut SessionKv) -> Vec<Segment<'a>> {
        vec![
            Segment { kv: a, position: 0, tokens: 3, logits: 0 },
            Segment { kv: b, position: 0, tokens: TILE + 1, logits: 0 },
        ]
    }
    let full = bench.run(batch(&mut a, &mut b)).unwrap_err();
    assert_eq!(full, StepError::Kv(KvError::Full { wanted: 2, free: 1, max: 3 }));
    assert_eq!(full.blame(), Blame::Full);
    assert_eq!((a.bytes(), b.bytes(), kv_pool.pages_lent()), (0, 0, 1));

    drop(other);
    let rows = bench.run(batch(&mut a, &mut b)).unwrap();
    assert_eq!((a.len(), b.len(), kv_pool.pages_lent()), (3, TILE + 1, 3));
    // The reused page held another session's rows; a fresh pool gives the same bits.
    let fresh = KvPool::new(layout, usize::MAX);
    let again = bench.run(batch(&mut fresh.open(), &mut fresh.open())).unwrap();
    assert!(bits(&rows) == bits(&again));
}

#[test]
fn a_stage_and_its_sessions_may_move_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Stage>();
    shared::<KvPool>();
    sent::<SessionKv>();
    sent::<Scratch>();
}

#[test]
fn a_step_of_nothing_is_nothing() {
    let bench = Bench::new();
    assert_eq!(bench.run(vec![]), Ok(vec![]));
}

#[test]
fn a_stage_does_only_its_own_part() {
    let bench = Bench::new();
    let opened = open_hf(&toy::spec("llama"), Storage::F32);
    let tail = load(&opened.checkpoint, 2..4);
    assert!(bench.stage.is_first() && !bench.stage.is_tail() && tail.is_tail() && !tail.is_first());
    let mut row = vec![0.0; 64];
    let mut logits = vec![0.0; toy::VOCAB_SIZE];
    let scratch = &mut Scratch::default();
    let not_first = tail.embed(&[1], &mut row).unwrap_err();
    assert_eq!(not_first, StepError::NotThisStage { layers: 2..4, what: "embedding" });
    let not_tail = bench.stage.logits(&bench.pool, &row, &mut logits, scratch).unwrap_err();
    assert_eq!(not_tail, StepError::NotThisStage { layers: 0..2, what: "head" });
    assert!(tail.logits(&bench.pool, &row, &mut logits[1..], scratch).is_err());
    let outside = bench.stage.embed(&[264], &mut row).unwrap_err();
    assert_eq!(outside, StepError::TokenOutsideVocab { token: 264, vocab: 264 });
    assert!(bench.stage.embed(&[1, 2], &mut row).is_err());

    let foreign = KvPool::new(load(&opened.checkpoint, 0..1).kv_layout(KvType::F16), usize::MAX);
    let refused = bench.run(vec![Segment { kv: &mut foreign.open(), position: 0, tokens: 1, logits: 0 }]);
    assert_eq!(refused, Err(StepError::ForeignKv));
}

/// An embedding that is not also the head takes no memory: it is read row by row, and a file that became shorter is
/// an error, not another answer.
#[test]
fn rows_of_an_embedding_are_looked_up_in_the_file() {
    let model = toy::spec("llama");
    let opened = open_hf(&model, Storage::F32);
    let stage = load(&opened.checkpoint, 0..4);
    let mut rows = vec![0.0; 2 * 64];
    stage.embed(&[263, 5], &mut rows).unwrap();
    let embedding = opened.checkpoint.read("model.embed_tokens.weight").unwrap();
    let values: &[[u8; 4]] = embedding.bytes.as_chunks::<4>().0;
    for (row, token) in rows.chunks(64).zip([263, 5]) {
        let want = values[token * 64..][..64].iter().map(|bytes| f32::from_le_bytes(*bytes));
        assert!(row.iter().copied().eq(want));
    }
    let held: u64 = opened.checkpoint.weight_bytes() - opened.checkpoint.embed_bytes();
    assert!((stage.weight_bytes() as u64) < held + opened.checkpoint.embed_bytes() / 2);

    let file = std::fs::OpenOptions::new().write(true).open(opened.path().join("model.safetensors")).unwrap();
    file.set_len(100).unwrap();
    let error = stage.embed(&[263], &mut rows[..64]).unwrap_err();
    assert!(matches!(&error, StepError::Embedding { token: 263, why } if why.contains("shorter")), "{error}");
    assert_eq!(error.blame(), Blame::Us);
}

/// No tensor is in memory twice while it loads: what is read at once stays small, however large the tensor.
#[test]
fn large_tensors_are_read_in_slices() {
    let model = toy::spec("llama").with_config("vocab_size", 40_000.into());
    let opened = open_hf(&model, Storage::F32);
    let reads = Arc::new(Mutex::new(Vec::new()));
    let opener = |path: &Path| {
        let inner = FileSource::open(path)?;
        Ok(Arc::new(Noting { inner, reads: Arc::clone(&reads) }) as Arc<dyn Source>)
    };
    let checkpoint = Checkpoint::open_with(opened.path(), &opener).unwrap();
    reads.lock().unwrap().clear();
    let options = LoadOptions { threads: 3, ..LoadOptions::default() };
    let stage = Stage::load(&checkpoint, 0..4, &options, &mut |_| {}).unwrap();
    assert!(stage.weight_bytes() > 10_000_000);
    let mut reads = reads.lock().unwrap().clone();
    let largest = reads.iter().map(|range| range.end - range.start).max().unwrap();
    assert!(largest <= 1 << 20, "{largest} bytes at once");
    reads.sort_by_key(|range| range.start);
    assert!(reads.windows(2).all(|pair| pair[0].end <= pair[1].start), "a byte was read twice");
}

#[test]
fn loading_ends_when_the_stage_is_not_wanted_any_more() {
    let opened = open_hf(&toy::spec("llama"), Storage::F32);
    let abort = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load = || {
        let options = LoadOptions { threads: 2, abort: Some(abort.clone()), ..Default::default() };
        let mut tensors = 0;
        let loaded = Stage::load(&opened.checkpoint, 0..4, &options, &mut |_| tensors += 1);
        (loaded.err(), tensors)
    };
    assert!(matches!(load(), (None, 1..)));
    abort.store(true, std::sync::atomic::Ordering::Relaxed);
    // Not a tensor is read from then on.
    assert!(matches!(load(), (Some(LoadError::Aborted), 0)));
}

#[test]
fn what_cannot_be_loaded_is_refused_by_name() {
    let opened = open_hf(&toy::spec("llama"), Storage::F32);
    let try_load = |layers, context| {
        Stage::load(
            &opened.checkpoint,
            layers,
            &LoadOptions { context, threads: 2, ..LoadOptions::default() },
            &mut |_| {},
        )
        .err()
    };
    for layers in [0..0, 2..2, 3..5, 5..6] {
        assert!(matches!(try_load(layers, None), Some(LoadError::Layers { num_layers: 4, .. })));
    }
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = try_load(3..1, None);
    assert!(matches!(backwards, Some(LoadError::Layers { .. })));
    assert!(matches!(try_load(0..4, Some(0)), Some(LoadError::Context { .. })));
    assert!(matches!(try_load(0..4, Some(513)), Some(LoadError::Context { context: 513, max: 512 })));
    assert!(try_load(0..4, Some(16)).is_none());
}

#[test]
fn progress_reaches_its_total_and_sizes_match_what_was_loaded() {
    for name in ["llama", "llama3", "qwen2", "qwen3", "llama_bias"] {
        let opened = open_hf(&toy::spec(name), Storage::F32);
        for layers in [0..4, 0..1, 1..3, 3..4] {
            let mut last = LoadProgress { bytes_done: 0, bytes_total: 0 };
            let stage =
                Stage::load(&opened.checkpoint, layers.clone(), &LoadOptions::default(), &mut |now| {
                    assert!(now.bytes_done > last.bytes_done);
                    last = now;
                })
                .unwrap();
            assert_eq!(last.bytes_done, last.bytes_total, "{name} {layers:?}");
            let size = stage_size(&opened.checkpoint, layers.clone(), KvType::F16).unwrap();
            // Packing may pad rows; these are small, so allow a quarter.
            let loaded = stage.weight_bytes() as u64;
            assert_eq!(size.weight_bytes, loaded, "{layers:?}");
            assert_eq!(size.kv_bytes_per_position, stage.kv_layout(KvType::F16).bytes_per_position() as u64);
            assert_eq!(stage.bytes_per_token(), stage.weight_bytes());
        }
    }
}
