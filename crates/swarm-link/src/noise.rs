//! The handshake as a pure state machine: bytes in, bytes out, no socket, no clock.

use std::sync::Arc;

use snow::{Builder, HandshakeState, StatelessTransportState};
use zeroize::Zeroizing;

use crate::id::InstanceId;
use crate::identity::Identity;
use crate::members::{GIFT_BYTES, Gift, Key};

/// Version of the handshake and of the records. Nodes of different versions do not talk.
pub const PROTOCOL_VERSION: u8 = 1;

const MAGIC: [u8; 4] = *b"SWRM";
/// Magic, version, suite.
pub(crate) const PREAMBLE_BYTES: usize = 6;
/// Bytes an AEAD tag adds.
pub(crate) const TAG_BYTES: usize = 16;
/// `e` and the tag of an empty payload (a PSK pattern encrypts from the first message on).
const FIRST_BYTES: usize = 32 + TAG_BYTES;
/// `e`, sealed `s`, sealed instance id.
const SECOND_BYTES: usize = 32 + (32 + TAG_BYTES) + (16 + TAG_BYTES);
/// Sealed `s`, sealed instance id.
const THIRD_BYTES: usize = (32 + TAG_BYTES) + (16 + TAG_BYTES);

pub(crate) type Preamble = [u8; PREAMBLE_BYTES];
pub(crate) type First = [u8; FIRST_BYTES];
pub(crate) type Second = [u8; SECOND_BYTES];
pub(crate) type Third = [u8; THIRD_BYTES];
/// A record like every later one: its length, and the tag of an empty payload.
pub(crate) type Confirmation = [u8; 2 + TAG_BYTES];
/// Instead of it, for a machine that missed a change of the secret: the length, and the sealed new secret.
pub(crate) const LATE_BYTES: usize = 2 + GIFT_BYTES + TAG_BYTES;
/// The third message when the dialling side brings a new secret.
pub(crate) const THIRD_NEWS_BYTES: usize = (32 + TAG_BYTES) + (16 + GIFT_BYTES + TAG_BYTES);

/// What a connection is for. Bits of the suite byte, so that they are bound into every handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A link between members of one swarm.
    Link,
    /// A member brings the secret that has replaced the one of the handshake.
    News,
    /// A member that was refused asks for the secret it may have missed: its own is the one of so many changes ago.
    Ask(u8),
    /// First meeting by a code.
    Pair,
}

impl Purpose {
    const fn bits(self) -> u8 {
        match self {
            Self::Link => 0,
            Self::News => 0x40,
            Self::Pair => 0x80,
            Self::Ask(age) => 0xc0 | (age & AGE_MASK) << 3,
        }
    }

    /// Which of the secrets the handshake is under, at the side that has the newer one.
    const fn age(self) -> usize {
        match self {
            Self::Ask(age) => age as usize,
            _ => 0,
        }
    }
}

/// Ages that fit between the purpose and the suite.
const AGE_MASK: u8 = 7;

/// The cipher of one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// AES-256-GCM: the faster one where the processor has AES instructions.
    AesGcm,
    /// ChaCha20-Poly1305: the faster one where it has not.
    ChaChaPoly,
}

impl Suite {
    /// What this computer is fast at. The initiator decides; the responder follows.
    #[must_use]
    pub fn preferred() -> Self {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        let aes =
            std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        let aes = std::arch::is_aarch64_feature_detected!("aes");
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
        let aes = false;
        if aes { Self::AesGcm } else { Self::ChaChaPoly }
    }

    const fn code(self) -> u8 {
        match self {
            Self::AesGcm => 0,
            Self::ChaChaPoly => 1,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::AesGcm),
            1 => Some(Self::ChaChaPoly),
            _ => None,
        }
    }

    const fn pattern(self) -> &'static str {
        match self {
            Self::AesGcm => "Noise_XXpsk3_25519_AESGCM_BLAKE2s",
            Self::ChaChaPoly => "Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s",
        }
    }

    pub(crate) const fn pairing_pattern(self) -> &'static str {
        match self {
            Self::AesGcm => "Noise_XXpsk0_25519_AESGCM_BLAKE2s",
            Self::ChaChaPoly => "Noise_XXpsk0_25519_ChaChaPoly_BLAKE2s",
        }
    }
}

/// Why a handshake ended. One reason covers everything a stranger could probe for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandshakeFailure {
    NotSwarm,
    OtherVersion(u8),
    Refused,
    OwnAddress,
}

/// What both sides hold when the handshake is over.
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Established {
    pub keys: Arc<StatelessTransportState>,
    pub suite: Suite,
    pub peer_key: [u8; 32],
    pub peer_instance: InstanceId,
    /// Number of the first record this side sends and receives.
    pub first_sent: u64,
    pub first_received: u64,
}

pub(crate) fn preamble_of(purpose: Purpose, suite: Suite) -> Preamble {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, PROTOCOL_VERSION, purpose.bits() | suite.code()]
}

/// What a stranger's first six bytes ask for.
pub(crate) fn read_preamble(bytes: &Preamble) -> Result<(Purpose, Suite), HandshakeFailure> {
    let [a, b, c, d, version, suite] = *bytes;
    if [a, b, c, d] != MAGIC {
        return Err(HandshakeFailure::NotSwarm);
    }
    if version != PROTOCOL_VERSION {
        return Err(HandshakeFailure::OtherVersion(version));
    }
    let purpose = match suite & 0xc0 {
        0 => Purpose::Link,
        0x40 => Purpose::News,
        0x80 => Purpose::Pair,
        _ => match (suite >> 3) & AGE_MASK {
            0 => return Err(HandshakeFailure::NotSwarm),
            age => Purpose::Ask(age),
        },
    };
    // What is not used in a purpose must be zero: every preamble has one spelling.
    let suite = Suite::from_code(suite ^ purpose.bits()).ok_or(HandshakeFailure::NotSwarm)?;
    Ok((purpose, suite))
}

/// Everything a failing cryptographic step may say.
pub(crate) fn refused<E>(_: E) -> HandshakeFailure {
    HandshakeFailure::Refused
}

fn state(
    identity: &Identity,
    psk: &[u8; 32],
    (purpose, suite): (Purpose, Suite),
    initiator: bool,
) -> Result<HandshakeState, HandshakeFailure> {
    let params = suite.pattern().parse().map_err(refused)?;
    let prologue = preamble_of(purpose, suite);
    let builder = Builder::new(params)
        .local_private_key(identity.private_key())
        .and_then(|builder| builder.psk(3, psk))
        .and_then(|builder| builder.prologue(&prologue))
        .map_err(refused)?;
    if initiator { builder.build_initiator() } else { builder.build_responder() }.map_err(refused)
}

/// The side that dialled, waiting for the second message.
pub(crate) struct Initiator {
    state: HandshakeState,
    suite: Suite,
    identity: Identity,
}

impl Initiator {
    pub(crate) fn start(identity: &Identity, suite: Suite) -> Result<(Self, First), HandshakeFailure> {
        Self::start_for(identity, (Purpose::Link, suite), 0)
    }

    /// `age` is the number of the secret to use: 0 is the current one, 1 the one before.
    pub(crate) fn start_for(
        identity: &Identity,
        (purpose, suite): (Purpose, Suite),
        age: usize,
    ) -> Result<(Self, First), HandshakeFailure> {
        let psks = identity.psks();
        let psk = psks.get(age).ok_or(HandshakeFailure::Refused)?;
        let mut state = state(identity, psk, (purpose, suite), true)?;
        let mut first = [0; FIRST_BYTES];
        write(&mut state, &[], &mut first)?;
        Ok((Self { state, suite, identity: identity.clone() }, first))
    }

    /// Reads who answers. A machine that was forgotten gets no further.
    fn meet(&mut self, second: &Second) -> Result<(InstanceId, Key), HandshakeFailure> {
        let peer_instance = read_instance(&mut self.state, second)?;
        if peer_instance == self.identity.instance() {
            return Err(HandshakeFailure::OwnAddress);
        }
        let key = remote_key(self.state.get_remote_static())?;
        if self.identity.is_forgotten(&key) {
            return Err(HandshakeFailure::Refused);
        }
        Ok((peer_instance, key))
    }

    pub(crate) fn answer(mut self, second: &Second) -> Result<(InitiatorWaiting, Third), HandshakeFailure> {
        let (peer_instance, _) = self.meet(second)?;
        let mut third = [0; THIRD_BYTES];
        write(&mut self.state, self.identity.instance().as_bytes(), &mut third)?;
        let established = establish(self.state, self.suite, peer_instance, 0, 1)?;
        Ok((InitiatorWaiting(established), third))
    }

    /// Brings the current secret to a machine that has an older one, if it may have it.
    pub(crate) fn bring_news(
        mut self,
        second: &Second,
    ) -> Result<(InitiatorWaiting, [u8; THIRD_NEWS_BYTES]), HandshakeFailure> {
        let (peer_instance, key) = self.meet(second)?;
        if !self.identity.may_have_secrets(&key) {
            return Err(HandshakeFailure::Refused);
        }
        let (gift, own) = (self.identity.gift().encode(), self.identity.instance());
        let payload = Zeroizing::new([own.as_bytes().as_slice(), gift.as_slice()].concat());
        let mut third = [0; THIRD_NEWS_BYTES];
        write(&mut self.state, &payload, &mut third)?;
        let established = establish(self.state, self.suite, peer_instance, 0, 1)?;
        Ok((InitiatorWaiting(established), third))
    }
}

/// The side that dialled, waiting to hear that it is in.
pub(crate) struct InitiatorWaiting(Established);

impl InitiatorWaiting {
    pub(crate) fn peer_key(&self) -> &Key {
        &self.0.peer_key
    }

    pub(crate) fn confirm(self, confirmation: &Confirmation) -> Result<Established, HandshakeFailure> {
        let (length, sealed) = confirmation.split_first_chunk::<2>().ok_or(HandshakeFailure::Refused)?;
        if usize::from(u16::from_le_bytes(*length)) != TAG_BYTES {
            return Err(HandshakeFailure::Refused);
        }
        let mut nothing = [0; TAG_BYTES];
        match self.0.keys.read_message(0, sealed, &mut nothing) {
            Ok(0) => Ok(self.0),
            _ => Err(HandshakeFailure::Refused),
        }
    }

    /// The secret that this machine missed, from one that proved that it holds the old one.
    pub(crate) fn late(self, confirmation: &[u8; LATE_BYTES]) -> Result<(Key, Gift), HandshakeFailure> {
        let (_, sealed) = confirmation.split_first_chunk::<2>().ok_or(HandshakeFailure::Refused)?;
        let mut plain = Zeroizing::new([0; GIFT_BYTES + TAG_BYTES]);
        self.0.keys.read_message(0, sealed, plain.as_mut_slice()).map_err(refused)?;
        let gift = plain.first_chunk().and_then(Gift::decode).ok_or(HandshakeFailure::Refused)?;
        Ok((self.0.peer_key, gift))
    }
}

/// The side that was dialled, waiting for the third message.
pub(crate) struct Responder {
    state: HandshakeState,
    suite: Suite,
    identity: Identity,
    /// The handshake is under a secret of the past.
    late: bool,
}

/// What the third message showed.
pub(crate) enum Finished {
    /// A member.
    Member(Established, Confirmation),
    /// A machine that missed a change of the secret, and what to tell it. The link ends with that.
    Late(Box<[u8; LATE_BYTES]>),
}

impl Responder {
    #[cfg(test)]
    pub(crate) fn answer(
        identity: &Identity,
        suite: Suite,
        first: &First,
    ) -> Result<(Self, Second), HandshakeFailure> {
        Self::answer_for(identity, (Purpose::Link, suite), first)
    }

    pub(crate) fn answer_for(
        identity: &Identity,
        (purpose, suite): (Purpose, Suite),
        first: &First,
    ) -> Result<(Self, Second), HandshakeFailure> {
        let psks = identity.psks();
        let psk = psks.get(purpose.age()).ok_or(HandshakeFailure::Refused)?;
        let mut state = state(identity, psk, (purpose, suite), false)?;
        // Ring's ciphers need room for the tag, or they take a detour through the heap.
        let mut nothing = [0; TAG_BYTES];
        if state.read_message(first, &mut nothing).map_err(refused)? != 0 {
            return Err(HandshakeFailure::Refused);
        }
        let mut second = [0; SECOND_BYTES];
        write(&mut state, identity.instance().as_bytes(), &mut second)?;
        let late = purpose.age() > 0;
        Ok((Self { state, suite, identity: identity.clone(), late }, second))
    }

    /// Reads the third message. Who asked for a secret that it missed gets it, if it was paired and not forgotten, and
    /// nothing else.
    pub(crate) fn finish(mut self, third: &Third) -> Result<Finished, HandshakeFailure> {
        let peer_instance = read_instance(&mut self.state, third)?;
        if peer_instance == self.identity.instance() {
            return Err(HandshakeFailure::OwnAddress);
        }
        let established = establish(self.state, self.suite, peer_instance, 1, 0)?;
        let key = &established.peer_key;
        if self.late {
            if !self.identity.may_have_secrets(key) {
                return Err(HandshakeFailure::Refused);
            }
            return late_confirmation(&established, &self.identity).map(Finished::Late);
        }
        if self.identity.is_forgotten(key) {
            return Err(HandshakeFailure::Refused);
        }
        let confirmation = confirmation(&established)?;
        Ok(Finished::Member(established, confirmation))
    }

    /// Reads a third message that brings a new secret under the current one.
    pub(crate) fn hear_news(
        mut self,
        third: &[u8; THIRD_NEWS_BYTES],
    ) -> Result<(Gift, Established, Confirmation), HandshakeFailure> {
        let mut payload = Zeroizing::new([0; 16 + GIFT_BYTES + TAG_BYTES]);
        if self.state.read_message(third, payload.as_mut_slice()).map_err(refused)? != 16 + GIFT_BYTES {
            return Err(HandshakeFailure::Refused);
        }
        let (instance, rest) = payload.split_first_chunk::<16>().ok_or(HandshakeFailure::Refused)?;
        let gift = rest.first_chunk().and_then(Gift::decode).ok_or(HandshakeFailure::Refused)?;
        let instance = InstanceId::from_bytes(*instance);
        let established = establish(self.state, self.suite, instance, 1, 0)?;
        let confirmation = confirmation(&established)?;
        Ok((gift, established, confirmation))
    }
}

fn confirmation(established: &Established) -> Result<Confirmation, HandshakeFailure> {
    let mut confirmation = [0; 2 + TAG_BYTES];
    let (length, sealed) = confirmation.split_at_mut(2);
    length.copy_from_slice(&(TAG_BYTES as u16).to_le_bytes());
    established.keys.write_message(0, &[], sealed).map_err(refused)?;
    Ok(confirmation)
}

fn late_confirmation(
    established: &Established,
    identity: &Identity,
) -> Result<Box<[u8; LATE_BYTES]>, HandshakeFailure> {
    let gift = identity.gift().encode();
    let mut out = Box::new([0; LATE_BYTES]);
    let (length, sealed) = out.split_at_mut(2);
    length.copy_from_slice(&((LATE_BYTES - 2) as u16).to_le_bytes());
    established.keys.write_message(0, gift.as_slice(), sealed).map_err(refused)?;
    Ok(out)
}

fn remote_key(key: Option<&[u8]>) -> Result<Key, HandshakeFailure> {
    key.and_then(|key| key.try_into().ok()).ok_or(HandshakeFailure::Refused)
}

fn establish(
    state: HandshakeState,
    suite: Suite,
    peer_instance: InstanceId,
    first_sent: u64,
    first_received: u64,
) -> Result<Established, HandshakeFailure> {
    let keys = state.into_stateless_transport_mode().map_err(refused)?;
    let peer_key = remote_key(keys.get_remote_static())?;
    Ok(Established { keys: Arc::new(keys), suite, peer_key, peer_instance, first_sent, first_received })
}

/// Fills `out` exactly, or the pattern is not the one the sizes were made for.
pub(crate) fn write(
    state: &mut HandshakeState,
    payload: &[u8],
    out: &mut [u8],
) -> Result<(), HandshakeFailure> {
    let bytes = state.write_message(payload, out).map_err(refused)?;
    if bytes == out.len() { Ok(()) } else { Err(HandshakeFailure::Refused) }
}

fn read_instance(state: &mut HandshakeState, message: &[u8]) -> Result<InstanceId, HandshakeFailure> {
    let mut payload = [0; 16 + TAG_BYTES];
    if state.read_message(message, &mut payload).map_err(refused)? != 16 {
        return Err(HandshakeFailure::Refused);
    }
    let instance = payload.first_chunk().ok_or(HandshakeFailure::Refused)?;
    Ok(InstanceId::from_bytes(*instance))
}

#[cfg(test)]
#[path = "noise_tests.rs"]
pub(crate) mod tests;
