//! A control connection: JSON messages both ways, shared by the threads that have something to say.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use swarm_link::{Connection, LinkError, PeerInfo, Receiver, Sender};
use swarm_wire::{
    CONTROL_BYTES_MAX, CloseCode, Control, ControlError, Hello, NodeId, PROTOCOL_MAJOR, PROTOCOL_MINOR, Role,
};

use crate::error::NodeError;
use crate::machine;

/// The sending half, for any thread. A message is written whole or the link is broken.
#[derive(Clone)]
pub struct ControlSender(Arc<Mutex<Half>>);

struct Half {
    sender: Sender,
    buffer: Vec<u8>,
}

/// The receiving half, for one thread.
pub struct ControlReceiver {
    receiver: Receiver,
    buffer: Vec<u8>,
}

/// Why no control message came.
#[derive(Debug, thiserror::Error)]
pub enum ControlFault {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Message(#[from] ControlError),
}

impl ControlFault {
    /// What the peer is told when the connection is closed for this; `None` where it is not to blame.
    pub fn code(&self) -> Option<CloseCode> {
        match self {
            Self::Link(error) => crate::refusals::link_code(error),
            Self::Message(ControlError::TooLong { .. } | ControlError::Invalid { .. }) => {
                Some(CloseCode::OverLimit)
            }
            Self::Message(_) => Some(CloseCode::Malformed),
        }
    }
}

impl ControlSender {
    /// Sends one message.
    pub fn send(&self, message: &Control) -> Result<(), ControlFault> {
        let mut half = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Half { sender, buffer } = &mut *half;
        message.encode(buffer)?;
        sender.send(&[buffer])?;
        Ok(())
    }
}

impl ControlReceiver {
    /// Waits for one message, `within` at most when given.
    pub fn receive(&mut self, within: Option<Duration>) -> Result<Control, ControlFault> {
        self.receiver.set_idle_timeout(within)?;
        self.receiver.receive(&mut self.buffer)?;
        Ok(Control::decode(&self.buffer)?)
    }
}

/// Makes a control connection of an authenticated link. `first` is a message already received on it.
pub fn split(connection: Connection) -> (PeerInfo, ControlSender, ControlReceiver, swarm_link::Closer) {
    let Connection { peer, mut sender, mut receiver, closer, .. } = connection;
    sender.set_message_bytes_max(CONTROL_BYTES_MAX);
    receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    let sender = ControlSender(Arc::new(Mutex::new(Half { sender, buffer: Vec::new() })));
    (peer, sender, ControlReceiver { receiver, buffer: Vec::new() }, closer)
}

/// The id of a peer as the wire spells it.
pub fn wire_id(id: swarm_link::NodeId) -> NodeId {
    NodeId(*id.as_bytes())
}

/// What this node says of itself.
pub fn hello(
    id: NodeId,
    name: &str,
    role: Role,
    threads: usize,
    memory: u64,
    read_gb_s: Option<f64>,
) -> Hello {
    Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: PROTOCOL_MINOR,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        numerics: swarm_kernels::NUMERICS.to_owned(),
        node_id: id,
        name: name.chars().take(swarm_wire::NAME_CHARS_MAX).collect(),
        role,
        memory_bytes_available: memory,
        cores: u32::try_from(threads.max(1)).unwrap_or(u32::MAX),
        // A measurement that is no number is none.
        read_gb_s: read_gb_s.filter(|speed| speed.is_finite() && *speed > 0.0),
        models: None,
    }
}

/// Refuses a peer that speaks another protocol.
pub fn check_hello(peer: &PeerInfo, hello: &Hello) -> Result<(), NodeError> {
    let node = node_name(&hello.name, &hello.node_id);
    if hello.protocol_major != PROTOCOL_MAJOR {
        return Err(NodeError::Protocol { node, theirs: hello.protocol_major, ours: PROTOCOL_MAJOR });
    }
    if hello.node_id != wire_id(peer.node) {
        let what = "it gives another node's id".to_owned();
        return Err(NodeError::BadPeer { node, what, code: CloseCode::Unexpected });
    }
    if hello.numerics != swarm_kernels::NUMERICS {
        let (theirs, ours) = (hello.numerics.escape_debug().to_string(), swarm_kernels::NUMERICS.to_owned());
        return Err(NodeError::Numerics { node, theirs, ours });
    }
    Ok(())
}

/// A node's name for people, safe to print: what its owner calls it and the start of its id.
pub fn node_name(name: &str, id: &NodeId) -> String {
    format!("{}-{}", name.escape_debug(), &id.short()[..4])
}

/// What stays free for the user's other programs, at least, where there is so much.
const RESERVE_MIN_BYTES: u64 = 256 << 20;

/// Memory this node offers: what is free now, less a reserve for the user's other programs: a tenth, and not too little.
pub fn memory_offered(limit: Option<u64>) -> u64 {
    memory_offered_with(limit, 0)
}

/// The same where `held` bytes are taken already by what the memory is for.
pub fn memory_offered_with(limit: Option<u64>, held: u64) -> u64 {
    let free = machine::memory_available().unwrap_or(4 << 30);
    let offered = free.saturating_sub((free / 10).max(RESERVE_MIN_BYTES.min(free / 2))).saturating_add(held);
    limit.map_or(offered, |limit| limit.min(offered))
}
