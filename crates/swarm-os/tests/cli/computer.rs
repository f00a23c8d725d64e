//! A computer of the network lab: a namespace, a home, and what its user does there.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use swarm_testkit::{Finished, NetLab, Proc};

use crate::common::{Bench, SOON, event};

/// A computer of the lab.
pub struct Computer<'a> {
    pub bench: Bench,
    pub lab: &'a NetLab,
    pub node: usize,
}

impl<'a> Computer<'a> {
    /// One with a home of its own.
    pub fn new(lab: &'a NetLab, node: usize) -> Self {
        Self { bench: Bench::new(), lab, node }
    }

    pub fn start(&self, args: &[&str]) -> Proc {
        Proc::spawn(&mut self.lab.run_in(self.node, &self.bench.command(args))).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Finished {
        self.start(args).finish(SOON).unwrap()
    }

    /// The same, where somebody sits at a terminal.
    pub fn at_terminal(&self, args: &[&str]) -> Proc {
        let inner = self.bench.command(args);
        let mut command = Command::new("python3");
        command.args(["-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]);
        command.arg(inner.get_program()).args(inner.get_args()).env("TERM", "dumb");
        for (key, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Proc::spawn(&mut self.lab.run_in(self.node, &command)).unwrap()
    }

    /// A question that needs a worker.
    pub fn ask(&self, model: &Path, more: &[&str]) -> Finished {
        let model = model.to_str().unwrap();
        let args = [
            "run",
            "--json",
            "--discover",
            "--split",
            "always",
            "--wait",
            "4",
            "--max-tokens",
            "8",
            "--raw",
            "--model",
            model,
        ];
        self.run(&[&args[..], more, &["the hen in"]].concat())
    }

    pub fn peers(&self) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.run(&["peers", "--json"]).stdout).unwrap();
        list["peers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|peer| peer["name"].as_str().unwrap().to_owned())
            .collect()
    }
}

pub fn code(worker: &mut Proc) -> String {
    let shown = event(&worker.expect(SOON, "\"pairing_code\"").unwrap());
    shown["code"].as_str().unwrap().to_owned()
}

pub fn other_code(code: &str) -> String {
    let start = if code.starts_with('0') { '1' } else { '0' };
    format!("{start}{}", &code[1..])
}

pub fn refused(finished: &Finished, texts: &[&str]) {
    assert_eq!(finished.status.code(), Some(3), "{finished:?}");
    assert_eq!(finished.stdout, "", "{finished:?}");
    texts.iter().for_each(|text| assert!(finished.stderr.contains(text), "{text}: {finished:?}"));
}
