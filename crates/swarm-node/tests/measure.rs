//! Nodes and links that are measured before layers are placed, and nodes that are left out.

mod common;

use std::time::Duration;

use common::{Room, alone, answer, config, identity, model};
use swarm_link::{LinkSettings, dial};
use swarm_node::{Engine, EngineConfig, Objective, Split};
use swarm_ring::SpeedSource;
use swarm_wire::Control;

#[test]
fn every_node_and_every_link_of_the_ring_is_measured() {
    let model = model("llama", 6);
    let want = alone(&model.path, 6);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 2);
    let config = EngineConfig { measure: true, ..config(&model.path, room.search()) };
    let engine = Engine::start(&config, &identity, &|_| {}).unwrap();
    let plan = engine.plan();
    assert_eq!(plan.placement.stages.len(), 3);
    for stage in &plan.placement.stages {
        assert_eq!(stage.source, SpeedSource::Probe);
        assert!(stage.hop_measured && stage.hop_ms > 0.0 && stage.predicted_ms > 0.0, "{stage:?}");
    }
    assert!(plan.alternatives.iter().any(|other| other.label == "alone" && other.placement.is_some()));
    assert_eq!(answer(&engine, 6).token_ids, want.token_ids);
}

#[test]
fn who_is_left_out_is_free_for_somebody_else() {
    let model = model("llama", 4);
    let identity = identity();
    let room = Room::new(&identity, &model.path, 1);
    let auto = EngineConfig { split: Split::Auto, measure: true, ..config(&model.path, room.search()) };
    let first = Engine::start(&auto, &identity, &|_| {}).unwrap();
    // A toy gains nothing from a second node.
    assert_eq!(first.nodes().len(), 1);
    assert_eq!(first.plan().left_out, ["worker0"]);
    let other = identity.another_instance().unwrap();
    let second = Engine::start(&config(&model.path, room.search()), &other, &|_| {}).unwrap();
    assert_eq!(second.nodes().len(), 2);
    // Both answer, also after the worker that the first one let go has lost its other coordinator.
    assert_eq!(answer(&second, 8).token_ids, answer(&first, 8).token_ids);
    drop(second);
    answer(&first, 8);
    let plan =
        swarm_node::plan(&EngineConfig { objective: Some(Objective::Throughput), ..auto }, &other, &|_| {});
    assert_eq!(plan.unwrap().plan.placement.stages.len(), 2);
}

#[test]
fn a_link_is_measured_so_long_and_no_longer() {
    let identity = identity();
    let model = model("llama", 2);
    let room = Room::new(&identity, &model.path, 1);
    let address = room.search().peers[0].clone();
    let own = identity.another_instance().unwrap();
    let mut link = dial(&address, &own, &LinkSettings::default(), Duration::from_secs(5)).unwrap();
    let mut bytes = Vec::new();
    Control::Probe.encode(&mut bytes).unwrap();
    link.sender.send(&[&bytes]).unwrap();
    link.receiver.set_idle_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answers = 0;
    while answers < 1000 && link.sender.send(&[b"measure me".as_slice()]).is_ok() {
        if link.receiver.receive(&mut bytes).is_err() {
            break;
        }
        assert_eq!(bytes, b"measure ");
        answers += 1;
    }
    assert!((30..200).contains(&answers), "{answers}");
    // And it is a node of the ring as before.
    let engine = Engine::start(&config(&model.path, room.search()), &identity, &|_| {}).unwrap();
    answer(&engine, 3);
}
