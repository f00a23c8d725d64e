//! What placement knows and what it says: nodes, links, the model's sizes, stages, errors.

use std::ops::Range;

use serde::Serialize;
use swarm_wire::NodeId;

use crate::place_words::{Bytes, Quoted};

/// How a node's speed is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SpeedSource {
    /// From memory bandwidth alone, or from another node's: the weakest.
    #[default]
    Assumed,
    /// From a short run of matrices in the model's shape and format.
    Probe,
    /// From real layers of the model on that node.
    Layers,
}

/// How fast a node computes this model. Times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeSpeed {
    /// One token through one layer of mean size.
    pub layer_ns: u64,
    /// One row of a prompt chunk through such a layer.
    pub row_ns: u64,
    /// One token through final norm, head and sampler.
    pub head_ns: u64,
    /// How this is known.
    pub source: SpeedSource,
}

/// What one node offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeProfile {
    /// Its static key.
    pub id: NodeId,
    /// What its owner calls it; escaped wherever this room prints it.
    pub name: String,
    /// Memory for weights, KV rows and buffers together.
    pub memory_bytes: u64,
    /// How fast it is.
    pub speed: NodeSpeed,
}

/// A link between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// There and back again of a small message, in nanoseconds.
    pub round_trip_ns: u64,
    /// Bulk transfer, bytes per second.
    pub bytes_per_s: u64,
    /// Both numbers were measured on this link.
    pub measured: bool,
}

/// Everybody, and the links between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoomProfile {
    /// The coordinator first.
    pub nodes: Vec<NodeProfile>,
    /// `links[from][to]`; absent where one cannot reach the other.
    pub links: Vec<Vec<Option<Link>>>,
}

impl RoomProfile {
    /// The link between two nodes.
    pub fn link(&self, from: usize, to: usize) -> Option<Link> {
        self.links.get(from)?.get(to).copied().flatten()
    }
}

/// The sizes of a model, in bytes of memory: the loader and the planner read the same ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelShape {
    /// Weights of each layer.
    pub layer_bytes: Vec<u64>,
    /// What the first stage holds of the embedding table, of which it reads one row per token: 0 when rows are
    /// read from the file.
    pub embed_bytes: u64,
    /// The final norm; held by the tail.
    pub norm_bytes: u64,
    /// The head; held by the tail, which reads all of it per token.
    pub head_bytes: u64,
    /// The head is the embedding table: a node that is first stage and tail holds it once.
    pub tied: bool,
    /// KV rows of one layer for one full session.
    pub kv_bytes_per_layer: u64,
    /// Buffers of a step, on every stage.
    pub buffer_bytes: u64,
    /// More of them on the tail: logits.
    pub tail_buffer_bytes: u64,
    /// A decode frame of one session between two stages.
    pub hidden_bytes: u64,
    /// The frame with its token, from the tail to the coordinator.
    pub token_bytes: u64,
    /// Positions of a session that `kv_bytes_per_layer` is for.
    pub context: u64,
}

/// KV rows come in pages of so many positions.
pub(crate) const KV_PAGE: u64 = 64;

/// Memory of one stage, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// Weights as they are held.
    pub weight_bytes: u64,
    /// KV rows of one full session.
    pub kv_bytes: u64,
    /// Buffers of a step and of frames.
    pub buffer_bytes: u64,
}

impl StageMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_bytes).saturating_add(self.buffer_bytes)
    }
}

impl ModelShape {
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layer_bytes.len()
    }

    /// The same model with a shorter context. Buffers stay: they would only get smaller.
    pub(crate) fn with_context(&self, context: u64) -> Self {
        let whole = u128::from(self.context.next_multiple_of(KV_PAGE).max(1));
        let positions = u128::from(context.next_multiple_of(KV_PAGE));
        let kv = (u128::from(self.kv_bytes_per_layer) * positions).div_ceil(whole);
        let kv_bytes_per_layer = u64::try_from(kv).unwrap_or(u64::MAX);
        Self { kv_bytes_per_layer, context, ..self.clone() }
    }

    /// What `layers` take as a stage. The loader refuses by this number, the planner places by it.
    pub fn stage_memory(&self, layers: &Range<usize>) -> StageMemory {
        let (first, tail) = (layers.start == 0, layers.end == self.layers());
        let weights = self.layer_bytes.get(layers.clone()).unwrap_or_default();
        let mut weight_bytes = weights.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
        let mut buffer_bytes = self.buffer_bytes;
        if first && !(tail && self.tied) {
            weight_bytes = weight_bytes.saturating_add(self.embed_bytes);
        }
        if tail {
            weight_bytes = weight_bytes.saturating_add(self.norm_bytes).saturating_add(self.head_bytes);
            buffer_bytes = buffer_bytes.saturating_add(self.tail_buffer_bytes);
        }
        let kv_bytes = self.kv_bytes_per_layer.saturating_mul(layers.len() as u64);
        StageMemory { weight_bytes, kv_bytes, buffer_bytes }
    }
}

/// What a placement is best at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The shortest time per token of one user.
    #[default]
    Latency,
    /// The most tokens of many users together: the slowest stage is as fast as it can be, within
    /// [`SLACK_PERCENT`](crate::SLACK_PERCENT). Among such placements prompts are fastest, and then the lap is shortest.
    Throughput,
    /// The fewest nodes that hold the model; among those the fullest node has the most room left.
    Fit,
}

/// Whether the layers may be shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Where the objective gains, or where they do not fit on the coordinator.
    #[default]
    Auto,
    /// Every node gets at least one layer.
    Always,
    /// The coordinator alone.
    Never,
}

/// One stage of a placement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlacedStage {
    /// The node.
    pub node: NodeId,
    /// Its name, as its owner wrote it: escape before printing.
    pub name: String,
    /// Its layers, `start..end`; never empty.
    pub layers: Range<usize>,
    /// Weights it holds.
    pub weight_bytes: u64,
    /// KV rows of one full session.
    pub kv_bytes: u64,
    /// Buffers of a step and of frames.
    pub buffer_bytes: u64,
    /// All memory it needs.
    pub memory_bytes: u64,
    /// The memory it offers.
    pub offered_bytes: u64,
    /// Predicted compute of one token here, in ms.
    pub predicted_ms: f64,
    /// How that is known.
    pub source: SpeedSource,
    /// Predicted hop from here to the next stage (from the tail: to the coordinator), in ms; zero
    /// for a node alone.
    pub hop_ms: f64,
    /// That link was measured.
    pub hop_measured: bool,
}

/// Layers to nodes, in ring order; the coordinator first, the tail last. All times are
/// predictions for one token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Placement {
    /// In ring order.
    pub stages: Vec<PlacedStage>,
    /// Sum of the stages' compute, in ms.
    pub compute_ms: f64,
    /// Sum of the hops, in ms.
    pub hops_ms: f64,
    /// Compute and hops: the lap of one session, in ms.
    pub lap_ms: f64,
    /// The slowest stage or link, in ms: with enough sessions a token comes this often.
    pub slowest_ms: f64,
    /// Tokens per second of one user.
    pub tok_per_s: f64,
    /// Tokens per second of many users together.
    pub tok_per_s_many: f64,
    /// Prompt rows per second, chunks following each other through the ring.
    pub prefill_tok_per_s: f64,
}

/// Another placement, for comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// `alone`, or the names of the other nodes; escaped.
    pub label: String,
    /// What it would be; null when it does not fit.
    pub placement: Option<Placement>,
    /// Why there is none; null when there is one.
    pub why_not: Option<String>,
}

/// A placement and how it compares.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The choice.
    #[serde(flatten)]
    pub placement: Placement,
    /// What it is best at.
    pub objective: Objective,
    /// How freely it was chosen.
    pub split: Split,
    /// The best others: alone, with one more node, with everybody.
    pub alternatives: Vec<Alternative>,
    /// Names of nodes that were there and get no layer; escaped.
    pub left_out: Vec<String>,
    /// Why, in one sentence.
    pub sentence: String,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// An empty node list.
    #[error("there is no node to place layers on")]
    NoNodes,
    /// A model without layers.
    #[error("the model has no layers")]
    NoLayers,
    /// More nodes than layers.
    #[error("{nodes} nodes cannot share {layers} layers: every node needs at least one; leave some out")]
    TooManyNodes {
        /// Nodes given.
        nodes: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A node that cannot hold what its place in the ring demands and one layer.
    #[error(
        "node {} offers {}, but its place in the ring needs at least {}; free memory on it, leave it out, or use a smaller model or --context",
        Quoted(name), Bytes(*have_bytes), Bytes(*need_bytes)
    )]
    NodeTooSmall {
        /// The node's name.
        name: String,
        /// Memory for its smallest possible stage.
        need_bytes: u64,
        /// Memory it offers.
        have_bytes: u64,
    },
    /// The nodes together are too small.
    #[error(
        "layers {}..{} have no home: {} more memory is needed ({}); {}",
        layers.start, layers.end, Bytes(*missing_bytes), offers, help
    )]
    NoHome {
        /// The layers that do not fit.
        layers: Range<usize>,
        /// How much the last node would have to offer on top.
        missing_bytes: u64,
        /// Who offers how much.
        offers: String,
        /// What would help.
        help: String,
    },
    /// There is memory enough, but no ring of links leads through it.
    #[error(
        "the nodes that could hold the model cannot reach each other: {0}; check firewalls and the network between them"
    )]
    NoWay(String),
    /// An explicit cut that is no cut of this model for these nodes.
    #[error("the given cut is refused: {0}")]
    BadCut(String),
    /// An explicit cut that gives a node more than it offers.
    #[error(
        "layers {}..{} need {} on node {}, which offers {}; give it fewer layers, or ask for a smaller --context",
        layers.start, layers.end, Bytes(*need_bytes), Quoted(name), Bytes(*have_bytes)
    )]
    StageTooLarge {
        /// The node's name.
        name: String,
        /// The layers of the cut.
        layers: Range<usize>,
        /// Memory they need there.
        need_bytes: u64,
        /// Memory the node offers.
        have_bytes: u64,
    },
}
