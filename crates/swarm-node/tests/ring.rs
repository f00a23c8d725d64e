//! Rings over real sockets in one process: toy models, every cut, several sessions, lost workers.

mod common;

use std::time::{Duration, Instant};

use common::{Room, alone, answer, config, identity, model, request};
use swarm_node::{
    Engine, EngineConfig, Finish, NodeError, Prompt, Request, Sampling, WorkerEvent, WorkerSearch,
};

#[test]
fn every_cut_gives_the_tokens_and_logits_of_one_node() {
    let model = model("llama", 4);
    let want = alone(&model.path, 12);
    let identity = identity();
    let cuts: [&[usize]; 5] = [&[1, 4], &[3, 4], &[1, 2, 4], &[2, 3, 4], &[1, 2, 3, 4]];
    for cut in cuts {
        let room = Room::new(&identity, &model.path, cut.len() - 1);
        let starts = std::iter::once(&0).chain(cut);
        let ranges: Vec<_> = starts.zip(cut).map(|(&start, &end)| start..end).collect();
        let config = EngineConfig { cut: Some(ranges.clone()), ..config(&model.path, room.search()) };
        let engine = Engine::start(&config, &identity, &|_| {}).unwrap();
        assert_eq!(engine.nodes().iter().map(|node| node.layers.clone()).collect::<Vec<_>>(), ranges);
        // Twice, so that a session leaves nothing behind.
        for _ in 0..2 {
            let got = answer(&engine, 12);
            assert_eq!(got.token_ids, want.token_ids, "{cut:?}");
            assert_eq!(got.logits_hash, want.logits_hash, "{cut:?}");
            assert_eq!(got.telemetry.decode.stages.len(), cut.len());
        }
    }
}

#[test]
fn sessions_share_laps_without_changing_each_other() {
    let model = model("qwen3", 4);
    let want = alone(&model.path, 20);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| answer(&engine, 20))).collect();
        for run in runs {
            let got = run.join().unwrap();
            assert_eq!((&got.token_ids, got.logits_hash), (&want.token_ids, want.logits_hash));
        }
    });
}

#[test]
fn sampled_answers_are_equal_too_and_depend_on_the_seed() {
    let model = model("llama", 3);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 2);
    let single = Engine::start(&config(&model.path, WorkerSearch::default()), &identity, &|_| {}).unwrap();
    let ring = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    let sample = |engine: &Engine, seed| {
        let sampling =
            Sampling { temperature: 1.2, top_k: 50, top_p: 0.95, repetition_penalty: 1.1, seed, min_p: 0.01 };
        engine.generate(Request { sampling, ..request(16) }).unwrap().finish().token_ids
    };
    assert_eq!(sample(&single, 1), sample(&ring, 1));
    assert_eq!(sample(&single, 2), sample(&ring, 2));
    assert_ne!(sample(&ring, 1), sample(&ring, 2));
}

#[test]
fn a_lost_worker_ends_the_answer_with_an_error_that_names_it() {
    let model = model("llama", 4);
    let identity = identity();
    let mut room = Room::new(&identity, &model.path, 2);
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    let mut generation = engine.generate(request(400)).unwrap();
    assert!(generation.next().is_some());
    let lost = Instant::now();
    drop(room.workers.pop());
    let outcome = generation.finish();
    assert!(lost.elapsed() < Duration::from_secs(5), "{:?}", lost.elapsed());
    let Finish::Error(why) = outcome.finish else { panic!("finished with {:?}", outcome.finish) };
    assert!(why.contains("worker") || why.contains("tail"), "{why}");
    // The next answer comes from those who are left.
    let want = alone(&model.path, 6);
    let next = answer(&engine, 6);
    assert_eq!((next.token_ids, next.logits_hash), (want.token_ids, want.logits_hash));
    assert_eq!(engine.nodes().len(), 2);
}

#[test]
fn a_dropped_generation_frees_its_session_everywhere() {
    let model = model("llama", 2);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    let config = EngineConfig { sessions_max: 1, ..config(&model.path, room.search()) };
    let engine = Engine::start(&config, &identity, &|_| {}).unwrap();
    let want = answer(&engine, 8);
    for _ in 0..5 {
        let mut generation = engine.generate(request(300)).unwrap();
        assert!(generation.next().is_some());
        drop(generation);
        // The only place is free again once the cancellation has been taken.
        let deadline = Instant::now() + Duration::from_secs(5);
        let next = loop {
            match engine.generate(request(8)) {
                Ok(generation) => break generation.finish(),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        assert_eq!(next.token_ids, want.token_ids);
    }
}

#[test]
fn another_model_is_refused_by_name() {
    let (ours, theirs) = (model("llama", 4), model("mistral", 4));
    let identity = identity();
    let room = Room::new(&identity, &theirs.path, 1);
    let error = Engine::start(&config(&ours.path, room.search()), &identity, &|_| {}).map(drop).unwrap_err();
    assert!(
        matches!(&error, NodeError::Refused { reason, .. } if reason.contains("mistral")),
        "{}",
        error.chain()
    );
}

#[test]
fn another_swarm_is_not_joined() {
    let model = model("llama", 2);
    let room = Room::new(&identity(), &model.path, 1);
    let error =
        Engine::start(&config(&model.path, room.search()), &identity(), &|_| {}).map(drop).unwrap_err();
    assert!(matches!(error, NodeError::NoWorkers(_)), "{}", error.chain());
}

#[test]
fn requests_that_cannot_succeed_are_refused() {
    let model = model("llama", 2);
    let engine = Engine::start(&config(&model.path, WorkerSearch::default()), &identity(), &|_| {}).unwrap();
    let too_long = Request::new(Prompt::Ids(vec![1; 600]));
    assert!(matches!(engine.generate(too_long), Err(NodeError::Request(why)) if why.contains("600")));
    let empty = Request::new(Prompt::Ids(Vec::new()));
    assert!(matches!(engine.generate(empty), Err(NodeError::Request(_))));
    let outside = Request::new(Prompt::Ids(vec![1_000_000]));
    assert!(matches!(engine.generate(outside), Err(NodeError::Request(_))));
    // And the engine still answers.
    answer(&engine, 3);
}

#[test]
fn a_worker_serves_the_next_coordinator() {
    let model = model("llama", 3);
    let want = alone(&model.path, 6);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    for _ in 0..3 {
        let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
        assert_eq!(answer(&engine, 6).token_ids, want.token_ids);
    }
    let left =
        || room.events.lock().unwrap().iter().filter(|e| matches!(e, WorkerEvent::Left { .. })).count();
    swarm_testkit::wait_for(Duration::from_secs(5), "the worker to see all coordinators leave", || {
        left() == 3
    })
    .unwrap();
}

#[test]
fn a_second_coordinator_is_told_that_the_worker_is_taken() {
    let model = model("llama", 2);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    let first = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    let second = identity.another_instance().unwrap();
    let error = Engine::start(&config(&model.path, room.search()), &second, &|_| {}).map(drop).unwrap_err();
    assert!(error.chain().contains("another coordinator"), "{}", error.chain());
    answer(&first, 4);
}

#[test]
fn a_conversation_computes_only_what_is_new_and_says_the_same() {
    let model = model("llama", 4);
    let identity = identity();
    for workers in [0, 2] {
        let room = Room::new(&identity, &model.path, workers);
        let search = if workers == 0 { WorkerSearch::default() } else { room.search() };
        let engine = Engine::start(&config(&model.path, search), &identity, &|_| {}).unwrap();
        assert_eq!(engine.nodes().len(), workers + 1);
        let asked = |ids: &[u32], keep, penalty| {
            let sampling =
                Sampling { temperature: 0.7, repetition_penalty: penalty, seed: 3, ..Sampling::default() };
            let prompt = Prompt::Ids(ids.to_vec());
            let request = Request { prompt, keep, sampling, logits_hash: true, ..request(9) };
            engine.generate(request).unwrap().finish()
        };
        let mut ids: Vec<u32> = (1..80).collect();
        // The sampling may change between turns: what it needs to know of the past comes with the turn.
        for (turn, penalty) in [1.0, 1.2, 1.0].into_iter().enumerate() {
            let got = asked(&ids, true, penalty);
            assert_eq!(got.telemetry.prompt_kept > 0, turn > 0, "{turn}");
            let rows = ids.len() + got.token_ids.len() - 1;
            ids.extend(&got.token_ids);
            ids.extend([5, 6, 7]);
            let again = asked(&ids, true, penalty);
            assert_eq!(again.telemetry.prompt_kept, rows, "{turn}");
            // Anew, on an engine that has kept nothing of it.
            asked(&[9, 9], false, penalty);
            let anew = asked(&ids, false, penalty);
            assert_eq!(anew.telemetry.prompt_kept, 0);
            assert_eq!((&again.token_ids, again.logits_hash), (&anew.token_ids, anew.logits_hash), "{turn}");
            asked(&ids, true, penalty);
        }
    }
}
