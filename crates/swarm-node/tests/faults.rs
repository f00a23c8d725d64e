//! What must happen when somebody stops, leaves, dies or misbehaves: every test has a deadline and names its fault.

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::puppet::{Caller, Puppet, ends};
use common::{Room, answer, config, identity, model, request};
use swarm_link::Identity;
use swarm_node::{
    Engine, EngineConfig, Finish, Piece, Worker, WorkerConfig, WorkerEvent, WorkerObserver, WorkerSearch,
};
use swarm_testkit::wait_for;
use swarm_wire::{Control, DataKind, Epoch};

/// A worker on this computer with an observer of the test's own.
fn worker(identity: &Identity, model: &Path, observer: WorkerObserver) -> Worker {
    let config = WorkerConfig {
        local_only: true,
        model: Some(model.to_owned()),
        threads: Some(1),
        ..WorkerConfig::default()
    };
    Worker::start(config, identity.another_instance().unwrap(), observer).unwrap()
}

/// A search for exactly these.
fn at(addresses: &[std::net::SocketAddr]) -> WorkerSearch {
    WorkerSearch {
        peers: addresses.iter().map(|&address| vec![address]).collect(),
        discover: false,
        at_least: addresses.len(),
        at_most: addresses.len(),
        within: Duration::from_secs(8),
        ..WorkerSearch::default()
    }
}

#[test]
fn one_node_hears_a_cancel_while_it_answers() {
    let model = model("llama", 4);
    let engine = Engine::start(&config(&model.path, WorkerSearch::default()), &identity(), &|_| {}).unwrap();
    let mut generation = engine.generate(request(480)).unwrap();
    assert!(generation.next().is_some());
    generation.cancel();
    let outcome = generation.finish();
    assert_eq!(outcome.finish, Finish::Cancelled, "{} tokens", outcome.token_ids.len());
}

#[test]
fn one_node_takes_a_second_request_while_it_answers() {
    let model = model("llama", 4);
    let engine = Engine::start(&config(&model.path, WorkerSearch::default()), &identity(), &|_| {}).unwrap();
    let mut first = engine.generate(request(480)).unwrap();
    assert!(first.next().is_some());
    answer(&engine, 2);
    first.cancel();
    assert_eq!(first.finish().finish, Finish::Cancelled);
}

#[test]
fn a_session_may_fill_a_context_that_is_no_whole_number_of_pages() {
    let model = model("llama", 2);
    let config =
        EngineConfig { context: Some(100), sessions_max: 1, ..config(&model.path, WorkerSearch::default()) };
    let engine = Engine::start(&config, &identity(), &|_| {}).unwrap();
    answer(&engine, 77);
}

#[test]
fn a_stopped_worker_is_noticed_though_its_socket_is_full() {
    let model = model("llama", 2);
    let identity = identity();
    let puppet = Puppet::start(&identity, "puppet");
    let engine = Engine::start(&config(&model.path, at(&[puppet.address])), &identity, &|_| {}).unwrap();
    puppet.stop();
    let stopped = Instant::now();
    // Every request sends its prompt, so that soon no more fits into the socket and a send waits.
    let first = engine.generate(common::request_of(480, 1)).unwrap();
    while engine.nodes().len() == 2 && stopped.elapsed() < Duration::from_secs(20) {
        let _ = engine.generate(common::request_of(480, 1));
    }
    let Finish::Error(fault) = first.finish().finish else { panic!("the puppet cannot answer") };
    assert!(stopped.elapsed() < Duration::from_secs(6), "{:?}: {fault}", stopped.elapsed());
    assert!(fault.contains("puppet") && fault.contains("layers 1..2"), "{fault}");
}

#[test]
fn a_batch_that_is_not_acknowledged_is_missed_though_heartbeats_are_answered() {
    let model = model("llama", 2);
    let identity = identity();
    // It takes the connection for hidden rows and never reads it.
    let puppet = Puppet::start(&identity, "puppet");
    let engine = Engine::start(&config(&model.path, at(&[puppet.address])), &identity, &|_| {}).unwrap();
    let asked = Instant::now();
    let Finish::Error(why) = engine.generate(request(5)).unwrap().finish().finish else {
        panic!("the puppet cannot answer")
    };
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}: {why}", asked.elapsed());
    assert!(why.contains("puppet") && why.contains("did not acknowledge lap 1"), "{why}");
}

#[test]
fn a_batch_that_the_receiver_lost_is_missed_after_a_round_trip() {
    let model = model("llama", 2);
    let identity = identity();
    // Alone on its way an echo finds it; with others behind it their receipts do.
    for (prompt, how) in [(4, "lost lap 1: an echo"), (23, "acknowledged lap 2, but lap 1 is due")] {
        let puppet = Puppet::start(&identity, "puppet");
        puppet.lose(1);
        let engine = Engine::start(&config(&model.path, at(&[puppet.address])), &identity, &|_| {}).unwrap();
        let Finish::Error(why) = engine.generate(common::request_of(prompt, 5)).unwrap().finish().finish
        else {
            panic!("the puppet cannot answer")
        };
        let noticed = puppet.lost_at().expect("a batch was lost").elapsed();
        assert!(noticed < Duration::from_secs(1), "{noticed:?}: {why}");
        assert!(why.contains("puppet") && why.contains("layers 1..2") && why.contains(how), "{why}");
    }
}

#[test]
fn a_stopped_worker_does_not_keep_the_engine_from_ending() {
    let model = model("llama", 2);
    let identity = identity();
    let puppet = Puppet::start(&identity, "puppet");
    let engine = Engine::start(&config(&model.path, at(&[puppet.address])), &identity, &|_| {}).unwrap();
    puppet.stop();
    let began = Instant::now();
    drop(engine);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // Nothing of it waits for the tail's tokens any more.
    wait_for(Duration::from_secs(2), "the tokens' link to close", || puppet.open.load(Ordering::SeqCst) == 0)
        .unwrap();
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

#[test]
fn workers_are_pinged_while_others_are_still_looked_for() {
    let model = model("llama", 3);
    let identity = identity();
    let puppet = Puppet::start(&identity, "puppet");
    // Takes connections and says nothing: the search waits for it.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let search = at(&[puppet.address, silent.local_addr().unwrap()]);
    std::thread::scope(|scope| {
        let pings = puppet.pings.clone();
        let start = scope.spawn(|| Engine::start(&config(&model.path, search), &identity, &|_| {}).map(drop));
        wait_for(Duration::from_secs(2), "a ping", || pings.load(Ordering::SeqCst) > 1).unwrap();
        assert!(!start.is_finished());
        assert!(start.join().unwrap().is_err());
    });
}

#[test]
fn a_worker_that_is_dropped_says_goodbye() {
    let model = model("llama", 2);
    let identity = identity();
    let worker = worker(&identity, &model.path, Arc::new(|_| {}));
    let mut caller = Caller::greet(&identity, worker.port());
    drop(worker);
    assert!(matches!(caller.talk.hear(Duration::from_secs(2)), Ok(Control::Bye)));
    assert!(ends(&mut caller.talk.link, Duration::from_secs(2)));
}

#[test]
fn a_stage_that_panics_is_reported() {
    let model = model("llama", 2);
    let identity = identity();
    let armed = Arc::new(AtomicBool::new(false));
    let trap = armed.clone();
    let observer = move |event: WorkerEvent| {
        let step = matches!(event, WorkerEvent::Stage(swarm_node::StageEvent::Step { .. }));
        assert!(!(step && trap.load(Ordering::SeqCst)), "a panic on purpose");
    };
    let worker = worker(&identity, &model.path, Arc::new(observer));
    let search = at(&[([127, 0, 0, 1], worker.port()).into()]);
    let engine = Engine::start(&config(&model.path, search), &identity, &|_| {}).unwrap();
    armed.store(true, Ordering::SeqCst);
    let outcome = engine.generate(request(20)).unwrap().finish();
    let Finish::Error(why) = outcome.finish else { panic!("{:?}", outcome.finish) };
    assert!(why.contains("panic"), "{why}");
}

#[test]
fn a_stage_takes_each_data_connection_once() {
    let model = model("llama", 2);
    let identity = identity();
    let worker = worker(&identity, &model.path, Arc::new(|_| {}));
    let mut caller = Caller::greet(&identity, worker.port());
    let epoch = Epoch(7);
    caller.prepare(Caller::order(&model.path, epoch));
    // A second of its kind is closed, whether the ring is complete or not, and the stage lives on.
    let mut twins = [caller.connect(epoch, DataKind::Hidden), caller.connect(epoch, DataKind::Hidden)];
    wait_for(Duration::from_secs(5), "one of two links to be closed", || {
        twins.iter_mut().filter_map(|link| ends(link, Duration::from_millis(20)).then_some(())).count() == 1
    })
    .unwrap();
    let tokens = caller.connect(epoch, DataKind::Tokens);
    caller.talk.hear_until(|message| match message {
        Control::Started { .. } => Some(()),
        Control::Refused(refused) => panic!("{}", refused.reason),
        _ => None,
    });
    let mut late = caller.connect(epoch, DataKind::Tokens);
    assert!(ends(&mut late, Duration::from_secs(2)));
    drop((twins, tokens));
}

#[test]
fn rings_of_two_coordinators_have_different_epochs() {
    let model = model("llama", 2);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    // An engine's stage does not take a link that belongs to another coordinator's first placement.
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    let caller = Caller::greet(&identity, room.workers[0].port());
    let mut stray = caller.connect(Epoch(1), DataKind::Hidden);
    assert!(ends(&mut stray, Duration::from_secs(2)));
    answer(&engine, 3);
}

#[test]
fn a_stage_waits_until_the_one_before_it_has_gone() {
    let model = model("llama", 2);
    let identity = identity();
    // The first stage stays in its loading event until it is let go; the second must not begin meanwhile.
    let (let_go, gate) = crossbeam_channel::bounded::<()>(0);
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = log.clone();
    let observer = move |event: WorkerEvent| {
        if let WorkerEvent::Stage(event) = event {
            let loading = matches!(event, swarm_node::StageEvent::Loading { .. });
            let first = loading && seen.lock().unwrap().is_empty();
            seen.lock().unwrap().push(if loading { "loading" } else { "other" });
            if first {
                let _ = gate.recv_timeout(Duration::from_secs(10));
                seen.lock().unwrap().push("released");
            }
        }
    };
    let worker = worker(&identity, &model.path, Arc::new(observer));
    let mut first = Caller::greet(&identity, worker.port());
    first.talk.say(&Control::Prepare(Box::new(Caller::order(&model.path, Epoch(1)))));
    wait_for(Duration::from_secs(5), "the first stage to load", || !log.lock().unwrap().is_empty()).unwrap();
    drop(first);
    let mut second = Caller::greet(&identity, worker.port());
    second.talk.say(&Control::Prepare(Box::new(Caller::order(&model.path, Epoch(2)))));
    assert!(
        !matches!(second.talk.hear(Duration::from_millis(500)), Ok(Control::Loading(_) | Control::Ready(_))),
        "the second stage began beside the first"
    );
    drop(let_go);
    second.talk.hear_until(|message| match message {
        Control::Ready(ready) => (ready.epoch == Epoch(2)).then_some(()),
        Control::Refused(refused) => panic!("{}", refused.reason),
        _ => None,
    });
    let log = log.lock().unwrap();
    let released = log.iter().position(|&what| what == "released").unwrap();
    assert_eq!(log[..released].iter().filter(|&&what| what == "loading").count(), 1, "{log:?}");
}

#[test]
fn layers_that_stay_are_not_read_again() {
    let model = model("llama", 3);
    let identity = identity();
    let reads = Arc::<AtomicUsize>::default();
    let count = reads.clone();
    let observer = move |event| {
        if let WorkerEvent::Stage(swarm_node::StageEvent::Loading { .. }) = event {
            count.fetch_add(1, Ordering::SeqCst);
        }
    };
    let worker = worker(&identity, &model.path, Arc::new(observer));
    let kept = || worker.watch().status().kept_bytes;
    let release = |caller: &mut Caller| {
        caller.talk.say(&Control::Release { reason: "another placement".into() });
        wait_for(Duration::from_secs(5), "the weights to be kept", || kept() > 0).unwrap();
        reads.swap(0, Ordering::SeqCst)
    };
    let mut caller = Caller::greet(&identity, worker.port());
    caller.prepare(Caller::order(&model.path, Epoch(1)));
    assert_eq!(kept(), 0, "they are in use");
    assert!(release(&mut caller) > 0);
    caller.prepare(Caller::order(&model.path, Epoch(2)));
    assert_eq!(release(&mut caller), 0, "the same layers were read again");
    // One that is not needed any more goes; it is read again when it comes back, and nothing else.
    let other = Caller::order(&model.path, Epoch(3));
    let smaller = swarm_wire::Prepare { layers: [2, 3].into(), ..other };
    let before = kept();
    caller.prepare(smaller);
    assert_eq!(release(&mut caller), 0, "a layer that stayed was read again");
    assert!(kept() < before, "a layer that went is still in memory");
    caller.prepare(Caller::order(&model.path, Epoch(4)));
    assert!(release(&mut caller) > 0 && kept() == before);
    // Without the coordinator nothing is kept, also of a stage that ends after it has gone.
    caller.prepare(Caller::order(&model.path, Epoch(5)));
    drop(caller);
    let idle = || worker.watch().status();
    wait_for(Duration::from_secs(5), "everything to be freed", || {
        idle().stage.is_none() && idle().coordinators == 0 && kept() == 0
    })
    .unwrap();
    let mut next = Caller::greet(&identity, worker.port());
    reads.store(0, Ordering::SeqCst);
    next.prepare(Caller::order(&model.path, Epoch(4)));
    assert!(reads.load(Ordering::SeqCst) > 0);
}

#[test]
fn an_order_for_many_threads_gets_as_many_as_there_are_cores() {
    let model = model("llama", 2);
    let identity = identity();
    let worker = worker(&identity, &model.path, Arc::new(|_| {}));
    let mut caller = Caller::greet(&identity, worker.port());
    let order = swarm_wire::Prepare { threads: Some(4000), ..Caller::order(&model.path, Epoch(1)) };
    caller.prepare(order);
    let count = threads();
    assert!(count < 2000, "{count} threads");
}

#[test]
fn a_worker_serves_so_many_connections_and_no_more() {
    let model = model("llama", 2);
    let identity = identity();
    let worker = worker(&identity, &model.path, Arc::new(|_| {}));
    let dial = || {
        let address = ([127, 0, 0, 1], worker.port()).into();
        let settings = swarm_link::LinkSettings::default();
        swarm_link::dial(&[address], &identity, &settings, Duration::from_secs(5)).unwrap()
    };
    // None of them says a word, so each would hold a thread until its first message is overdue.
    let mut links: Vec<_> = (0..80).map(|_| dial()).collect();
    assert!(links.iter_mut().skip(64).all(|link| ends(link, Duration::from_secs(1))));
    let first = links.first_mut().unwrap();
    assert!(!ends(first, Duration::from_millis(50)), "the first had its place");
}

#[test]
fn a_lost_worker_is_named_wherever_it_stood() {
    let model = model("llama", 4);
    let identity = identity();
    for lost in 0..3 {
        let mut room = Room::new(&identity, &model.path, 3);
        let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
        let mut generation = engine.generate(request(450)).unwrap();
        assert!(matches!(generation.next(), Some(Piece { token: Some(_), .. })));
        drop(room.workers.remove(lost));
        let outcome = generation.finish();
        let Finish::Error(why) = outcome.finish else { panic!("{lost}: {:?}", outcome.finish) };
        assert!(why.contains(&format!("worker{lost}-")), "{lost}: {why}");
        let layers = format!("layers {}..{}", lost + 1, lost + 2);
        assert!(why.contains(&layers), "{lost}: {why}");
    }
}

#[test]
fn a_worker_that_floods_its_coordinator_is_let_go() {
    let model = model("llama", 2);
    let identity = identity();
    let puppet = Puppet::chatty(&identity, "puppet", 100_000);
    // The observer is called while the layers are loaded, when nobody reads what workers say.
    let busy = |event| {
        if let swarm_node::EngineEvent::Loading { node: 0, .. } = event {
            let _ = crossbeam_channel::never::<()>().recv_timeout(Duration::from_millis(100));
        }
    };
    let started = Engine::start(&config(&model.path, at(&[puppet.address])), &identity, &busy);
    let error = started.map(drop).unwrap_err().chain();
    assert!(error.contains("more than it was asked for"), "{error}");
}
