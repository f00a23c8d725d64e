//! Which layers go where: an exact search over subsets of nodes, their order in the ring, and cuts.
//!
//! `docs/placement.md` has the formulas. All costs are integers, so that equal inputs give equal
//! placements on every computer.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use crate::download::{Downloads, with_slack};
use crate::place::{
    Alternative, ModelShape, Objective, PlaceError, PlacedStage, Placement, Plan, RoomProfile, Split,
};
use crate::place_words::{self, Quoted};

/// Up to so many nodes every subset and order is searched; with more, nodes keep the order of
/// their speed and may still be left out.
pub const EXACT_NODES_MAX: usize = 8;

/// Nodes beyond this are not looked at.
const NODES_MAX: usize = 63;

/// A stage of a cut: the node's place in [`RoomProfile::nodes`], and its layers.
pub type CutStage = (usize, Range<usize>);

/// Chooses who gets which layers. The coordinator (`room.nodes[0]`) always has the first stage.
///
/// With `split` auto, nodes that do not help `objective` are left out. No node gets more memory
/// than it offers by [`ModelShape::stage_memory`], and no other choice serves `objective` better;
/// equal ones keep the order of `room.nodes`, so that equal rooms get equal placements.
///
/// Costs about `2^(nodes - 1) * nodes^2 * layers^2 / 8` steps for up to [`EXACT_NODES_MAX`] nodes.
///
/// # Errors
/// [`PlaceError`], which names the layers or the node that do not fit and what would help.
pub fn plan(
    room: &RoomProfile,
    model: &ModelShape,
    objective: Objective,
    split: Split,
) -> Result<Plan, PlaceError> {
    plan_frugally(room, model, objective, split, Downloads::default())
}

/// [`plan`], but a placement that is nearly as good ([`SLACK_PERCENT`](crate::SLACK_PERCENT)) is chosen when less has to be fetched for it.
///
/// # Errors
/// As [`plan`].
pub fn plan_frugally(
    room: &RoomProfile,
    model: &ModelShape,
    objective: Objective,
    split: Split,
    downloads: Downloads<'_>,
) -> Result<Plan, PlaceError> {
    let costs = Costs { downloads, ..Costs::new(room, model)? };
    let nodes = room.nodes.len();
    let layers = model.layers();
    if split == Split::Always && nodes > layers {
        return Err(PlaceError::TooManyNodes { nodes, layers });
    }
    let wanted = match split {
        Split::Auto => Wanted::Any,
        Split::Always => Wanted::Exactly(nodes),
        Split::Never => Wanted::Exactly(1),
    };
    let cut = costs.search(objective, wanted).ok_or_else(|| costs.why_not(wanted))?;
    let cut = costs.frugal(objective, wanted, cut);
    Ok(costs.plan(objective, split, &cut, false))
}

/// Describes a cut that was given, and compares it as [`plan`] does.
///
/// # Errors
/// [`PlaceError::BadCut`] when `cut` is no partition of the layers that starts on the coordinator,
/// [`PlaceError::StageTooLarge`] when a node offers too little, [`PlaceError::NoWay`].
pub fn plan_cut(
    room: &RoomProfile,
    model: &ModelShape,
    objective: Objective,
    cut: &[CutStage],
) -> Result<Plan, PlaceError> {
    let costs = Costs::new(room, model)?;
    costs.check(cut)?;
    Ok(costs.plan(objective, Split::Always, cut, true))
}

/// Which subsets are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Any,
    Exactly(usize),
}

impl Wanted {
    fn allows(self, count: usize) -> bool {
        match self {
            Self::Any => true,
            Self::Exactly(wanted) => count == wanted,
        }
    }
}

/// Everything a cut costs, in nanoseconds and bytes.
pub(crate) struct Costs<'a> {
    pub(crate) room: &'a RoomProfile,
    pub(crate) model: &'a ModelShape,
    pub(crate) downloads: Downloads<'a>,
    /// `sums[i]` is the weight bytes of layers `0..i`.
    sums: Vec<u128>,
    /// The order in which nodes may follow each other, where not every order is searched.
    rank: Option<Vec<usize>>,
}

/// What a path through the first stages has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sums {
    pub lap: u128,
    pub slowest: u128,
    /// One row of a prompt on the node where it takes longest.
    pub slowest_row: u128,
    /// Fullest node, in millionths of what it offers.
    pub fullest: u128,
    pub nodes: u128,
    /// Bytes that would be fetched.
    pub fetch: u128,
}

/// The cheapest way to a state, and where it came from: the last stage's start, and the set and
/// node before it.
#[derive(Clone, Copy, Debug)]
struct Entry<K> {
    key: K,
    sums: Sums,
    start: usize,
    before: (u64, usize),
}

/// Ways to place `0..end` for every `end`, with a given set of nodes and last node.
type Row<K> = Vec<Option<Entry<K>>>;

impl<'a> Costs<'a> {
    pub(crate) fn new(room: &'a RoomProfile, model: &'a ModelShape) -> Result<Self, PlaceError> {
        if room.nodes.is_empty() {
            return Err(PlaceError::NoNodes);
        }
        if model.layers() == 0 {
            return Err(PlaceError::NoLayers);
        }
        let mut sums = vec![0u128];
        let mut sum = 0u128;
        for &bytes in &model.layer_bytes {
            sum += u128::from(bytes);
            sums.push(sum);
        }
        let rank = (room.nodes.len() > EXACT_NODES_MAX).then(|| {
            let mut order: Vec<usize> = (1..room.nodes.len()).collect();
            order.sort_by_key(|&node| (room.nodes.get(node).map(|node| node.speed.layer_ns), node));
            let mut rank = vec![0; room.nodes.len()];
            for (place, node) in order.into_iter().enumerate() {
                if let Some(rank) = rank.get_mut(node) {
                    *rank = place + 1;
                }
            }
            rank
        });
        Ok(Self { room, model, downloads: Downloads::default(), sums, rank })
    }

    fn layers(&self) -> usize {
        self.model.layers()
    }

    fn nodes(&self) -> usize {
        self.room.nodes.len().min(NODES_MAX)
    }

    pub(crate) fn offered(&self, node: usize) -> u64 {
        self.room.nodes.get(node).map_or(0, |node| node.memory_bytes)
    }

    pub(crate) fn fits(&self, node: usize, layers: &Range<usize>) -> bool {
        self.model.stage_memory(layers).total() <= self.offered(node)
    }

    /// One token through `layers` on `node`: the mean layer's time, scaled by their weights, and
    /// the head on the tail.
    fn compute_ns(&self, node: usize, layers: &Range<usize>) -> u128 {
        let Some(node) = self.room.nodes.get(node) else { return 0 };
        let head = if layers.end == self.layers() { node.speed.head_ns } else { 0 };
        self.scaled(node.speed.layer_ns, layers) + u128::from(head)
    }

    /// One row of a prompt chunk through `layers` on `node`.
    fn row_ns(&self, node: usize, layers: &Range<usize>) -> u128 {
        self.room.nodes.get(node).map_or(0, |node| self.scaled(node.speed.row_ns, layers))
    }

    /// `per_layer` times the layers, each weighed by its bytes against the mean layer.
    fn scaled(&self, per_layer: u64, layers: &Range<usize>) -> u128 {
        let sum = |at: usize| self.sums.get(at).copied().unwrap_or_default();
        let all = sum(self.layers());
        let per_layer = u128::from(per_layer);
        if all == 0 {
            return per_layer * layers.len() as u128;
        }
        let part = sum(layers.end).saturating_sub(sum(layers.start));
        per_layer.saturating_mul(self.layers() as u128).saturating_mul(part) / all
    }

    /// One frame of one token from `from` to `to`: half a round trip and the transfer.
    fn hop_ns(&self, from: usize, to: usize, bytes: u64) -> Option<u128> {
        let link = self.room.link(from, to)?;
        Some(u128::from(link.round_trip_ns) / 2 + self.transfer_ns(from, to, bytes)?)
    }

    /// The time a frame keeps a link busy.
    fn transfer_ns(&self, from: usize, to: usize, bytes: u64) -> Option<u128> {
        let link = self.room.link(from, to)?;
        Some(u128::from(bytes) * 1_000_000_000 / u128::from(link.bytes_per_s.max(1)))
    }

    /// `sums` with one more stage, reached over the hop `from -> node`; `None` where that cannot be.
    fn join(&self, sums: Sums, from: Option<usize>, node: usize, layers: &Range<usize>) -> Option<Sums> {
        let need = self.model.stage_memory(layers).total();
        let offered = self.offered(node);
        if need > offered {
            return None;
        }
        let bytes = self.model.hidden_bytes;
        let (hop, transfer) = match from {
            Some(from) => (self.hop_ns(from, node, bytes)?, self.transfer_ns(from, node, bytes)?),
            None => (0, 0),
        };
        let compute = self.compute_ns(node, layers);
        let mut sums = Sums {
            lap: sums.lap.saturating_add(compute).saturating_add(hop),
            slowest: sums.slowest.max(compute).max(transfer),
            slowest_row: sums.slowest_row.max(self.row_ns(node, layers)),
            fullest: sums.fullest.max(u128::from(need) * 1_000_000 / u128::from(offered.max(1))),
            nodes: sums.nodes + 1,
            fetch: sums.fetch + u128::from(self.downloads.bytes(node, layers, self.model)),
        };
        if node != 0 && layers.end == self.layers() {
            let bytes = self.model.token_bytes;
            sums.lap = sums.lap.saturating_add(self.hop_ns(node, 0, bytes)?);
            sums.slowest = sums.slowest.max(self.transfer_ns(node, 0, bytes)?);
        }
        Some(sums)
    }

    /// What a whole cut costs; `None` when it cannot be.
    pub(crate) fn sums_of(&self, cut: &[CutStage]) -> Option<Sums> {
        let (mut sums, mut before) = (Sums::default(), None);
        for (node, layers) in cut {
            sums = self.join(sums, before, *node, layers)?;
            before = Some(*node);
        }
        Some(sums)
    }

    /// The best cut for `objective` among those `wanted` allows; `None` when there is none.
    ///
    /// A maximum and a sum cannot be minimized in that order in one pass (a stage that makes two
    /// maxima equal turns the order round), so the maximum is found first and then bounds the sum.
    pub(crate) fn search(&self, objective: Objective, wanted: Wanted) -> Option<Vec<CutStage>> {
        match objective {
            Objective::Latency => {
                self.cheapest(wanted, |sums| Some((sums.lap, sums.nodes, sums.slowest))).map(|found| found.1)
            }
            Objective::Throughput => {
                let (best, _) = self.cheapest(wanted, |sums| Some(sums.slowest))?;
                // The head makes the tail slow at decoding, not at prompts, which take it once.
                let near = |sums: &Sums| sums.slowest <= with_slack(best);
                let (row, _) = self.cheapest(wanted, |sums| near(&sums).then_some(sums.slowest_row))?;
                let near = |sums: &Sums| near(sums) && sums.slowest_row <= row;
                let (best, _) = self.cheapest(wanted, |sums| near(&sums).then_some(sums.slowest))?;
                let within =
                    |sums: Sums| (near(&sums) && sums.slowest <= best).then_some((sums.lap, sums.nodes));
                self.cheapest(wanted, within).map(|found| found.1)
            }
            Objective::Fit => {
                let ((_, best), _) = self.cheapest(wanted, |sums| Some((sums.nodes, sums.fullest)))?;
                let within = |sums: Sums| (sums.fullest <= best).then_some((sums.nodes, sums.lap));
                self.cheapest(wanted, within).map(|found| found.1)
            }
        }
    }

    /// Dynamic programming over (set of nodes, last node, layers placed). `key` orders ways to one
    /// state and must only get worse as a way grows; `None` gives the way up.
    pub(crate) fn cheapest<K: Ord + Copy>(
        &self,
        wanted: Wanted,
        key: impl Fn(Sums) -> Option<K>,
    ) -> Option<(K, Vec<CutStage>)> {
        let layers = self.layers();
        let mut table: BTreeMap<(u64, usize), Row<K>> = BTreeMap::new();
        let mut row: Row<K> = vec![None; layers + 1];
        self.extend((0, 0, Sums::default()), None, 0, &key, &mut row);
        table.insert((1, 0), row);
        // A larger set has a larger number, so every state is complete before it is read.
        let mut at = Some((1u64, 0usize));
        while let Some(state) = at {
            let (set, last) = state;
            for next in (1..self.nodes()).filter(|&next| self.may_follow(set, last, next)) {
                let to = (self.set_after(set, next), next);
                let mut row = table.remove(&to).unwrap_or_else(|| vec![None; layers + 1]);
                for (end, entry) in table.get(&state).into_iter().flatten().enumerate() {
                    // What ends the layers ends the ring.
                    if let Some(entry) = entry.as_ref().filter(|_| end < layers) {
                        self.extend((end, entry.sums.nodes, entry.sums), Some(state), next, &key, &mut row);
                    }
                }
                table.insert(to, row);
            }
            at = table
                .range((std::ops::Bound::Excluded(state), std::ops::Bound::Unbounded))
                .next()
                .map(|(state, _)| *state);
        }
        self.best_end(&table, wanted)
    }

    /// Adds the stages `start..` on `node` to its row.
    fn extend<K: Ord + Copy>(
        &self,
        (start, _, sums): (usize, u128, Sums),
        from: Option<(u64, usize)>,
        node: usize,
        key: &impl Fn(Sums) -> Option<K>,
        row: &mut Row<K>,
    ) {
        for end in start + 1..=self.layers() {
            let stage = start..end;
            // Memory grows with the stage; only the tail's own parts come on top.
            if !self.fits(node, &stage) {
                break;
            }
            let Some(sums) = self.join(sums, from.map(|(_, last)| last), node, &stage) else { continue };
            let Some(key) = key(sums) else { continue };
            let Some(best) = row.get_mut(end) else { break };
            // Among equals the later one: ways come in the order of the nodes, which the ring then keeps.
            if best.is_none_or(|other| key <= other.key) {
                *best = Some(Entry { key, sums, start, before: from.unwrap_or_default() });
            }
        }
    }

    fn may_follow(&self, set: u64, last: usize, next: usize) -> bool {
        match &self.rank {
            Some(rank) => rank.get(next) > rank.get(last),
            None => set & (1 << next) == 0,
        }
    }

    /// In a fixed order the last node and the number of nodes say all that matters of a set.
    fn set_after(&self, set: u64, next: usize) -> u64 {
        if self.rank.is_some() { set + 1 } else { set | 1 << next }
    }

    fn count(&self, set: u64) -> usize {
        if self.rank.is_some() { set as usize } else { set.count_ones() as usize }
    }

    fn best_end<K: Ord + Copy>(
        &self,
        table: &BTreeMap<(u64, usize), Row<K>>,
        wanted: Wanted,
    ) -> Option<(K, Vec<CutStage>)> {
        let mut best: Option<(K, u64, Reverse<usize>)> = None;
        for (&(set, last), row) in table {
            let Some(Some(entry)) = row.last() else { continue };
            let this = (entry.key, set, Reverse(last));
            if wanted.allows(self.count(set)) && best.is_none_or(|best| this < best) {
                best = Some(this);
            }
        }
        let (key, set, Reverse(last)) = best?;
        let mut state = (set, last);
        let (mut cut, mut end) = (Vec::new(), self.layers());
        while end > 0 {
            let entry = table.get(&state)?.get(end)?.as_ref()?;
            cut.push((state.1, entry.start..end));
            (state, end) = (entry.before, entry.start);
        }
        cut.reverse();
        Some((key, cut))
    }

    fn check(&self, cut: &[CutStage]) -> Result<(), PlaceError> {
        let (layers, bad) = (self.layers(), |what: String| Err(PlaceError::BadCut(what)));
        let mut expected = 0;
        for (index, (node, range)) in cut.iter().enumerate() {
            let Range { start, end } = *range;
            let Some(profile) = self.room.nodes.get(*node) else {
                return bad(format!("it has {} stages for {} nodes", cut.len(), self.room.nodes.len()));
            };
            if (index == 0) != (*node == 0) {
                return bad(format!(
                    "layers {start}..{end} are on {}, but the first layers, and only those, stay on this node",
                    Quoted(&profile.name)
                ));
            }
            if cut.iter().take(index).any(|(other, _)| other == node) {
                return bad(format!("node {} has two stages", Quoted(&profile.name)));
            }
            if start != expected {
                return bad(format!("the stage {start}..{end} should start at layer {expected}"));
            }
            if end <= start || end > layers {
                return bad(format!("{start}..{end} is no range of layers within 0..{layers}"));
            }
            expected = end;
        }
        if expected != layers {
            return bad(format!("layers {expected}..{layers} are in no stage"));
        }
        let mut before = None;
        for (node, range) in cut {
            let (need, have) = (self.model.stage_memory(range).total(), self.offered(*node));
            if need > have {
                let name = self.room.nodes.get(*node).map(|node| node.name.clone()).unwrap_or_default();
                let (layers, need_bytes, have_bytes) = (range.clone(), need, have);
                return Err(PlaceError::StageTooLarge { name, layers, need_bytes, have_bytes });
            }
            if self.join(Sums::default(), before, *node, range).is_none() {
                return Err(PlaceError::NoWay(place_words::no_link(
                    self.room,
                    before.unwrap_or(*node),
                    *node,
                )));
            }
            before = Some(*node);
        }
        Ok(())
    }

    pub(crate) fn describe(&self, cut: &[CutStage]) -> Placement {
        let ms = |ns: u128| ns as f64 / 1e6;
        let rate = |ns: u128| if ns == 0 { 0.0 } else { 1e9 / ns as f64 };
        let (mut sums, mut before, mut compute) = (Sums::default(), None, 0u128);
        let mut stages = Vec::with_capacity(cut.len());
        for (index, (node, layers)) in cut.iter().enumerate() {
            let Some(profile) = self.room.nodes.get(*node) else { continue };
            sums = self.join(sums, before, *node, layers).unwrap_or(sums);
            before = Some(*node);
            let own = self.compute_ns(*node, layers);
            compute += own;
            let next = cut.get(index + 1).map(|(next, _)| *next);
            let bytes = if next.is_some() { self.model.hidden_bytes } else { self.model.token_bytes };
            let next = next.unwrap_or(0);
            let memory = self.model.stage_memory(layers);
            stages.push(PlacedStage {
                node: profile.id,
                name: profile.name.clone(),
                layers: layers.clone(),
                weight_bytes: memory.weight_bytes,
                kv_bytes: memory.kv_bytes,
                buffer_bytes: memory.buffer_bytes,
                memory_bytes: memory.total(),
                offered_bytes: profile.memory_bytes,
                predicted_ms: ms(own),
                source: profile.speed.source,
                hop_ms: if cut.len() > 1 { ms(self.hop_ns(*node, next, bytes).unwrap_or(0)) } else { 0.0 },
                hop_measured: cut.len() == 1 || self.room.link(*node, next).is_some_and(|link| link.measured),
            });
        }
        Placement {
            stages,
            compute_ms: ms(compute),
            hops_ms: ms(sums.lap.saturating_sub(compute)),
            lap_ms: ms(sums.lap),
            slowest_ms: ms(sums.slowest),
            tok_per_s: rate(sums.lap),
            tok_per_s_many: rate(sums.slowest),
            prefill_tok_per_s: rate(sums.slowest_row),
        }
    }

    fn plan(&self, objective: Objective, split: Split, cut: &[CutStage], given: bool) -> Plan {
        let placement = self.describe(cut);
        let used = |node: usize| cut.iter().any(|(used, _)| *used == node);
        let left_out: Vec<usize> = (0..self.room.nodes.len()).filter(|&node| !used(node)).collect();
        let mut counts = vec![1, 2, self.room.nodes.len()];
        counts.dedup();
        let mut alternatives = Vec::new();
        for count in counts.into_iter().filter(|&count| count <= self.room.nodes.len()) {
            let found = self.search(objective, Wanted::Exactly(count));
            // Alone is always told of, also where it does not fit.
            if found.as_deref() == Some(cut) || (found.is_none() && count > 1) {
                continue;
            }
            if alternatives.iter().any(|(other, _)| *other == found) {
                continue;
            }
            let alternative = match &found {
                Some(cut) => {
                    let label = place_words::label(self.room, cut);
                    Alternative { label, placement: Some(self.describe(cut)), why_not: None }
                }
                None => {
                    let why_not = Some(place_words::lacks(self));
                    Alternative { label: "alone".to_owned(), placement: None, why_not }
                }
            };
            alternatives.push((found, alternative));
        }
        let alternatives: Vec<Alternative> = alternatives.into_iter().map(|(_, other)| other).collect();
        let name = |&node: &usize| self.room.nodes.get(node).map(|node| place_words::plain(&node.name));
        let left_out: Vec<String> = left_out.iter().filter_map(name).collect();
        let choice =
            place_words::Choice { objective, split, given, label: place_words::label(self.room, cut) };
        let sentence = place_words::sentence(&choice, &placement, &alternatives, &left_out);
        Plan { placement, objective, split, alternatives, left_out, sentence }
    }

    /// Why no cut was found.
    fn why_not(&self, wanted: Wanted) -> PlaceError {
        place_words::why_not(self, wanted)
    }
}
