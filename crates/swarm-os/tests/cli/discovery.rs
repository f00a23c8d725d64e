//! Two computers on one network: they find each other by themselves and answer as one does.

use swarm_testkit::{NetLab, Proc};

use crate::common::{Bench, SOON};

#[test]
fn two_computers_find_each_other_and_answer_as_one() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let (here, there) = (Bench::new(), Bench::new());
    let toy = here.toy();
    let model = toy.to_str().unwrap();
    let secret = there.run(&["secret", "export"]).stdout;
    assert!(here.run(&["secret", "import", secret.trim()]).status.success());
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
