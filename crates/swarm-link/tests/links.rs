//! Links over real sockets: good ones, refused ones, silent ones, and the end of them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use swarm_link::{
    Blame, Connection, Identity, LinkError, LinkSettings, Listener, PROTOCOL_VERSION, Refusal, SwarmSecret,
    dial,
};
use swarm_testkit::wait_for;

const SOON: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(5);

fn node(secret: u8) -> Identity {
    Identity::ephemeral(SwarmSecret::from_bytes([secret; 32])).unwrap()
}

fn listen(identity: &Identity) -> Listener {
    Listener::bind(0, identity, &LinkSettings::default()).unwrap()
}

fn local(listener: &Listener) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port()))
}

fn reach(identity: &Identity, listener: &Listener) -> Result<Connection, LinkError> {
    dial(&[local(listener)], identity, &LinkSettings::default(), TIMEOUT)
}

/// Both ends of a link, with these settings on both.
fn link_with(settings: &LinkSettings) -> (Connection, Connection) {
    let listener = Listener::bind(0, &node(1), settings).unwrap();
    let ours = dial(&[local(&listener)], &node(1), settings, TIMEOUT).unwrap();
    (ours, listener.connections().recv_timeout(SOON).unwrap())
}

fn link() -> (Connection, Connection) {
    link_with(&LinkSettings::default())
}

fn hear(connection: &mut Connection) -> Vec<u8> {
    let mut message = Vec::new();
    connection.receiver.receive(&mut message).unwrap();
    message
}

fn refusal(listener: &Listener) -> Refusal {
    listener.refusals().recv_timeout(SOON).unwrap()
}

#[test]
fn a_link_carries_messages_both_ways_and_names_both_ends() {
    let (one, two) = (node(1), node(1));
    let listener = listen(&two);
    let mut ours = reach(&one, &listener).unwrap();
    let mut theirs = listener.connections().recv_timeout(SOON).unwrap();
    assert_eq!((ours.peer.node, ours.peer.instance), (two.node_id(), two.instance()));
    assert_eq!((theirs.peer.node, &theirs.peer.static_key), (one.node_id(), one.public_key()));
    assert_eq!(ours.peer.address, local(&listener));
    assert!(theirs.peer.address.ip().is_loopback() && theirs.peer.address.is_ipv4());
    ours.sender.send(&[b"to ", b"them"]).unwrap();
    assert_eq!(hear(&mut theirs), b"to them");
    theirs.sender.send(&[b"to us"]).unwrap();
    assert_eq!(hear(&mut ours), b"to us");
    let stats = listener.stats();
    assert_eq!((stats.accepted, stats.authenticated, stats.refused, stats.pending), (1, 1, 0, 0));
}

#[test]
fn both_halves_work_on_threads_of_their_own() {
    let (ours, theirs) = link();
    let body: Vec<u8> = (0..700_000u32).map(|index| index as u8).collect();
    thread::scope(|scope| {
        for mut end in [ours, theirs] {
            let body = &body;
            scope.spawn(move || {
                thread::scope(|scope| {
                    scope.spawn(|| {
                        for _ in 0..20 {
                            end.sender.send(&[body]).unwrap();
                        }
                    });
                    let mut message = Vec::new();
                    for _ in 0..20 {
                        end.receiver.receive(&mut message).unwrap();
                        assert!(message == *body);
                    }
                });
            });
        }
    });
}

#[test]
fn another_swarm_is_refused_on_both_sides_and_the_user_told_what_to_do() {
    let listener = listen(&node(1));
    let error = reach(&node(2), &listener).unwrap_err();
    assert!(matches!(error, LinkError::Refused { .. }), "{error}");
    assert_eq!(error.blame(), Blame::Peer);
    assert!(error.to_string().contains("swarm-os secret import"), "{error}");
    let refused = refusal(&listener);
    assert!(matches!(refused.error, LinkError::Refused { .. }), "{}", refused.error);
    assert!(listener.connections().is_empty());
    assert_eq!(listener.stats().refused, 1);
}

#[test]
fn wrong_secrets_cost_the_guesser_time_and_an_honest_node_still_gets_in() {
    let listener = listen(&node(1));
    let began = Instant::now();
    for _ in 0..5 {
        assert!(reach(&node(2), &listener).is_err());
    }
    // 0 + 100 + 200 + 400 + 800 ms.
    assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
    reach(&node(1), &listener).unwrap();
}

#[test]
fn a_silent_stranger_is_dropped_after_three_seconds() {
    let listener = listen(&node(1));
    let began = Instant::now();
    let mut silent = TcpStream::connect(local(&listener)).unwrap();
    let mut dripping = TcpStream::connect(local(&listener)).unwrap();
    thread::scope(|scope| {
        // A byte now and then must not extend the deadline.
        scope.spawn(|| {
            for byte in b"SWRM\x01\x00".iter().cycle() {
                if dripping.write_all(&[*byte]).is_err() || began.elapsed() > SOON {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        silent.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(silent.read(&mut [0; 10]).unwrap_or(0), 0);
        let waited = began.elapsed();
        assert!((Duration::from_millis(2900)..Duration::from_millis(6000)).contains(&waited), "{waited:?}");
        for _ in 0..2 {
            let refused = refusal(&listener);
            assert!(
                matches!(refused.error, LinkError::HandshakeTimeout { waited_ms: 3000, .. }),
                "{}",
                refused.error
            );
        }
        assert!(began.elapsed() < Duration::from_millis(6000));
    });
    wait_for(SOON, "places to be free", || listener.stats().pending == 0).unwrap();
}

#[test]
fn a_hundred_silent_strangers_do_not_stop_a_good_node() {
    let listener = listen(&node(1));
    let silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(local(&listener)).unwrap()).collect();
    let began = Instant::now();
    reach(&node(1), &listener).unwrap();
    assert!(began.elapsed() < Duration::from_millis(2900), "{:?}", began.elapsed());
    listener.connections().recv_timeout(SOON).unwrap();
    let stats = listener.stats();
    assert!(stats.evicted >= 92 && stats.pending <= 8, "{stats:?}");
    drop(silent);
}

#[test]
fn strangers_with_other_protocols_are_told_nothing() {
    let listener = listen(&node(1));
    for hello in [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), vec![0; 5000], b"SWRM\x01\x07".repeat(10)] {
        let mut stream = TcpStream::connect(local(&listener)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(&hello).unwrap();
        let mut answer = Vec::new();
        // The unread rest of what we sent may turn the close into a reset.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
        assert!(matches!(refusal(&listener).error, LinkError::NotSwarm { .. }));
    }
    // Right so far, then noise: only the handshake was answered, and nothing after it failed.
    let mut stream = TcpStream::connect(local(&listener)).unwrap();
    stream.write_all(b"SWRM\x01\x00").unwrap();
    stream.write_all(&[0x55; 48]).unwrap();
    assert!(matches!(refusal(&listener).error, LinkError::Refused { .. }));
}

/// A server that says `answer` to whoever connects.
fn impostor(answer: &'static [u8]) -> (SocketAddr, thread::JoinHandle<()>) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let serve = move || {
        let (mut stream, _) = socket.accept().unwrap();
        let mut hello = [0; 54];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(answer).unwrap();
    };
    (address, thread::spawn(serve))
}

#[test]
fn what_is_not_a_node_is_named() {
    let settings = LinkSettings::default();
    let try_at = |answer| {
        let (address, server) = impostor(answer);
        let error = dial(&[address], &node(1), &settings, TIMEOUT).unwrap_err();
        server.join().unwrap();
        error
    };
    assert!(matches!(try_at(b"HTTP/1.1 400 Bad Request\r\n\r\n"), LinkError::NotSwarm { .. }));
    assert!(matches!(try_at(b""), LinkError::HungUp { .. }));
    let error = try_at(b"SWRM\x09\x00");
    assert!(matches!(error, LinkError::OtherVersion { theirs: 9, ours: PROTOCOL_VERSION, .. }), "{error}");
}

#[test]
fn a_newer_node_learns_this_version() {
    let listener = listen(&node(1));
    let mut stream = TcpStream::connect(local(&listener)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"SWRM\x09\x00").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.get(..5), Some(b"SWRM\x01".as_slice()));
    assert!(matches!(refusal(&listener).error, LinkError::OtherVersion { theirs: 9, .. }));
}

#[test]
fn crossed_dials_give_two_links() {
    let (one, two) = (node(1), node(1));
    let (at_one, at_two) = (listen(&one), listen(&two));
    for _ in 0..10 {
        let (mut from_one, mut from_two) = thread::scope(|scope| {
            let first = scope.spawn(|| reach(&one, &at_two).unwrap());
            let second = scope.spawn(|| reach(&two, &at_one).unwrap());
            (first.join().unwrap(), second.join().unwrap())
        });
        let mut to_two = at_two.connections().recv_timeout(SOON).unwrap();
        let mut to_one = at_one.connections().recv_timeout(SOON).unwrap();
        from_one.sender.send(&[b"one"]).unwrap();
        from_two.sender.send(&[b"two"]).unwrap();
        assert_eq!((hear(&mut to_two), hear(&mut to_one)), (b"one".to_vec(), b"two".to_vec()));
    }
}

#[test]
fn a_node_that_reaches_itself_notices_and_one_that_shares_its_folder_is_a_peer() {
    let one = node(1);
    let listener = listen(&one);
    let error = reach(&one, &listener).unwrap_err();
    assert!(matches!(error, LinkError::OwnAddress { .. }), "{error}");
    reach(&one.another_instance().unwrap(), &listener).unwrap();
}

#[test]
fn closing_from_another_thread_ends_a_blocked_receive_at_once() {
    let (mut ours, mut theirs) = link();
    let closer = ours.closer.clone();
    let (error, waited) = thread::scope(|scope| {
        let blocked = scope.spawn(|| ours.receiver.receive(&mut Vec::new()).unwrap_err());
        thread::sleep(Duration::from_millis(100));
        let began = Instant::now();
        closer.close();
        (blocked.join().unwrap(), began.elapsed())
    });
    assert!(matches!(error, LinkError::ClosedHere), "{error}");
    assert!(waited < Duration::from_secs(2), "{waited:?}");
    assert!(matches!(ours.sender.send(&[b"late"]), Err(LinkError::ClosedHere)));
    assert!(matches!(theirs.receiver.receive(&mut Vec::new()), Err(LinkError::Closed)));
    closer.close();
}

#[test]
fn dropping_both_halves_closes_the_link_though_a_closer_lives() {
    let (ours, mut theirs) = link();
    let Connection { sender, receiver, closer, .. } = ours;
    drop((sender, receiver));
    assert!(matches!(theirs.receiver.receive(&mut Vec::new()), Err(LinkError::Closed)));
    closer.close();
}

#[test]
fn silence_is_reported_and_the_link_lives_on() {
    let (mut ours, mut theirs) = link();
    ours.receiver.set_idle_timeout(Some(Duration::from_millis(50))).unwrap();
    let began = Instant::now();
    let error = ours.receiver.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, LinkError::Idle { waited_ms: 50 }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(2));
    theirs.sender.send(&[b"still here"]).unwrap();
    ours.receiver.set_idle_timeout(None).unwrap();
    assert_eq!(hear(&mut ours), b"still here");
}

#[test]
fn a_peer_that_takes_nothing_ends_a_send() {
    let settings = LinkSettings {
        write_timeout: Duration::from_millis(200),
        message_bytes_max: 64 << 20,
        ..Default::default()
    };
    let (mut ours, _theirs) = link_with(&settings);
    let began = Instant::now();
    let body = vec![0; 64 << 20];
    let error = ours.sender.send(&[&body]).unwrap_err();
    assert!(matches!(error, LinkError::WriteTimeout { waited_ms: 200 }), "{error}");
    assert!(began.elapsed() < SOON);
    assert!(matches!(ours.sender.send(&[b"x"]), Err(LinkError::Broken)));
}

#[test]
fn limits_hold_on_both_ends_and_can_be_changed() {
    let (mut ours, mut theirs) = link_with(&LinkSettings { message_bytes_max: 100, ..Default::default() });
    assert!(matches!(ours.sender.send(&[&[0; 101]]), Err(LinkError::SendTooLong { .. })));
    ours.sender.set_message_bytes_max(1000);
    theirs.receiver.set_message_bytes_max(1000);
    ours.sender.send(&[&[1; 101]]).unwrap();
    assert_eq!(hear(&mut theirs), [1; 101]);
    theirs.receiver.set_message_bytes_max(100);
    ours.sender.send(&[&[1; 101]]).unwrap();
    let error = theirs.receiver.receive(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, LinkError::MessageTooLong { bytes: 101, bytes_max: 100 }), "{error}");
    assert_eq!(error.blame(), Blame::Peer);
}

#[test]
fn a_port_in_use_is_named() {
    let listener = listen(&node(1));
    let error = Listener::bind(listener.port(), &node(1), &LinkSettings::default()).unwrap_err();
    assert!(matches!(error, LinkError::PortInUse { port } if port == listener.port()), "{error}");
    assert!(error.to_string().contains(&listener.port().to_string()), "{error}");
}

#[test]
fn a_closed_listener_frees_its_port_and_keeps_its_links() {
    let listener = listen(&node(1));
    let mut ours = reach(&node(1), &listener).unwrap();
    let mut theirs = listener.connections().recv_timeout(SOON).unwrap();
    let silent = TcpStream::connect(local(&listener)).unwrap();
    wait_for(SOON, "the silent one", || listener.stats().pending == 1).unwrap();
    let (port, began) = (listener.port(), Instant::now());
    drop(listener);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let again = Listener::bind(port, &node(1), &LinkSettings::default()).unwrap();
    assert_eq!(again.port(), port);
    ours.sender.send(&[b"on"]).unwrap();
    assert_eq!(hear(&mut theirs), b"on");
    drop(silent);
}

#[test]
fn the_address_that_answers_wins_over_closed_silent_and_strange_ones() {
    let listener = listen(&node(1));
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        gone.local_addr().unwrap()
    };
    // 192.0.2.0/24 is reserved for documentation: nobody answers there.
    let nowhere = SocketAddr::from(([192, 0, 2, 1], 9));
    let all = [nowhere, closed, mute.local_addr().unwrap(), local(&listener)];
    let began = Instant::now();
    let connection = dial(&all, &node(1), &LinkSettings::default(), TIMEOUT).unwrap();
    assert_eq!(connection.peer.address, local(&listener));
    assert!(began.elapsed() < TIMEOUT, "{:?}", began.elapsed());
}

#[test]
fn nobody_there_is_said_in_time() {
    let closed = {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        gone.local_addr().unwrap()
    };
    let error = dial(&[closed], &node(1), &LinkSettings::default(), TIMEOUT).unwrap_err();
    assert!(matches!(error, LinkError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&closed.to_string()), "{error}");
    assert!(matches!(dial(&[], &node(1), &LinkSettings::default(), TIMEOUT), Err(LinkError::NoAddress)));
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let began = Instant::now();
    let error =
        dial(&[mute.local_addr().unwrap()], &node(1), &LinkSettings::default(), Duration::from_millis(300));
    assert!(matches!(error, Err(LinkError::HandshakeTimeout { .. })), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn ipv6_and_ipv4_reach_one_listener() {
    let listener = listen(&node(1));
    if listener.address().is_ipv4() {
        eprintln!("this computer has no IPv6: only IPv4 was tried");
        return;
    }
    let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, listener.port()));
    let error = dial(&[v6], &node(1), &LinkSettings::default(), TIMEOUT);
    assert!(error.is_ok(), "{error:?}");
    reach(&node(1), &listener).unwrap();
}
