//! A coordinator that cannot ask the Hub: `org/name` from a worker that has it, or can fetch it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use swarm_testkit::toy::{GgufType, Storage};
use swarm_testkit::{Finished, Hub, Proc};

use crate::common::SOON;
use crate::hub::{PROMPT, Room, model};

const RUN: [&str; 9] = ["run", "--json", "--raw", "--max-tokens", "8", "--threads", "1", PROMPT, "--model"];

/// A computer without a way to the Hub: told so, or with nobody at the other end.
fn away(room: &Room, who: &str, args: &[&str], told: bool) -> Command {
    let mut command = room.command(who, args);
    if told {
        command.env("HF_HUB_OFFLINE", "1");
    } else {
        command.env("HF_ENDPOINT", "http://127.0.0.1:9");
    }
    command
}

fn finished(command: &mut Command) -> Finished {
    Proc::spawn(command).unwrap().finish(SOON).unwrap()
}

fn json(command: &mut Command) -> Value {
    let finished = finished(command);
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(finished.stdout.trim()).unwrap()
}

fn same(answer: &Value, alone: &Value) {
    assert_eq!((&answer["token_ids"], &answer["logits_hash"]), (&alone["token_ids"], &alone["logits_hash"]));
}

#[test]
fn a_laptop_without_internet_uses_what_a_worker_has_or_can_fetch() {
    for (told, files) in [(true, 1), (false, 3)] {
        let room = Room::safetensors(files);
        let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
        let (mut worker, address) = room.worker("one");
        room.hub.clear_log();
        let ring = ["org/toy", "--split", "always", "--layers", "0..4,4..10", "--peer", &address];
        let began = Instant::now();
        let answer = json(&mut away(&room, "me", &[&RUN[..], &ring].concat(), told));
        same(&answer, &alone);
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        // The worker fetched its own layers, and on the way those of the laptop.
        assert_eq!(room.hub.bytes_to("me"), 0);
        assert_eq!(room.hub.bytes_again(), 0, "{told}");
        // What came stays here: the next start needs no byte of anybody.
        worker.expect(SOON, "\"left\"").unwrap();
        room.hub.clear_log();
        same(&json(&mut away(&room, "me", &[&RUN[..], &ring].concat(), told)), &alone);
        assert_eq!(room.hub.bytes_of(".safetensors"), 0);
        // All of it, where one node is enough.
        let whole = ["pull", "org/toy", "--json", "--peer", &address];
        let pulled = json(&mut away(&room, "me", &whole, told));
        assert!(pulled["bytes_from_peers"].as_u64() > Some(0), "{pulled}");
        drop(worker);
        same(&json(&mut away(&room, "me", &[&RUN[..], &["org/toy"]].concat(), true)), &alone);
    }
}

#[test]
fn a_worker_without_the_hub_lends_what_it_holds() {
    let room = Room::new(|folder| {
        model().write_gguf_split(folder, "toy-Q8_0", GgufType::Q8_0, 2).unwrap();
        model().write_gguf(&folder.join("toy-F16.gguf"), GgufType::F16).unwrap();
    });
    let file = room.folder.path().join("toy-Q8_0-00001-of-00002.gguf");
    let alone = room.json("alone", &[&RUN[..], &[file.to_str().unwrap()]].concat());
    room.json("one", &["pull", "org/toy:Q8_0", "--json"]);
    let start = |who: &str| {
        let args = ["worker", "--local", "--json", "--name", who, "--threads", "1"];
        let mut worker = Proc::spawn(&mut away(&room, who, &args, true)).unwrap();
        let waiting = crate::common::event(&worker.expect(SOON, "\"waiting\"").unwrap());
        (worker, format!("127.0.0.1:{}", waiting["port"]))
    };
    let ((_one, first), (_two, second)) = (start("one"), start("two"));
    room.hub.clear_log();
    // One that has nothing does not matter.
    let ring = ["org/toy:Q8_0", "--split", "always", "--peer", &first, "--peer", &second];
    same(&json(&mut away(&room, "me", &[&RUN[..], &ring].concat(), true)), &alone);
    assert!(room.hub.log().is_empty());
    // Nobody has this one, and that is said of everybody.
    let none = ["org/toy:F16", "--peer", &first, "--peer", &second, "--peer", "127.0.0.1:9"];
    let refused = finished(&mut away(&room, "other", &[&RUN[..], &none].concat(), true));
    assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(2), ""), "{refused:?}");
    let said = refused.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    for words in
        ["org/toy:F16 is not to be had from any node", &first, &second, "127.0.0.1:9", "HF_HUB_OFFLINE"]
    {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    // Nor does a worker look into paths that somebody names.
    let path = room.folder.path().to_str().unwrap().trim_start_matches('/');
    let refused = finished(&mut away(&room, "other", &[&RUN[..], &[path, "--peer", &first]].concat(), true));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn a_snapshot_of_another_tool_is_lent_as_well() {
    let room = Room::safetensors(2);
    let alone = room.json("alone", &[&RUN[..], &[room.folder.path().to_str().unwrap()]].concat());
    let commit = "ab".repeat(20);
    let (_one, address, _) = crate::supply::worker_with_snapshot(&room, "one", &commit);
    let ring = ["org/toy", "--split", "always", "--peer", &address];
    let answer = json(&mut away(&room, "me", &[&RUN[..], &ring].concat(), true));
    same(&answer, &alone);
    assert!(room.hub.log().is_empty());
    let listed = room.json("me", &["models", "--json", "--peer", &address]);
    assert_eq!(listed["room"]["nodes"][0]["models"][0]["commit"], commit, "{listed}");
    assert_eq!(listed["fetched"][0]["commit"], commit);
}

#[test]
fn a_code_on_the_command_line_comes_before_the_model() {
    let Some(lab) = swarm_testkit::NetLab::open(2).unwrap() else { return };
    let [here, there] = [0, 1].map(|node| crate::computer::Computer::new(&lab, node));
    let files = tempfile::tempdir().unwrap();
    model().write_hf(files.path(), Storage::F32).unwrap();
    let commit = "cd".repeat(20);
    let snapshot = there.bench.path("hub").join("models--org--toy/snapshots").join(&commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(snapshot.join("../../refs")).unwrap();
    std::fs::write(snapshot.join("../../refs/main"), &commit).unwrap();
    for file in std::fs::read_dir(files.path()).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), snapshot.join(file.file_name())).unwrap();
    }
    let mut worker = there.start(&["worker", "--json", "--name", "kitchen", "--threads", "1"]);
    let code = crate::computer::code(&mut worker);
    let run = ["run", "--raw", "--max-tokens", "4", "--threads", "1", "--discover", "--wait", "20"];
    let name = ["--model", "org/toy", PROMPT];
    let refused = here.run(&[&run[..6], &["--discover", "--wait", "3"], &name].concat());
    assert!(!refused.status.success() && refused.stderr.contains("shows a code"), "{refused:?}");
    let answered = here.run(&[&run[..], &["--join", &code], &name].concat());
    assert!(answered.status.success(), "{answered:?}");
    assert!(
        answered.stderr.contains("paired with kitchen") && answered.stderr.contains("has it"),
        "{answered:?}"
    );
    // From now on without a code, and found by itself.
    let listed: Value = serde_json::from_str(&here.run(&["models", "--json"]).stdout).unwrap();
    assert_eq!(listed["room"]["nodes"][0]["models"][0]["name"], "org/toy", "{listed}");
    assert_eq!(listed["fetched"][0]["commit"], commit, "{listed}");
}

#[test]
fn two_versions_in_a_room_are_for_the_user_to_choose_from() {
    let room = Room::safetensors(1);
    room.json("one", &["pull", "org/toy", "--json"]);
    let newer = tempfile::tempdir().unwrap();
    model().with_seed(7).write_hf(newer.path(), Storage::F32).unwrap();
    let hub = Hub::start().unwrap();
    hub.add("org/toy", newer.path()).unwrap();
    let (_one, first) = room.worker("one");
    let args = ["worker", "--local", "--json", "--name", "two", "--threads", "1"];
    let mut two = Proc::spawn(room.command("two", &args).env("HF_ENDPOINT", hub.endpoint())).unwrap();
    let waiting = crate::common::event(&two.expect(SOON, "\"waiting\"").unwrap());
    let second = format!("127.0.0.1:{}", waiting["port"]);
    let ask = |name: &str| {
        let pull = ["pull", name, "--json", "--layers", "0..3", "--peer", &first, "--peer", &second];
        finished(&mut away(&room, "me", &pull, true))
    };
    let refused = ask("org/toy");
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let named = refused.stderr.split("name one of ").nth(1).unwrap().split(" at ").next().unwrap();
    assert!(named.starts_with("org/toy@") && named.len() == 48, "{refused:?}");
    let answered = ask(named);
    assert!(answered.status.success(), "{answered:?}");
}
