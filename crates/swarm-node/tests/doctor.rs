//! What `doctor` finds out about members and strangers, and what a member lets itself be asked.

mod common;

use std::net::TcpListener;
use std::time::Duration;

use common::{Room, identity, model};
use swarm_link::{LinkSettings, Remembered, Scope, dial};
use swarm_node::doctor::{Look, NetworkReport, PeerState, Silence, examine};
use swarm_wire::{CONTROL_BYTES_MAX, Control, Examine, Examined};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn members_are_measured_and_others_are_told_apart() {
    let (own, other) = (identity(), identity());
    let model = model("llama", 2);
    let (room, strangers) = (Room::new(&own, &model.path, 2), Room::new(&other, &model.path, 1));
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut named = room.search().peers;
    named.extend(strangers.search().peers);
    named.push(vec![closed]);
    // The first worker is remembered as well, and somebody who is there no more.
    let state = tempfile::tempdir().unwrap();
    let mut remembered = Remembered::load(state.path());
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    remembered.note_reached(gone, &[9; 32]).unwrap();
    remembered.note_reached(named[0][0], &[8; 32]).unwrap();
    let look = Look {
        identity: &own,
        named: &named,
        state_dir: Some(state.path()),
        scope: Scope::default(),
        port: None,
        within: Duration::from_millis(500),
    };
    let NetworkReport { peers, port, .. } = examine(&look).unwrap();
    assert_ne!(port, 0);
    let at =
        |address| peers.iter().find(|peer| peer.address == address).unwrap_or_else(|| panic!("{peers:?}"));
    for addresses in &named[..2] {
        let peer = at(addresses[0]);
        let PeerState::Member(link) = &peer.state else { panic!("{peer:?}") };
        assert!(
            peer.name.as_deref().is_some_and(|name| name.starts_with("worker")) && peer.named,
            "{peer:?}"
        );
        assert!(link.round_trip_us_p50 > 0.0 && link.round_trip_us_p99 >= link.round_trip_us_p50, "{link:?}");
        assert!(link.up_mbit_s > 1.0 && link.down_mbit_s > 1.0 && link.reaches_back, "{link:?}");
        // A worker of one command listens to no announcements.
        assert_eq!(link.hears, None);
        assert!(link.memory_bytes > 0);
    }
    assert!(matches!(at(named[2][0]).state, PeerState::OtherSwarm), "{peers:?}");
    assert!(matches!(at(closed).state, PeerState::Unreachable(Silence::Closed)), "{peers:?}");
    assert!(peers.iter().all(|peer| peer.address != gone), "{peers:?}");
    assert_eq!(peers.iter().filter(|peer| peer.address == named[0][0]).count(), 1);
}

#[test]
fn a_member_answers_so_many_questions_and_says_what_it_can_reach() {
    let identity = identity();
    let model = model("llama", 2);
    let room = Room::new(&identity, &model.path, 1);
    let own = identity.another_instance().unwrap();
    let mut link = dial(&room.search().peers[0], &own, &LinkSettings::default(), SOON).unwrap();
    link.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.receiver.set_idle_timeout(Some(SOON)).unwrap();
    let mut ask = |question: Examine| -> Option<Examined> {
        let mut bytes = Vec::new();
        Control::Examine(question).encode(&mut bytes).unwrap();
        link.sender.send(&[&bytes]).ok()?;
        link.receiver.receive(&mut bytes).ok()?;
        match Control::decode(&bytes).unwrap() {
            Control::Examined(answer) => Some(*answer),
            other => panic!("{other:?}"),
        }
    };
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = open.local_addr().unwrap().port();
    let answer = ask(Examine { id: 7, reach: Some(port), ..Examine::default() }).unwrap();
    assert_eq!((answer.id, answer.reaches, answer.hears), (7, Some(true), None));
    assert_eq!(answer.hello.name, "worker0");
    drop(open);
    let answer =
        ask(Examine { reach: Some(port), hear: Some("no name".into()), ..Examine::default() }).unwrap();
    assert_eq!((answer.reaches, answer.hears), (Some(false), None));
    let answer = ask(Examine { padding_bytes: 128 * 1024, ..Examine::default() }).unwrap();
    assert_eq!(answer.padding.len(), 128 * 1024);
    let more = (0..1000).take_while(|_| ask(Examine::default()).is_some()).count();
    assert!((10..200).contains(&more), "{more}");
}
