//! Weights from other nodes: a worker that has nothing is served, and a byte comes over the internet once.

use std::path::{Path, PathBuf};

use serde_json::Value;
use swarm_testkit::Proc;
use swarm_testkit::toy::{GgufType, Storage};

use crate::common::{Bench, SOON, event};
use crate::hub::{PROMPT, Room, model};

const RUN: [&str; 9] = ["run", "--json", "--raw", "--max-tokens", "8", "--threads", "1", PROMPT, "--model"];

/// A worker without a model and without the Hub, with a store of its own.
fn bare_worker(bench: &Bench, who: &str) -> (Proc, String) {
    let mut command = bench.command(&["worker", "--local", "--json", "--name", who, "--threads", "1"]);
    command.env("SWARM_OS_CACHE", bench.path(&format!("store-{who}")));
    let mut worker = Proc::spawn(&mut command).unwrap();
    let waiting = event(&worker.expect(SOON, "\"waiting\"").unwrap());
    (worker, format!("127.0.0.1:{}", waiting["port"]))
}

fn same(answer: &Value, alone: &Value) {
    assert_eq!((&answer["token_ids"], &answer["logits_hash"]), (&alone["token_ids"], &alone["logits_hash"]));
}

#[test]
fn a_worker_with_nothing_is_served_by_a_coordinator_with_files() {
    type Write = fn(&Path) -> PathBuf;
    let writes: [Write; 3] = [
        |folder| {
            let file = folder.join("my model (1).gguf");
            model().write_gguf(&file, GgufType::Q8_0).unwrap();
            file
        },
        |folder| {
            model().write_gguf_split(folder, "toy", GgufType::F16, 2).unwrap();
            folder.join("toy-00001-of-00002.gguf")
        },
        |folder| {
            model().write_hf(folder, Storage::F32.sharded(3)).unwrap();
            folder.to_owned()
        },
    ];
    for write in writes {
        let (bench, files) = (Bench::new(), tempfile::tempdir().unwrap());
        let path = write(files.path());
        let path = path.to_str().unwrap();
        let alone = bench.json(&[&RUN[..], &[path]].concat());
        let (mut one, first) = bare_worker(&bench, "one");
        let (_two, second) = bare_worker(&bench, "two");
        let ring = ["--split", "always", "--layers", "0..2,2..6,6..10", "--peer", &first, "--peer", &second];
        same(&bench.json(&[&RUN[..], &[path], &ring].concat()), &alone);
        one.expect(SOON, "\"from\":\"peer\"").unwrap();
        // What came stays: the next time nothing is fetched, and more layers are the difference.
        same(&bench.json(&[&RUN[..], &[path], &ring].concat()), &alone);
        let before = one.stdout().matches("\"from\":\"peer\"").count();
        same(&bench.json(&[&RUN[..], &[path], &ring].concat()), &alone);
        assert_eq!(one.stdout().matches("\"from\":\"peer\"").count(), before, "{}", one.stdout());
    }
}

#[test]
fn the_internet_serves_each_byte_once() {
    for files in [1, 3] {
        let room = Room::new(|folder| {
            let tied = model().with_config("tie_word_embeddings", true.into());
            tied.write_hf(folder, Storage::F32.sharded(files)).unwrap();
        });
        let local = room.folder.path().to_str().unwrap();
        let alone = room.json("alone", &[&RUN[..], &[local]].concat());
        for nodes in [2, 3] {
            room.hub.clear_log();
            let names: Vec<String> = (1..nodes).map(|node| format!("worker-{nodes}-{node}")).collect();
            let workers: Vec<(Proc, String)> = names.iter().map(|who| room.worker(who)).collect();
            let mut ring = vec!["--split", "always"];
            workers.iter().for_each(|(_, address)| ring.extend(["--peer", address]));
            let who = format!("coordinator-{nodes}");
            same(&room.json(&who, &[&RUN[..], &["org/toy"], &ring].concat()), &alone);
            assert_eq!(room.hub.bytes_again(), 0, "{nodes} nodes");
            let weights = room.hub.bytes_of(".safetensors");
            let original = swarm_weights::Checkpoint::open(room.folder.path()).unwrap().weight_bytes();
            assert!(
                weights >= original && weights <= original + original / 100 + 1_000_000,
                "{weights} of {original}"
            );
            for who in names {
                assert!(room.hub.bytes_to(&who) > 0, "{who} fetches its own layers");
            }
        }
    }
}

#[test]
fn a_worker_without_a_way_to_the_hub_gets_its_layers_from_the_coordinator() {
    let room = Room::safetensors(2);
    let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
    let (_one, first) = bare_worker(&room.bench, "one");
    let (_two, second) = bare_worker(&room.bench, "two");
    let ring = ["--split", "always", "--peer", &first, "--peer", &second];
    same(&room.json("coordinator", &[&RUN[..], &["org/toy"], &ring].concat()), &alone);
    assert_eq!(room.hub.bytes_again(), 0);
    assert_eq!(
        room.hub.bytes_to("coordinator"),
        room.hub.log().iter().map(|served| served.bytes).sum::<u64>()
    );
}

#[test]
fn corrupt_bytes_of_the_coordinator_are_refused_and_fetched_from_the_hub() {
    let room = Room::safetensors(1);
    let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
    let pulled = room.json("coordinator", &["pull", "org/toy", "--json"]);
    let file = PathBuf::from(pulled["path"].as_str().unwrap()).join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // Two thirds into the file are layers of the second stage, whose file order is by name.
    let original = swarm_weights::Checkpoint::open(room.folder.path()).unwrap();
    let tensor = original.read("model.layers.8.mlp.down_proj.weight").unwrap().bytes;
    let at = bytes.windows(4096).position(|window| window == &tensor[..4096]).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    room.hub.clear_log();
    let (worker, address) = room.worker("worker");
    let ring = ["--layers", "0..5,5..10", "--split", "always", "--peer", &address];
    same(&room.json("coordinator", &[&RUN[..], &["org/toy"], &ring].concat()), &alone);
    // One piece, and nothing else.
    let fetched = room.hub.bytes_to("worker");
    assert!(fetched > 0 && fetched <= 300_000, "{fetched}");
    assert!(worker.stderr().contains("not what their digest says"), "{}", worker.stderr());
}
