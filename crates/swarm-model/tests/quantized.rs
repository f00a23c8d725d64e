//! Quantized weights on disk: the same bits as from the originals, and whatever happens to the files, never others.

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::counting::open_counting;
use common::{Chain, Opened, bits, open_hf};
use swarm_kernels::{Pool, Quant};
use swarm_model::{KvType, LoadOptions, Stage, keep_quantized};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, Storage};
use swarm_weights::{Checkpoint, QuantizedError, QuantizedStore, quantized};
use tempfile::TempDir;

struct Bench {
    checkpoint: Checkpoint,
    reads: Arc<Mutex<u64>>,
    cache: TempDir,
    _opened: Opened,
}

impl Bench {
    fn new(name: &str, quant: Quant) -> Self {
        // Large enough for several pieces to a tensor.
        let opened = open_hf(&toy::spec(name).with_config("vocab_size", 9000.into()), Storage::F32);
        let (checkpoint, reads) = open_counting(opened.path());
        let checkpoint = checkpoint.quantized(Some(quant));
        checkpoint.held_fingerprint().unwrap();
        Self { checkpoint, reads, cache: tempfile::tempdir().unwrap(), _opened: opened }
    }

    fn store(&self, keeps: bool) -> Arc<QuantizedStore> {
        Arc::new(QuantizedStore::open(self.cache.path(), &self.checkpoint, keeps).unwrap().unwrap())
    }

    fn options(&self, keeps: bool) -> LoadOptions {
        LoadOptions { threads: 3, quantized: Some(self.store(keeps)), ..LoadOptions::default() }
    }

    /// The logits of the whole model, and the bytes of the originals that were read for it.
    fn logits(&self, options: &LoadOptions) -> (Vec<u32>, u64) {
        *self.reads.lock().unwrap() = 0;
        let layers = self.checkpoint.config().num_hidden_layers;
        let mut last = None;
        let stage = Stage::load(&self.checkpoint, 0..layers, options, &mut |done| last = Some(done)).unwrap();
        let last = last.unwrap();
        assert_eq!(last.bytes_done, last.bytes_total);
        let read = *self.reads.lock().unwrap();
        let ids = &golden("llama").ids[..10];
        (bits(&Chain::of(vec![stage], KvType::F16).logits(&Pool::new(1), ids, &[4, 1])), read)
    }

    fn files(&self) -> Vec<PathBuf> {
        let folder = self.store(false).folder().to_owned();
        let mut files: Vec<_> =
            fs::read_dir(folder).into_iter().flatten().map(|file| file.unwrap().path()).collect();
        files.sort();
        files
    }
}

#[test]
fn what_was_kept_is_read_in_place_of_the_originals() {
    for (name, quant) in [("llama", Quant::Q8_0), ("qwen2", Quant::Q4_0), ("llama_k", Quant::Q4_K)] {
        let bench = Bench::new(name, quant);
        let (want, all) = bench.logits(&LoadOptions::default());
        assert_eq!(bench.logits(&bench.options(false)), (want.clone(), all));
        assert!(bench.files().is_empty(), "nothing was to be kept");
        assert_eq!(bench.logits(&bench.options(true)), (want.clone(), all));
        let matrices = bench.checkpoint.tensors().filter(|info| info.held != info.dtype);
        assert_eq!(bench.files().len(), matrices.count() + 1, "{:?}", bench.files());
        let stored: u64 = bench.files().iter().map(|file| fs::metadata(file).unwrap().len()).sum();
        let (got, read) = bench.logits(&bench.options(false));
        assert!(got == want && read < all / 50, "{name}: {read} of {all} bytes");
        let held: u64 = common::load(&bench.checkpoint, 0..1).weight_bytes() as u64;
        assert!(stored > held, "{stored}");
        // Another quantization of the same model has a place of its own.
        let entries = quantized::entries(bench.cache.path());
        assert_eq!((entries.len(), entries[0].quant.as_str(), entries[0].bytes), (1, quant.name(), stored));
    }
}

#[test]
fn layers_are_kept_ahead_without_a_stage() {
    let bench = Bench::new("llama", Quant::Q4_0);
    let (want, all) = bench.logits(&LoadOptions::default());
    for layers in [1..3, 0..2, 0..4] {
        keep_quantized(&bench.checkpoint, layers, &bench.options(true), &mut |_| {}).unwrap();
    }
    assert!(bench.store(true).trouble().is_none());
    let (got, read) = bench.logits(&bench.options(false));
    assert!(got == want && read < all / 50, "{read} of {all} bytes");
    // There is nothing left to do.
    *bench.reads.lock().unwrap() = 0;
    keep_quantized(&bench.checkpoint, 0..4, &bench.options(true), &mut |_| {}).unwrap();
    assert_eq!(*bench.reads.lock().unwrap(), 0);
    assert!(keep_quantized(&bench.checkpoint, 3..5, &bench.options(true), &mut |_| {}).is_err());
}

#[test]
fn damaged_files_are_made_anew() {
    let bench = Bench::new("llama", Quant::Q8_0);
    let (want, _) = bench.logits(&bench.options(true));
    let whole = bench.files();
    let blocks = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "blocks");
    for (index, file) in whole.iter().filter(|file| blocks(file)).enumerate() {
        let mut bytes = fs::read(file).unwrap();
        let len = bytes.len();
        match index % 6 {
            0 => bytes[len / 3] ^= 1,     // a code
            1 => bytes[len - 50] ^= 1,    // a digest
            2 => bytes[len - 8] ^= 1,     // the footer
            3 => bytes.truncate(len / 2), // cut short
            4 => bytes[len - 16] = 0xff,  // pieces of another size
            _ => bytes.clear(),
        }
        fs::write(file, bytes).unwrap();
    }
    assert_eq!(bench.logits(&bench.options(true)).0, want);
    // Those whose pieces did not match went, and come back with the next start; then all are whole.
    assert_eq!(bench.logits(&bench.options(true)).0, want);
    assert_eq!(bench.files(), whole);
    let (got, read) = bench.logits(&bench.options(false));
    assert!(got == want && read < 20_000, "{read}");
}

#[test]
fn a_load_that_ends_early_leaves_no_half_file() {
    let bench = Bench::new("llama", Quant::Q4_0);
    let options = bench.options(true);
    let abort = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let stopped = LoadOptions { abort: Some(abort), ..options };
    assert!(Stage::load(&bench.checkpoint, 0..4, &stopped, &mut |_| {}).is_err());
    assert_eq!(bench.files().len(), 1, "{:?}", bench.files());
}

#[test]
fn a_folder_that_cannot_be_written_costs_the_keeping_only() {
    let bench = Bench::new("llama", Quant::Q4_0);
    let (want, _) = bench.logits(&LoadOptions::default());
    // A file where the folder should be.
    fs::write(bench.cache.path().join("quantized"), "").unwrap();
    let options = bench.options(true);
    assert_eq!(bench.logits(&options).0, want);
    let trouble = options.quantized.unwrap().trouble().unwrap();
    assert!(matches!(&trouble, QuantizedError::Io { path, .. } if path.starts_with(bench.cache.path())));
}

#[test]
fn the_least_recently_used_goes_first() {
    let bench = Bench::new("llama", Quant::Q4_0);
    bench.logits(&bench.options(true));
    let cache = bench.cache.path();
    let checkpoint = bench.checkpoint.quantized(Some(Quant::Q8_0));
    let store = Arc::new(QuantizedStore::open(cache, &checkpoint, true).unwrap().unwrap());
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    let about = fs::File::options().write(true).open(store.folder().join("model.json")).unwrap();
    about.set_modified(old).unwrap();
    let entries = quantized::entries(cache);
    assert_eq!(entries.iter().map(|entry| entry.quant.as_str()).collect::<Vec<_>>(), ["q8_0", "q4_0"]);
    let removed = quantized::prune(cache, entries[1].bytes).unwrap();
    assert_eq!(removed.iter().map(|entry| entry.quant.as_str()).collect::<Vec<_>>(), ["q8_0"]);
    assert!(!store.folder().exists());
    assert_eq!(quantized::prune(cache, 0).unwrap().len(), 1);
    assert!(quantized::entries(cache).is_empty());
}
