//! Names of nodes: a random one for each process, and one bound to the static key.

use std::fmt;

use crate::error::IdentityError;

/// The random name of one running process, made at its start and announced over mDNS.
///
/// Several nodes of one user on one computer share a config folder, and with it the static key; this is
/// what tells them apart. It says nothing about the user, the computer or the swarm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId([u8; 16]);

impl InstanceId {
    /// A new random name.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn random() -> Result<Self, IdentityError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(IdentityError::Random)?;
        Ok(Self(bytes))
    }

    /// The name with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Reads exactly 32 lower-case hex digits; anything else is `None`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex(text).map(Self)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

/// The name of a node once its link is authenticated: BLAKE3 of its static public key and instance id.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The name of the process `instance` that holds `static_key`.
    #[must_use]
    pub fn of(static_key: &[u8; 32], instance: InstanceId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("swarm-os 1 node id");
        hasher.update(static_key);
        hasher.update(instance.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The name with these bytes, as a peer wrote them.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight hex digits, for people to read.
    #[must_use]
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(8);
        text
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Exactly `2 * N` lower-case hex digits.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N.checked_mul(2)? {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let &[high, low] = pair else { return None };
        *byte = (digit(high)? << 4) | digit(low)?;
    }
    Some(out)
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_processes_with_one_key_are_two_nodes() {
        let (one, two) = (InstanceId::from_bytes([1; 16]), InstanceId::from_bytes([2; 16]));
        assert_ne!(NodeId::of(&[7; 32], one), NodeId::of(&[7; 32], two));
        assert_ne!(NodeId::of(&[7; 32], one), NodeId::of(&[8; 32], one));
        assert_eq!(NodeId::of(&[7; 32], one), NodeId::of(&[7; 32], one));
        assert_eq!(NodeId::of(&[7; 32], one).short().len(), 8);
    }

    proptest! {
        #[test]
        fn an_instance_id_survives_its_text(bytes: [u8; 16]) {
            let id = InstanceId::from_bytes(bytes);
            prop_assert_eq!(InstanceId::parse(&id.to_string()), Some(id));
        }

        #[test]
        fn only_hex_of_the_right_length_is_an_instance_id(text in ".*") {
            let good = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            prop_assert_eq!(InstanceId::parse(&text).is_some(), good);
        }
    }
}
