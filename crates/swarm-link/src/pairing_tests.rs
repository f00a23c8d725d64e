//! Pairing against an adversary who owns the network.

use proptest::prelude::*;

use super::*;
use crate::noise::tests::node;

fn code(digits: &str) -> PairCode {
    PairCode::parse(digits).unwrap()
}

const SUITE: Suite = Suite::ChaChaPoly;

/// Runs a pairing, lets `change` touch each of its messages, and gives what both sides ended with.
fn run(codes: [&str; 2], mut change: impl FnMut(usize, &mut [u8])) -> (Option<Met>, Option<Met>) {
    let (typing, showing) = (node(1), node(2));
    let (cards, [typed, shown]) = ((Card::of(&typing, "den"), Card::of(&showing, "kitchen")), codes);
    let (shower, mut first) = Shower::start(SUITE, &code(shown)).unwrap();
    change(0, &mut first);
    let Ok((typist, mut opening)) = Typist::open(&typing, SUITE, &code(typed), &first) else {
        return (None, None);
    };
    change(1, &mut opening);
    let Ok((waiting, mut answer)) = shower.answer(&showing, &cards.1, &opening) else { return (None, None) };
    change(2, &mut answer);
    let Ok((ours, mut closing)) = typist.close(&typing, &cards.0, &answer) else { return (None, None) };
    change(3, &mut closing);
    let theirs = waiting.close(&showing, &cards.1, &closing).ok();
    if let Some(theirs) = &theirs {
        assert_eq!((&ours.peer_key, &theirs.peer_key), (showing.public_key(), typing.public_key()));
        assert_eq!((ours.card.name.as_str(), theirs.card.name.as_str()), ("kitchen", "den"));
        assert_eq!(ours.verdict, theirs.verdict);
    }
    (Some(ours), theirs)
}

#[test]
fn the_right_code_opens_a_channel_and_a_wrong_one_nothing() {
    let (ours, theirs) = run(["1234-5678", "12345678"], |_, _| {});
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
    let gift = node(1).gift();
    let sealed = ours.seal_gift(Some(&gift)).unwrap();
    assert!(theirs.open_gift(&sealed).unwrap() == Some(gift));
    assert!(theirs.seal_gift(None).is_ok_and(|sealed| ours.open_gift(&sealed) == Ok(None)));
    // A record given back to its sender, or taken for another one, opens nothing.
    assert!(ours.open_gift(&sealed).is_err());
    let done = theirs.seal_done().unwrap();
    assert!(ours.open_done(&done).is_ok() && theirs.open_done(&done).is_err());
    let (ours, theirs) = run(["1234-5678", "1234-5679"], |_, _| {});
    assert!(ours.is_none() && theirs.is_none());
}

#[test]
fn every_flipped_byte_is_noticed() {
    for (message, bytes) in [(0, 33), (1, 81), (2, 193), (3, 161)] {
        for at in 0..bytes {
            let flip = if at % 2 == 0 { 0x80 } else { 1 };
            let (_, theirs) = run(["11112222"; 2], |number, body| {
                if number == message {
                    body[at] ^= flip;
                }
            });
            assert!(theirs.is_none(), "message {message} byte {at}");
        }
    }
}

#[test]
fn a_message_given_back_to_its_sender_is_refused() {
    let (one, card) = (node(1), Card::of(&node(1), "den"));
    let (shower, first) = Shower::start(SUITE, &code("00000000")).unwrap();
    let (_, opening) = Typist::open(&one, SUITE, &code("00000000"), &first).unwrap();
    // The typist's own SPAKE2 message back to a typist, and the shower's own back to the shower.
    let typists: &SpakeMessage = opening.first_chunk().unwrap();
    assert!(Typist::open(&one, SUITE, &code("00000000"), typists).is_err());
    let mut mirrored = opening;
    mirrored[..33].copy_from_slice(&first);
    assert!(shower.answer(&one, &card, &mirrored).is_err());
}

#[test]
fn a_machine_does_not_pair_with_itself_nor_with_another_node_of_its_folder() {
    let one = node(1);
    let two = one.another_instance().unwrap();
    let (shower, first) = Shower::start(SUITE, &code("00000000")).unwrap();
    let (typist, opening) = Typist::open(&one, SUITE, &code("00000000"), &first).unwrap();
    let (_, answer) = shower.answer(&two, &Card::of(&two, "den"), &opening).unwrap();
    let closed = typist.close(&one, &Card::of(&one, "den"), &answer);
    assert_eq!(closed.err(), Some(HandshakeFailure::OwnAddress));
}

#[test]
fn who_gives_the_secret_to_whom() {
    let card =
        |settled, tag| Card { instance: node(1).instance(), settled, tag: [tag; 16], name: String::new() };
    for (typist, shower, want) in [
        ((false, 1), (false, 2), Verdict::TypistGives),
        ((true, 1), (false, 2), Verdict::TypistGives),
        ((false, 1), (true, 2), Verdict::ShowerGives),
        ((true, 1), (true, 2), Verdict::TwoSwarms),
        ((true, 1), (true, 1), Verdict::Same),
        ((false, 1), (false, 1), Verdict::Same),
    ] {
        assert_eq!(verdict(&card(typist.0, typist.1), &card(shower.0, shower.1)), want);
    }
}

/// An adversary with a handful of pairings at once: it may hand any recorded message to any party that waits for one
/// of its kind. Even numbers have code 0, odd ones code 1.
#[derive(Default)]
struct World {
    showers: Vec<(usize, Shower)>,
    typists: Vec<(usize, Typist)>,
    waiting: Vec<(usize, ShowerWaiting)>,
    firsts: Vec<SpakeMessage>,
    openings: Vec<Opening>,
    answers: Vec<Answer>,
    closings: Vec<Closing>,
    typed: Vec<(usize, Met)>,
    shown: Vec<(usize, Met)>,
}

const PARTIES_MAX: usize = 8;

impl World {
    fn step(&mut self, nodes: &[Identity; 2], kind: u8, party: usize, message: usize) -> Option<()> {
        let newest = |length: usize, back: usize| length.checked_sub(1)?.checked_sub(back % length);
        let secret = usize::from(kind / 5) % 2;
        let digits = code(["11111111", "22222222"][secret]);
        match kind % 5 {
            0 if self.showers.len() < PARTIES_MAX => {
                let (shower, first) = Shower::start(SUITE, &digits).unwrap();
                self.showers.push((secret, shower));
                self.firsts.push(first);
            }
            1 if self.typists.len() < PARTIES_MAX => {
                let first = &self.firsts[newest(self.firsts.len(), message)?];
                let (typist, opening) = Typist::open(&nodes[0], SUITE, &digits, first).ok()?;
                self.typists.push((secret, typist));
                self.openings.push(opening);
            }
            2 => {
                let opening = &self.openings[newest(self.openings.len(), message)?];
                let at = newest(self.showers.len(), party)?;
                let (secret, shower) = self.showers.remove(at);
                let (waiting, answer) = shower.answer(&nodes[1], &Card::of(&nodes[1], "b"), opening).ok()?;
                self.waiting.push((secret, waiting));
                self.answers.push(answer);
            }
            3 => {
                let answer = &self.answers[newest(self.answers.len(), message)?];
                let at = newest(self.typists.len(), party)?;
                let (secret, typist) = self.typists.remove(at);
                let (met, closing) = typist.close(&nodes[0], &Card::of(&nodes[0], "a"), answer).ok()?;
                self.typed.push((secret, met));
                self.closings.push(closing);
            }
            4 => {
                let closing = &self.closings[newest(self.closings.len(), message)?];
                let at = newest(self.waiting.len(), party)?;
                let (secret, waiting) = self.waiting.remove(at);
                let met = waiting.close(&nodes[1], &Card::of(&nodes[1], "b"), closing).ok()?;
                self.shown.push((secret, met));
            }
            _ => {}
        }
        Some(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the schedule of replays, reflections and crossings: whoever finishes shares its keys with exactly one
    /// other, who used the same code.
    #[test]
    fn crossed_pairings_confuse_nobody(
        steps in prop::collection::vec((any::<u8>(), prop_oneof![4 => Just(0usize), 1 => 0usize..6], prop_oneof![4 => Just(0usize), 1 => 0usize..6]), 20..80),
    ) {
        let (nodes, mut world) = ([node(1), node(2)], World::default());
        for (kind, party, message) in steps {
            world.step(&nodes, kind, party, message);
        }
        for (secret, theirs) in &world.shown {
            let sealed = theirs.seal_gift(None).unwrap();
            let mates: Vec<_> = world.typed.iter().filter(|(_, ours)| ours.open_gift(&sealed).is_ok()).collect();
            prop_assert_eq!(mates.len(), 1);
            prop_assert_eq!(*secret, mates[0].0);
        }
    }

    #[test]
    fn any_bytes_are_refused(
        first in prop::array::uniform::<_, 33>(any::<u8>()), opening in prop::array::uniform::<_, 81>(any::<u8>()),
        answer in prop::array::uniform::<_, 193>(any::<u8>()), closing in prop::array::uniform::<_, 161>(any::<u8>()),
    ) {
        let (one, two, digits) = (node(1), node(2), code("31415926"));
        let (cards, _) = ((Card::of(&one, "a"), Card::of(&two, "b")), Typist::open(&one, SUITE, &digits, &first));
        let (shower, good) = Shower::start(SUITE, &digits).unwrap();
        prop_assert!(shower.answer(&two, &cards.1, &opening).is_err());
        let (typist, _) = Typist::open(&one, SUITE, &digits, &good).unwrap();
        prop_assert!(typist.close(&one, &cards.0, &answer).is_err());
        let (shower, good) = Shower::start(SUITE, &digits).unwrap();
        let (_, good) = Typist::open(&one, SUITE, &digits, &good).unwrap();
        let (waiting, _) = shower.answer(&two, &cards.1, &good).unwrap();
        prop_assert!(waiting.close(&two, &cards.1, &closing).is_err());
    }
}
