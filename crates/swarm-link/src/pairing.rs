//! Two machines that share nothing but a code: SPAKE2, then Noise under its key. Pure: bytes in, bytes out.
//!
//! | Direction | Bytes | Content |
//! | --- | --- | --- |
//! | typist to shower | 6 | `SWRM`, version, suite with the pairing bit |
//! | shower to typist | 6 + 33 | the same six bytes; SPAKE2 message B |
//! | typist to shower | 33 + 48 | SPAKE2 message A; Noise `XXpsk0`: `psk, e` |
//! | shower to typist | 193 | `e, ee, s, es`, card |
//! | typist to shower | 161 | `s, se`, card |
//! | shower to typist | 1082 | sealed: what this side gives |
//! | typist to shower | 1082 | sealed: what this side gives |
//! | shower to typist | 16 | sealed: done |
//!
//! The psk is derived from SPAKE2's key, and the prologue holds both SPAKE2 messages and the preamble, so Noise's own
//! tags confirm the key both ways (first the typist's) and bind the PAKE to the channel. The roles are bound in SPAKE2
//! itself: a message sent back to its sender is refused. The shower sends nothing that depends on the code before the
//! typist has proved that it knows it.

use snow::{Builder, HandshakeState, StatelessTransportState};
use spake2::{Ed25519Group, Identity as Party, Password, Spake2};
use zeroize::Zeroizing;

use crate::code::PairCode;
use crate::id::InstanceId;
use crate::identity::Identity;
use crate::members::{GIFT_BYTES, Gift, Key, NAME_BYTES_MAX, cut};
use crate::noise::{HandshakeFailure, Preamble, Purpose, Suite, TAG_BYTES, preamble_of, refused, write};

/// A side byte and a point.
pub(crate) const SPAKE_BYTES: usize = 33;
/// `e` and the tag of an empty payload.
const OPENING_BYTES: usize = 32 + TAG_BYTES;
/// Instance, whether it has a swarm, which, and its name.
const CARD_BYTES: usize = 16 + 1 + 16 + NAME_BYTES_MAX;

pub(crate) type SpakeMessage = [u8; SPAKE_BYTES];
/// The typist's SPAKE2 message and the first of Noise.
pub(crate) type Opening = [u8; SPAKE_BYTES + OPENING_BYTES];
pub(crate) type Answer = [u8; 32 + (32 + TAG_BYTES) + (CARD_BYTES + TAG_BYTES)];
pub(crate) type Closing = [u8; (32 + TAG_BYTES) + (CARD_BYTES + TAG_BYTES)];
pub(crate) type SealedGift = [u8; 1 + GIFT_BYTES + TAG_BYTES];
pub(crate) type SealedDone = [u8; TAG_BYTES];

/// What each side says of itself once the channel is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Card {
    pub instance: InstanceId,
    /// Others may hold its secret.
    pub settled: bool,
    pub tag: [u8; 16],
    /// A stranger's text.
    pub name: String,
}

impl Card {
    pub(crate) fn of(identity: &Identity, name: &str) -> Self {
        let (instance, tag) = (identity.instance(), identity.swarm_tag());
        Self { instance, settled: !identity.is_fresh(), tag, name: cut(name) }
    }

    fn encode(&self) -> [u8; CARD_BYTES] {
        let mut out = [0; CARD_BYTES];
        let flag = [u8::from(self.settled)];
        let bytes = self.instance.as_bytes().iter().chain(&flag).chain(&self.tag).chain(self.name.as_bytes());
        out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = *byte);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (instance, rest) = bytes.split_first_chunk::<16>()?;
        let (flag, rest) = rest.split_first()?;
        let (tag, name) = rest.split_first_chunk::<16>()?;
        let name = name.split(|byte| *byte == 0).next()?;
        Some(Self {
            instance: InstanceId::from_bytes(*instance),
            settled: *flag != 0,
            tag: *tag,
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }
}

/// Whose secret both will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    TypistGives,
    ShowerGives,
    /// They have the same one.
    Same,
    /// Each has others with it: neither may change.
    TwoSwarms,
}

/// A machine without others joins one with others; of two without, the typist's secret is taken, because the machine
/// at which somebody types is the one that will meet the next worker, too.
pub(crate) fn verdict(typist: &Card, shower: &Card) -> Verdict {
    match (typist.settled, shower.settled) {
        _ if typist.tag == shower.tag => Verdict::Same,
        (true, true) => Verdict::TwoSwarms,
        (false, true) => Verdict::ShowerGives,
        (_, false) => Verdict::TypistGives,
    }
}

/// The machine at the other end, proved to know the code.
pub(crate) struct Met {
    keys: StatelessTransportState,
    pub peer_key: Key,
    pub card: Card,
    pub verdict: Verdict,
}

fn start(code: &PairCode, typist: bool) -> (Spake2<Ed25519Group>, Vec<u8>) {
    let (a, b) = (Party::new(b"swarm-os 1 pairing typist"), Party::new(b"swarm-os 1 pairing shower"));
    let password = Password::new(code.digits());
    if typist { Spake2::start_a(&password, &a, &b) } else { Spake2::start_b(&password, &a, &b) }
}

fn spake_message(bytes: Vec<u8>) -> Result<SpakeMessage, HandshakeFailure> {
    bytes.try_into().map_err(refused)
}

/// `Noise_XXpsk0` under the key of the PAKE.
fn channel(
    identity: &Identity,
    suite: Suite,
    key: Vec<u8>,
    [shower, typist]: [&SpakeMessage; 2],
    initiator: bool,
) -> Result<HandshakeState, HandshakeFailure> {
    let key = Zeroizing::new(key);
    let psk = Zeroizing::new(blake3::derive_key("swarm-os 1 pairing psk", &key));
    let preamble: Preamble = preamble_of(Purpose::Pair, suite);
    let prologue = [preamble.as_slice(), shower, typist].concat();
    let params = suite.pairing_pattern().parse().map_err(refused)?;
    let builder = Builder::new(params)
        .local_private_key(identity.private_key())
        .and_then(|builder| builder.psk(0, &psk))
        .and_then(|builder| builder.prologue(&prologue))
        .map_err(refused)?;
    if initiator { builder.build_initiator() } else { builder.build_responder() }.map_err(refused)
}

fn read_card(state: &mut HandshakeState, message: &[u8]) -> Result<Card, HandshakeFailure> {
    let mut payload = [0; CARD_BYTES + TAG_BYTES];
    if state.read_message(message, &mut payload).map_err(refused)? != CARD_BYTES {
        return Err(HandshakeFailure::Refused);
    }
    payload.get(..CARD_BYTES).and_then(Card::decode).ok_or(HandshakeFailure::Refused)
}

fn met(state: HandshakeState, own: &Identity, card: Card, verdict: Verdict) -> Result<Met, HandshakeFailure> {
    let keys = state.into_stateless_transport_mode().map_err(refused)?;
    let peer_key: Key =
        keys.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(HandshakeFailure::Refused)?;
    if peer_key == *own.public_key() {
        return Err(HandshakeFailure::OwnAddress);
    }
    Ok(Met { keys, peer_key, card, verdict })
}

impl Met {
    /// One record each way, numbered from 0; the shower sends a second one at the end.
    pub(crate) fn seal_gift(&self, gift: Option<&Gift>) -> Result<SealedGift, HandshakeFailure> {
        let mut plain = Zeroizing::new([0; 1 + GIFT_BYTES]);
        if let Some(gift) = gift {
            let bytes = gift.encode();
            plain.iter_mut().zip([1].iter().chain(bytes.iter())).for_each(|(out, byte)| *out = *byte);
        }
        let mut sealed = [0; 1 + GIFT_BYTES + TAG_BYTES];
        self.keys.write_message(0, plain.as_slice(), &mut sealed).map_err(refused)?;
        Ok(sealed)
    }

    pub(crate) fn open_gift(&self, sealed: &SealedGift) -> Result<Option<Gift>, HandshakeFailure> {
        let mut plain = Zeroizing::new([0; 1 + GIFT_BYTES + TAG_BYTES]);
        self.keys.read_message(0, sealed, plain.as_mut_slice()).map_err(refused)?;
        let (flag, rest) = plain.split_first().ok_or(HandshakeFailure::Refused)?;
        match flag {
            0 => Ok(None),
            _ => {
                let bytes = rest.first_chunk::<GIFT_BYTES>().ok_or(HandshakeFailure::Refused)?;
                Gift::decode(bytes).map(Some).ok_or(HandshakeFailure::Refused)
            }
        }
    }

    pub(crate) fn seal_done(&self) -> Result<SealedDone, HandshakeFailure> {
        let mut sealed = [0; TAG_BYTES];
        self.keys.write_message(1, &[], &mut sealed).map_err(refused)?;
        Ok(sealed)
    }

    pub(crate) fn open_done(&self, sealed: &SealedDone) -> Result<(), HandshakeFailure> {
        let mut nothing = [0; TAG_BYTES];
        match self.keys.read_message(1, sealed, &mut nothing) {
            Ok(0) => Ok(()),
            _ => Err(HandshakeFailure::Refused),
        }
    }
}

/// The side where the code is typed, waiting for the answer to its opening.
pub(crate) struct Typist {
    state: HandshakeState,
}

impl Typist {
    pub(crate) fn open(
        identity: &Identity,
        suite: Suite,
        code: &PairCode,
        shower: &SpakeMessage,
    ) -> Result<(Self, Opening), HandshakeFailure> {
        let (spake, own) = start(code, true);
        let own = spake_message(own)?;
        let key = spake.finish(shower).map_err(refused)?;
        let mut state = channel(identity, suite, key, [shower, &own], true)?;
        let mut opening = [0; SPAKE_BYTES + OPENING_BYTES];
        let (spake_part, noise_part) = opening.split_at_mut(SPAKE_BYTES);
        spake_part.copy_from_slice(&own);
        write(&mut state, &[], noise_part)?;
        Ok((Self { state }, opening))
    }

    pub(crate) fn close(
        mut self,
        identity: &Identity,
        own: &Card,
        answer: &Answer,
    ) -> Result<(Met, Closing), HandshakeFailure> {
        let card = read_card(&mut self.state, answer)?;
        let mut closing = [0; (32 + TAG_BYTES) + (CARD_BYTES + TAG_BYTES)];
        write(&mut self.state, &own.encode(), &mut closing)?;
        let verdict = verdict(own, &card);
        Ok((met(self.state, identity, card, verdict)?, closing))
    }
}

/// The side that shows the code, waiting for an opening.
pub(crate) struct Shower {
    spake: Spake2<Ed25519Group>,
    own: SpakeMessage,
    suite: Suite,
}

/// The same, waiting for the typist's card.
pub(crate) struct ShowerWaiting {
    state: HandshakeState,
}

impl Shower {
    pub(crate) fn start(suite: Suite, code: &PairCode) -> Result<(Self, SpakeMessage), HandshakeFailure> {
        let (spake, own) = start(code, false);
        let own = spake_message(own)?;
        Ok((Self { spake, own, suite }, own))
    }

    /// Fails when the typist used another code: this is the one guess that a run allows.
    pub(crate) fn answer(
        self,
        identity: &Identity,
        own: &Card,
        opening: &Opening,
    ) -> Result<(ShowerWaiting, Answer), HandshakeFailure> {
        let (typist, noise) = opening.split_first_chunk::<SPAKE_BYTES>().ok_or(HandshakeFailure::Refused)?;
        let key = self.spake.finish(typist).map_err(refused)?;
        let mut state = channel(identity, self.suite, key, [&self.own, typist], false)?;
        let mut nothing = [0; TAG_BYTES];
        if state.read_message(noise, &mut nothing).map_err(refused)? != 0 {
            return Err(HandshakeFailure::Refused);
        }
        let mut answer = [0; 32 + (32 + TAG_BYTES) + (CARD_BYTES + TAG_BYTES)];
        write(&mut state, &own.encode(), &mut answer)?;
        Ok((ShowerWaiting { state }, answer))
    }
}

impl ShowerWaiting {
    pub(crate) fn close(
        mut self,
        identity: &Identity,
        own: &Card,
        closing: &Closing,
    ) -> Result<Met, HandshakeFailure> {
        let card = read_card(&mut self.state, closing)?;
        let verdict = verdict(&card, own);
        met(self.state, identity, card, verdict)
    }
}

#[cfg(test)]
#[path = "pairing_tests.rs"]
mod tests;
