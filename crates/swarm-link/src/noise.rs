//! The handshake as a pure state machine: bytes in, bytes out, no socket, no clock.

use std::sync::Arc;

use snow::{Builder, HandshakeState, StatelessTransportState};

use crate::id::InstanceId;
use crate::identity::Identity;

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

pub(crate) fn preamble(suite: Suite) -> Preamble {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, PROTOCOL_VERSION, suite.code()]
}

/// The suite a stranger's first six bytes ask for.
pub(crate) fn read_preamble(bytes: &Preamble) -> Result<Suite, HandshakeFailure> {
    let [a, b, c, d, version, suite] = *bytes;
    if [a, b, c, d] != MAGIC {
        return Err(HandshakeFailure::NotSwarm);
    }
    if version != PROTOCOL_VERSION {
        return Err(HandshakeFailure::OtherVersion(version));
    }
    Suite::from_code(suite).ok_or(HandshakeFailure::NotSwarm)
}

/// Everything a failing cryptographic step may say.
fn refused<E>(_: E) -> HandshakeFailure {
    HandshakeFailure::Refused
}

fn state(identity: &Identity, suite: Suite, initiator: bool) -> Result<HandshakeState, HandshakeFailure> {
    let params = suite.pattern().parse().map_err(refused)?;
    let (psk, prologue) = (identity.psk(), preamble(suite));
    let builder = Builder::new(params)
        .local_private_key(identity.private_key())
        .and_then(|builder| builder.psk(3, &psk))
        .and_then(|builder| builder.prologue(&prologue))
        .map_err(refused)?;
    if initiator { builder.build_initiator() } else { builder.build_responder() }.map_err(refused)
}

/// The side that dialled, waiting for the second message.
pub(crate) struct Initiator {
    state: HandshakeState,
    suite: Suite,
    own: InstanceId,
}

impl Initiator {
    pub(crate) fn start(identity: &Identity, suite: Suite) -> Result<(Self, First), HandshakeFailure> {
        let mut state = state(identity, suite, true)?;
        let mut first = [0; FIRST_BYTES];
        write(&mut state, &[], &mut first)?;
        Ok((Self { state, suite, own: identity.instance() }, first))
    }

    pub(crate) fn answer(mut self, second: &Second) -> Result<(InitiatorWaiting, Third), HandshakeFailure> {
        let peer_instance = read_instance(&mut self.state, second)?;
        if peer_instance == self.own {
            return Err(HandshakeFailure::OwnAddress);
        }
        let mut third = [0; THIRD_BYTES];
        write(&mut self.state, self.own.as_bytes(), &mut third)?;
        let established = establish(self.state, self.suite, peer_instance, 0, 1)?;
        Ok((InitiatorWaiting(established), third))
    }
}

/// The side that dialled, waiting to hear that it is in.
pub(crate) struct InitiatorWaiting(Established);

impl InitiatorWaiting {
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
}

/// The side that was dialled, waiting for the third message.
pub(crate) struct Responder {
    state: HandshakeState,
    suite: Suite,
    own: InstanceId,
}

impl Responder {
    pub(crate) fn answer(
        identity: &Identity,
        suite: Suite,
        first: &First,
    ) -> Result<(Self, Second), HandshakeFailure> {
        let mut state = state(identity, suite, false)?;
        // Ring's ciphers need room for the tag, or they take a detour through the heap.
        let mut nothing = [0; TAG_BYTES];
        if state.read_message(first, &mut nothing).map_err(refused)? != 0 {
            return Err(HandshakeFailure::Refused);
        }
        let mut second = [0; SECOND_BYTES];
        write(&mut state, identity.instance().as_bytes(), &mut second)?;
        Ok((Self { state, suite, own: identity.instance() }, second))
    }

    pub(crate) fn finish(mut self, third: &Third) -> Result<(Established, Confirmation), HandshakeFailure> {
        let peer_instance = read_instance(&mut self.state, third)?;
        if peer_instance == self.own {
            return Err(HandshakeFailure::OwnAddress);
        }
        let established = establish(self.state, self.suite, peer_instance, 1, 0)?;
        let mut confirmation = [0; 2 + TAG_BYTES];
        let (length, sealed) = confirmation.split_at_mut(2);
        length.copy_from_slice(&(TAG_BYTES as u16).to_le_bytes());
        established.keys.write_message(0, &[], sealed).map_err(refused)?;
        Ok((established, confirmation))
    }
}

fn establish(
    state: HandshakeState,
    suite: Suite,
    peer_instance: InstanceId,
    first_sent: u64,
    first_received: u64,
) -> Result<Established, HandshakeFailure> {
    let keys = state.into_stateless_transport_mode().map_err(refused)?;
    let peer_key =
        keys.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(HandshakeFailure::Refused)?;
    Ok(Established { keys: Arc::new(keys), suite, peer_key, peer_instance, first_sent, first_received })
}

/// Fills `out` exactly, or the pattern is not the one the sizes were made for.
fn write(state: &mut HandshakeState, payload: &[u8], out: &mut [u8]) -> Result<(), HandshakeFailure> {
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
