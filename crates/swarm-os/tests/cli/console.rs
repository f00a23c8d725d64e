//! The chat console, fed line by line.

use crate::common::{Bench, SOON};

#[test]
fn a_conversation_with_commands() {
    let bench = Bench::new();
    let toy = bench.toy();
    let mut chat =
        bench.start(&["chat", "--nodes", "2", "--max-tokens", "8", "--model", toy.to_str().unwrap()]);
    chat.expect(SOON, "2 nodes").unwrap();
    chat.expect(SOON, "node-2-").unwrap();
    chat.say("/help").unwrap();
    chat.expect(SOON, "/reset").unwrap();
    chat.say("/stats").unwrap();
    chat.expect(SOON, "nothing was answered yet").unwrap();
    chat.say("the hen").unwrap();
    for text in ["tok/s, first token after", "prompt: ", "compute p50", "frames x", "frames x"] {
        chat.expect(SOON, text).unwrap();
    }
    chat.say("/stats").unwrap();
    chat.expect(SOON, "tok/s, first token after").unwrap();
    chat.say("/nodes").unwrap();
    chat.expect(SOON, "round trip").unwrap();
    chat.say("/nonsense").unwrap();
    chat.expect(SOON, "/nonsense is no command").unwrap();
    // Too long for the context: refused, and the conversation goes on.
    chat.say(&"the hen ".repeat(600)).unwrap();
    chat.expect(SOON, "/reset starts a new conversation").unwrap();
    chat.say("/reset").unwrap();
    chat.expect(SOON, "forgotten").unwrap();
    chat.say("in the inn").unwrap();
    chat.expect(SOON, "tok/s").unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
}

#[test]
fn without_workers_it_says_so_once_and_goes_on() {
    let bench = Bench::new();
    let toy = bench.toy();
    // Looking costs the wait; an own swarm keeps other tests' workers out.
    let mut chat =
        bench.start(&["chat", "--wait", "1", "--max-tokens", "4", "--model", toy.to_str().unwrap()]);
    chat.say("the hen").unwrap();
    chat.expect(SOON, "1 node").unwrap();
    chat.expect(SOON, "tok/s").unwrap();
    chat.close_stdin();
    let finished = chat.finish(SOON).unwrap();
    assert!(finished.status.success());
    let told = finished.stderr.matches("no worker was found; this computer answers alone").count();
    assert_eq!(told, 1, "{finished:?}");
}
