//! A ring that loses nodes and gets them back: every answer is whole or an error, and the next prompt is answered by
//! whoever is there.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::puppet::{Caller, Puppet};
use common::{Room, alone, answer, config, identity, model, request};
use swarm_kernels::Quant;
use swarm_link::Identity;
use swarm_node::{Engine, EngineConfig, EngineEvent, Finish, Worker, WorkerConfig, WorkerSearch};
use swarm_testkit::lossy::{Relay, Settings};
use swarm_testkit::wait_for;
use swarm_weights::Checkpoint;
use swarm_wire::{Control, Epoch};

/// Long enough for a busy computer.
const SOON: Duration = Duration::from_secs(20);

/// A worker at `port`, 0 for any.
fn worker(identity: &Identity, model: &Path, port: u16) -> Worker {
    let config = WorkerConfig {
        name: "worker1".into(),
        port,
        local_only: true,
        model: Some(model.to_owned()),
        threads: Some(1),
        ..WorkerConfig::default()
    };
    Worker::start(config, identity.another_instance().unwrap(), Arc::new(|_| {})).unwrap()
}

/// Loses the answer that is on its way, with an error that names `node`.
fn lose(engine: &Engine, node: &str, act: impl FnOnce()) {
    let mut generation = engine.generate(request(450)).unwrap();
    assert!(generation.next().is_some());
    act();
    let lost = Instant::now();
    let Finish::Error(why) = generation.finish().finish else { panic!("the answer did not end in an error") };
    assert!(lost.elapsed() < Duration::from_secs(5), "{:?}", lost.elapsed());
    assert!(why.contains(node), "{why}");
}

#[test]
fn the_next_answer_comes_from_those_who_are_left_and_later_from_all() {
    let model = model("llama", 4);
    let want = alone(&model.path, 8);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 3);
    let port = room.workers[1].port();
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    assert_eq!(answer(&engine, 8).token_ids, want.token_ids);
    for _ in 0..2 {
        lose(&engine, "worker1-", || drop(room.workers.remove(1)));
        let healed = answer(&engine, 8);
        assert_eq!((healed.token_ids, healed.logits_hash), (want.token_ids.clone(), want.logits_hash));
        assert_eq!(engine.nodes().len(), 3);
        room.workers.insert(1, worker(&identity, &model.path, port));
        // It takes part from the first prompt on that comes after it was seen.
        wait_for(SOON, "the worker to be seen again", || engine.heal(&|_| {}).unwrap()).unwrap();
        assert_eq!(engine.nodes().len(), 4);
        assert_eq!(answer(&engine, 8).token_ids, want.token_ids);
    }
    // All of them at once: this node answers alone.
    lose(&engine, "worker", || room.workers.clear());
    assert_eq!(answer(&engine, 8).token_ids, want.token_ids);
    assert_eq!(engine.nodes().len(), 1);
}

#[test]
fn a_node_that_is_back_waits_until_nobody_is_answered() {
    let model = model("llama", 3);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 1);
    let port = room.workers[0].port();
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    lose(&engine, "worker0-", || room.workers.clear());
    let mut long = engine.generate(request(480)).unwrap();
    let _back = worker(&identity, &model.path, port);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) && long.next().is_some() {
        assert!(!engine.heal(&|_| {}).unwrap(), "the ring changed under an answer");
    }
    drop(long);
    wait_for(SOON, "the worker to be seen again", || engine.heal(&|_| {}).unwrap()).unwrap();
    assert_eq!(engine.nodes().len(), 2);
    answer(&engine, 5);
}

#[test]
fn layers_that_stay_are_not_read_again() {
    let model = model("llama", 4);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 1);
    let port = room.workers[0].port();
    let halves = EngineConfig { cut: Some(vec![0..2, 2..4]), ..config(&model.path, room.search()) };
    let quantized = EngineConfig { quant: Some(Quant::Q8_0), ..halves };
    let engine = Engine::start(&quantized, &identity, &|_| {}).unwrap();
    let want = answer(&engine, 8);
    assert_ne!(want.logits_hash, alone(&model.path, 8).logits_hash, "weights of eight bits are others");
    lose(&engine, "worker0-", || room.workers.clear());
    let told = Mutex::new(Vec::new());
    let observer = |event| {
        if let EngineEvent::Loading { node, bytes_done, bytes_total, .. } = event {
            told.lock().unwrap().push((node, bytes_done, bytes_total));
        }
    };
    assert!(engine.heal(&observer).unwrap());
    let files = Checkpoint::open(&model.path).unwrap();
    let rest = files.stage_bytes(0..4) - files.stage_bytes(0..2);
    assert_eq!(told.lock().unwrap().last(), Some(&(0, rest, rest)));
    let healed = answer(&engine, 8);
    assert_eq!((healed.token_ids, healed.logits_hash), (want.token_ids.clone(), want.logits_hash));
    // And back again: this node lets go of two layers and reads none.
    told.lock().unwrap().clear();
    let _back = worker(&identity, &model.path, port);
    wait_for(SOON, "the worker to be seen again", || engine.heal(&observer).unwrap()).unwrap();
    assert!(told.lock().unwrap().iter().all(|(node, ..)| *node == 1), "{told:?}");
    assert_eq!(engine.nodes().len(), 2);
    assert_eq!(answer(&engine, 8).logits_hash, want.logits_hash);
}

#[test]
fn layers_that_no_longer_fit_are_named_until_somebody_takes_them() {
    let model = model("llama", 4);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 1);
    let port = room.workers[0].port();
    let roomy = EngineConfig { cut: Some(vec![0..1, 1..4]), ..config(&model.path, room.search()) };
    let needed = {
        let engine = Engine::start(&roomy, &identity, &|_| {}).unwrap();
        engine.placement().stages[0].memory_bytes
    };
    // This node has room for its own layer and not for another.
    let tight = EngineConfig { memory_bytes: Some(needed + needed / 8), ..roomy };
    let engine = Engine::start(&tight, &identity, &|_| {}).unwrap();
    lose(&engine, "worker0-", || room.workers.clear());
    for _ in 0..2 {
        let error = engine.generate(request(3)).map(drop).unwrap_err().chain();
        assert!(error.contains("cannot be placed"), "{error}");
    }
    let _back = worker(&identity, &model.path, port);
    wait_for(SOON, "an answer", || engine.generate(request(3)).is_ok()).unwrap();
    answer(&engine, 5);
}

#[test]
fn a_node_that_serves_somebody_else_by_now_is_done_without() {
    let model = model("llama", 3);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 1);
    let port = room.workers[0].port();
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    lose(&engine, "worker0-", || room.workers.clear());
    answer(&engine, 3);
    let back = worker(&identity, &model.path, port);
    let mut other = Caller::greet(&identity, back.port());
    other.prepare(Caller::order(&model.path, Epoch(7)));
    wait_for(SOON, "the worker to be seen again", || engine.heal(&|_| {}).unwrap()).unwrap();
    assert_eq!(engine.nodes().len(), 1);
    answer(&engine, 3);
    drop(other);
}

/// The way from one worker to the next is cut in one direction, and the coordinator reaches both.
fn cut_between(way: &str) {
    let model = model("llama", 4);
    let want = alone(&model.path, 8);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 3);
    let address = |index: usize| ([127, 0, 0, 1], room.workers[index].port()).into();
    let middle: std::net::SocketAddr = address(1);
    let relay = Relay::to(&middle.to_string(), Settings::default()).unwrap();
    let peers = vec![vec![address(0)], vec![relay.address()], vec![address(2)]];
    let search = WorkerSearch { peers, ..room.search() };
    let engine = Engine::start(&config(&model.path, search), &identity, &|_| {}).unwrap();
    let order = |engine: &Engine| -> Vec<String> {
        engine.nodes().iter().skip(1).map(|node| node.name[..7].to_owned()).collect()
    };
    assert_eq!(order(&engine), ["worker0", "worker1", "worker2"]);
    let mut generation = engine.generate(request(450)).unwrap();
    assert!(generation.next().is_some());
    // Through the relay go the coordinator's control connection and, since then, the neighbour's rows.
    relay.command(&format!("cut {way} newest")).unwrap();
    let cut = Instant::now();
    // Without receipts the answer may come to its end before they are missed.
    let why = match generation.finish().finish {
        Finish::Error(why) => why,
        _ => {
            wait_for(SOON, "the ring to be given up", || engine.fault().is_some()).unwrap();
            engine.fault().unwrap()
        }
    };
    assert!(cut.elapsed() < Duration::from_secs(6), "{way}: {:?}", cut.elapsed());
    let names = ["the link from worker0-", " (layers 1..2) to worker1-", " (layers 2..3)"];
    assert!(names.iter().all(|part| why.contains(part)), "{way}: {why}");
    // Nobody is lost, and the next placement does not go that way.
    assert_eq!(answer(&engine, 8).token_ids, want.token_ids);
    let order = order(&engine);
    assert!(!order.windows(2).any(|pair| pair == ["worker0", "worker1"]), "{order:?}");
    assert_eq!(order.len(), 3, "{order:?}");
}

#[test]
fn a_cut_on_the_way_to_the_next_worker_is_named_and_gone_round() {
    cut_between("up");
}

#[test]
fn a_cut_on_the_way_back_from_the_next_worker_is_named_and_gone_round() {
    cut_between("down");
}

#[test]
fn a_stage_that_gives_up_is_given_another_one() {
    let model = model("llama", 2);
    let identity = identity();
    let puppet = Puppet::start(&identity, "puppet");
    let search = WorkerSearch {
        peers: vec![vec![puppet.address]],
        discover: false,
        at_least: 1,
        at_most: 1,
        within: SOON,
        ..WorkerSearch::default()
    };
    let engine = Engine::start(&config(&model.path, search), &identity, &|_| {}).unwrap();
    // It says that its stage cannot go on, and stays: the next placement has it again, with the next epoch.
    let first = puppet.orders();
    assert_eq!(first.len(), 1);
    puppet.give_up();
    let outcome = engine.generate(request(5)).unwrap().finish();
    let Finish::Error(why) = outcome.finish else { panic!("the puppet cannot answer") };
    assert!(why.contains("puppet") && why.contains("on purpose"), "{why}");
    let reads = AtomicUsize::new(0);
    let observer = |event| {
        if let EngineEvent::Loading { node: 0, .. } = event {
            reads.fetch_add(1, Ordering::SeqCst);
        }
    };
    assert!(engine.heal(&observer).unwrap());
    assert_eq!(reads.load(Ordering::SeqCst), 0, "the same layers were read again");
    assert_eq!(puppet.orders(), [first[0], Epoch(first[0].0 + 1)]);
    assert!(matches!(puppet.told().last(), Some(Control::Start { epoch }) if epoch.0 == first[0].0 + 1));
}
