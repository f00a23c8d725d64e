//! Weights from other nodes: a worker that has nothing is served, and a byte comes over the internet once.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use swarm_testkit::hub::Trouble;
use swarm_testkit::lossy::{Relay, Settings};
use swarm_testkit::toy::{GgufType, Storage};
use swarm_testkit::{Hub, NetLab, Proc};

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
            // An embedding of many pieces.
            let tied = model()
                .with_config("tie_word_embeddings", true.into())
                .with_config("vocab_size", 8000.into());
            tied.write_hf(folder, Storage::F32.sharded(files)).unwrap();
        });
        let local = room.folder.path().to_str().unwrap();
        let alone = room.json("alone", &[&RUN[..], &[local]].concat());
        for nodes in [2, 3] {
            room.hub.clear_log();
            // So slow that what two nodes need is still on its way to one when the other asks for it.
            room.hub.trouble(|request| match request.store {
                true => Trouble::Slow(Duration::from_millis(1)),
                false => Trouble::None,
            });
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

/// A coordinator that is killed while it serves bytes: what came stays, and its next one goes on from there.
#[test]
fn a_coordinator_that_dies_while_it_serves_bytes_costs_what_was_under_way() {
    let (bench, files) = (Bench::new(), tempfile::tempdir().unwrap());
    model().write_hf(files.path(), Storage::F32).unwrap();
    let path = files.path().to_str().unwrap();
    let alone = bench.json(&[&RUN[..], &[path]].concat());
    let (mut worker, address) = bare_worker(&bench, "one");
    // Eight megabytes take some seconds.
    let slow = Settings { rate: Some(1_500_000), ..Settings::default() };
    let relay = Relay::to(&address, slow).unwrap();
    let far = relay.address().to_string();
    let ring =
        |peer| [&RUN[..], &[path, "--split", "always", "--layers", "0..5,5..10", "--peer", peer]].concat();
    let mut killed = bench.start(&ring(&far));
    worker.expect(SOON, "\"from\":\"peer\"").unwrap();
    let done = worker.expect_line(SOON, "some bytes", |line| {
        line.contains("\"from\":\"peer\"") && event(line)["bytes_done"].as_u64() > Some(2_000_000)
    });
    let done = event(&done.unwrap());
    killed.kill();
    worker.expect(SOON, "\"left\"").unwrap();
    same(&bench.json(&ring(&address)), &alone);
    let rest = event(&worker.expect(SOON, "\"from\":\"peer\"").unwrap())["bytes_total"].as_u64().unwrap();
    let (total, held) = (done["bytes_total"].as_u64().unwrap(), done["bytes_done"].as_u64().unwrap());
    assert!(rest <= total - held, "{rest} of {total} after {held}");
}

const HUB_FOLDER: &str = "SWARM_TEST_HUB_FOLDER";

/// Not a test: what the next one starts in another network namespace. Serves until standard input ends, and then says
/// what it gave.
#[test]
#[ignore = "a process of another test"]
fn hub_of_a_namespace() {
    let Some(folder) = std::env::var_os(HUB_FOLDER) else { return };
    let any = |port| TcpListener::bind((Ipv4Addr::new(10, 78, 0, 4), port)).unwrap();
    let hub = Hub::with(any(8080), any(8081)).unwrap();
    hub.add("org/toy", Path::new(&folder)).unwrap();
    println!("\nserving");
    std::io::stdin().read_to_string(&mut String::new()).unwrap();
    println!("\ngave {} again {}", hub.bytes_of(".safetensors"), hub.bytes_again());
}

#[test]
fn three_computers_of_which_one_has_a_way_to_the_hub() {
    let Some(lab) = NetLab::open(4).unwrap() else { return };
    let (bench, files) = (Bench::new(), tempfile::tempdir().unwrap());
    let tied = model().with_config("tie_word_embeddings", true.into());
    tied.write_hf(files.path(), Storage::F32.sharded(2)).unwrap();
    let alone = bench.json(&[&RUN[..], &[files.path().to_str().unwrap()]].concat());
    // A cable from the coordinator to the Hub, which nobody else can reach.
    lab.add_cable(0, 3).unwrap();
    lab.set_link(3, false).unwrap();
    let mut hub = Command::new(std::env::current_exe().unwrap());
    hub.args(["--exact", "supply::hub_of_a_namespace", "--ignored", "--nocapture"])
        .env(HUB_FOLDER, files.path());
    let mut hub = Proc::spawn(&mut lab.run_in(3, &hub)).unwrap();
    hub.expect(SOON, "serving").unwrap();
    let start = |node: usize, args: &[&str]| {
        let mut command = bench.command(args);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", "http://10.78.0.4:8080");
        command.env("SWARM_OS_CACHE", bench.path(&format!("store-{node}")));
        Proc::spawn(&mut lab.run_in(node, &command)).unwrap()
    };
    let worker = |node: usize| {
        let args = ["worker", "--json", "--name", if node == 1 { "one" } else { "two" }, "--threads", "1"];
        let mut worker = start(node, &args);
        let waiting = event(&worker.expect(SOON, "\"waiting\"").unwrap());
        (worker, format!("{}:{}", lab.address(node), waiting["port"]))
    };
    let ((_one, first), (_two, second)) = (worker(1), worker(2));
    let ring = ["--split", "always", "--peer", &first, "--peer", &second];
    let finished = start(0, &[&RUN[..], &["org/toy"], &ring].concat()).finish(2 * SOON).unwrap();
    assert!(finished.status.success(), "{finished:?}");
    let answer: Value = serde_json::from_str(finished.stdout.trim()).unwrap();
    same(&answer, &alone);
    assert_eq!(answer["nodes"].as_array().unwrap().len(), 3);
    let said = hub.finish(SOON).unwrap().stdout;
    let weights = swarm_weights::Checkpoint::open(files.path()).unwrap().weight_bytes();
    let gave: Vec<u64> = said
        .lines()
        .find(|line| line.starts_with("gave "))
        .unwrap()
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    assert!(
        gave[0] >= weights && gave[0] <= weights + weights / 100 + 1_000_000 && gave[1] == 0,
        "{said} of {weights}"
    );
}

/// A ring whose last stage was fetched by `one`; then another coordinator gives those layers to `two`.
fn layers_move(room: &Room, damage: impl FnOnce(&Path)) {
    let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
    let (_one, first) = room.worker("one");
    let ring = ["--split", "always", "--layers", "0..5,5..10", "--peer", &first];
    same(&room.json("first", &[&RUN[..], &["org/toy"], &ring].concat()), &alone);
    damage(&room.store("one"));
    room.hub.clear_log();
    let (_two, second) = room.worker("two");
    let cut = "here=0..2,one=2..5,two=5..10";
    let ring = ["--split", "always", "--layers", cut, "--peer", &first, "--peer", &second];
    same(&room.json("second", &[&RUN[..], &["org/toy"], &ring].concat()), &alone);
}

#[test]
fn a_worker_takes_layers_from_the_worker_that_has_them() {
    let room = Room::safetensors(2);
    layers_move(&room, |_| {});
    assert_eq!(room.hub.bytes_to("two"), 0);
    // The second coordinator fetched its own layers, and a worker those that nobody has.
    assert_eq!(room.hub.bytes_again(), 0);
    assert!(room.hub.bytes_to("one") > 0 && room.hub.bytes_to("second") > 0);
}

#[test]
fn damaged_layers_of_a_worker_are_refused_and_fetched_from_the_hub() {
    let room = Room::safetensors(1);
    let original = swarm_weights::Checkpoint::open(room.folder.path()).unwrap();
    let tensor = original.read("model.layers.8.mlp.down_proj.weight").unwrap().bytes;
    layers_move(&room, |store| {
        let mut folder = store.join("models--org--toy");
        folder.push(
            std::fs::read_dir(&folder)
                .unwrap()
                .find_map(|entry| {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    (name.len() == 40).then_some(name)
                })
                .unwrap(),
        );
        let file = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.windows(4096).position(|window| window == &tensor[..4096]).unwrap();
        bytes[at + 9] ^= 64;
        std::fs::write(&file, bytes).unwrap();
    });
    let fetched = room.hub.bytes_to("two");
    let stage = original.stage_bytes(5..10);
    assert!(fetched > 0 && fetched < stage, "{fetched} of {stage}");
}

#[test]
fn a_peer_that_is_killed_while_it_serves_is_done_without() {
    let room = Room::safetensors(1);
    let (worker, address) = room.worker("one");
    let pulled = room.json("one", &["pull", "org/toy", "--json"]);
    assert_eq!(pulled["bytes_from_peers"], 0);
    room.hub.clear_log();
    let slow = Settings { rate: Some(1_500_000), ..Settings::default() };
    let relay = Relay::to(&address, slow).unwrap();
    let far = relay.address().to_string();
    let mut pull =
        Proc::spawn(&mut room.command("two", &["pull", "org/toy", "--json", "--peer", &far])).unwrap();
    let store = room.store("two");
    let held = || {
        let listed = room.json("two", &["models", "--json"]);
        listed["fetched"][0]["models"][0]["bytes_held"].as_u64().unwrap_or(0)
    };
    swarm_testkit::wait_for(SOON, "some bytes", || store.is_dir() && held() > 2_000_000).unwrap();
    assert!(pull.is_running(), "{}", pull.output());
    drop(worker);
    let finished = pull.finish(SOON).unwrap();
    assert!(finished.status.success(), "{finished:?}");
    let pulled: Value = serde_json::from_str(finished.stdout.trim()).unwrap();
    let (all, peers) =
        (pulled["bytes_fetched"].as_u64().unwrap(), pulled["bytes_from_peers"].as_u64().unwrap());
    assert!(peers > 2_000_000 && peers < all && room.hub.bytes_to("two") >= all - peers, "{pulled}");
    let file = PathBuf::from(pulled["path"].as_str().unwrap()).join("model.safetensors");
    assert_eq!(
        std::fs::read(file).unwrap(),
        std::fs::read(room.folder.path().join("model.safetensors")).unwrap()
    );
}

#[test]
fn plan_tells_what_each_node_would_fetch_and_prefers_who_has_it() {
    let room = Room::safetensors(1);
    let (_one, first) = room.worker("one");
    let (_two, second) = room.worker("two");
    let ring = ["--split", "always", "--peer", &first, "--peer", &second, "--model", "org/toy"];
    let plan = [&["plan", "--json"][..], &ring].concat();
    let before = room.json("me", &plan);
    let to_fetch = |plan: &Value| -> Vec<u64> {
        plan["to_fetch_bytes"].as_array().unwrap().iter().map(|bytes| bytes.as_u64().unwrap()).collect()
    };
    assert!(to_fetch(&before).iter().all(|bytes| *bytes > 1_000_000), "{before}");
    room.json("one", &["pull", "org/toy", "--json"]);
    let after = room.json("me", &plan);
    let stages = after["stages"].as_array().unwrap();
    for (stage, bytes) in stages.iter().zip(to_fetch(&after)) {
        assert_eq!(bytes == 0, stage["name"] == "one", "{after}");
    }
    let shown =
        Proc::spawn(&mut room.command("me", &[&["plan"][..], &ring].concat())).unwrap().finish(SOON).unwrap();
    let line = shown.stdout.lines().find(|line| line.starts_with("to fetch before it starts")).unwrap();
    assert!(line.contains("two ") && !line.contains("one ") && !line.contains("at most"), "{line}");
}

/// A worker with a complete snapshot, as the Hub's own tools make it.
pub fn worker_with_snapshot(room: &Room, who: &str, commit: &str) -> (Proc, String, PathBuf) {
    let cache = room.bench.path(&format!("snapshots-{who}"));
    let repo = cache.join("models--org--toy");
    let snapshot = repo.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), commit).unwrap();
    for file in std::fs::read_dir(room.folder.path()).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), snapshot.join(file.file_name())).unwrap();
    }
    let args = ["worker", "--local", "--json", "--name", who, "--threads", "1"];
    let mut worker = Proc::spawn(room.command(who, &args).env("HF_HUB_CACHE", &cache)).unwrap();
    let waiting = event(&worker.expect(SOON, "\"waiting\"").unwrap());
    (worker, format!("127.0.0.1:{}", waiting["port"]), snapshot)
}

#[test]
fn whole_files_of_another_tool_are_a_source_for_others() {
    for is_damaged in [false, true] {
        let room = Room::safetensors(2);
        let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
        let pulled = room.json("look", &["pull", "org/toy", "--layers", "0..1", "--json"]);
        let (mut one, first, snapshot) =
            worker_with_snapshot(&room, "one", pulled["commit"].as_str().unwrap());
        let (_two, second) = room.worker("two");
        let cut = "here=0..2,one=2..5,two=5..10";
        let peers = ["--split", "always", "--layers", cut, "--peer", &first, "--peer", &second];
        if is_damaged {
            // It is read, and then it is another file, of the same length and time.
            room.json("look", &[&["plan", "--json", "--model", "org/toy"][..], &peers].concat());
            one.expect(SOON, "\"left\"").unwrap();
            let file = snapshot.join("model-00002-of-00002.safetensors");
            let time = std::fs::metadata(&file).unwrap().modified().unwrap();
            let mut bytes = std::fs::read(&file).unwrap();
            let end = bytes.len();
            bytes[end / 2..].iter_mut().for_each(|byte| *byte ^= 1);
            std::fs::write(&file, bytes).unwrap();
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
        }
        room.hub.clear_log();
        let answer = room.json("me", &[&RUN[..], &["org/toy"], &peers].concat());
        let fetched = room.hub.bytes_of(".safetensors");
        if is_damaged {
            assert!(room.hub.bytes_to("two") > 1_000_000, "what does not match is fetched elsewhere");
        } else {
            same(&answer, &alone);
            assert!(fetched < 100_000, "headers and no weights: {fetched}");
        }
    }
}
