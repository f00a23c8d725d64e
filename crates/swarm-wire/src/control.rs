//! The control plane: JSON messages between the coordinator and each worker.

use std::net::SocketAddr;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::blame::Blame;
use crate::closing::CloseCode;
use crate::control_check::{CONTROL_BYTES_MAX, CONTROL_KINDS, REASON_CHARS_MAX};
use crate::examine::{Examine, Examined};
use crate::ids::{Epoch, Fingerprint, NodeId};
use crate::inventory::Listed;
use crate::limits::Limits;
use crate::measure::{Measure, Measured};
use crate::supply::{ModelId, Supply, WeightSource};

/// Everything that is said on a control connection. In JSON the field `kind` names the variant in
/// snake case. A field this build does not know is ignored; a kind it does not know is an error
/// that names the kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Control {
    /// First message of whoever dialled.
    Hello(Hello),
    /// The answer to a hello that was accepted.
    Welcome(Hello),
    /// Coordinator to worker: become a stage.
    Prepare(Box<Prepare>),
    /// Worker to coordinator, while it reads weights.
    Loading(Loading),
    /// Worker to coordinator: the stage is in memory and its data connections may be dialled.
    Ready(Ready),
    /// Coordinator to worker, after every stage said ready: dial the next stage.
    Start {
        /// The placement.
        epoch: Epoch,
    },
    /// Worker to coordinator: the data connection to the next stage stands.
    Started {
        /// The placement.
        epoch: Epoch,
    },
    /// The answer to a hello, prepare or start that cannot be followed.
    Refused(Refused),
    /// Heartbeat, and a sample for the clock estimate.
    Ping(Ping),
    /// The answer to a ping, sent at once.
    Pong(Pong),
    /// Asks for [`Control::Stats`].
    StatsRequest {
        /// Repeated in the answer.
        id: u64,
    },
    /// What a stage measured since it started.
    Stats(Stats),
    /// Coordinator to worker: forget the stage and its sessions, stay in the room.
    Release {
        /// Why, in words.
        reason: String,
    },
    /// Coordinator to worker, before layers are placed: measure yourself and your links.
    Measure(Box<Measure>),
    /// What the worker measured.
    Measured(Measured),
    /// First message of whoever dials only to measure the link: every message that follows is
    /// answered by its first bytes.
    Probe,
    /// Whoever dials only to look at the way between the two asks this, first and then again.
    Examine(Examine),
    /// The answer to an examine.
    Examined(Box<Examined>),
    /// Worker to coordinator: bytes of the model are missing here; dial again with a supply.
    Wanting {
        /// The placement.
        epoch: Epoch,
    },
    /// First message of a coordinator that dials to serve a stage with bytes of its model; the answer to a fetch.
    Supply(Box<Supply>),
    /// First message of whoever dials to ask for bytes of a model.
    Fetch(ModelId),
    /// First message of whoever dials to learn a published model from a node that has it, or can fetch it. The answer is a
    /// supply with the tokenizer's files; asks may follow.
    Resolve {
        /// As a user types it: `organisation/name`, with a revision or a file. Held against its grammar before it is used.
        model: String,
    },
    /// First message of whoever dials only to ask which models are here.
    List,
    /// The answer to a list.
    Listed(Box<Listed>),
    /// The sender leaves. A closed link without it is a fault.
    Bye,
}

/// What a node does in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Holds sessions and speaks to a user.
    Coordinator,
    /// Offers its memory and cores.
    Worker,
}

/// Who a node is and what it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Must equal the receiver's.
    pub protocol_major: u32,
    /// The lower of both is spoken.
    pub protocol_minor: u32,
    /// The build, for people: version and commit.
    pub build: String,
    /// The numerics contract. Nodes of one exact ring must agree.
    pub numerics: String,
    /// The node's static key.
    pub node_id: NodeId,
    /// What its owner calls it. A stranger's text: escape before printing.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Memory it offers to weights, KV rows and buffers together.
    pub memory_bytes_available: u64,
    /// Cores it offers.
    pub cores: u32,
    /// Measured sequential read bandwidth over all cores, 10^9 bytes per second; absent when not
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_gb_s: Option<f64>,
    /// Models it can open without a download; absent when it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
}

/// A contiguous layer range `start..end`, never empty once validated. `[start, end]` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "[u32; 2]", into = "[u32; 2]")]
pub struct LayerRange {
    /// First layer.
    pub start: u32,
    /// One past the last layer.
    pub end: u32,
}

impl From<[u32; 2]> for LayerRange {
    fn from([start, end]: [u32; 2]) -> Self {
        Self { start, end }
    }
}

impl From<LayerRange> for [u32; 2] {
    fn from(range: LayerRange) -> Self {
        [range.start, range.end]
    }
}

impl From<LayerRange> for Range<usize> {
    fn from(range: LayerRange) -> Self {
        range.start as usize..range.end as usize
    }
}

impl TryFrom<Range<usize>> for LayerRange {
    type Error = std::num::TryFromIntError;

    fn try_from(range: Range<usize>) -> Result<Self, Self::Error> {
        Ok(Self { start: range.start.try_into()?, end: range.end.try_into()? })
    }
}

/// How KV rows are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvType {
    /// Two bytes per number.
    F16,
    /// Four bytes per number.
    F32,
}

/// What float matrices become while they are loaded.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Quant {
    /// Eight bits, 32 weights to a scale.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Four bits, 32 weights to a scale.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// Four bits, 32 weights to a scale and a minimum.
    #[serde(rename = "q4_k")]
    Q4_K,
}

/// Where a stage finds the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHop {
    /// Its static key; the link refuses anyone else at these addresses.
    pub node_id: NodeId,
    /// Addresses to try in order.
    pub addresses: Vec<SocketAddr>,
}

/// A model as a repository published it. Names of a peer: held against their grammar before they are used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// `organisation/name`.
    pub repository: String,
    /// 40 hexadecimal digits.
    pub commit: String,
    /// The GGUF file that is meant; absent for `config.json` and safetensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Digest of the above and of the model's headers.
    pub fingerprint: Fingerprint,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadSource {
    /// Files of the node itself, into memory.
    #[default]
    Disk,
    /// The Hub, to the node's disk.
    Hub,
    /// Other nodes, to the node's disk.
    Peer,
}

/// Become a stage of the ring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// The placement this stage belongs to.
    pub epoch: Epoch,
    /// The model as the user named it. The receiver resolves it among its own models only and
    /// compares the fingerprint.
    pub model: String,
    /// Digest of the coordinator's copy.
    pub fingerprint: Fingerprint,
    /// Which published model it is, so that a worker without it can fetch its own layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The stage's layers.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub layers_total: u32,
    /// This stage runs the final norm, the head and the sampler; its layers end at
    /// `layers_total`.
    pub tail: bool,
    /// What float matrices become while they are loaded; absent: what they are. `numerics` says it, too, so that a build
    /// without this field refuses the order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quant: Option<Quant>,
    /// How KV rows are stored.
    pub kv_type: KvType,
    /// Positions one session may have.
    pub context: u32,
    /// Sessions that may be open at once.
    pub sessions_max: u32,
    /// Sizes of the data plane.
    pub limits: Limits,
    /// The next stage; absent on the tail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NextHop>,
    /// Compute threads; absent: the worker decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// The numerics contract the ring runs under, with what the weights are quantized to.
    pub numerics: String,
    /// Other nodes that have weights of this stage; the coordinator is asked after them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<WeightSource>,
}

/// Progress of fetching or reading weights. Each source is counted on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loading {
    /// Bytes read so far, at most `bytes_total`.
    pub bytes_done: u64,
    /// Bytes the stage needs.
    pub bytes_total: u64,
    /// Where they come from.
    #[serde(default)]
    pub from: LoadSource,
}

/// The stage is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The placement.
    pub epoch: Epoch,
    /// Bytes of weights in memory.
    pub bytes_loaded: u64,
    /// Bytes of weights one decode step reads.
    pub weight_bytes_per_token: u64,
}

/// A request that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Whose fault it is.
    pub blame: Blame,
    /// What happened, to what, and what to do; escape before printing.
    pub reason: String,
    /// The placement whose stage cannot go on; absent when no stage is meant. A refusal of an older placement is no
    /// news to the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// The same for programs; absent when no code fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<CloseCode>,
    /// The node at the other end of a data connection that failed; absent when it is not about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub towards: Option<NodeId>,
}

impl Refused {
    /// A refusal that always fits: a longer reason is cut at [`REASON_CHARS_MAX`] characters.
    pub fn new(blame: Blame, reason: &str) -> Self {
        Self {
            blame,
            reason: reason.chars().take(REASON_CHARS_MAX).collect(),
            epoch: None,
            code: None,
            towards: None,
        }
    }

    /// The same, about the stage of a placement.
    pub fn of(mut self, epoch: Epoch) -> Self {
        self.epoch = Some(epoch);
        self
    }

    /// The same, with a code.
    pub fn with_code(mut self, code: Option<CloseCode>) -> Self {
        self.code = code;
        self
    }

    /// The same, about the link to `node`.
    pub fn towards(mut self, node: NodeId) -> Self {
        self.towards = Some(node);
        self
    }
}

/// A heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Repeated in the pong.
    pub id: u64,
    /// Microseconds on the sender's monotonic clock.
    pub sent_us: u64,
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// From the ping.
    pub id: u64,
    /// From the ping.
    pub sent_us: u64,
    /// Microseconds on the answering node's monotonic clock.
    pub node_us: u64,
}

/// What a stage measured since it started. Counts and bytes are totals, times are percentiles
/// over its recent steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// From the request.
    pub id: u64,
    /// The stage's placement; absent on an idle node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// Sessions open now.
    pub sessions: u32,
    /// Hidden frames computed.
    pub frames: u64,
    /// Rows computed.
    pub tokens: u64,
    /// Frames of an older epoch that were dropped.
    pub frames_stale: u64,
    /// Bytes of frames received.
    pub bytes_in: u64,
    /// Bytes of frames sent.
    pub bytes_out: u64,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of KV rows in use.
    pub kv_bytes: u64,
    /// Median time a frame waited for the compute thread.
    pub queue_us_p50: u64,
    /// 99th percentile of the same.
    pub queue_us_p99: u64,
    /// Median forward.
    pub compute_us_p50: u64,
    /// 99th percentile of the same.
    pub compute_us_p99: u64,
}

/// Why a control message was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Longer than [`CONTROL_BYTES_MAX`].
    #[error("a control message of {bytes} bytes is above the limit of {CONTROL_BYTES_MAX}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A kind this build does not know. The text is cut to 64 characters; escape before printing.
    #[error("control message kind {kind:?} is unknown to this build")]
    UnknownKind {
        /// What the message says it is.
        kind: String,
    },
    /// Not JSON, or a field is missing or of another type.
    #[error("a control message is malformed")]
    Malformed(#[source] serde_json::Error),
    /// A field outside its range.
    #[error("control message field {field} is refused: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl Control {
    /// Decodes one message. Total; refuses a long one before it is read.
    ///
    /// # Errors
    /// [`ControlError`]; always the sender's fault.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        #[derive(Deserialize)]
        struct Kind<'a> {
            #[serde(borrow)]
            kind: std::borrow::Cow<'a, str>,
        }
        if bytes.len() > CONTROL_BYTES_MAX {
            return Err(ControlError::TooLong { bytes: bytes.len() });
        }
        let Kind { kind } = serde_json::from_slice(bytes).map_err(ControlError::Malformed)?;
        if !CONTROL_KINDS.contains(&kind.as_ref()) {
            return Err(ControlError::UnknownKind { kind: kind.chars().take(64).collect() });
        }
        let message: Self = serde_json::from_slice(bytes).map_err(ControlError::Malformed)?;
        message.validate()?;
        Ok(message)
    }

    /// Replaces the content of `out` by this message. Validates first, so that this node never
    /// sends what a peer must refuse.
    ///
    /// # Errors
    /// [`ControlError`]; a bug or a wrong setting on this side.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ControlError> {
        self.validate()?;
        out.clear();
        serde_json::to_writer(&mut *out, self).map_err(ControlError::Malformed)?;
        if out.len() > CONTROL_BYTES_MAX {
            return Err(ControlError::TooLong { bytes: out.len() });
        }
        Ok(())
    }
}
