//! A placement that changes: layers that go give their memory back, layers that stay are not read again.

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::counting::open_counting;
use common::{Chain, bits, open_hf};
use swarm_kernels::{Pool, Quant};
use swarm_model::{Kept, KvType, LoadOptions, Stage};
use swarm_testkit::golden;
use swarm_testkit::toy::{self, Storage};
use swarm_weights::{Checkpoint, TensorInfo};

/// Bytes in the file of the tensors in which a stage of `now` is not like one of `before`, but for an embedding that is
/// looked up.
fn difference(checkpoint: &Checkpoint, before: &Range<usize>, now: &Range<usize>) -> u64 {
    let config = checkpoint.config();
    let held = |layers: &Range<usize>| -> Vec<TensorInfo> {
        let is_head = config.tie_word_embeddings && layers.end == config.num_hidden_layers;
        let tensors = checkpoint.stage_tensors(layers.clone()).into_iter().cloned();
        tensors.filter(|info| is_head || info.name != swarm_weights::EMBED).collect()
    };
    let before = held(before);
    held(now).iter().filter(|info| !before.contains(info)).map(|info| info.bytes).sum()
}

#[test]
fn only_the_difference_is_read_and_the_bits_are_the_same() {
    for (name, quant) in [("llama", None), ("qwen2", Some(Quant::Q8_0)), ("qwen3", Some(Quant::Q4_0))] {
        let opened = open_hf(&toy::spec(name), Storage::F16);
        let (checkpoint, reads) = open_counting(opened.path());
        let checkpoint = checkpoint.quantized(quant);
        let ids = &golden(name).ids[..12];
        let want = Chain::single(&checkpoint, KvType::F16).logits(&Pool::new(1), ids, &[5, 1]);
        let mut kept = Kept::default();
        let mut before = 0..0;
        for now in [1..3, 1..3, 0..3, 2..4, 0..4, 0..1, 3..4, 0..4] {
            *reads.lock().unwrap() = 0;
            let options = LoadOptions { threads: 2, ..LoadOptions::default() };
            let mut told = 0;
            let stage = Stage::load_rest(&checkpoint, now.clone(), &options, &mut kept, &mut |done| {
                told = done.bytes_done;
            })
            .unwrap();
            let read = difference(&checkpoint, &before, &now);
            assert_eq!((*reads.lock().unwrap(), told), (read, read), "{name}: {before:?} then {now:?}");
            assert_eq!(kept.weight_bytes(), 0);
            let fresh = common::load(&checkpoint, now.clone());
            assert_eq!(stage.weight_bytes(), fresh.weight_bytes());
            kept = Kept::from(stage);
            assert_eq!(kept.weight_bytes(), fresh.weight_bytes());
            assert!(kept.is_whole(checkpoint.config(), &now));
            before = now;
        }
        let whole =
            Stage::load_rest(&checkpoint, 0..4, &LoadOptions::default(), &mut kept, &mut |_| {}).unwrap();
        let got = Chain::of(vec![whole], KvType::F16).logits(&Pool::new(1), ids, &[5, 1]);
        assert!(bits(&got) == bits(&want), "{name}");
    }
}

#[test]
fn what_could_not_be_loaded_leaves_what_was_kept() {
    let opened = open_hf(&toy::spec("llama"), Storage::F32);
    let mut kept = Kept::from(common::load(&opened.checkpoint, 1..3));
    let abort = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let options = LoadOptions { abort: Some(abort), ..LoadOptions::default() };
    let refused = Stage::load_rest(&opened.checkpoint, 2..4, &options, &mut kept, &mut |_| {});
    assert!(refused.is_err());
    assert!(kept.is_whole(opened.checkpoint.config(), &(2..3)), "layer 2 stayed");
    assert!(!kept.is_whole(opened.checkpoint.config(), &(1..2)), "layer 1 is not needed any more");
    let layers = 2..3;
    let stage = common::load(&opened.checkpoint, layers);
    assert_eq!(kept.weight_bytes(), stage.weight_bytes());
}

#[cfg(target_os = "linux")]
mod memory {
    use super::*;

    fn status(field: &str) -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
    }

    /// Makes the peak what is resident now.
    fn forget_the_peak() {
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
    }

    /// Layers of 14 MB: no whole number of huge pages.
    fn large() -> common::Opened {
        let model = toy::spec("llama").with_layers(12).with_config("hidden_size", 512.into());
        open_hf(&model.with_config("intermediate_size", 1800.into()), Storage::F32)
    }

    #[test]
    fn memory_falls_with_every_layer_and_never_holds_more_than_the_larger_stage() {
        let opened = large();
        let config = opened.checkpoint.config().clone();
        let mut kept = Kept::from(common::load(&opened.checkpoint, 0..8));
        let layer = kept.weight_bytes() / 8;
        assert!(layer > 12 << 20, "{layer}");
        // Unless every layer but one is gone, its neighbours need a huge page at each end.
        let slack = 5 << 20;
        let mut last = status("VmRSS:");
        for end in (5..8).rev() {
            kept.trim(&config, &(0..end));
            let now = status("VmRSS:");
            assert!(last - now > layer - slack, "{last} -> {now} with {end} layers of {layer}");
            last = now;
        }
        forget_the_peak();
        // Three of five go, five come: eight were the most that any placement needs.
        let options = LoadOptions { threads: 2, ..LoadOptions::default() };
        let stage = Stage::load_rest(&opened.checkpoint, 3..10, &options, &mut kept, &mut |_| {}).unwrap();
        assert_eq!(stage.layers(), 3..10);
        let peak = status("VmHWM:") - last;
        assert!(peak < 2 * layer + layer, "{peak} more than five layers of {layer}");
    }
}
