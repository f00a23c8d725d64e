//! Who belongs to the swarm: its secrets by age, the machines paired with, and those that were forgotten. Pure.

use serde::{Deserialize, Serialize};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::id::{hex, parse_hex};
use crate::secret::SwarmSecret;

/// Secrets of the past that are kept, so that machines that were off when it changed can be given the new one.
pub(crate) const OLD_SECRETS_MAX: usize = 4;
/// Machines that can be forgotten before a new swarm has to be made.
pub const FORGOTTEN_MAX: usize = 32;
/// Machines remembered by name.
const PEERS_MAX: usize = 256;
/// Longest name of a machine, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 64;
/// Epoch, secret, number of forgotten keys, the keys and zeros.
pub(crate) const GIFT_BYTES: usize = 8 + 32 + 1 + 32 * FORGOTTEN_MAX;

pub(crate) type Key = [u8; 32];

/// A machine that this one knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What its owner calls it: a stranger's text.
    pub name: String,
    /// Its static X25519 public key.
    pub key: [u8; 32],
    /// The two met by a code. Only such a machine is given a new secret after it missed the change.
    pub paired: bool,
}

impl Peer {
    /// The start of its key, for people to compare.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut text = hex(&self.key);
        text.truncate(8);
        text
    }
}

/// One secret and its place in the order of secrets of this swarm.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub epoch: u64,
    pub secret: SwarmSecret,
}

/// What a machine of the swarm hands to one that lacks it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Gift {
    pub epoch: u64,
    pub secret: SwarmSecret,
    pub forgotten: Vec<Key>,
}

impl Gift {
    pub(crate) fn encode(&self) -> Zeroizing<[u8; GIFT_BYTES]> {
        let mut out = Zeroizing::new([0; GIFT_BYTES]);
        let count = [self.forgotten.len().min(FORGOTTEN_MAX) as u8];
        let epoch = self.epoch.to_le_bytes();
        let keys = self.forgotten.iter().take(FORGOTTEN_MAX).flatten();
        let bytes = epoch.iter().chain(self.secret.as_bytes()).chain(&count).chain(keys);
        out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = *byte);
        out
    }

    /// Total: every 1065 bytes are a gift or `None`.
    pub(crate) fn decode(bytes: &[u8; GIFT_BYTES]) -> Option<Self> {
        let (epoch, rest) = bytes.split_first_chunk::<8>()?;
        let (secret, rest) = rest.split_first_chunk::<32>()?;
        let (count, keys) = rest.split_first()?;
        let count = usize::from(*count);
        if count > FORGOTTEN_MAX {
            return None;
        }
        let (keys, _) = keys.as_chunks::<32>();
        Some(Self {
            epoch: u64::from_le_bytes(*epoch),
            secret: SwarmSecret::from_bytes(*secret),
            forgotten: keys.iter().take(count).copied().collect(),
        })
    }
}

/// Why a name cannot be forgotten.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForgetError {
    /// Nobody of that name.
    #[error("no machine {name:?} is known; `swarm-os peers` lists those that are")]
    Unknown {
        /// What was typed.
        name: String,
    },
    /// Several of that name.
    #[error("{count} machines are called {name:?}; say one of their keys instead: {keys}")]
    Ambiguous {
        /// What was typed.
        name: String,
        /// How many fit.
        count: usize,
        /// Their short keys.
        keys: String,
    },
    /// The list is full.
    #[error(
        "{FORGOTTEN_MAX} machines were forgotten already; leave this swarm with `swarm-os forget --all` and pair the others again"
    )]
    Full,
}

#[derive(Clone)]
pub(crate) struct Membership {
    current: Held,
    /// Newest first.
    old: Vec<Held>,
    /// Somebody else may hold the secret.
    pub settled: bool,
    peers: Vec<Peer>,
    forgotten: Vec<Key>,
}

#[derive(Serialize, Deserialize)]
struct FileForm {
    settled: bool,
    /// Newest first.
    secrets: Vec<SecretForm>,
    peers: Vec<PeerForm>,
    forgotten: Vec<String>,
}

#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
struct SecretForm {
    epoch: u64,
    secret: String,
}

#[derive(Serialize, Deserialize)]
struct PeerForm {
    name: String,
    key: String,
    paired: bool,
}

impl Membership {
    /// A swarm of one (`settled` false), or one whose other members are not known.
    pub(crate) fn new(secret: SwarmSecret, settled: bool) -> Self {
        Self {
            current: Held { epoch: 0, secret },
            old: Vec::new(),
            settled,
            peers: Vec::new(),
            forgotten: Vec::new(),
        }
    }

    pub(crate) fn secret(&self) -> &SwarmSecret {
        &self.current.secret
    }

    /// The current one first.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &SwarmSecret> {
        std::iter::once(&self.current).chain(&self.old).map(|held| &held.secret)
    }

    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    pub(crate) fn is_forgotten(&self, key: &Key) -> bool {
        self.forgotten.contains(key)
    }

    pub(crate) fn is_paired(&self, key: &Key) -> bool {
        !self.is_forgotten(key) && self.peers.iter().any(|peer| peer.paired && peer.key == *key)
    }

    pub(crate) fn gift(&self) -> Gift {
        Gift {
            epoch: self.current.epoch,
            secret: self.current.secret.clone(),
            forgotten: self.forgotten.clone(),
        }
    }

    /// Remembers a machine; returns whether anything changed. Pairing is not undone by meeting again, and what a
    /// code said last wins over what was forgotten.
    pub(crate) fn note(&mut self, key: Key, name: &str, paired: bool) -> bool {
        let name: String = cut(name);
        if paired {
            self.settled = true;
            self.forgotten.retain(|forgotten| *forgotten != key);
        } else if self.is_forgotten(&key) {
            return false;
        }
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.key == key) {
            // The name stays what it was when the two met: a member must not slip under that of another.
            if !paired {
                return false;
            }
            let same = peer.paired && peer.name == name;
            (peer.name, peer.paired) = (name, true);
            return !same;
        }
        if self.peers.len() >= PEERS_MAX {
            // Somebody who was only met makes room; machines paired with never do.
            match self.peers.iter().position(|peer| !peer.paired) {
                Some(at) => drop(self.peers.remove(at)),
                None => return false,
            }
        }
        self.peers.push(Peer { name, key, paired });
        true
    }

    /// Becomes a member of the swarm of `gift`, handed over by `from` in a pairing.
    pub(crate) fn adopt(&mut self, gift: Gift, from: Key, name: &str) {
        *self = Self {
            current: Held { epoch: gift.epoch, secret: gift.secret },
            old: Vec::new(),
            settled: true,
            peers: Vec::new(),
            forgotten: gift.forgotten,
        };
        self.note(from, name, true);
    }

    /// Takes the newer secret of this swarm; `false` when it is not newer.
    pub(crate) fn rotate(&mut self, gift: Gift) -> bool {
        if gift.epoch <= self.current.epoch {
            return false;
        }
        let new = Held { epoch: gift.epoch, secret: gift.secret };
        self.old.insert(0, std::mem::replace(&mut self.current, new));
        self.old.truncate(OLD_SECRETS_MAX);
        for key in gift.forgotten {
            if !self.forgotten.contains(&key) && self.forgotten.len() < FORGOTTEN_MAX {
                self.forgotten.push(key);
            }
        }
        let forgotten = &self.forgotten;
        self.peers.retain(|peer| !forgotten.contains(&peer.key));
        true
    }

    /// Forgets the machine of this name or key: `secret` is the new one for the rest.
    pub(crate) fn forget(&mut self, name: &str, secret: SwarmSecret) -> Result<Peer, ForgetError> {
        let fits: Vec<&Peer> =
            self.peers.iter().filter(|peer| peer.name == name || peer.fingerprint() == name).collect();
        let peer = match fits[..] {
            [] => return Err(ForgetError::Unknown { name: name.into() }),
            [peer] => peer.clone(),
            _ => {
                let keys: Vec<String> = fits.iter().map(|peer| peer.fingerprint()).collect();
                return Err(ForgetError::Ambiguous {
                    name: name.into(),
                    count: keys.len(),
                    keys: keys.join(", "),
                });
            }
        };
        if self.forgotten.len() >= FORGOTTEN_MAX {
            return Err(ForgetError::Full);
        }
        let mut gift = Gift { epoch: self.current.epoch.saturating_add(1), secret, ..self.gift() };
        gift.forgotten.push(peer.key);
        self.rotate(gift);
        Ok(peer)
    }

    pub(crate) fn to_text(&self) -> Zeroizing<String> {
        let secret =
            |held: &Held| SecretForm { epoch: held.epoch, secret: held.secret.to_text().to_string() };
        let form = FileForm {
            settled: self.settled,
            secrets: std::iter::once(&self.current).chain(&self.old).map(secret).collect(),
            peers: self
                .peers
                .iter()
                .map(|peer| PeerForm { name: peer.name.clone(), key: hex(&peer.key), paired: peer.paired })
                .collect(),
            forgotten: self.forgotten.iter().map(|key| hex(key)).collect(),
        };
        // Strings, numbers and lists can always be written.
        let mut text = Zeroizing::new(serde_json::to_string_pretty(&form).unwrap_or_default());
        text.push('\n');
        text
    }

    /// Reads [`Membership::to_text`] back; `None` when it is something else, or over a limit.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let form: FileForm = serde_json::from_str(text).ok()?;
        if form.secrets.len() > OLD_SECRETS_MAX + 1
            || form.peers.len() > PEERS_MAX
            || form.forgotten.len() > FORGOTTEN_MAX
        {
            return None;
        }
        let held = |form: &SecretForm| {
            Some(Held { epoch: form.epoch, secret: SwarmSecret::parse(&form.secret).ok()? })
        };
        let mut secrets = form.secrets.iter().map(held).collect::<Option<Vec<_>>>()?.into_iter();
        let peer = |form: PeerForm| {
            let name = (form.name.len() <= NAME_BYTES_MAX).then_some(form.name)?;
            Some(Peer { name, key: parse_hex(&form.key)?, paired: form.paired })
        };
        Some(Self {
            current: secrets.next()?,
            old: secrets.collect(),
            settled: form.settled,
            peers: form.peers.into_iter().map(peer).collect::<Option<_>>()?,
            forgotten: form.forgotten.iter().map(|key| parse_hex(key)).collect::<Option<_>>()?,
        })
    }
}

/// The start of a name that fits the limit, cut between characters.
pub(crate) fn cut(name: &str) -> String {
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret(byte: u8) -> SwarmSecret {
        SwarmSecret::from_bytes([byte; 32])
    }

    fn room() -> Membership {
        let mut members = Membership::new(secret(1), false);
        members.note([1; 32], "den", true);
        members.note([2; 32], "kitchen", true);
        members.note([3; 32], "guest", false);
        members
    }

    #[test]
    fn a_forgotten_machine_is_out_and_the_others_stay() {
        let mut members = room();
        assert_eq!(members.forget("kitchen", secret(2)).unwrap().key, [2; 32]);
        assert!(members.is_forgotten(&[2; 32]) && !members.is_paired(&[2; 32]));
        assert!(members.is_paired(&[1; 32]) && !members.is_paired(&[3; 32]));
        assert_eq!(members.secrets().cloned().collect::<Vec<_>>(), [secret(2), secret(1)]);
        // Meeting it again by an old secret does not bring it back; a code does.
        assert!(!members.note([2; 32], "kitchen", false));
        assert!(members.note([2; 32], "kitchen", true) && members.is_paired(&[2; 32]));
        let unknown = members.forget("attic", secret(3)).unwrap_err();
        assert!(unknown.to_string().contains("swarm-os peers"), "{unknown}");
        members.note([4; 32], "den", false);
        assert!(matches!(members.forget("den", secret(3)), Err(ForgetError::Ambiguous { count: 2, .. })));
        assert_eq!(members.forget("04040404", secret(3)).unwrap().key, [4; 32]);
    }

    #[test]
    fn a_newer_secret_brings_who_was_forgotten_and_an_older_one_nothing() {
        let (mut here, mut there) = (room(), room());
        here.forget("guest", secret(2)).unwrap();
        assert!(there.rotate(here.gift()));
        assert!(there.is_forgotten(&[3; 32]) && there.peers().len() == 2);
        assert!(!there.rotate(here.gift()));
        assert!(!there.rotate(room().gift()));
        assert_eq!(there.secret(), &secret(2));
    }

    #[test]
    fn limits_hold() {
        let mut members = Membership::new(secret(0), false);
        for index in 0..FORGOTTEN_MAX as u8 {
            members.note([index; 32], "x", true);
            members.forget("x", secret(index + 1)).unwrap();
        }
        members.note([200; 32], "x", true);
        assert_eq!(members.forget("x", secret(99)), Err(ForgetError::Full));
        assert_eq!(members.secrets().count(), OLD_SECRETS_MAX + 1);
        for index in 0..1000u32 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&index.to_le_bytes());
            key[31] = 1;
            members.note(key, "met", false);
        }
        assert_eq!(members.peers().len(), PEERS_MAX);
        assert!(members.is_paired(&[200; 32]));
        assert_eq!(cut(&"é".repeat(100)).len(), NAME_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn text_and_gift_survive(
            epoch: u64,
            keys in proptest::collection::vec(any::<[u8; 32]>(), 0..FORGOTTEN_MAX),
            names in proptest::collection::vec(".{0,20}", 0..5),
        ) {
            let mut members = Membership::new(secret(7), false);
            for (index, name) in names.iter().enumerate() {
                members.note([index as u8; 32], name, index % 2 == 0);
            }
            members.rotate(Gift { epoch, secret: secret(8), forgotten: keys });
            let read = Membership::parse(&members.to_text()).unwrap();
            prop_assert_eq!(read.peers(), members.peers());
            prop_assert!(read.gift() == members.gift());
            prop_assert!(Gift::decode(&members.gift().encode()) == Some(members.gift()));
        }

        #[test]
        fn any_text_and_any_bytes_are_read_or_refused(text in ".*", bytes in proptest::collection::vec(any::<u8>(), GIFT_BYTES)) {
            let _ = Membership::parse(&text);
            let bytes: &[u8; GIFT_BYTES] = bytes.as_slice().try_into().unwrap();
            let _ = Gift::decode(bytes);
        }
    }
}
