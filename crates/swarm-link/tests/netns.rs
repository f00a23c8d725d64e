//! Nodes on a small real network: network namespaces on one bridge, a process in each.
//!
//! Needs root and `ip`; without them the tests fail and say so. Each process is this test program again,
//! started for the one ignored test at the end.

use std::fmt::Write as _;
use std::io::BufRead;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use swarm_link::{
    Connection, Discovery, DiscoveryEvent, Identity, InstanceId, LinkSettings, Listener, PEERS_MAX, Scope,
    SwarmSecret, dial, parse_peer,
};
use swarm_testkit::{NetLab, Proc, wait_for};

const ROLE: &str = "SWARM_LINK_TEST_ROLE";
const SOON: Duration = Duration::from_secs(20);

fn start(lab: &NetLab, node: usize, role: &str) -> Proc {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "one_process_of_the_network"]).env(ROLE, role);
    Proc::spawn(&mut lab.run_in(node, &command)).unwrap()
}

/// The last word of the next line that contains `text`.
fn word(process: &mut Proc, text: &str) -> String {
    process.expect(SOON, text).unwrap().split(' ').next_back().unwrap_or_default().to_owned()
}

/// What the finder knows of the node that it looks for.
fn addresses(process: &mut Proc) -> Vec<String> {
    process.say("addresses").unwrap();
    let list = word(process, "addresses are");
    list.split(',').filter(|address| *address != "are").map(str::to_owned).collect()
}

fn number(process: &mut Proc, command: &str) -> usize {
    process.say(command).unwrap();
    word(process, &format!("{command} is")).parse().unwrap()
}

#[test]
fn a_node_in_one_namespace_finds_and_reaches_one_in_another() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    let address = word(&mut finder, "reached it at");
    assert!(address.starts_with(&format!("{}:", lab.address(0))), "{address}");
    finder.expect(SOON, "it answered: hello").unwrap();
    // A goodbye is heard; a second node of the same computer is found as well.
    let mut second = start(&lab, 0, "serve");
    let other = word(&mut second, "serving as");
    finder.expect(SOON, &format!("found {other}")).unwrap();
    assert!(second.finish(SOON).unwrap().status.success());
    finder.expect(SOON, &format!("lost {other}")).unwrap();
    // One that lives answers when doubted, one that was killed does not.
    finder.say("doubt").unwrap();
    thread::sleep(Duration::from_secs(3));
    assert!(!finder.output().contains(&format!("lost {instance}")));
    server.kill();
    finder.say("doubt").unwrap();
    finder.expect(SOON, &format!("lost {instance}")).unwrap();
    assert!(finder.finish(SOON).unwrap().status.success());
}

#[test]
fn without_any_address_but_link_local_ones_nodes_meet_all_the_same() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    if !Path::new("/proc/sys/net/ipv6").exists() {
        eprintln!("SKIPPED: this system has no IPv6");
        return;
    }
    for node in 0..2 {
        let mut command = Command::new("ip");
        command.args(["-4", "addr", "flush", "dev", "eth0"]);
        assert!(lab.run_in(node, &command).status().unwrap().success());
    }
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    let address = word(&mut finder, "reached it at");
    assert!(address.starts_with("[fe80::") && address.contains('%'), "{address}");
    finder.expect(SOON, "it answered: hello").unwrap();
    // Typed, with the name of the interface instead of its number.
    let (start, port) =
        address.split_once('%').zip(address.rsplit_once(':')).map(|(a, b)| (a.0, b.1)).unwrap();
    finder.say(&format!("type {start}%eth0]:{port}")).unwrap();
    assert_eq!(word(&mut finder, "reached it at"), address);
}

#[test]
fn a_network_that_is_missing_is_told_and_one_that_comes_back_is_used() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let set = |state: &str| {
        for device in ["lo", "eth0"] {
            let mut command = Command::new("ip");
            command.args(["link", "set", device, state]);
            assert!(lab.run_in(1, &command).status().unwrap().success());
        }
    };
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    set("down");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    finder.expect(SOON, "unavailable").unwrap();
    set("up");
    finder.expect(SOON, "it answered: hello").unwrap();
    wait_for(SOON, "the good news", || finder.output().contains("available again")).unwrap();
}

#[test]
fn junk_floods_and_forged_goodbyes_do_not_hurt() {
    let Some(lab) = NetLab::open(3).unwrap() else { return };
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    finder.expect(SOON, "it answered: hello").unwrap();
    let mut stranger = start(&lab, 2, &format!("junk {instance}"));
    stranger.expect(SOON, "junk sent").unwrap();
    for what in ["malformed", "no_room"] {
        wait_for(SOON, what, || number(&mut finder, what) > 0).unwrap();
    }
    let peers = number(&mut finder, "peers");
    assert!((1..=PEERS_MAX).contains(&peers), "{peers}");
    // A reader that falls behind in the flood loses its channel and begins again; that must not go on.
    assert!(number(&mut finder, "restarts") <= 2);
    // What the flood made this process hold is bounded.
    let memory = number(&mut finder, "peak_mib");
    assert!(memory < 200, "{memory} MiB");
    // One that comes while the list is full of services that do not exist is found all the same.
    let mut late = start(&lab, 0, "serve");
    let late = word(&mut late, "serving as").to_owned();
    wait_for(SOON + SOON, "the newcomer", || finder.output().contains(&format!("found {late}"))).unwrap();
    wait_for(SOON, "a new beginning", || {
        number(&mut finder, "renewals") + number(&mut finder, "restarts") > 0
    })
    .unwrap();
    assert!(!finder.output().contains('\u{1b}'), "a stranger's name reached the terminal");
    // Whether a goodbye in the name of the server is believed or not, its link does not care.
    stranger.say("forge a goodbye").unwrap();
    stranger.expect(SOON, "goodbye forged").unwrap();
    finder.say("again").unwrap();
    finder.expect(SOON, "it answered: again").unwrap();
}

#[test]
fn a_node_with_several_interfaces_is_one_peer_and_is_reached_over_any_of_them() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    lab.add_cable(0, 1).unwrap();
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    finder.expect(SOON, "it answered: hello").unwrap();
    let both = |list: &[String]| {
        ["10.77.0.1:", "10.78.0.1:"].iter().all(|ip| list.iter().any(|address| address.starts_with(ip)))
    };
    let mut list = Vec::new();
    wait_for(SOON, "both addresses", || {
        list = addresses(&mut finder);
        both(&list)
    })
    .unwrap();
    let mut once = list.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), list.len(), "{list:?}");
    assert_eq!(number(&mut finder, "peers"), 1);
    // One cable is cut: the other will do.
    lab.set_link(0, false).unwrap();
    finder.say("dial").unwrap();
    let reached = word(&mut finder, "reached it at");
    assert!(!reached.starts_with("10.77."), "{reached}");
    lab.set_link(0, true).unwrap();
    // One that uses only one interface is announced there, with what it has there, and hears nothing elsewhere.
    let mut scoped = start(&lab, 0, "serve-on eth1");
    let scoped_instance = word(&mut scoped, "serving as");
    let mut other = start(&lab, 1, &format!("find {scoped_instance}"));
    other.expect(SOON, "it answered: hello").unwrap();
    let list = addresses(&mut other);
    assert!(list.iter().any(|address| address.starts_with("10.78.0.1:")), "{list:?}");
    assert!(!list.iter().any(|address| address.starts_with("10.77.")), "{list:?}");
    let mut bound = start(&lab, 0, "serve-at 10.77.0.1");
    let bound_instance = word(&mut bound, "serving as");
    let mut third = start(&lab, 1, &format!("find {bound_instance}"));
    third.expect(SOON, "it answered: hello").unwrap();
    let list = addresses(&mut third);
    assert!(list.iter().all(|address| address.starts_with("10.77.0.1:")), "{list:?}");
}

#[test]
fn a_node_that_changes_its_address_is_found_at_the_new_one() {
    let Some(lab) = NetLab::open(2).unwrap() else { return };
    let mut server = start(&lab, 0, "serve-on eth0");
    let instance = word(&mut server, "serving as");
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    finder.expect(SOON, "it answered: hello").unwrap();
    lab.move_to(0, 50).unwrap();
    wait_for(SOON + SOON, "the new address alone", || {
        let list = addresses(&mut finder);
        let starts = |start: &str| list.iter().any(|address| address.starts_with(start));
        starts("10.77.0.50:") && !starts("10.77.0.1:")
    })
    .unwrap();
    finder.say("dial").unwrap();
    let reached = word(&mut finder, "reached it at");
    assert!(reached.starts_with("10.77.0.50:"), "{reached}");
}

#[test]
fn a_stranger_of_the_same_name_does_not_hide_a_node() {
    let Some(lab) = NetLab::open(3).unwrap() else { return };
    let mut server = start(&lab, 0, "serve");
    let instance = word(&mut server, "serving as");
    let mut impostor = start(&lab, 2, &format!("impostor {instance}"));
    // Renamed, it still knows its own announcement.
    impostor.expect(SOON, "it hears itself").unwrap();
    let mut finder = start(&lab, 1, &format!("find {instance}"));
    finder.expect(SOON, "it answered: hello").unwrap();
    wait_for(SOON, "both services", || {
        let list = addresses(&mut finder);
        [0, 2]
            .iter()
            .all(|&node| list.iter().any(|address| address.starts_with(&format!("{}:", lab.address(node)))))
    })
    .unwrap();
    assert_eq!(number(&mut finder, "peers"), 1);
    finder.say("dial").unwrap();
    let reached = word(&mut finder, "reached it at");
    assert!(!reached.starts_with(&format!("{}:", lab.address(2))), "{reached}");
    // Its goodbye is not the node's.
    assert!(impostor.finish(SOON).unwrap().status.success());
    wait_for(SOON, "one service", || {
        let list = addresses(&mut finder);
        !list.is_empty() && !list.iter().any(|address| address.starts_with(&format!("{}:", lab.address(2))))
    })
    .unwrap();
    assert!(!finder.output().contains(&format!("lost {instance}")), "{}", finder.output());
}

#[test]
#[ignore = "one half of the other tests, started by them"]
fn one_process_of_the_network() {
    let role = std::env::var(ROLE).expect("this test is a part of the others and is started by them");
    println!();
    match role.split_once(' ') {
        None => serve(Scope::default()),
        Some(("serve-on", name)) => serve(Scope { interfaces: vec![name.into()], address: None }),
        Some(("serve-at", ip)) => serve(Scope { interfaces: Vec::new(), address: Some(ip.parse().unwrap()) }),
        Some(("impostor", instance)) => impostor(InstanceId::parse(instance).unwrap()),
        Some(("find", instance)) => find(InstanceId::parse(instance).unwrap()),
        Some((_, instance)) => junk(instance),
    }
}

fn identity() -> Identity {
    Identity::ephemeral(SwarmSecret::from_bytes([1; 32])).unwrap()
}

/// Returns every message, until stdin closes.
fn serve(scope: Scope) {
    let identity = identity();
    let listener = match scope.address {
        Some(ip) => Listener::bind_to((ip, 0).into(), &identity, &LinkSettings::default()).unwrap(),
        None => Listener::bind(0, &identity, &LinkSettings::default()).unwrap(),
    };
    let discovery = Discovery::start_in(identity.instance(), scope).unwrap();
    discovery.advertise(listener.port());
    println!("serving as {}", identity.instance());
    let connections = listener.connections().clone();
    thread::spawn(move || {
        for mut link in &connections {
            thread::spawn(move || {
                let mut message = Vec::new();
                while link.receiver.receive(&mut message).is_ok() {
                    link.sender.send(&[&message]).unwrap();
                }
            });
        }
    });
    for line in std::io::stdin().lock().lines() {
        line.unwrap();
    }
}

/// Announces itself in the name of another node, takes connections, and says nothing on them.
fn impostor(instance: InstanceId) {
    let listener = TcpListener::bind("[::]:0").unwrap();
    let discovery = Discovery::start(instance).unwrap();
    discovery.advertise(listener.local_addr().unwrap().port());
    wait_for(SOON, "its own announcement", || discovery.hears_itself().is_some()).unwrap();
    println!("it {} itself", if discovery.hears_itself() == Some(true) { "hears" } else { "does not hear" });
    thread::spawn(move || listener.incoming().collect::<Vec<_>>());
    for line in std::io::stdin().lock().lines() {
        line.unwrap();
    }
}

fn ask(link: &mut Connection, text: &str) {
    link.sender.send(&[text.as_bytes()]).unwrap();
    let mut message = Vec::new();
    link.receiver.receive(&mut message).unwrap();
    println!("it answered: {}", String::from_utf8(message).unwrap());
}

/// Finds `wanted`, reaches it, then tells what it sees and does what stdin says.
fn find(wanted: InstanceId) {
    let identity = identity();
    let discovery = Discovery::start(identity.instance()).unwrap();
    discovery.advertise(4747);
    let deadline = Instant::now() + SOON + SOON;
    let found = loop {
        match discovery.events().recv_deadline(deadline).unwrap() {
            DiscoveryEvent::Found(peer) if peer.instance == wanted => break peer,
            event => tell(&event),
        }
    };
    let settings = LinkSettings { idle_timeout: Some(SOON), ..LinkSettings::default() };
    // A stranger of the same name may have been heard first: then others of its addresses follow.
    let mut addresses = found.addresses;
    let mut link = loop {
        match dial(&addresses, &identity, &settings, Duration::from_secs(5)) {
            Ok(link) => break link,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        if let Some(peer) = discovery.peers().into_iter().find(|peer| peer.instance == wanted) {
            addresses = peer.addresses;
        }
    };
    assert_eq!(link.peer.instance, wanted);
    println!("reached it at {}", link.peer.address);
    ask(&mut link, "hello");
    let events = discovery.events().clone();
    thread::spawn(move || events.iter().for_each(|event| tell(&event)));
    for line in std::io::stdin().lock().lines() {
        match line.unwrap().as_str() {
            "peers" => println!("peers is {}", discovery.peers().len()),
            "malformed" => println!("malformed is {}", discovery.stats().malformed),
            "no_room" => println!("no_room is {}", discovery.stats().no_room),
            "doubt" => discovery.doubt(wanted),
            "restarts" => println!("restarts is {}", discovery.stats().restarts),
            "renewals" => println!("renewals is {}", discovery.stats().renewals),
            "peak_mib" => println!("peak_mib is {}", peak_mib()),
            "addresses" => println!("addresses are {}", listed(&discovery, wanted).join(",")),
            "dial" => {
                let peers = discovery.peers();
                let found = peers.iter().find(|peer| peer.instance == wanted).unwrap();
                let link = dial(&found.addresses, &identity, &settings, Duration::from_secs(8)).unwrap();
                assert_eq!(link.peer.instance, wanted);
                println!("reached it at {}", link.peer.address);
            }
            text => match text.strip_prefix("type ") {
                Some(typed) => {
                    let typed = parse_peer(typed, SOON).unwrap();
                    let link = dial(&typed, &identity, &settings, Duration::from_secs(8)).unwrap();
                    println!("reached it at {}", link.peer.address);
                }
                None => ask(&mut link, text),
            },
        }
    }
}

fn listed(discovery: &Discovery, wanted: InstanceId) -> Vec<String> {
    let peers = discovery.peers();
    let found = peers.iter().find(|peer| peer.instance == wanted);
    found.iter().flat_map(|peer| &peer.addresses).map(ToString::to_string).collect()
}

/// Most memory that this process has had, in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

fn tell(event: &DiscoveryEvent) {
    match event {
        DiscoveryEvent::Found(peer) => println!("found {}", peer.instance),
        DiscoveryEvent::Lost(instance) => println!("lost {instance}"),
        DiscoveryEvent::Unavailable { why, .. } => println!("unavailable: {why}"),
        DiscoveryEvent::Available => println!("available again"),
    }
}

/// Everything a stranger may multicast: noise, cut packets, thousands of services, names that would move a
/// terminal's cursor, and a goodbye in the name of `victim`.
fn junk(victim: &str) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let send = |packet: &[u8]| socket.send_to(packet, ("224.0.0.251", 5353)).map(drop).unwrap();
    for _ in 0..1000 {
        let bytes: Vec<u8> = (0..next() % 300).map(|_| next() as u8).collect();
        send(&bytes);
        let whole = announcement(&name(next()), 120);
        send(whole.get(..next() as usize % whole.len()).unwrap());
        let mut bent = whole.clone();
        let at = next() as usize % bent.len();
        bent[at] ^= next() as u8;
        send(&bent);
    }
    for _ in 0..100 {
        send(&announcement(&format!("\u{1b}[2J\u{7}{}", next()), 120));
    }
    for _ in 0..10_000 {
        send(&announcement(&name(next()), 120));
    }
    println!("junk sent");
    for line in std::io::stdin().lock().lines() {
        line.unwrap();
        send(&announcement(victim, 0));
        println!("goodbye forged");
    }
}

/// A name as a node would choose it.
fn name(number: u64) -> String {
    let mut text = String::new();
    write!(text, "{number:016x}{number:016x}").unwrap();
    text
}

/// A multicast DNS response that announces the service `instance` (RFC 6763), with this lifetime.
fn announcement(instance: &str, lifetime_s: u32) -> Vec<u8> {
    let service = ["_swarm", "_tcp", "local"];
    let full = [&[instance], service.as_slice()].concat();
    let host = [name(7), "local".to_owned()];
    let host = [host[0].as_str(), host[1].as_str()];
    let labels = |name: &[&str]| {
        let mut bytes: Vec<u8> =
            name.iter().flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
        bytes.push(0);
        bytes
    };
    let mut packet = vec![0, 0, 0x84, 0, 0, 0, 0, 4, 0, 0, 0, 0];
    let mut record = |owner: &[&str], kind: u16, class: u16, data: &[u8]| {
        packet.extend(labels(owner));
        packet.extend(kind.to_be_bytes());
        packet.extend(class.to_be_bytes());
        packet.extend(lifetime_s.to_be_bytes());
        packet.extend((data.len() as u16).to_be_bytes());
        packet.extend(data);
    };
    record(&service, 12, 1, &labels(&full));
    record(&full, 33, 0x8001, &[vec![0, 0, 0, 0, 0x12, 0x34], labels(&host)].concat());
    let id = format!("id={instance}");
    record(&full, 16, 0x8001, &[&[3], b"v=1".as_slice(), &[id.len() as u8], id.as_bytes()].concat());
    record(&host, 1, 0x8001, &[10, 77, 0, 99]);
    packet
}
