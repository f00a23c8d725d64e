//! The swarm secret and its text form.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::error::IdentityError;

/// What every text form of a secret starts with.
pub(crate) const SECRET_PREFIX: &str = "swarm-secret-v1:";

const CHECK_BYTES: usize = 2;
const DIGITS: usize = 2 * (32 + CHECK_BYTES);

/// The 32 random bytes that make a group of nodes a swarm. Wiped from memory on drop, never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SwarmSecret([u8; 32]);

impl SwarmSecret {
    /// A new random secret: a new swarm.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn random() -> Result<Self, IdentityError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(IdentityError::Random)?;
        Ok(Self(bytes))
    }

    /// The secret with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Tells two secrets apart inside an encrypted channel. Says nothing useful about 256 random bits.
    pub(crate) fn tag(&self) -> [u8; 16] {
        let mut tag = [0; 16];
        let mut hasher = blake3::Hasher::new_derive_key("swarm-os 1 swarm tag");
        hasher.update(&self.0);
        hasher.finalize_xof().fill(&mut tag);
        tag
    }

    /// The text a person copies to another computer: prefix, eight groups of eight hex digits, and a
    /// group of four that catches a mistyped one. 92 characters.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        keyed_text(SECRET_PREFIX, &self.0)
    }

    /// Reads [`SwarmSecret::to_text`] back. Letter case, surrounding space, and spaces or dashes between
    /// digits do not matter.
    ///
    /// # Errors
    /// [`SecretTextError`], saying what is wrong without repeating the secret.
    pub fn parse(text: &str) -> Result<Self, SecretTextError> {
        parse_keyed_text(SECRET_PREFIX, text).map(Self)
    }

    /// The Noise pre-shared key. Derived, so the secret itself is never an input to the handshake.
    pub(crate) fn psk(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(blake3::derive_key("swarm-os 1 link psk", &self.0))
    }
}

impl fmt::Debug for SwarmSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SwarmSecret(hidden)")
    }
}

/// Why a text is not a swarm secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretTextError {
    /// It does not start as a secret does.
    #[error(
        "this is not a swarm secret: it must start with \"{SECRET_PREFIX}\"; copy the whole line that `swarm-os secret export` prints"
    )]
    Prefix,
    /// Something other than a hex digit, a dash or a space.
    #[error("character {position} of the swarm secret is not one of 0-9 and a-f; copy the whole line again")]
    Character {
        /// Counted from 1, over the whole text without surrounding space.
        position: usize,
    },
    /// Too few or too many digits.
    #[error("the swarm secret has {got} hex digits instead of {DIGITS}; copy the whole line again")]
    Length {
        /// Digits found.
        got: usize,
    },
    /// All digits are there, but one or more are wrong.
    #[error(
        "the swarm secret was mistyped: its last four digits do not fit the others; copy the whole line again"
    )]
    Checksum,
}

/// `prefix`, 64 hex digits in groups of eight, four check digits.
pub(crate) fn keyed_text(prefix: &str, bytes: &[u8; 32]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(prefix.len() + DIGITS + 8));
    text.push_str(prefix);
    for (index, byte) in bytes.iter().chain(&check(prefix, bytes)).enumerate() {
        if index > 0 && index % 4 == 0 {
            text.push('-');
        }
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
        }
    }
    text
}

pub(crate) fn parse_keyed_text(prefix: &str, text: &str) -> Result<[u8; 32], SecretTextError> {
    let text = text.trim();
    let head = text.get(..prefix.len()).ok_or(SecretTextError::Prefix)?;
    if !head.eq_ignore_ascii_case(prefix) {
        return Err(SecretTextError::Prefix);
    }
    let mut bytes = Zeroizing::new([0u8; 32 + CHECK_BYTES]);
    let mut got = 0usize;
    for (index, character) in text.chars().enumerate().skip(prefix.len()) {
        if character == '-' || character.is_ascii_whitespace() {
            continue;
        }
        let digit = character.to_digit(16).ok_or(SecretTextError::Character { position: index + 1 })?;
        if let Some(byte) = bytes.get_mut(got / 2) {
            *byte = (*byte << 4) | (digit as u8);
        }
        got += 1;
    }
    if got != DIGITS {
        return Err(SecretTextError::Length { got });
    }
    let (key, checksum) = bytes.split_first_chunk::<32>().ok_or(SecretTextError::Length { got })?;
    if checksum != check(prefix, key) {
        return Err(SecretTextError::Checksum);
    }
    Ok(*key)
}

/// Two bytes: they catch 65535 of 65536 slips, and say nothing useful about a 256-bit secret.
fn check(prefix: &str, bytes: &[u8; 32]) -> [u8; CHECK_BYTES] {
    let mut hasher = blake3::Hasher::new_derive_key("swarm-os 1 text checksum");
    hasher.update(prefix.as_bytes());
    hasher.update(bytes);
    let mut out = [0; CHECK_BYTES];
    hasher.finalize_xof().fill(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_text_form_is_stable() {
        let text = SwarmSecret::from_bytes([0xab; 32]).to_text();
        let start =
            "swarm-secret-v1:abababab-abababab-abababab-abababab-abababab-abababab-abababab-abababab-";
        assert_eq!(text.len(), start.len() + 4);
        assert!(text.starts_with(start));
    }

    #[test]
    fn case_space_and_dashes_do_not_matter() {
        let secret = SwarmSecret::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        let loud = format!("  {} \n", secret.to_text().to_uppercase());
        assert_eq!(SwarmSecret::parse(&loud).as_ref(), Ok(&secret));
        let bare = secret.to_text().replacen('-', "", 9).replace("secretv1", "secret-v1");
        let bare = bare.replace("swarmsecret", "swarm-secret");
        assert_eq!(SwarmSecret::parse(&bare.replace("-v1:", "-v1: ")).as_ref(), Ok(&secret));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let text = SwarmSecret::from_bytes([3; 32]).to_text();
        assert_eq!(SwarmSecret::parse(""), Err(SecretTextError::Prefix));
        assert_eq!(SwarmSecret::parse(&text["swarm-".len()..]), Err(SecretTextError::Prefix));
        assert_eq!(SwarmSecret::parse(&text[..text.len() - 1]), Err(SecretTextError::Length { got: 67 }));
        assert_eq!(SwarmSecret::parse(&format!("{}0", *text)), Err(SecretTextError::Length { got: 69 }));
        assert_eq!(
            SwarmSecret::parse(&text.replacen("03030303", "0303o303", 1)),
            Err(SecretTextError::Character { position: SECRET_PREFIX.len() + 5 })
        );
        assert_eq!(
            SwarmSecret::parse(&text.replacen("03030303", "03030308", 1)),
            Err(SecretTextError::Checksum)
        );
    }

    #[test]
    fn a_secret_is_never_printed() {
        assert_eq!(format!("{:?}", SwarmSecret::from_bytes([0xab; 32])), "SwarmSecret(hidden)");
    }

    proptest! {
        #[test]
        fn every_secret_survives_its_text(bytes: [u8; 32]) {
            let secret = SwarmSecret::from_bytes(bytes);
            prop_assert_eq!(SwarmSecret::parse(&secret.to_text()), Ok(secret));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = SwarmSecret::parse(&text);
            let _ = SwarmSecret::parse(&format!("{SECRET_PREFIX}{text}"));
        }

        #[test]
        fn two_neighbouring_digits_swapped_are_caught(bytes: [u8; 32], at in 0usize..63) {
            let text = SwarmSecret::from_bytes(bytes).to_text();
            let digits: Vec<usize> = (SECRET_PREFIX.len()..text.len()).filter(|i| text.as_bytes()[*i] != b'-').collect();
            let mut swapped = text.as_bytes().to_vec();
            swapped.swap(digits[at], digits[at + 1]);
            prop_assume!(swapped != text.as_bytes());
            let swapped = String::from_utf8(swapped).unwrap();
            // Two check bytes let one slip in 65536 through; a slip must never panic, and is nearly always caught.
            if let Err(error) = SwarmSecret::parse(&swapped) {
                prop_assert_eq!(error, SecretTextError::Checksum);
            }
        }
    }
}
