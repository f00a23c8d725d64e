//! `swarm-os doctor` on a good network, and on networks with one fault each.

use serde_json::Value;
use swarm_testkit::{NetLab, Proc};

use crate::common::{Bench, SOON, event};

/// What doctor says at `node`, and whether something is broken.
fn look(lab: &NetLab, node: usize, bench: &Bench, more: &[&str]) -> Value {
    let command = bench.command(&[&["doctor", "--json"][..], more].concat());
    let finished = Proc::spawn(&mut lab.run_in(node, &command)).unwrap().finish(SOON).unwrap();
    let report: Value =
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error} {finished:?}"));
    let broken = report["broken"].as_bool().unwrap();
    assert_eq!(finished.status.code(), Some(i32::from(broken)), "{finished:?}");
    report
}

fn next(report: &Value, text: &str) {
    assert!(report["next"].as_str().unwrap().contains(text), "{text:?}: {report:#}");
}

/// A worker of `bench` at `node` that listens on 4747.
fn worker(lab: &NetLab, node: usize, bench: &Bench, model: &str) -> Proc {
    let offer = bench.command(&[
        "worker",
        "--json",
        "--name",
        "kitchen",
        "--port",
        "4747",
        "--threads",
        "1",
        "--model",
        model,
    ]);
    Proc::spawn(&mut lab.run_in(node, &offer)).unwrap()
}

#[test]
fn doctor_measures_a_good_network_and_sees_an_unpaired_worker() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    let alone = look(&lab, 0, &here, &["--wait", "2"]);
    assert_eq!((&alone["machines"], &alone["broken"]), (&serde_json::json!([]), &false.into()), "{alone}");
    next(&alone, "Nobody else was found");
    let mut serving = worker(&lab, 1, &there, toy.to_str().unwrap());
    serving.expect(SOON, "\"pairing_code\"").unwrap();
    let strange = look(&lab, 0, &here, &[]);
    assert_eq!(strange["machines"][0]["state"], "shows_code", "{strange}");
    assert_eq!(strange["broken"], false);
    next(&strange, "type the code");
    drop(serving);
    here.joins(&there);
    let mut serving = worker(&lab, 1, &there, toy.to_str().unwrap());
    serving.expect(SOON, "\"waiting\"").unwrap();
    let good = look(&lab, 0, &here, &[]);
    let machine = &good["machines"][0];
    assert_eq!((&machine["state"], &machine["name"]), (&"member".into(), &"kitchen".into()), "{good:#}");
    let link = &machine["link"];
    assert_eq!(
        (&link["reaches_back"], &link["hears_this"], &machine["announced"]),
        (&true.into(), &true.into(), &true.into())
    );
    assert!(link["round_trip_us_p50"].as_f64().unwrap() > 0.0, "{good:#}");
    assert!(
        link["up_mbit_s"].as_f64().unwrap() > 1.0 && link["down_mbit_s"].as_f64().unwrap() > 1.0,
        "{good:#}"
    );
    assert_eq!((&good["hears_own_multicast"], &good["broken"]), (&true.into(), &false.into()), "{good:#}");
    next(&good, "All is well");
    // Seen from the worker's own computer: the port that others are to reach is the worker's.
    let own = look(&lab, 1, &there, &["--wait", "2"]);
    assert_eq!(own["machines"][0]["own"], true, "{own:#}");
    let addresses =
        own["checks"].as_array().unwrap().iter().find(|check| check["topic"] == "addresses").unwrap();
    assert!(addresses["text"].as_str().unwrap().contains("port 4747"), "{own:#}");
    // In words.
    let words = Proc::spawn(&mut lab.run_in(0, &here.command(&["doctor"]))).unwrap().finish(SOON).unwrap();
    assert!(words.status.success(), "{words:?}");
    for text in ["processor", "memory", "huge pages", "kitchen at", "ms p50", "Mbit/s", "next: All is well"] {
        assert!(words.stdout.contains(text), "{text:?}: {}", words.stdout);
    }
    // A computer that nobody is at.
    let nobody = look(&lab, 0, &here, &["--wait", "1", "--peer", &format!("{}:9", lab.address(1))]);
    assert_eq!(nobody["broken"], true);
    next(&nobody, "Nobody listens at");
}

#[test]
fn doctor_tells_multicast_that_is_blocked_here_from_a_network_that_carries_none() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    here.joins(&there);
    lab.set_multicast(false).unwrap();
    let mut serving = worker(&lab, 1, &there, toy.to_str().unwrap());
    serving.expect(SOON, "\"waiting\"").unwrap();
    let address = format!("{}:4747", lab.address(1));
    let silent = look(&lab, 0, &here, &["--wait", "3", "--peer", &address]);
    let machine = &silent["machines"][0];
    assert_eq!((&machine["state"], &machine["announced"]), (&"member".into(), &false.into()), "{silent:#}");
    assert_eq!(
        (&machine["link"]["hears_this"], &silent["hears_own_multicast"]),
        (&false.into(), &true.into())
    );
    assert_eq!(silent["broken"], true);
    next(&silent, "none goes between this computer and kitchen");
    next(&silent, "phone's hotspot");
    lab.set_multicast(true).unwrap();
    lab.forbid_multicast(0).unwrap();
    let deaf = look(&lab, 0, &here, &["--peer", &address]);
    assert_eq!((&deaf["hears_own_multicast"], &deaf["broken"]), (&false.into(), &true.into()), "{deaf:#}");
    next(&deaf, "The links are good, but multicast is blocked on this computer");
}

#[test]
fn doctor_knows_an_access_point_that_keeps_its_clients_apart() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    here.joins(&there);
    lab.isolate_clients().unwrap();
    let mut serving = worker(&lab, 1, &there, toy.to_str().unwrap());
    serving.expect(SOON, "\"waiting\"").unwrap();
    let apart = look(&lab, 0, &here, &[]);
    let machine = &apart["machines"][0];
    assert_eq!(
        (&machine["state"], &machine["announced"]),
        (&"unreachable".into(), &true.into()),
        "{apart:#}"
    );
    assert_eq!(apart["broken"], true);
    next(&apart, "keeps its clients apart");
    next(&apart, "hotspot");
}

#[cfg(unix)]
#[test]
fn doctor_goes_on_where_secrets_are_exposed_and_says_so_first() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    assert!(bench.run(&["peers"]).status.success());
    let path = bench.home.path().join("swarm.secret");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let finished = bench.run(&["doctor", "--json", "--wait", "1"]);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    next(&report, "chmod 600");
    let topics: Vec<_> = report["checks"].as_array().unwrap().iter().map(|check| &check["topic"]).collect();
    assert!(topics.contains(&&"processor".into()) && topics.contains(&&"memory".into()), "{topics:?}");
}

#[test]
fn interfaces_and_addresses_that_are_not_here() {
    let bench = Bench::new();
    for command in ["doctor", "worker"] {
        bench.refused(
            &[command, "--interface", "no-such-card"],
            2,
            &["--interface", "no-such-card", "there are"],
        );
    }
    bench.refused(&["worker", "--bind", "203.0.113.9"], 2, &["cannot listen on 203.0.113.9"]);
    let toy = bench.toy();
    let args = ["run", "--discover", "--interface", "nowhere0", "--model", toy.to_str().unwrap(), "hi"];
    bench.refused(&args, 2, &["--interface", "nowhere0"]);
}

#[test]
fn a_worker_comes_back_at_its_port_and_a_second_one_takes_another() {
    let bench = Bench::new();
    // A machine of some swarm shows no code: other tests of this computer must not find one.
    assert!(bench.run(&["secret", "export"]).status.success());
    let toy = bench.toy();
    let args = ["worker", "--json", "--threads", "1", "--model", toy.to_str().unwrap()];
    let port =
        |worker: &mut Proc| event(&worker.expect(SOON, "\"waiting\"").unwrap())["port"].as_u64().unwrap();
    let mut first = bench.start(&args);
    let usual = port(&mut first);
    let mut second = bench.start(&args);
    assert_ne!(port(&mut second), usual);
    drop(first);
    let mut again = bench.start(&args);
    assert_eq!(port(&mut again), usual);
}
