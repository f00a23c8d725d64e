//! Two nodes of one computer find each other over mDNS.

use std::time::{Duration, Instant};

use swarm_link::{Discovery, DiscoveryEvent, InstanceId, PROTOCOL_VERSION, PeerFound};

const SOON: Duration = Duration::from_secs(10);

fn wait<T>(discovery: &Discovery, what: &str, mut wanted: impl FnMut(&DiscoveryEvent) -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    let mut seen = Vec::new();
    while let Ok(event) = discovery.events().recv_deadline(deadline) {
        if let Some(found) = wanted(&event) {
            return found;
        }
        seen.push(event);
    }
    panic!("not {what} within {SOON:?}; saw {seen:?}");
}

fn wait_for_peer(discovery: &Discovery, instance: InstanceId, port: u16) -> PeerFound {
    wait(discovery, "found", |event| match event {
        DiscoveryEvent::Found(peer) if peer.instance == instance && peer.addresses[0].port() == port => {
            Some(peer.clone())
        }
        DiscoveryEvent::Unavailable { why, .. } => panic!("unavailable: {why}"),
        _ => None,
    })
}

#[test]
fn two_nodes_of_one_computer_find_each_other_and_say_goodbye() {
    let (one, two) = (InstanceId::random().unwrap(), InstanceId::random().unwrap());
    let first = Discovery::start(one).unwrap();
    let second = Discovery::start(two).unwrap();
    first.advertise(4001);
    second.advertise(4002);
    assert_eq!(wait_for_peer(&first, two, 4002).version, u16::from(PROTOCOL_VERSION));
    wait_for_peer(&second, one, 4001);
    assert!(first.peers().iter().all(|peer| peer.instance != one), "a node is not its own peer");
    assert!(first.peers().iter().any(|peer| peer.instance == two));
    drop(second);
    wait(&first, "lost", |event| (*event == DiscoveryEvent::Lost(two)).then_some(()));
    assert!(first.peers().iter().all(|peer| peer.instance != two));
}
