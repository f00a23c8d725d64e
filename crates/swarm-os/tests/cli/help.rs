//! What `--help` says, as it was last agreed on.

use crate::common::Bench;

fn help(args: &[&str]) -> String {
    let finished = Bench::new().run(args);
    assert!(finished.status.success(), "{finished:?}");
    finished.stdout
}

#[test]
fn help_of_the_whole() {
    insta::assert_snapshot!(help(&["--help"]));
}

#[test]
fn help_of_every_command() {
    let commands = ["worker", "chat", "run", "plan", "verify", "demo", "bench", "perplexity", "status"];
    let more = ["top", "models", "pull", "prune", "pair", "doctor", "peers", "forget", "secret"];
    for command in commands.into_iter().chain(more) {
        insta::assert_snapshot!(command, help(&[command, "--help"]));
    }
}

#[test]
fn the_version_names_what_two_nodes_must_share() {
    let version = help(&["--version"]);
    assert!(version.contains("protocol ") && version.contains("numerics swarm-numerics-"), "{version}");
}

#[test]
fn roles_are_commands() {
    assert_eq!(help(&["--role", "B", "--help"]), help(&["worker", "--help"]));
    assert_eq!(help(&["--role=a", "--help"]), help(&["chat", "--help"]));
    let finished = Bench::new().run(&["--role", "C"]);
    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.stderr.contains("A, B"), "{finished:?}");
    // No arguments: the help, and the exit code of bad usage.
    assert_eq!(Bench::new().run(&[]).status.code(), Some(2));
}
