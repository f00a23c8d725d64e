//! What the tests of this room share: toy models, workers in this process, requests.

// Each test file is a program of its own and uses its own part of this.
#![allow(dead_code)]

pub mod puppet;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use swarm_link::{Identity, SwarmSecret};
use swarm_node::{
    Engine, EngineConfig, Finish, Outcome, Prompt, Request, Split, Worker, WorkerConfig, WorkerEvent,
    WorkerSearch,
};
use swarm_testkit::toy::{self, Storage};

/// A toy model on disk.
pub struct Model {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
}

pub fn model(name: &str, layers: usize) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    toy::spec(name).with_layers(layers).write_hf(&path, Storage::F32).unwrap();
    Model { path, _dir: dir }
}

pub fn identity() -> Identity {
    Identity::ephemeral(SwarmSecret::random().unwrap()).unwrap()
}

/// Workers of the same swarm as `identity`, on this computer only.
pub struct Room {
    pub workers: Vec<Worker>,
    pub events: Arc<Mutex<Vec<WorkerEvent>>>,
}

impl Room {
    pub fn new(identity: &Identity, model: &Path, count: usize) -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let start = |index: usize| {
            let config = WorkerConfig {
                name: format!("worker{index}"),
                local_only: true,
                model: Some(model.to_owned()),
                threads: Some(1),
                ..WorkerConfig::default()
            };
            let seen = events.clone();
            let observer = Arc::new(move |event| seen.lock().unwrap().push(event));
            Worker::start(config, identity.another_instance().unwrap(), observer).unwrap()
        };
        Self { workers: (0..count).map(start).collect(), events }
    }

    pub fn search(&self) -> WorkerSearch {
        WorkerSearch {
            peers: self.workers.iter().map(|worker| vec![([127, 0, 0, 1], worker.port()).into()]).collect(),
            discover: false,
            at_least: self.workers.len(),
            at_most: self.workers.len(),
            within: Duration::from_secs(10),
            ..WorkerSearch::default()
        }
    }
}

pub fn config(model: &Path, search: WorkerSearch) -> EngineConfig {
    EngineConfig {
        threads: Some(1),
        worker_threads: Some(1),
        chunk: Some(5),
        search,
        split: Split::Always,
        // Toy models are too small to measure, and some workers of these tests are made of cardboard.
        measure: false,
        ..EngineConfig::new(model.to_str().unwrap())
    }
}

pub fn request(tokens: usize) -> Request {
    request_of(23, tokens)
}

/// A prompt of `prompt` ids.
pub fn request_of(prompt: u32, tokens: usize) -> Request {
    let ids = (0..prompt).map(|i| (i * 37 + 11) % 250).collect();
    Request {
        max_tokens: Some(tokens),
        logits_hash: true,
        ignore_end: true,
        ..Request::new(Prompt::Ids(ids))
    }
}

pub fn answer(engine: &Engine, tokens: usize) -> Outcome {
    let outcome = engine.generate(request(tokens)).unwrap().finish();
    assert_eq!(outcome.finish, Finish::Length);
    assert_eq!(outcome.token_ids.len(), tokens);
    outcome
}

pub fn alone(model: &Path, tokens: usize) -> Outcome {
    let engine = Engine::start(&config(model, WorkerSearch::default()), &identity(), &|_| {}).unwrap();
    answer(&engine, tokens)
}
