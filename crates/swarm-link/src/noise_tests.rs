//! The handshake against an adversary who owns the network: it reads, changes, repeats, reorders and
//! redirects every message.

use proptest::prelude::*;

use super::*;
use crate::secret::SwarmSecret;

pub(crate) fn node(secret: u8) -> Identity {
    Identity::ephemeral(SwarmSecret::from_bytes([secret; 32])).unwrap()
}

/// Ends a handshake as with a member.
fn finish(responder: Responder, third: &Third) -> Result<(Established, Confirmation), HandshakeFailure> {
    match responder.finish(third)? {
        Finished::Member(established, confirmation) => Ok((established, confirmation)),
        Finished::Late(_) => panic!("this machine did not miss anything"),
    }
}

/// Both ends of a finished handshake: initiator, responder.
pub(crate) fn pair(one: &Identity, two: &Identity, suite: Suite) -> (Established, Established) {
    let (initiator, first) = Initiator::start(one, suite).unwrap();
    let (responder, second) = Responder::answer(two, suite, &first).unwrap();
    let (waiting, third) = initiator.answer(&second).unwrap();
    let (theirs, confirmation) = finish(responder, &third).unwrap();
    (waiting.confirm(&confirmation).unwrap(), theirs)
}

/// Whether a record sealed by `from` opens at `to`.
fn carries(from: &Established, to: &Established) -> bool {
    let (mut sealed, mut plain) = ([0; 5 + TAG_BYTES], [0; 5 + TAG_BYTES]);
    from.keys.write_message(from.first_sent, b"hello", &mut sealed).unwrap();
    to.keys
        .read_message(to.first_received, &sealed, &mut plain)
        .is_ok_and(|bytes| plain.get(..bytes) == Some(b"hello"))
}

#[test]
fn two_nodes_of_one_swarm_learn_each_other() {
    for suite in [Suite::AesGcm, Suite::ChaChaPoly] {
        let (one, two) = (node(1), node(1));
        let (ours, theirs) = pair(&one, &two, suite);
        assert_eq!((&ours.peer_key, ours.peer_instance), (two.public_key(), two.instance()));
        assert_eq!((&theirs.peer_key, theirs.peer_instance), (one.public_key(), one.instance()));
        assert!(carries(&ours, &theirs) && carries(&theirs, &ours));
        assert_eq!((ours.suite, theirs.suite), (suite, suite));
    }
}

#[test]
fn nodes_that_share_a_folder_are_two_nodes_and_a_node_is_not_its_own_peer() {
    let one = node(1);
    let two = one.another_instance().unwrap();
    let (ours, _) = pair(&one, &two, Suite::AesGcm);
    assert_eq!(&ours.peer_key, one.public_key());
    assert_eq!(ours.peer_instance, two.instance());

    let (initiator, first) = Initiator::start(&one, Suite::AesGcm).unwrap();
    let (_, second) = Responder::answer(&one, Suite::AesGcm, &first).unwrap();
    assert_eq!(initiator.answer(&second).err(), Some(HandshakeFailure::OwnAddress));
}

#[test]
fn another_secret_fails_on_both_sides_with_one_reason() {
    let (one, two) = (node(1), node(2));
    let (initiator, first) = Initiator::start(&one, Suite::AesGcm).unwrap();
    let (responder, second) = Responder::answer(&two, Suite::AesGcm, &first).unwrap();
    let (waiting, third) = initiator.answer(&second).unwrap();
    assert_eq!(finish(responder, &third).err(), Some(HandshakeFailure::Refused));
    // A responder that pretends to accept is found out: it lacks the keys.
    let mut forged = [7; 18];
    forged[..2].copy_from_slice(&16u16.to_le_bytes());
    assert_eq!(waiting.confirm(&forged).err(), Some(HandshakeFailure::Refused));
}

#[test]
fn the_suite_is_bound_to_the_handshake() {
    let (one, two) = (node(1), node(1));
    let (initiator, first) = Initiator::start(&one, Suite::AesGcm).unwrap();
    // Somebody rewrites the suite byte, hoping for the other cipher. The first message carries a tag already.
    let answered = Responder::answer(&two, Suite::ChaChaPoly, &first);
    assert!(answered.is_err() || initiator.answer(&answered.unwrap().1).is_err());
}

#[test]
fn preambles_are_read_or_refused() {
    assert_eq!(read_preamble(&preamble_of(Purpose::Link, Suite::AesGcm)), Ok((Purpose::Link, Suite::AesGcm)));
    assert_eq!(
        read_preamble(&preamble_of(Purpose::Link, Suite::ChaChaPoly)),
        Ok((Purpose::Link, Suite::ChaChaPoly))
    );
    assert_eq!(read_preamble(b"GET / "), Err(HandshakeFailure::NotSwarm));
    assert_eq!(read_preamble(b"SWRM\x02\x00"), Err(HandshakeFailure::OtherVersion(2)));
    assert_eq!(read_preamble(b"SWRM\x01\x02"), Err(HandshakeFailure::NotSwarm));
    for purpose in [Purpose::News, Purpose::Pair, Purpose::Ask(1), Purpose::Ask(4)] {
        assert_eq!(read_preamble(&preamble_of(purpose, Suite::AesGcm)), Ok((purpose, Suite::AesGcm)));
    }
    assert_eq!(read_preamble(b"SWRM\x01\xc2"), Err(HandshakeFailure::NotSwarm));
}

/// Runs a handshake and lets `change` touch each message; which sides finished.
fn run_changed(suite: Suite, mut change: impl FnMut(usize, &mut [u8])) -> (bool, bool) {
    let (one, two) = (node(1), node(1));
    let (initiator, mut first) = Initiator::start(&one, suite).unwrap();
    change(0, &mut first);
    let Ok((responder, mut second)) = Responder::answer(&two, suite, &first) else { return (false, false) };
    change(1, &mut second);
    let Ok((waiting, mut third)) = initiator.answer(&second) else { return (false, false) };
    change(2, &mut third);
    let Ok((_, mut confirmation)) = finish(responder, &third) else { return (false, false) };
    change(3, &mut confirmation);
    (waiting.confirm(&confirmation).is_ok(), true)
}

#[test]
fn every_flipped_byte_of_every_message_is_noticed() {
    for (message, bytes) in [FIRST_BYTES, SECOND_BYTES, THIRD_BYTES, 2 + TAG_BYTES].into_iter().enumerate() {
        for at in 0..bytes {
            // The top bit is the one that X25519 ignores in a public key; the transcript does not.
            let flip = if at % 2 == 0 { 0x80 } else { 1 };
            let (initiator, responder) = run_changed(Suite::preferred(), |number, body| {
                if number == message {
                    body[at] ^= flip;
                }
            });
            assert!(!initiator, "message {message} byte {at}");
            // Nothing follows the confirmation, so only the first record tells the responder.
            assert_eq!(responder, message == 3, "message {message} byte {at}");
        }
    }
}

/// Everything an adversary can do with a dozen handshakes at once: hand any recorded message to any party
/// that waits for one of its kind.
struct World {
    nodes: Vec<Identity>,
    initiators: Vec<(usize, Initiator)>,
    waiting: Vec<(usize, InitiatorWaiting)>,
    responders: Vec<Responder>,
    firsts: Vec<First>,
    seconds: Vec<Second>,
    thirds: Vec<Third>,
    confirmations: Vec<Confirmation>,
    /// The node that dialled, and what it believes.
    initiated: Vec<(usize, Established)>,
    responded: Vec<Established>,
}

const PARTIES_MAX: usize = 12;
/// The node of another swarm.
const FOREIGN: usize = 3;

impl World {
    /// Three nodes of a swarm, two of which share a key, and one of another swarm.
    fn new() -> Self {
        let (a, b) = (node(1), node(1));
        let nodes = vec![a.clone(), a.another_instance().unwrap(), b, node(2)];
        Self {
            nodes,
            initiators: Vec::new(),
            waiting: Vec::new(),
            responders: Vec::new(),
            firsts: Vec::new(),
            seconds: Vec::new(),
            thirds: Vec::new(),
            confirmations: Vec::new(),
            initiated: Vec::new(),
            responded: Vec::new(),
        }
    }

    /// Steps that can do nothing now do nothing. `party` and `message` count from the newest, so that
    /// schedules in which handshakes finish are common.
    fn step(&mut self, kind: u8, party: usize, message: usize) -> Option<()> {
        let newest = |length: usize, back: usize| length.checked_sub(1)?.checked_sub(back % length);
        let node = usize::from(kind / 5) % self.nodes.len();
        match kind % 5 {
            0 if self.initiators.len() < PARTIES_MAX => {
                let (initiator, first) = Initiator::start(&self.nodes[node], Suite::ChaChaPoly).unwrap();
                self.initiators.push((node, initiator));
                self.firsts.push(first);
            }
            1 if self.responders.len() < PARTIES_MAX => {
                let first = &self.firsts[newest(self.firsts.len(), message)?];
                let identity = &self.nodes[node];
                let (responder, second) = Responder::answer(identity, Suite::ChaChaPoly, first).ok()?;
                self.responders.push(responder);
                self.seconds.push(second);
            }
            2 => {
                let second = &self.seconds[newest(self.seconds.len(), message)?];
                let at = newest(self.initiators.len(), party)?;
                let (node, initiator) = self.initiators.remove(at);
                let (waiting, third) = initiator.answer(second).ok()?;
                self.waiting.push((node, waiting));
                self.thirds.push(third);
            }
            3 => {
                let third = &self.thirds[newest(self.thirds.len(), message)?];
                let at = newest(self.responders.len(), party)?;
                let (established, confirmation) = finish(self.responders.remove(at), third).ok()?;
                self.responded.push(established);
                self.confirmations.push(confirmation);
            }
            4 => {
                let confirmation = &self.confirmations[newest(self.confirmations.len(), message)?];
                let at = newest(self.waiting.len(), party)?;
                let (node, waiting) = self.waiting.remove(at);
                self.initiated.push((node, waiting.confirm(confirmation).ok()?));
            }
            _ => {}
        }
        Some(())
    }
}

/// Mostly the newest: then the handshakes that finish are neither all nor none.
fn back() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0usize), 1 => 0usize..6]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the schedule, a finished initiator shares its keys with exactly one finished responder, each
    /// is the node the other believes it is, and nobody finishes with the other swarm.
    #[test]
    fn no_schedule_of_replays_and_reflections_confuses_anyone(
        steps in prop::collection::vec((any::<u8>(), back(), back()), 50..200),
    ) {
        let mut world = World::new();
        for (kind, party, message) in steps {
            world.step(kind, party, message);
        }
        for (node, ours) in &world.initiated {
            let mates: Vec<_> = world.responded.iter().filter(|theirs| carries(ours, theirs)).collect();
            prop_assert_eq!(mates.len(), 1);
            let theirs = mates[0];
            prop_assert!(carries(theirs, ours));
            let own = &world.nodes[*node];
            prop_assert_eq!((&theirs.peer_key, theirs.peer_instance), (own.public_key(), own.instance()));
            prop_assert_ne!(ours.peer_instance, own.instance());
            let peer = world.nodes.iter().find(|peer| peer.instance() == ours.peer_instance).unwrap();
            prop_assert_eq!(&ours.peer_key, peer.public_key());
            prop_assert!(*node != FOREIGN && peer.instance() != world.nodes[FOREIGN].instance());
        }
        for theirs in &world.responded {
            let mates = world.initiated.iter().filter(|(_, ours)| carries(theirs, ours)).count();
            prop_assert!(mates <= 1);
            prop_assert_ne!(theirs.peer_instance, world.nodes[FOREIGN].instance());
        }
    }

    #[test]
    fn any_bytes_are_refused(
        first in prop::array::uniform::<_, FIRST_BYTES>(any::<u8>()), second in prop::array::uniform::<_, SECOND_BYTES>(any::<u8>()),
        third in prop::array::uniform::<_, THIRD_BYTES>(any::<u8>()), confirmation in prop::array::uniform::<_, 18>(any::<u8>()),
    ) {
        let (one, two) = (node(1), node(1));
        prop_assert!(Responder::answer(&two, Suite::AesGcm, &first).is_err());
        let (initiator, good_first) = Initiator::start(&one, Suite::AesGcm).unwrap();
        prop_assert!(initiator.answer(&second).is_err());
        let (responder, _) = Responder::answer(&two, Suite::AesGcm, &good_first).unwrap();
        prop_assert!(finish(responder, &third).is_err());
        let (initiator, good_first) = Initiator::start(&one, Suite::AesGcm).unwrap();
        let (_, good_second) = Responder::answer(&two, Suite::AesGcm, &good_first).unwrap();
        prop_assert!(initiator.answer(&good_second).unwrap().0.confirm(&confirmation).is_err());
    }
}
