//! A stage fetches its own bytes: the Hub's log is the witness.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use swarm_testkit::Hub;
use swarm_testkit::toy::{GgufType, Storage, ToyModel, spec};
use swarm_weights::hub::{HubSettings, Retry, Token};
use swarm_weights::{Checkpoint, FetchControl, FetchProgress, ModelRef, Needs, Store, StoreError};

/// Ten layers of about 1.6 MB, so that one layer too many is seen.
pub fn model() -> ToyModel {
    spec("llama")
        .with_layers(10)
        .with_config("hidden_size", 128.into())
        .with_config("intermediate_size", 1024.into())
}

/// A Hub with one repository, `org/toy`, and the folder it was made of.
pub struct Room {
    pub hub: Hub,
    pub folder: tempfile::TempDir,
    pub caches: tempfile::TempDir,
}

impl Room {
    pub fn new(write: impl FnOnce(&Path)) -> Self {
        let (folder, caches) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(folder.path());
        let hub = Hub::start().unwrap();
        hub.add("org/toy", folder.path()).unwrap();
        Self { hub, folder, caches }
    }

    pub fn safetensors(files: usize) -> Self {
        Self::new(|folder| model().write_hf(folder, Storage::F32.sharded(files)).unwrap())
    }

    pub fn settings(&self, token: &str) -> HubSettings {
        let retry = Retry {
            failures_max: 4,
            first: Duration::from_millis(2),
            longest: Duration::from_millis(20),
            idle: Duration::from_secs(2),
            ..Retry::default()
        };
        HubSettings { token: Token::new(token), retry, ..HubSettings::new(&self.hub.endpoint()) }
    }

    pub fn root(&self, who: &str) -> PathBuf {
        self.caches.path().join(who)
    }

    /// The store of somebody with this token.
    pub fn store(&self, who: &str) -> Arc<Store> {
        self.store_with(who, self.settings(who))
    }

    pub fn store_with(&self, who: &str, settings: HubSettings) -> Arc<Store> {
        Arc::new(Store::new(self.root(who), self.caches.path().join("hub"), settings))
    }
}

pub fn open(store: &Arc<Store>, name: &str, needs: Needs) -> Checkpoint {
    let path = store.resolve(&ModelRef::parse(name).unwrap(), needs).unwrap();
    Checkpoint::open_with(&path, &|path| store.open_file(path)).unwrap()
}

pub fn fetch(checkpoint: &Checkpoint, layers: Range<usize>) -> Result<FetchProgress, StoreError> {
    let mut last = FetchProgress::default();
    let mut control = FetchControl { progress: &mut |now| last = now, abort: &AtomicBool::new(false) };
    checkpoint.fetch(layers, &mut control)?;
    Ok(last)
}

/// Every tensor of the stage is what the original has.
pub fn assert_right(checkpoint: &Checkpoint, original: &Path, layers: Range<usize>) {
    let original = Checkpoint::open(original).unwrap();
    for info in checkpoint.stage_tensors(layers) {
        assert_eq!(checkpoint.read(&info.name).unwrap(), original.read(&info.name).unwrap(), "{}", info.name);
    }
}

fn stages(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|stage| stage * 10 / count..(stage + 1) * 10 / count).collect()
}

/// Each of several nodes fetches its stage of `name` and nothing of the others'.
fn each_fetches_its_own(room: &Room, name: &str, original: &Path) {
    for count in [2, 3, 5] {
        for (stage, layers) in stages(count).into_iter().enumerate() {
            let who = format!("node-{count}-{stage}");
            let store = room.store(&who);
            let checkpoint = open(&store, name, Needs::WeightsOnly);
            let headers = room.hub.bytes_to(&who);
            let own: u64 = checkpoint.stage_tensors(layers.clone()).iter().map(|info| info.bytes).sum();
            assert!(checkpoint.missing_bytes(layers.clone()) <= own);
            fetch(&checkpoint, layers.clone()).unwrap();
            assert_eq!(checkpoint.missing_bytes(layers.clone()), 0);
            let fetched = room.hub.bytes_to(&who);
            assert!(
                fetched <= own + own / 100 + 1_000_000,
                "{name}, stage {layers:?} of {own} bytes: {fetched}"
            );
            // Toy layers are small: what is beyond the tensors must be headers and gaps, not another layer.
            assert!(fetched - headers <= own + own / 100 + 200_000, "{own} {headers} {fetched}");
            assert_right(&checkpoint, original, layers);
            assert_eq!(room.hub.bytes_to(&who), fetched, "reading fetched more");
        }
    }
    assert!(room.hub.log().iter().all(|served| !served.token_leaked));
}

#[test]
fn a_stage_of_one_safetensors_file() {
    let room = Room::safetensors(1);
    each_fetches_its_own(&room, "org/toy", room.folder.path());
}

#[test]
fn a_stage_of_many_safetensors_files() {
    let room = Room::safetensors(7);
    each_fetches_its_own(&room, "org/toy", room.folder.path());
}

#[test]
fn a_stage_of_a_gguf_file_among_others() {
    let room = Room::new(|folder| {
        model().write_gguf(&folder.join("toy-Q8_0.gguf"), GgufType::Q8_0).unwrap();
        model().write_gguf(&folder.join("toy-F16.gguf"), GgufType::F16).unwrap();
    });
    each_fetches_its_own(&room, "org/toy:F16", &room.folder.path().join("toy-F16.gguf"));
    assert_eq!(room.hub.bytes_of("toy-Q8_0.gguf"), 0);
}

#[test]
fn a_stage_of_a_gguf_over_several_files() {
    let room = Room::new(|folder| model().write_gguf_split(folder, "toy", GgufType::F16, 4).unwrap());
    each_fetches_its_own(&room, "org/toy", &room.folder.path().join("toy-00001-of-00004.gguf"));
}

#[test]
fn a_model_is_known_by_its_origin() {
    let room = Room::safetensors(2);
    let one = open(&room.store("one"), "org/toy", Needs::Everything);
    let two = open(&room.store("two"), "org/toy@main", Needs::WeightsOnly);
    let before = room.hub.log().len();
    assert_eq!(one.fingerprint().unwrap(), two.fingerprint().unwrap());
    assert_eq!(one.origin(), two.origin());
    assert_eq!((one.name(), one.origin().unwrap().id.as_str()), ("org/toy", "org/toy"));
    assert_eq!(room.hub.log().len(), before, "a fingerprint fetched something");
    let other = tempfile::tempdir().unwrap();
    model().with_seed(9).write_hf(other.path(), Storage::F32).unwrap();
    room.hub.add("org/toy", other.path()).unwrap();
    let newer = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
    assert!(!newer.is_model(&one.fingerprint().unwrap()).unwrap());
    let pinned = format!("org/toy@{}", one.origin().unwrap().commit);
    assert!(
        open(&room.store("three"), &pinned, Needs::WeightsOnly)
            .is_model(&one.fingerprint().unwrap())
            .unwrap()
    );
    assert_right(&newer, other.path(), 3..4);
    assert_right(&one, room.folder.path(), 3..4);
}

#[test]
fn what_is_here_is_not_asked_for_again() {
    let room = Room::safetensors(3);
    let first = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
    fetch(&first, 2..5).unwrap();
    drop(first);
    room.hub.clear_log();
    let again = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
    assert_eq!(fetch(&again, 2..5).unwrap().bytes_total, 0);
    assert_right(&again, room.folder.path(), 2..5);
    assert_eq!(room.hub.bytes_of(".safetensors"), 0);
    // One layer more is the difference.
    let more = again.missing_bytes(2..6);
    assert_eq!(
        fetch(&again, 2..6).unwrap(),
        FetchProgress { bytes_done: more, bytes_total: more, ..FetchProgress::default() }
    );
    assert!(room.hub.bytes_of(".safetensors") <= more + 200_000);
    assert_eq!(room.hub.bytes_again(), 0);
}

#[test]
fn without_the_hub_what_is_here_still_works() {
    let room = Room::safetensors(2);
    fetch(&open(&room.store("one"), "org/toy", Needs::Everything), 0..4).unwrap();
    room.hub.clear_log();
    let offline = HubSettings { offline: true, ..room.settings("one") };
    let store = room.store_with("one", offline.clone());
    let checkpoint = open(&store, "org/toy", Needs::Everything);
    assert_right(&checkpoint, room.folder.path(), 0..4);
    let error = swarm(&fetch(&checkpoint, 4..5).unwrap_err());
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    assert!(checkpoint.read("model.layers.9.mlp.up_proj.weight").is_err());
    let absent =
        room.store_with("two", offline).resolve(&ModelRef::parse("org/toy").unwrap(), Needs::Everything);
    assert!(swarm(&absent.unwrap_err()).contains("HF_HUB_OFFLINE"));
    assert!(room.hub.log().is_empty());
    // A Hub that is gone is no reason to stop either.
    let gone = HubSettings { retry: room.settings("").retry, ..HubSettings::new("http://127.0.0.1:1") };
    assert_right(
        &open(&room.store_with("one", gone), "org/toy", Needs::Everything),
        room.folder.path(),
        0..4,
    );
}

#[test]
fn complete_files_of_the_standard_cache_are_used_and_never_written() {
    let room = Room::safetensors(3);
    let commit = open(&room.store("one"), "org/toy", Needs::WeightsOnly).origin().unwrap().commit.clone();
    let snapshot = room.caches.path().join("hub/models--org--toy/snapshots").join(&commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    let shard = "model-00002-of-00003.safetensors";
    std::fs::copy(room.folder.path().join(shard), snapshot.join(shard)).unwrap();
    // One that is still on its way does not count.
    std::fs::write(snapshot.join("model-00003-of-00003.safetensors"), [0; 1000]).unwrap();
    room.hub.clear_log();
    let checkpoint = open(&room.store("two"), "org/toy", Needs::WeightsOnly);
    fetch(&checkpoint, 0..10).unwrap();
    assert_right(&checkpoint, room.folder.path(), 0..10);
    assert_eq!(room.hub.bytes_of(shard), 0);
    assert!(room.hub.bytes_of("model-00003-of-00003.safetensors") > 1000);
    assert_eq!(std::fs::read_dir(&snapshot).unwrap().count(), 2);
}

#[test]
fn a_damaged_piece_is_fetched_again() {
    let room = Room::safetensors(1);
    let store = room.store("one");
    let checkpoint = open(&store, "org/toy", Needs::WeightsOnly);
    fetch(&checkpoint, 0..10).unwrap();
    let path = checkpoint.path().join("model.safetensors");
    drop((checkpoint, store));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    room.hub.clear_log();
    let checkpoint = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
    assert_right(&checkpoint, room.folder.path(), 0..10);
    let again = room.hub.bytes_of("model.safetensors");
    assert!(again > 0 && again <= 1 << 20, "{again}");
    assert_eq!(
        std::fs::read(&path).unwrap(),
        std::fs::read(room.folder.path().join("model.safetensors")).unwrap()
    );
}

#[test]
fn a_list_that_a_crash_cut_short_costs_one_piece() {
    let room = Room::safetensors(1);
    let checkpoint = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
    let total = fetch(&checkpoint, 0..10).unwrap().bytes_total;
    let list = checkpoint.path().join("model.safetensors.ranges");
    drop(checkpoint);
    let bytes = std::fs::read(&list).unwrap();
    for cut in [1, 20, 47] {
        std::fs::write(&list, &bytes[..bytes.len() - cut]).unwrap();
        room.hub.clear_log();
        let checkpoint = open(&room.store("one"), "org/toy", Needs::WeightsOnly);
        fetch(&checkpoint, 0..10).unwrap();
        assert_right(&checkpoint, room.folder.path(), 0..10);
        let again = room.hub.bytes_of("model.safetensors");
        assert!(again <= 1 << 20 && again < total / 2, "{again} of {total}");
        assert_eq!(std::fs::read(&list).unwrap().len(), bytes.len());
    }
}

#[test]
fn two_who_want_the_same_at_once_fetch_it_once() {
    let room = Room::safetensors(2);
    let stores = [room.store("shared"), room.store("shared")];
    std::thread::scope(|scope| {
        for store in &stores {
            scope.spawn(|| {
                let checkpoint = open(store, "org/toy", Needs::WeightsOnly);
                fetch(&checkpoint, 1..8).unwrap();
                assert_right(&checkpoint, room.folder.path(), 1..8);
            });
        }
    });
    assert_eq!(room.hub.bytes_again(), 0);
}

#[test]
fn the_least_recently_used_goes_first_and_what_is_in_use_stays() {
    let room = Room::safetensors(1);
    let other = tempfile::tempdir().unwrap();
    model().write_gguf(&other.path().join("x.gguf"), GgufType::Q8_0).unwrap();
    room.hub.add("org/other", other.path()).unwrap();
    let store = room.store("one");
    fetch(&open(&store, "org/toy", Needs::WeightsOnly), 0..2).unwrap();
    let used = open(&store, "org/other", Needs::WeightsOnly);
    fetch(&used, 0..2).unwrap();
    let entries = store.entries();
    let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
    assert_eq!(ids, ["org/other", "org/toy"]);
    assert!(entries.iter().all(|entry| entry.bytes > 0 && entry.bytes < entry.bytes_total));
    let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
    assert!(store.prune(total).unwrap().removed.is_empty());
    let pruned = store.prune(total - 1).unwrap();
    assert_eq!((pruned.removed[0].id.as_str(), pruned.removed.len()), ("org/toy", 1));
    let pruned = store.prune(0).unwrap();
    assert_eq!((pruned.in_use[0].id.as_str(), pruned.removed.len()), ("org/other", 0));
    assert_right(&used, &other.path().join("x.gguf"), 0..2);
    drop(used);
    assert_eq!(store.prune(0).unwrap().bytes, 0);
    assert!(store.entries().is_empty());
}

/// An error and what it came from.
pub fn swarm(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
