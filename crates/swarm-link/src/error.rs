//! What can go wrong, and whose fault it is.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::secret::SecretTextError;

/// Whose fault a failed link operation is. Policy reads only this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The caller asked for something that can never succeed here.
    Caller,
    /// The network or the far computer went away. Trying again may help.
    Link,
    /// The peer broke the protocol or belongs to another swarm. Do not try again soon.
    Peer,
    /// This computer: no memory, no sockets, a bug.
    Us,
}

/// Why the identity, or the folder it lives in, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// No home folder and no `SWARM_OS_HOME`.
    #[error(
        "this user has no home folder; set SWARM_OS_HOME to a folder for Swarm-OS to keep its identity in"
    )]
    NoHome,
    /// The system gave no random bytes.
    #[error("the system gave no random bytes")]
    Random(#[source] getrandom::Error),
    /// The cryptography library lacks X25519.
    #[error("X25519 is missing from this build")]
    Crypto,
    /// A file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file or folder cannot be created.
    #[error("cannot create {}; set SWARM_OS_HOME to a folder you may write to", path.display())]
    Write {
        /// What was to be created.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Other users of this computer may read the file.
    #[error(
        "{} can be read by other users (mode {mode:03o}); run `chmod 600 {}`, and if somebody may have read it, make a new secret",
        path.display(), path.display()
    )]
    OpenSecret {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Other users of this computer may put files into the folder.
    #[error("{} can be written by everybody, who could swap the swarm secret; run `chmod 700 {}`", path.display(), path.display())]
    OpenFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The key file is not one.
    #[error("{} is not a node key; delete it and a new one is made", path.display())]
    DamagedKey {
        /// The file.
        path: PathBuf,
    },
    /// The secret file is not one.
    #[error("{} is damaged; run `swarm-os secret import` with the secret of another node, or delete the file to start a new swarm", path.display())]
    DamagedSecret {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SecretTextError,
    },
    /// The list of members is not one.
    #[error("{} is damaged; delete it and pair the other machines again", path.display())]
    DamagedMembers {
        /// The file.
        path: PathBuf,
    },
    /// A machine cannot be forgotten.
    #[error(transparent)]
    Forget(#[from] crate::members::ForgetError),
    /// The text to import is not a secret.
    #[error(transparent)]
    Text(#[from] SecretTextError),
    /// All backup names are taken.
    #[error("{} has 999 backups already; delete some", path.display())]
    TooManyBackups {
        /// The file.
        path: PathBuf,
    },
}

/// Why a link could not be made, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Nothing to dial.
    #[error("no address to connect to")]
    NoAddress,
    /// No address answered.
    #[error(
        "cannot reach {}: {why}; check that the other node runs and that no firewall is in between",
        list(addresses)
    )]
    Unreachable {
        /// All addresses tried.
        addresses: Vec<SocketAddr>,
        /// What the last of them said.
        why: String,
    },
    /// The port to listen on is taken.
    #[error("port {port} is in use by another program; choose another port, or 0 for any")]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// The address to listen on cannot be used.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The handshake failed: most likely another swarm secret.
    #[error(
        "{address} belongs to another swarm, or has forgotten this machine, or something in between changed the handshake; to bring the two together, run `swarm-os pair` on one and `swarm-os pair CODE` on the other, or copy the secret with `swarm-os secret export` there and `swarm-os secret import` here"
    )]
    Refused {
        /// The other end.
        address: SocketAddr,
    },
    /// The other end typed another pairing code than the one that is shown here; the desk that shows it says so as well.
    #[error("{address} typed another pairing code than the one that is shown here")]
    WrongCode {
        /// The other end.
        address: SocketAddr,
    },
    /// The other end hung up before the handshake was over.
    #[error(
        "{address} closed the connection during the handshake; try again, and check that a Swarm-OS node listens there"
    )]
    HungUp {
        /// The other end.
        address: SocketAddr,
    },
    /// The other end speaks something else.
    #[error("{address} is not a Swarm-OS node; check the port")]
    NotSwarm {
        /// The other end.
        address: SocketAddr,
    },
    /// The other end speaks another version of the link protocol.
    #[error("{address} speaks link version {theirs}, this node {ours}; update the older one")]
    OtherVersion {
        /// The other end.
        address: SocketAddr,
        /// Its version.
        theirs: u8,
        /// This node's.
        ours: u8,
    },
    /// The handshake did not finish in time.
    #[error("{address} did not finish the handshake within {waited_ms} ms")]
    HandshakeTimeout {
        /// The other end.
        address: SocketAddr,
        /// The deadline.
        waited_ms: u64,
    },
    /// The files of this node cannot be read or written.
    #[error("this node's own files cannot be used")]
    Identity {
        /// Which, and why.
        #[source]
        source: Box<IdentityError>,
    },
    /// The address leads back to this very process.
    #[error("{address} is this node itself")]
    OwnAddress {
        /// The address.
        address: SocketAddr,
    },
    /// The peer ended the link between two messages.
    #[error("the peer closed the link")]
    Closed,
    /// This node ended the link, through its [`crate::Closer`].
    #[error("the link was closed here")]
    ClosedHere,
    /// The link ended inside a message, or was torn down.
    #[error("the link to the peer broke")]
    Lost {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No message began within the idle timeout. The link is intact: receiving again is allowed.
    #[error("the peer was silent for {waited_ms} ms")]
    Idle {
        /// The timeout.
        waited_ms: u64,
    },
    /// A message began, then nothing came for the idle timeout.
    #[error("the peer went silent in the middle of a message")]
    Stalled,
    /// The peer does not take what is sent.
    #[error("the peer took no data for {waited_ms} ms")]
    WriteTimeout {
        /// The timeout.
        waited_ms: u64,
    },
    /// A record did not decrypt: changed, replayed, reordered or dropped on the way.
    #[error("record {record} of the link was changed on the way")]
    Tampered {
        /// Its number, from 0.
        record: u64,
    },
    /// A record decrypted, but is not built as the protocol says.
    #[error("the peer sent record {record} in a form the link does not allow")]
    BadRecord {
        /// Its number, from 0.
        record: u64,
    },
    /// The peer announced a message over the agreed limit. Nothing was allocated for it.
    #[error("the peer announced a message of {bytes} bytes, over the limit of {bytes_max}")]
    MessageTooLong {
        /// Announced.
        bytes: usize,
        /// Agreed.
        bytes_max: usize,
    },
    /// The message to send is over the agreed limit. Nothing was sent; the link is intact.
    #[error("a message of {bytes} bytes is over the limit of {bytes_max}")]
    SendTooLong {
        /// Asked for.
        bytes: usize,
        /// Agreed.
        bytes_max: usize,
    },
    /// No memory for a message within the limit.
    #[error("no memory for a message of {bytes} bytes")]
    NoMemory {
        /// Needed.
        bytes: usize,
    },
    /// The keys of this link have sealed as many records as is safe.
    #[error("this link has carried as many records as its keys allow; open a new one")]
    WornOut,
    /// An earlier error ended this half of the link.
    #[error("the link failed before and cannot be used again")]
    Broken,
    /// The system refused a socket, a thread or randomness.
    #[error("{what} failed")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl LinkError {
    /// Whose fault this is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::NoAddress
            | Self::PortInUse { .. }
            | Self::Bind { .. }
            | Self::OwnAddress { .. }
            | Self::ClosedHere
            | Self::SendTooLong { .. } => Blame::Caller,
            Self::Unreachable { .. }
            | Self::HungUp { .. }
            | Self::HandshakeTimeout { .. }
            | Self::Closed
            | Self::Lost { .. }
            | Self::Idle { .. }
            | Self::Stalled
            | Self::WriteTimeout { .. }
            | Self::WornOut
            | Self::Broken => Blame::Link,
            // Anyone on the path can change bytes, but only the peer can be avoided.
            Self::Refused { .. }
            | Self::WrongCode { .. }
            | Self::NotSwarm { .. }
            | Self::OtherVersion { .. }
            | Self::Tampered { .. }
            | Self::BadRecord { .. }
            | Self::MessageTooLong { .. } => Blame::Peer,
            Self::NoMemory { .. } | Self::System { .. } | Self::Identity { .. } => Blame::Us,
        }
    }
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
}
