//! Models that are on the Hub: every node fetches its own layers, and the Hub's log is the witness.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use swarm_testkit::hub::Trouble;
use swarm_testkit::toy::{GgufType, Storage, ToyModel, spec};
use swarm_testkit::{Hub, Proc};

#[cfg(target_os = "linux")]
use crate::common::SmallDisk;
use crate::common::{Bench, SOON};

pub const PROMPT: &str = "the tin hen in the inn";

/// Ten layers of about 1.6 MB as f32, so that one layer too many is seen.
pub fn model() -> ToyModel {
    spec("llama")
        .with_layers(10)
        .with_config("hidden_size", 128.into())
        .with_config("intermediate_size", 1024.into())
}

pub struct Room {
    pub bench: Bench,
    pub hub: Hub,
    pub folder: tempfile::TempDir,
}

impl Room {
    pub fn new(write: impl FnOnce(&std::path::Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        let hub = Hub::start().unwrap();
        hub.add("org/toy", folder.path()).unwrap();
        Self { bench: Bench::new(), hub, folder }
    }

    pub fn safetensors(files: usize) -> Self {
        Self::new(|folder| model().write_hf(folder, Storage::F32.sharded(files)).unwrap())
    }

    pub fn store(&self, who: &str) -> PathBuf {
        self.bench.path(&format!("store-{who}"))
    }

    /// The command with the Hub, and with a store and a token of its own.
    pub fn command(&self, who: &str, args: &[&str]) -> Command {
        let mut command = self.bench.command(args);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", self.hub.endpoint()).env("HF_TOKEN", who);
        command.env("SWARM_OS_CACHE", self.store(who));
        command
    }

    pub fn json(&self, who: &str, args: &[&str]) -> Value {
        let finished = Proc::spawn(&mut self.command(who, args)).unwrap().finish(SOON).unwrap();
        assert!(finished.status.success(), "{args:?}: {}", finished.stderr);
        serde_json::from_str(finished.stdout.trim()).unwrap()
    }

    /// A worker without a model, and its address.
    pub fn worker(&self, who: &str) -> (Proc, String) {
        let args = ["worker", "--local", "--json", "--name", who, "--threads", "1"];
        let mut worker = Proc::spawn(&mut self.command(who, &args)).unwrap();
        let waiting = worker.expect(SOON, "\"waiting\"").unwrap();
        let port = crate::common::event(&waiting)["port"].clone();
        (worker, format!("127.0.0.1:{port}"))
    }
}

/// Rings of several sizes: each node fetches its stage and no more, and the answer is that of one node.
fn every_node_fetches_its_own(room: &Room, name: &str, local: &str) {
    let args = ["run", "--json", "--raw", "--max-tokens", "8", "--threads", "1", PROMPT, "--model"];
    let alone = room.json("alone", &[&args[..], &[local]].concat());
    for nodes in [2, 3, 5] {
        let names: Vec<String> = (1..nodes).map(|node| format!("worker-{nodes}-{node}")).collect();
        let workers: Vec<(Proc, String)> = names.iter().map(|who| room.worker(who)).collect();
        let cut: Vec<String> =
            (0..nodes).map(|node| format!("{}..{}", node * 10 / nodes, (node + 1) * 10 / nodes)).collect();
        let cut = cut.join(",");
        let mut ring = vec!["--split", "always", "--layers", cut.as_str()];
        workers.iter().for_each(|(_, address)| ring.extend(["--peer", address]));
        let who = format!("coordinator-{nodes}");
        let answer = room.json(&who, &[&args[..], &[name], &ring].concat());
        assert_eq!(answer["token_ids"], alone["token_ids"], "{nodes} nodes");
        assert_eq!(answer["logits_hash"], alone["logits_hash"], "{nodes} nodes");
        let stages = answer["nodes"].as_array().unwrap();
        assert_eq!(stages.len(), nodes);
        for (index, stage) in stages.iter().enumerate() {
            let layers = (
                stage["layers"][0].as_u64().unwrap() as usize,
                stage["layers"][1].as_u64().unwrap() as usize,
            );
            let original = swarm_weights::Checkpoint::open(std::path::Path::new(local)).unwrap();
            let own = original.stage_bytes(layers.0..layers.1);
            let fetcher =
                if index == 0 { who.clone() } else { node_of(stage["name"].as_str().unwrap(), &names) };
            let fetched = room.hub.bytes_to(&fetcher);
            assert!(
                fetched <= own + own / 100 + 1_000_000,
                "{fetcher}: {fetched} for layers {layers:?} of {own} bytes"
            );
            assert!(fetched * 100 >= own * 99, "{fetcher} has its layers from elsewhere: {fetched} of {own}");
        }
    }
    assert!(room.hub.log().iter().all(|served| !served.token_leaked));
}

/// The worker that a node's name belongs to.
fn node_of(shown: &str, names: &[String]) -> String {
    names
        .iter()
        .find(|name| shown.starts_with(&format!("{name}-")))
        .unwrap_or_else(|| panic!("{shown}"))
        .clone()
}

#[test]
fn rings_of_one_safetensors_file_fetch_their_own_layers() {
    let room = Room::safetensors(1);
    every_node_fetches_its_own(&room, "org/toy", room.folder.path().to_str().unwrap());
}

#[test]
fn rings_of_many_safetensors_files_fetch_their_own_layers() {
    let room = Room::safetensors(6);
    every_node_fetches_its_own(&room, "org/toy", room.folder.path().to_str().unwrap());
}

#[test]
fn rings_of_a_gguf_file_fetch_their_own_layers() {
    let room = Room::new(|folder| {
        model().write_gguf(&folder.join("toy-F16.gguf"), GgufType::F16).unwrap();
        model().write_gguf_split(folder, "toy-Q8_0", GgufType::Q8_0, 2).unwrap();
    });
    let local = room.folder.path().join("toy-F16.gguf");
    every_node_fetches_its_own(&room, "org/toy:F16", local.to_str().unwrap());
}

#[test]
fn nodes_of_one_computer_share_what_they_fetch() {
    let room = Room::safetensors(2);
    let args = ["run", "--json", "--raw", "--max-tokens", "8", PROMPT, "--model"];
    let alone = room.json("alone", &[&args[..], &[room.folder.path().to_str().unwrap()]].concat());
    let ring = room.json("ring", &[&args[..], &["org/toy", "--nodes", "3"]].concat());
    assert_eq!((&ring["token_ids"], &ring["logits_hash"]), (&alone["token_ids"], &alone["logits_hash"]));
    assert_eq!(room.hub.bytes_again(), 0);
    assert_eq!(ring["model"], "org/toy");
}

#[test]
fn a_new_user_pulls_looks_runs_and_prunes() {
    let room = Room::safetensors(2);
    room.hub.require_token("me");
    let pulled = room.json("me", &["pull", "org/toy", "--layers", "3..6", "--json"]);
    assert_eq!((&pulled["layers"], &pulled["bytes"]), (&json!([3, 6]), &pulled["bytes_fetched"]));
    let listed = room.json("me", &["models", "--json"]);
    let held = &listed["fetched"][0];
    assert_eq!((&held["name"], &held["models"][0]["layers_held"]), (&json!("org/toy"), &json!([[3, 6]])));
    assert_eq!(held["commit"], pulled["commit"]);
    let plan = ["plan", "--alone", "--json", "--model", "org/toy"];
    let planned = room.json("me", &plan);
    let to_fetch = planned["to_fetch_bytes"][0].as_u64().unwrap();
    assert!(to_fetch > 0 && to_fetch < held["models"][0]["bytes"].as_u64().unwrap());
    let pulled = room.json("me", &["pull", "org/toy", "--json"]);
    assert_eq!(pulled["bytes_fetched"], to_fetch);
    assert_eq!(room.json("me", &plan)["to_fetch_bytes"], json!([0]));
    assert_eq!(room.hub.bytes_again(), 0);
    // All is here: no Hub is needed any more.
    let mut offline =
        room.command("me", &["run", "--raw", "--max-tokens", "4", "--model", "org/toy", PROMPT]);
    let finished = Proc::spawn(offline.env("HF_HUB_OFFLINE", "1")).unwrap().finish(SOON).unwrap();
    assert!(finished.status.success(), "{finished:?}");
    let pruned = room.json("me", &["prune", "--keep", "1TB", "--json"]);
    assert_eq!(pruned["removed"], json!([]));
    let pruned = room.json("me", &["prune", "--keep", "0", "--json"]);
    assert_eq!((&pruned["removed"][0]["name"], &pruned["bytes_left"]), (&json!("org/toy"), &json!(0)));
    assert_eq!(room.json("me", &["models", "--json"])["fetched"], json!([]));
    let says =
        |args: &[&str]| Proc::spawn(&mut room.command("me", args)).unwrap().finish(SOON).unwrap().stdout;
    assert!(says(&["pull", "org/toy", "--layers", "0..2"]).contains("layers 0..2 of 10 are here"));
    assert!(says(&["models"]).contains("0..2 of 10"));
    assert!(says(&["plan", "--alone", "--model", "org/toy"]).contains("to fetch before it starts: "));
    assert!(says(&["prune", "--keep", "0"]).contains("removed org/toy"));
}

#[test]
fn what_cannot_be_fetched_is_said_in_one_line() {
    let room = Room::new(|folder| {
        model().write_gguf(&folder.join("toy-F16.gguf"), GgufType::F16).unwrap();
        model().write_gguf(&folder.join("toy-Q8_0.gguf"), GgufType::Q8_0).unwrap();
    });
    let refused = |who: &str, args: &[&str], words: &[&str]| {
        let finished = Proc::spawn(&mut room.command(who, args)).unwrap().finish(SOON).unwrap();
        assert!(!finished.status.success() && finished.stdout.is_empty(), "{finished:?}");
        assert!(
            words.iter().all(|word| finished.stderr.contains(word)),
            "{args:?} {words:?}: {}",
            finished.stderr
        );
        assert!(!finished.stderr.contains("hf_secret"), "a token is shown: {}", finished.stderr);
    };
    refused("hf_secret", &["pull", "org/toy"], &["several models", "org/toy:toy-F16.gguf"]);
    refused("hf_secret", &["pull", "org/toy:Q4_K_M"], &["no Q4_K_M", "org/toy:toy-Q8_0.gguf"]);
    refused("hf_secret", &["pull", "org/none"], &["org/none", "check its name"]);
    refused("hf_secret", &["pull", "org/toy:F16", "--layers", "5..11"], &["0..10"]);
    room.hub.require_token("another");
    refused("hf_secret", &["pull", "org/toy:F16"], &["HF_TOKEN"]);
    room.hub.trouble(|_| Trouble::Busy(Some(100_000)));
    refused("hf_secret", &["pull", "org/toy:F16"], &["100000 s"]);
}

/// The numbers of a sequence that looks like none.
fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn a_process_that_is_killed_while_it_fetches_goes_on_where_it_was() {
    let room = Room::new(|folder| {
        let model = model().with_config("intermediate_size", 4096.into());
        model.write_hf(folder, Storage::F32).unwrap();
    });
    let mut random = random(5);
    // About a second for all of it, whoever asks.
    room.hub.trouble(
        |request| {
            if request.store { Trouble::Slow(Duration::from_micros(200)) } else { Trouble::None }
        },
    );
    let mut killed = 0;
    let pull = ["pull", "org/toy", "--json"];
    let total = loop {
        let mut process = Proc::spawn(&mut room.command("me", &pull)).unwrap();
        let at = room.hub.bytes_of(".safetensors") + 2_000_000 + random(8_000_000);
        let waited = swarm_testkit::wait_for(SOON, "some bytes", || {
            room.hub.bytes_of(".safetensors") >= at || !process.is_running()
        });
        waited.unwrap();
        if !process.is_running() {
            let finished = process.finish(SOON).unwrap();
            assert!(finished.status.success(), "{finished:?}");
            break serde_json::from_str::<Value>(finished.stdout.trim()).unwrap()["bytes"].as_u64().unwrap();
        }
        process.kill();
        killed += 1;
    };
    assert!(killed >= 3, "it was killed {killed} times");
    room.hub.trouble(|_| Trouble::None);
    let path = room.json("me", &pull)["path"].as_str().unwrap().to_owned();
    let original = std::fs::read(room.folder.path().join("model.safetensors")).unwrap();
    assert_eq!(std::fs::read(PathBuf::from(path).join("model.safetensors")).unwrap(), original);
    // Of each kill, what was under way: eight pieces of 256 KiB at most, and what the sockets hold.
    let again = room.hub.bytes_again();
    assert!(again / killed < total / 20, "{again} of {total} bytes came again after {killed} kills");
    eprintln!("{again} of {total} bytes came again after {killed} kills");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_what_came_is_kept() {
    let room = Room::safetensors(1);
    let Some(disk) = SmallDisk::mount(room.store("me"), "size=8m") else { return };
    let pull = ["pull", "org/toy", "--json"];
    let finished = Proc::spawn(&mut room.command("me", &pull)).unwrap().finish(SOON).unwrap();
    let said = &finished.stderr;
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    let path = room.store("me").display().to_string();
    assert!(said.contains("the disk is full") && said.contains(&path), "{said}");
    let need: u64 =
        said.split("full: ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
    let listed = room.json("me", &["models", "--json"]);
    let (held, all) =
        (&listed["fetched"][0]["models"][0]["bytes_held"], &listed["fetched"][0]["models"][0]["bytes"]);
    let (held, all) = (held.as_u64().unwrap(), all.as_u64().unwrap());
    // What was on its way when the disk was full is told as needed and not as held.
    assert!(held > 4_000_000 && need >= 1_000_000 && need <= all, "{held} held of {all}, {need} needed");
    disk.grow("size=64m");
    let pulled = room.json("me", &pull);
    let fetched = pulled["bytes_fetched"].as_u64().unwrap();
    assert!(fetched >= all - held && fetched <= all - held + (8 << 18), "{fetched} after {held} of {all}");
    assert_eq!(room.json("me", &pull)["bytes_fetched"], 0);
}
