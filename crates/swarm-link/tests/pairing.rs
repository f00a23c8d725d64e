//! Machines that meet by a code, share a secret, and forget one another: real sockets, real files.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use swarm_link::{
    CODE_TRIES, Connection, Identity, LinkError, LinkSettings, Listener, PairCode, PairError, Paired,
    PairingDesk, PairingEvent, dial, pair, shows_code, tell_member,
};
use swarm_testkit::wait_for;

const SOON: Duration = Duration::from_secs(10);

/// A computer: a home folder, a listener, and the desk where its code is shown.
struct Machine {
    home: tempfile::TempDir,
    identity: Identity,
    listener: Listener,
    desk: PairingDesk,
    name: &'static str,
}

impl Machine {
    fn new(name: &'static str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(home.path()).unwrap();
        let listener = Listener::bind(0, &identity, &LinkSettings::default()).unwrap();
        let desk = PairingDesk::open(name).unwrap();
        listener.set_desk(Some(desk.clone()));
        Self { home, identity, listener, desk, name }
    }

    fn addresses(&self) -> [SocketAddr; 1] {
        [SocketAddr::from((Ipv4Addr::LOCALHOST, self.listener.port()))]
    }

    fn type_code(&self, other: &Self, code: &PairCode) -> Result<Paired, PairError> {
        pair(&other.addresses(), &self.identity, code, self.name, SOON)
    }

    fn pair(&self, other: &Self) -> Paired {
        self.type_code(other, &other.desk.code()).unwrap()
    }

    fn dial(&self, other: &Self) -> Result<Connection, LinkError> {
        dial(&other.addresses(), &self.identity, &LinkSettings::default(), SOON)
    }

    fn secret(&self) -> String {
        // What is on disk, not only what this process believes.
        Identity::load_or_create(self.home.path()).unwrap().export_secret().to_string()
    }

    fn knows(&self) -> Vec<String> {
        self.identity.peers().into_iter().map(|peer| peer.name).collect()
    }
}

fn wrong(code: &PairCode) -> PairCode {
    let text = code.to_string();
    let other = if text.starts_with('0') { '1' } else { '0' };
    PairCode::parse(&format!("{other}{}", &text[1..])).unwrap()
}

#[test]
fn two_new_machines_pair_once_and_for_good() {
    let (den, kitchen) = (Machine::new("den"), Machine::new("kitchen"));
    assert!(den.identity.is_fresh() && kitchen.identity.is_fresh());
    assert!(matches!(den.dial(&kitchen), Err(LinkError::Refused { .. })));
    assert!(shows_code(&kitchen.addresses(), SOON).unwrap());
    let (before, code) = (den.secret(), kitchen.desk.code());
    let paired = den.pair(&kitchen);
    assert_eq!((paired.name.as_str(), paired.joined), ("kitchen", false));
    assert_eq!((den.secret(), kitchen.secret()), (before.clone(), before));
    assert_eq!((den.knows(), kitchen.knows()), (vec!["kitchen".to_owned()], vec!["den".to_owned()]));
    // A running node uses the new secret at once, both ways.
    den.dial(&kitchen).unwrap();
    kitchen.dial(&den).unwrap();
    let events: Vec<_> = kitchen.desk.events().try_iter().collect();
    assert!(events.contains(&PairingEvent::Paired { name: "den".into() }), "{events:?}");
    // The code was good for one machine.
    let third = Machine::new("attic");
    assert!(matches!(third.type_code(&kitchen, &code), Err(PairError::WrongCode { .. })));
}

#[test]
fn a_new_machine_joins_the_swarm_of_the_other_whoever_shows_the_code() {
    let (den, kitchen, attic, guest) =
        (Machine::new("den"), Machine::new("kitchen"), Machine::new("attic"), Machine::new("guest"));
    den.pair(&kitchen);
    let secret = den.secret();
    // The new one types the code of a member, and a member that of a new one.
    assert!(attic.pair(&kitchen).joined);
    assert!(!den.pair(&guest).joined);
    assert!([&attic, &guest, &kitchen].iter().all(|machine| machine.secret() == secret));
    // Machines that never met are members all the same.
    attic.dial(&guest).unwrap();
    // Pairing within a swarm changes nothing but the list.
    assert!(!attic.pair(&guest).joined);
    assert_eq!(attic.secret(), secret);
    assert_eq!(attic.knows(), ["kitchen", "guest"]);
}

#[test]
fn two_swarms_are_not_merged() {
    let (den, kitchen, other, friend) =
        (Machine::new("den"), Machine::new("kitchen"), Machine::new("other"), Machine::new("friend"));
    den.pair(&kitchen);
    other.pair(&friend);
    let (secrets, code) = ((den.secret(), other.secret()), other.desk.code());
    let error = den.type_code(&other, &code).unwrap_err();
    assert!(matches!(&error, PairError::TwoSwarms { name } if name == "other"), "{error}");
    assert!(error.to_string().contains("swarm-os forget --all"), "{error}");
    assert_eq!((den.secret(), other.secret()), secrets);
    assert!(!den.knows().contains(&"other".to_owned()) && !other.knows().contains(&"den".to_owned()));
}

#[test]
fn three_wrong_codes_and_the_code_is_dead() {
    let (den, kitchen) = (Machine::new("den"), Machine::new("kitchen"));
    let (code, secret) = (kitchen.desk.code(), kitchen.secret());
    for _ in 0..CODE_TRIES {
        let error = den.type_code(&kitchen, &wrong(&code)).unwrap_err();
        assert!(matches!(error, PairError::WrongCode { .. }), "{error}");
    }
    assert_ne!(kitchen.desk.code(), code);
    let events: Vec<_> = kitchen.desk.events().try_iter().collect();
    let left: Vec<u8> = events
        .iter()
        .filter_map(|event| match event {
            PairingEvent::WrongCode { tries_left, .. } => Some(*tries_left),
            _ => None,
        })
        .collect();
    assert_eq!(left, [2, 1, 0]);
    // The listener calls it by its name, and not another swarm.
    let refusals = kitchen.listener.refusals();
    let called = |refusal: swarm_link::Refusal| matches!(refusal.error, LinkError::WrongCode { .. });
    wait_for(SOON, "a refusal", || refusals.try_recv().is_ok_and(called)).unwrap();
    // For a while nobody may pair, then the old code is one more wrong guess and the new one is right.
    assert!(matches!(den.type_code(&kitchen, &code), Err(PairError::Closed { .. })));
    wait_for(SOON, "the end of the rest", || shows_code(&kitchen.addresses(), SOON).unwrap()).unwrap();
    assert!(matches!(den.type_code(&kitchen, &code), Err(PairError::WrongCode { .. })));
    assert_eq!(kitchen.secret(), secret);
    den.pair(&kitchen);
}

#[test]
fn without_a_code_shown_nobody_pairs() {
    let (den, kitchen) = (Machine::new("den"), Machine::new("kitchen"));
    kitchen.listener.set_desk(None);
    assert!(!shows_code(&kitchen.addresses(), SOON).unwrap());
    let error = den.type_code(&kitchen, &kitchen.desk.code()).unwrap_err();
    assert!(matches!(error, PairError::Closed { .. }), "{error}");
    let mut stranger = TcpStream::connect(kitchen.addresses()[0]).unwrap();
    stranger.set_read_timeout(Some(SOON)).unwrap();
    stranger.write_all(b"SWRM\x01\x80").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    assert_eq!(answer, b"", "the one refusal says nothing");
}

#[test]
fn who_begins_to_pair_and_goes_silent_has_three_seconds() {
    let kitchen = Machine::new("kitchen");
    let mut stranger = TcpStream::connect(kitchen.addresses()[0]).unwrap();
    stranger.set_read_timeout(Some(SOON)).unwrap();
    let began = Instant::now();
    stranger.write_all(b"SWRM\x01\x80").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    assert_eq!(answer.len(), 6 + 33, "preamble and a point");
    assert!((2900..6000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert!(kitchen.desk.events().try_iter().all(|event| matches!(event, PairingEvent::Code(_))));
}

#[test]
fn a_forgotten_machine_is_out_at_once_and_gets_nothing_more() {
    let (den, kitchen, guest) = (Machine::new("den"), Machine::new("kitchen"), Machine::new("guest"));
    den.pair(&kitchen);
    den.pair(&guest);
    let old = den.secret();
    let mut link = guest.dial(&den).unwrap();
    den.listener.connections().recv_timeout(SOON).unwrap();
    den.identity.forget("guest").unwrap();
    // A link that was up ends.
    link.receiver.set_idle_timeout(Some(SOON)).unwrap();
    let ended = link.receiver.receive(&mut Vec::new()).unwrap_err();
    assert!(!matches!(ended, LinkError::Idle { .. }), "{ended}");
    // Who is there is told over an authenticated connection.
    let told = tell_member(&kitchen.addresses(), &den.identity, SOON).unwrap();
    assert_eq!(told, Some(*kitchen.identity.public_key()));
    assert_eq!(kitchen.secret(), den.secret());
    assert_ne!(den.secret(), old);
    assert_eq!(kitchen.knows(), ["den"]);
    assert_eq!(tell_member(&guest.addresses(), &den.identity, SOON).unwrap(), None);
    // Under the old secret and its own key it gets the handshake and no more, wherever it asks.
    for other in [&den, &kitchen] {
        assert!(matches!(guest.dial(other), Err(LinkError::Refused { .. })));
        assert!(matches!(other.dial(&guest), Err(LinkError::Refused { .. })));
    }
    assert_eq!(guest.secret(), old);
    den.dial(&kitchen).unwrap();
}

#[test]
fn who_missed_the_change_is_told_at_the_next_meeting_whoever_dials() {
    let (den, kitchen, attic, guest) =
        (Machine::new("den"), Machine::new("kitchen"), Machine::new("attic"), Machine::new("guest"));
    den.pair(&kitchen);
    den.pair(&attic);
    den.pair(&guest);
    den.identity.forget("guest").unwrap();
    kitchen.dial(&den).unwrap();
    den.dial(&attic).unwrap();
    assert!(kitchen.secret() == den.secret() && attic.secret() == den.secret());
    // The news say who was forgotten, too: the guest cannot get them from somebody who heard them late.
    assert!(matches!(guest.dial(&attic), Err(LinkError::Refused { .. })));
    assert_ne!(guest.secret(), den.secret());
    // A member that only holds the secret, but was never paired, is not told: its key may be anyone's.
    let copied = Machine::new("copied");
    swarm_link::import_secret(copied.home.path(), &den.secret()).unwrap();
    copied.dial(&den).unwrap();
    den.identity.note_met(copied.identity.public_key(), "copied").unwrap();
    den.identity.forget("attic").unwrap();
    assert!(matches!(copied.dial(&den), Err(LinkError::Refused { .. })));
    assert_ne!(copied.secret(), den.secret());
}

#[test]
fn a_machine_that_left_comes_back_as_a_new_one() {
    let (den, guest) = (Machine::new("den"), Machine::new("guest"));
    den.pair(&guest);
    den.identity.forget("guest").unwrap();
    assert!(matches!(guest.type_code(&den, &den.desk.code()), Err(PairError::TwoSwarms { .. })));
    swarm_link::leave_swarm(guest.home.path()).unwrap();
    let again = Identity::load_or_create(guest.home.path()).unwrap();
    let paired = pair(&den.addresses(), &again, &den.desk.code(), "guest", SOON).unwrap();
    assert!(paired.joined);
    dial(&den.addresses(), &again, &LinkSettings::default(), SOON).unwrap();
}
