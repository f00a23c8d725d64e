//! Finding peers and talking to them: the swarm secret, mDNS discovery, encrypted TCP.
//!
//! This room understands nothing of the bytes it moves. It gives the rooms above three things:
//!
//! - [`Identity`]: who this node is and which swarm it belongs to, kept in the user's config folder.
//! - [`Listener`] and [`dial`]: a [`Connection`] to a peer that proved it holds the same swarm secret,
//!   split into a [`Sender`] and a [`Receiver`] of whole messages, each with a deadline and a length limit.
//! - [`Discovery`]: who else is on the local network, as untrusted hints. Its failure is visible and
//!   never fatal; [`Remembered`] peers and [`parse_peer`] do without it.
//!
//! # The handshake, byte by byte
//!
//! Noise `XXpsk3` with X25519 and BLAKE2s; the initiator picks AES-GCM or ChaCha20-Poly1305 by its own
//! hardware. Every part has a fixed size, so nothing with a length is read from a stranger.
//!
//! | Direction | Bytes | Content |
//! | --- | --- | --- |
//! | initiator to responder | 6 + 48 | `SWRM`, version, suite; `e` |
//! | responder to initiator | 6 + 112 | the same six bytes; `e, ee, s, es`, instance id |
//! | initiator to responder | 80 | `s, se, psk`, instance id |
//! | responder to initiator | 18 | an empty sealed record: "you are in" |
//!
//! The initiator's six bytes are the Noise prologue, so a changed suite or version fails the handshake.
//! The last record exists because without it an initiator with the wrong secret would not learn so.
//!
//! Two more kinds of handshake begin with the same six bytes, told apart by two bits of the suite:
//!
//! - **First meeting** ([`PairingDesk`], [`pair`]): two machines that share nothing but a short code, see `pairing.rs`.
//! - **News** ([`tell_member`]): when a machine is forgotten the secret changes, and a member brings the new one to
//!   another: the third message of a handshake under the old secret is 1145 bytes and holds it. A member that missed
//!   the change and is refused asks for it with its old secret, and gets it in place of the last record. Both only
//!   between machines that were paired by a code, and never to one that was forgotten.
//!
//! # What an observer may learn
//!
//! That Swarm-OS is spoken here, sizes and times. An active stranger who dials a node also learns its
//! static public key (`XX` sends it before the initiator is authenticated), never the secret. The end of a
//! TCP stream between two messages is not authenticated: say goodbye in a message where that matters.

#![forbid(unsafe_code)]

mod address;
mod code;
mod config;
mod connection;
mod desk;
mod dial;
mod discovery;
mod error;
mod files;
mod gate;
mod id;
mod identity;
mod interfaces;
mod listener;
mod meet;
mod members;
mod noise;
mod pairing;
mod record;
mod remembered;
mod secret;
mod sightings;

pub use address::{PeerAddressError, parse_peer};
pub use code::{PairCode, PairCodeError};
pub use config::ConfigDir;
pub use connection::{Closer, Connection, LinkSettings, PeerInfo, Receiver, Sender};
pub use desk::{CODE_TRIES, PairingDesk, PairingEvent};
pub use dial::dial;
pub use discovery::{Discovery, DiscoveryEvent, DiscoveryStats};
pub use error::{Blame, IdentityError, LinkError};
pub use id::{InstanceId, NodeId};
pub use identity::{Identity, exposed_secrets, import_secret, leave_swarm};
pub use interfaces::{InterfaceAddress, Scope, interfaces, own_address};
pub use listener::{Listener, ListenerStats, Refusal};
pub use meet::{PairError, Paired, pair, shows_code, tell_member};
pub use members::{FORGOTTEN_MAX, ForgetError, Peer};
pub use noise::{PROTOCOL_VERSION, Suite};
pub use remembered::Remembered;
pub use secret::{SecretTextError, SwarmSecret};
pub use sightings::{PEERS_MAX, PeerFound};
