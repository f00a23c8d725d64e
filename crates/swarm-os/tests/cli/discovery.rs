//! Two computers on one network: they find each other by themselves and answer as one does.

use std::collections::BTreeSet;
use std::process::Command;

use swarm_testkit::{NetLab, Proc};

use crate::common::{Bench, SOON, event};

#[test]
fn two_computers_find_each_other_and_answer_as_one() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    let model = toy.to_str().unwrap();
    here.joins(&there);
    let offer = there.command(&["worker", "--json", "--name", "kitchen", "--model", model]);
    let mut worker = Proc::spawn(&mut lab.run_in(1, &offer)).unwrap();
    worker.expect(SOON, "\"waiting\"").unwrap();
    let ask = |more: &[&str]| {
        let args = ["run", "--json", "--max-tokens", "24", "--raw", "--model", model, "the hen in"];
        let finished = Proc::spawn(&mut lab.run_in(0, &here.command(&[&args[..], more].concat()))).unwrap();
        let finished = finished.finish(SOON).unwrap();
        assert!(finished.status.success(), "{finished:?}");
        serde_json::from_str::<serde_json::Value>(&finished.stdout).unwrap()
    };
    let alone = ask(&[]);
    let ring = ask(&["--discover", "--split", "always"]);
    assert_eq!(ring["nodes"].as_array().unwrap().len(), 2);
    assert!(ring["nodes"][1]["name"].as_str().unwrap().starts_with("kitchen-"));
    assert_eq!((&alone["token_ids"], &alone["logits_hash"]), (&ring["token_ids"], &ring["logits_hash"]));
    // And in the original's spelling.
    let chat = here.command(&["--role", "A", "--split", "always", "--model", model, "--max-tokens", "8"]);
    let mut chat = Proc::spawn(&mut lab.run_in(0, &chat)).unwrap();
    chat.expect(SOON, "kitchen-").unwrap();
    chat.say("the hen").unwrap();
    chat.expect(SOON, "frames x").unwrap();
    chat.say("exit").unwrap();
    assert!(chat.wait(SOON).unwrap().success());
    worker.expect(SOON, "\"left\"").unwrap();
}

/// Ports that a namespace listens on, of a table of the kernel.
fn ports(lab: &NetLab, node: usize, table: &str) -> BTreeSet<u64> {
    let mut command = Command::new("cat");
    command.args([format!("/proc/net/{table}"), format!("/proc/net/{table}6")]);
    let shown = Proc::spawn(&mut lab.run_in(node, &command)).unwrap().finish(SOON).unwrap();
    assert!(shown.status.success(), "{shown:?}");
    // sl local_address rem_address st ...; 0A is a TCP socket that listens, 07 any UDP socket.
    let fields = shown.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let open = fields.filter(|fields| matches!(fields.get(3), Some(&("0A" | "07"))));
    open.map(|fields| u64::from_str_radix(fields[1].rsplit(':').next().unwrap(), 16).unwrap()).collect()
}

/// A fresh install offers the port for links and mDNS, nothing else; whoever only chats offers no port at all.
#[test]
fn nothing_listens_but_the_port_for_links_and_mdns() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    let model = toy.to_str().unwrap();
    here.joins(&there);
    let start = |node, bench: &Bench, args: &[&str]| {
        Proc::spawn(&mut lab.run_in(node, &bench.command(args))).unwrap()
    };
    let mut worker = start(1, &there, &["worker", "--json", "--model", model]);
    let port = event(&worker.expect(SOON, "\"waiting\"").unwrap())["port"].as_u64().unwrap();
    let mut chat = start(0, &here, &["chat", "--split", "always", "--workers", "1", "--model", model]);
    chat.expect(SOON, "2 nodes").unwrap();
    assert_eq!(ports(&lab, 1, "tcp"), BTreeSet::from([port]));
    assert_eq!(ports(&lab, 0, "tcp"), BTreeSet::new());
    assert_eq!(ports(&lab, 1, "udp"), BTreeSet::from([5353]));
    assert!(ports(&lab, 0, "udp").is_subset(&BTreeSet::from([5353])));
}
