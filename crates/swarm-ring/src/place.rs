//! Which layers go where: an exact search over contiguous cuts.

use std::ops::Range;

use serde::Serialize;
use swarm_wire::NodeId;

use crate::place_words::{Bytes, Quoted, reason};

/// What one node offers.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCapacity {
    /// Its static key.
    pub id: NodeId,
    /// What its owner calls it; escaped wherever this room prints it.
    pub name: String,
    /// Memory for weights, KV rows and buffers together.
    pub memory_bytes: u64,
    /// Measured sequential read bandwidth, 10^9 bytes per second. Without one the node is assumed
    /// to be as fast per core as the measured nodes are on average.
    pub read_gb_s: Option<f64>,
    /// Cores it offers.
    pub cores: u32,
}

/// The sizes of a model that placement depends on, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelShape {
    /// Weights of each layer.
    pub layer_bytes: Vec<u64>,
    /// What the first stage holds of the embedding table, of which it reads one row per token: 0 when rows are
    /// read from the file.
    pub embed_bytes: u64,
    /// Final norm and head; held by the tail, which reads all of it per token.
    pub head_bytes: u64,
    /// The head is the embedding table: a node that is first stage and tail holds it once.
    pub tied: bool,
    /// KV rows of one layer, for all sessions together.
    pub kv_bytes_per_layer: u64,
    /// Buffers of a step, on every stage.
    pub scratch_bytes: u64,
}

/// What a placement is best at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The slowest stage is as fast as it can be: layers in proportion to speed. Among such
    /// placements the lap is shortest. Best for prefill and for several sessions at once, where
    /// the stages work at the same time.
    #[default]
    Balanced,
    /// The lap of one session is as short as it can be: the fastest nodes are filled first and
    /// the others hold one layer.
    Latency,
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
    /// Weights it reads for each decode step.
    pub read_bytes_per_token: u64,
    /// Memory it needs: weights, KV rows, buffers.
    pub memory_bytes: u64,
    /// Time to read those weights once at the node's speed: the compute part of a decode step,
    /// in ms. A prediction: KV rows and the link come on top.
    pub predicted_ms: f64,
    /// The speed behind the prediction was measured, not assumed.
    pub measured: bool,
    /// Why these layers, in plain words.
    pub reason: String,
}

/// Layers to nodes, in ring order; the coordinator first, the tail last.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Placement {
    /// One per node, in the order given.
    pub stages: Vec<PlacedStage>,
    /// Sum of the stages' predictions, in ms: the lap of one session without the links.
    pub lap_ms: f64,
    /// The slowest stage's prediction, in ms: with enough sessions a lap ends this often.
    pub slowest_ms: f64,
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
        "node {} offers {}, but its place in the ring needs at least {}; leave it out or free memory on it",
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
        "layers {}..{} have no home: {} more memory is needed; add a node, free memory, or use a smaller model or context",
        layers.start, layers.end, Bytes(*missing_bytes)
    )]
    NoHome {
        /// The layers that do not fit.
        layers: Range<usize>,
        /// How much the last node would have to offer on top.
        missing_bytes: u64,
    },
    /// An explicit cut that is no cut of this model for these nodes.
    #[error("the given cut is refused: {0}")]
    BadCut(String),
    /// An explicit cut that gives a node more than it offers.
    #[error(
        "layers {}..{} need {} on node {}, which offers {}; give it fewer layers",
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

/// [`place_for`] with [`Goal::Balanced`].
///
/// # Errors
/// As [`place_for`].
pub fn place(
    nodes: &[NodeCapacity],
    model: &ModelShape,
    cut: Option<&[Range<usize>]>,
) -> Result<Placement, PlaceError> {
    place_for(Goal::Balanced, nodes, model, cut)
}

/// Gives every node of `nodes` one contiguous range of layers, in the order given: the first node
/// also holds the embedding, the last one the head. Every layer is placed exactly once, no node
/// gets more than its memory, and no other such cut serves `goal` better. With `cut` that cut is
/// checked and described instead.
///
/// Costs `O(nodes * layers^2)`, some microseconds for a room and a model of today.
///
/// # Errors
/// [`PlaceError`], which names the layers or the node that do not fit. Always the caller's to
/// mend: other nodes, another model, another cut.
pub fn place_for(
    goal: Goal,
    nodes: &[NodeCapacity],
    model: &ModelShape,
    cut: Option<&[Range<usize>]>,
) -> Result<Placement, PlaceError> {
    let layers = model.layer_bytes.len();
    if nodes.is_empty() {
        return Err(PlaceError::NoNodes);
    }
    if layers == 0 {
        return Err(PlaceError::NoLayers);
    }
    let costs = Costs::new(nodes, model);
    let ranges = match cut {
        Some(cut) => {
            check_cut(&costs, cut)?;
            cut.to_vec()
        }
        None => search(goal, &costs)?,
    };
    Ok(describe(&costs, &ranges))
}

/// Everything a cut costs, with exact integer arithmetic so that equal inputs give equal cuts.
pub(crate) struct Costs<'a> {
    pub(crate) nodes: &'a [NodeCapacity],
    pub(crate) model: &'a ModelShape,
    pub(crate) speeds: Vec<Speed>,
    /// `sums[i]` is the weight bytes of layers `0..i`.
    sums: Vec<u128>,
}

/// How fast a node reads weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    pub(crate) bytes_per_s: u128,
    pub(crate) measured: bool,
}

impl<'a> Costs<'a> {
    fn new(nodes: &'a [NodeCapacity], model: &'a ModelShape) -> Self {
        let mut sums = vec![0u128];
        let mut sum = 0u128;
        for &bytes in &model.layer_bytes {
            sum += u128::from(bytes);
            sums.push(sum);
        }
        Self { nodes, model, speeds: speeds(nodes), sums }
    }

    fn layers(&self) -> usize {
        self.model.layer_bytes.len()
    }

    fn is_tail(&self, node: usize) -> bool {
        node + 1 == self.nodes.len()
    }

    fn layer_weights(&self, layers: &Range<usize>) -> u128 {
        let sum = |at: usize| self.sums.get(at).copied().unwrap_or_default();
        sum(layers.end).saturating_sub(sum(layers.start))
    }

    pub(crate) fn weights(&self, node: usize, layers: &Range<usize>) -> u128 {
        self.layer_weights(layers) + self.ends(node)
    }

    /// Embedding and head, where this node holds them.
    fn ends(&self, node: usize) -> u128 {
        let is_head_too = self.model.tied && self.is_tail(node);
        let embed = if node == 0 && !is_head_too { self.model.embed_bytes } else { 0 };
        let head = if self.is_tail(node) { self.model.head_bytes } else { 0 };
        u128::from(embed) + u128::from(head)
    }

    pub(crate) fn read_per_token(&self, node: usize, layers: &Range<usize>) -> u128 {
        let head = if self.is_tail(node) { self.model.head_bytes } else { 0 };
        self.layer_weights(layers) + u128::from(head)
    }

    pub(crate) fn memory(&self, node: usize, layers: &Range<usize>) -> u128 {
        let kv = u128::from(self.model.kv_bytes_per_layer) * layers.len() as u128;
        self.weights(node, layers) + kv + u128::from(self.model.scratch_bytes)
    }

    pub(crate) fn memory_offered(&self, node: usize) -> u128 {
        self.nodes.get(node).map_or(0, |node| node.memory_bytes.into())
    }

    /// Time to read the stage's weights once.
    fn time_ps(&self, node: usize, layers: &Range<usize>) -> u128 {
        let speed = self.speeds.get(node).map_or(1, |speed| speed.bytes_per_s);
        self.read_per_token(node, layers).saturating_mul(1_000_000_000_000) / speed.max(1)
    }
}

/// Measured speeds, and assumed ones in proportion to cores for the nodes that have none.
fn speeds(nodes: &[NodeCapacity]) -> Vec<Speed> {
    let measured = |node: &NodeCapacity| {
        let speed = node.read_gb_s.filter(|speed| speed.is_finite() && *speed > 0.0)?;
        Some(((speed * 1e9) as u128).clamp(1, 1 << 60))
    };
    let cores = |node: &NodeCapacity| u128::from(node.cores.max(1));
    let mut total = (0u128, 0u128);
    for node in nodes {
        if let Some(speed) = measured(node) {
            total = (total.0 + speed, total.1 + cores(node));
        }
    }
    // Nothing measured at all: any equal speed per core gives the same cut. 5 GB/s is an ordinary
    // core; predictions made from it say that they are not measured.
    let per_core = total.0.checked_div(total.1).unwrap_or(5_000_000_000).max(1);
    let speed = |node: &NodeCapacity| match measured(node) {
        Some(bytes_per_s) => Speed { bytes_per_s, measured: true },
        None => Speed { bytes_per_s: per_core * cores(node), measured: false },
    };
    nodes.iter().map(speed).collect()
}

fn search(goal: Goal, costs: &Costs<'_>) -> Result<Vec<Range<usize>>, PlaceError> {
    let (nodes, layers) = (costs.nodes.len(), costs.layers());
    if nodes > layers {
        return Err(PlaceError::TooManyNodes { nodes, layers });
    }
    let slowest = best_cut(costs, 0u128, |slowest, time| Some(time.max(slowest)));
    let (slowest_ps, _) = slowest.map_err(|furthest| no_home(costs, furthest))?;
    let bound = if goal == Goal::Balanced { slowest_ps } else { u128::MAX };
    // Shortest lap within the bound; among equals the most even one.
    let lap = best_cut(costs, (0u128, 0u128), |(sum, squares), time| {
        let within = time <= bound;
        within.then(|| (sum.saturating_add(time), squares.saturating_add(time.saturating_mul(time))))
    });
    lap.map(|(_, ranges)| ranges).map_err(|furthest| no_home(costs, furthest))
}

/// How far a search came that did not reach the last layer.
#[derive(Clone, Copy, Debug)]
struct Furthest {
    node: usize,
    /// Layers of the last stage that was placed.
    start: usize,
    end: usize,
}

/// The cheapest cut, by dynamic programming over (nodes used, layers placed). `join` adds a
/// stage's time to a cost, or refuses the stage; both it and memory must only get worse as a
/// stage grows.
fn best_cut<K: Ord + Copy>(
    costs: &Costs<'_>,
    zero: K,
    join: impl Fn(K, u128) -> Option<K>,
) -> Result<(K, Vec<Range<usize>>), Furthest> {
    let (nodes, layers) = (costs.nodes.len(), costs.layers());
    // rows[n][end]: cheapest way to place layers 0..end on the first n nodes, and where the last
    // of those stages starts.
    let mut rows: Vec<Vec<Option<(K, usize)>>> = Vec::with_capacity(nodes + 1);
    let mut row = vec![None; layers + 1];
    row[0] = Some((zero, 0));
    rows.push(row.clone());
    let mut furthest = Furthest { node: 0, start: 0, end: 0 };
    for node in 0..nodes {
        let mut next: Vec<Option<(K, usize)>> = vec![None; layers + 1];
        let end_max = layers - (nodes - 1 - node); // each node after this one needs a layer
        for (start, entry) in row.iter().enumerate() {
            let Some((cost, _)) = *entry else { continue };
            for (end, best) in next.iter_mut().enumerate().take(end_max + 1).skip(start + 1) {
                let stage = start..end;
                if costs.memory(node, &stage) > costs.memory_offered(node) {
                    break;
                }
                let Some(cost) = join(cost, costs.time_ps(node, &stage)) else { break };
                if best.is_none_or(|(other, _)| cost < other) {
                    *best = Some((cost, start));
                }
            }
        }
        if let Some((end, Some((_, start)))) = next.iter().enumerate().rfind(|(_, entry)| entry.is_some()) {
            furthest = Furthest { node, start: *start, end };
        }
        rows.push(next.clone());
        row = next;
    }
    let Some(Some((cost, _))) = row.last().copied() else { return Err(furthest) };
    let mut ranges = Vec::with_capacity(nodes);
    let mut end = layers;
    for row in rows.iter().skip(1).rev() {
        let start = row.get(end).copied().flatten().map_or(0, |(_, start)| start);
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Ok((cost, ranges))
}

fn no_home(costs: &Costs<'_>, furthest: Furthest) -> PlaceError {
    let smallest = costs.model.layer_bytes.iter().min().copied().unwrap_or_default();
    let one_layer = u128::from(smallest)
        + u128::from(costs.model.kv_bytes_per_layer)
        + u128::from(costs.model.scratch_bytes);
    for (index, node) in costs.nodes.iter().enumerate() {
        let need = one_layer + costs.ends(index);
        if need > u128::from(node.memory_bytes) {
            let (name, have_bytes) = (node.name.clone(), node.memory_bytes);
            return PlaceError::NodeTooSmall { name, need_bytes: narrow(need), have_bytes };
        }
    }
    let homeless = furthest.end..costs.layers();
    let kv = u128::from(costs.model.kv_bytes_per_layer) * homeless.len() as u128;
    let used = costs.memory(furthest.node, &(furthest.start..furthest.end));
    let free = costs.memory_offered(furthest.node).saturating_sub(used);
    let missing = (costs.layer_weights(&homeless) + kv).saturating_sub(free).max(1);
    PlaceError::NoHome { layers: homeless, missing_bytes: narrow(missing) }
}

fn check_cut(costs: &Costs<'_>, cut: &[Range<usize>]) -> Result<(), PlaceError> {
    let (nodes, layers) = (costs.nodes.len(), costs.layers());
    if cut.len() != nodes {
        return Err(PlaceError::BadCut(format!("it has {} stages for {nodes} nodes", cut.len())));
    }
    let mut expected = 0;
    for range in cut {
        let Range { start, end } = *range;
        if start != expected {
            return Err(PlaceError::BadCut(format!(
                "the stage {start}..{end} should start at layer {expected}"
            )));
        }
        if end <= start || end > layers {
            return Err(PlaceError::BadCut(format!(
                "{start}..{end} is no range of layers within 0..{layers}"
            )));
        }
        expected = end;
    }
    if expected != layers {
        return Err(PlaceError::BadCut(format!("layers {expected}..{layers} are in no stage")));
    }
    for (index, (range, node)) in cut.iter().zip(costs.nodes).enumerate() {
        let need = costs.memory(index, range);
        if need > u128::from(node.memory_bytes) {
            return Err(PlaceError::StageTooLarge {
                name: node.name.clone(),
                layers: range.clone(),
                need_bytes: narrow(need),
                have_bytes: node.memory_bytes,
            });
        }
    }
    Ok(())
}

fn describe(costs: &Costs<'_>, ranges: &[Range<usize>]) -> Placement {
    let ms = |ps: u128| ps as f64 / 1e9;
    let times: Vec<u128> =
        ranges.iter().enumerate().map(|(node, layers)| costs.time_ps(node, layers)).collect();
    let stage = |(node, layers): (usize, &Range<usize>)| {
        let capacity = costs.nodes.get(node)?;
        Some(PlacedStage {
            node: capacity.id,
            name: capacity.name.clone(),
            layers: layers.clone(),
            weight_bytes: narrow(costs.weights(node, layers)),
            read_bytes_per_token: narrow(costs.read_per_token(node, layers)),
            memory_bytes: narrow(costs.memory(node, layers)),
            predicted_ms: ms(costs.time_ps(node, layers)),
            measured: costs.speeds.get(node).is_some_and(|speed| speed.measured),
            reason: reason(costs, node, layers),
        })
    };
    Placement {
        stages: ranges.iter().enumerate().filter_map(stage).collect(),
        lap_ms: ms(times.iter().fold(0, |sum, time| time.saturating_add(sum))),
        slowest_ms: ms(times.iter().copied().max().unwrap_or_default()),
    }
}

pub(crate) fn narrow(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
