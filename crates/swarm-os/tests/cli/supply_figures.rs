//! A figure and not a test: what a transfer of weights costs the tokens beside it, on a link of 100 Mbit/s.
//!
//! `cargo nextest run -p swarm-os --run-ignored only --no-capture -E 'test(tokens_beside_a_transfer)'`, as root, on a
//! quiet computer.

use std::process::Command;

use serde_json::Value;
use swarm_testkit::toy::Storage;
use swarm_testkit::{NetLab, Proc, demo_model, wait_for};

use crate::common::{SOON, event};
use crate::hub::{Room, model};

const ROUNDS: usize = 5;
const RATE: &str = "100mbit";

struct Lap {
    p50: f64,
    p99: f64,
}

/// A long answer of the ring.
fn answer(room: &Room, lab: &NetLab, peer: &str, model: &str) -> Lap {
    let args = [
        "run",
        "--json",
        "--raw",
        "--max-tokens",
        "600",
        "--threads",
        "1",
        "--split",
        "always",
        "--peer",
        peer,
        "--model",
        model,
        "Once upon a time",
    ];
    let mut command = room.command("coordinator", &args);
    let finished = Proc::spawn(&mut lab.run_in(0, command.env("HF_HUB_OFFLINE", "1")))
        .unwrap()
        .finish(2 * SOON)
        .unwrap();
    assert!(finished.status.success(), "{finished:?}");
    let report: Value = serde_json::from_str(finished.stdout.trim()).unwrap();
    if std::env::var_os("SWARM_OS_FIGURE_PARTS").is_some() {
        println!("{}", report["waterfall"]);
    }
    // The longest of a hundred tokens would be noise.
    assert_eq!(report["completion_tokens"], 600, "{report}");
    let ms = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
    Lap { p50: ms("lap_ms_p50"), p99: ms("lap_ms_p99") }
}

/// Bytes of the model that somebody holds.
fn held(room: &Room, who: &str) -> u64 {
    room.json(who, &["models", "--json"])["fetched"][0]["models"][0]["bytes_held"].as_u64().unwrap_or(0)
}

#[test]
#[ignore = "a figure, which takes a minute and a quiet computer"]
fn tokens_beside_a_transfer() {
    let lab = NetLab::new(2).unwrap();
    for node in 0..2 {
        let mut shape = Command::new("tc");
        shape.args([
            "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE, "burst", "32kb", "latency", "50ms",
        ]);
        assert!(lab.run_in(node, &shape).status().unwrap().success());
    }
    let room = Room::new(|folder| {
        let large =
            model().with_config("hidden_size", 256.into()).with_config("intermediate_size", 8192.into());
        large.write_hf(folder, Storage::F32).unwrap();
    });
    room.json("worker", &["pull", "org/toy", "--json"]);
    let smol = demo_model().unwrap();
    let mut worker = room.command("worker", &["worker", "--json", "--name", "den", "--threads", "1"]);
    let mut worker = Proc::spawn(&mut lab.run_in(1, worker.env("HF_HUB_OFFLINE", "1"))).unwrap();
    let waiting = event(&worker.expect(SOON, "\"waiting\"").unwrap());
    let peer = format!("{}:{}", lab.address(1), waiting["port"]);
    // The worker gets its layers, and both learn how fast they are.
    answer(&room, &lab, &peer, smol.to_str().unwrap());
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        alone.push(answer(&room, &lab, &peer, smol.to_str().unwrap()));
        let who = format!("puller-{round}");
        // It knows the commit and the headers before it is cut off from the Hub.
        room.json(&who, &["pull", "org/toy", "--layers", "0..1", "--json"]);
        let mut pull = room.command(&who, &["pull", "org/toy", "--json", "--peer", &peer]);
        let mut pull = Proc::spawn(&mut lab.run_in(0, pull.env("HF_HUB_OFFLINE", "1"))).unwrap();
        let before = held(&room, &who);
        wait_for(SOON, "some bytes", || held(&room, &who) > before + 1_000_000).unwrap();
        let (start, began) = (held(&room, &who), std::time::Instant::now());
        beside.push(answer(&room, &lab, &peer, smol.to_str().unwrap()));
        assert!(pull.is_running(), "the transfer ended before the answer: {}", pull.output());
        let rate = (held(&room, &who) - start) as f64 / 1e6 / began.elapsed().as_secs_f64();
        let (quiet, busy) = (&alone[round], &beside[round]);
        let growth = (busy.p99 / quiet.p99 - 1.0) * 100.0;
        println!(
            "round {round}: lap p50 {:.2} -> {:.2} ms, p99 {:.2} -> {:.2} ms ({growth:+.0} %), transfer at {rate:.1} MB/s",
            quiet.p50, busy.p50, quiet.p99, busy.p99
        );
        drop(pull);
    }
    let median = |laps: &[Lap]| {
        let mut times: Vec<f64> = laps.iter().map(|lap| lap.p99).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (quiet, busy) = (median(&alone), median(&beside));
    println!(
        "median p99 of a token: {quiet:.2} -> {busy:.2} ms ({:+.0} %) on {RATE}",
        (busy / quiet - 1.0) * 100.0
    );
}
