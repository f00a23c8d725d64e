//! What nodes would have to fetch, and the rule that prefers to fetch less where speed is near equal.

use std::ops::Range;

use crate::place::{ModelShape, Objective};
use crate::plan::{Costs, CutStage, Sums, Wanted};

/// A placement may be so much slower, in hundredths, when less is fetched for it; many users may wait so much longer for a token when
/// their prompts are faster for it.
pub const SLACK_PERCENT: u64 = 5;

/// The most that is still as good as `value`.
pub(crate) fn with_slack(value: u128) -> u128 {
    value.saturating_add(value.saturating_mul(SLACK_PERCENT.into()) / 100)
}

/// What one node lacks of a model, in bytes of files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Of each layer. A list that is too short stands for a node that has the rest.
    pub layers: Vec<u64>,
    /// Of the embedding, which the first stage needs.
    pub embed: u64,
    /// Of the final norm, which the tail needs.
    pub norm: u64,
    /// Of the head, which the tail needs; the embedding where they are tied.
    pub head: u64,
}

impl Missing {
    /// What a stage of `layers`, of a model of `layers_total`, would fetch.
    pub fn stage(&self, layers: &Range<usize>, layers_total: usize, tied: bool) -> u64 {
        let own = self.layers.get(layers.start.min(self.layers.len())..layers.end.min(self.layers.len()));
        let mut bytes = own.unwrap_or_default().iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
        let is_first = layers.start == 0;
        if is_first {
            bytes = bytes.saturating_add(self.embed);
        }
        if layers.end == layers_total {
            let head = if tied && is_first { 0 } else { self.head };
            bytes = bytes.saturating_add(self.norm).saturating_add(head);
        }
        bytes
    }
}

/// What each node of a room lacks, in the order of its nodes; one that is not listed has everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Downloads<'a>(pub &'a [Missing]);

impl Downloads<'_> {
    /// Bytes that `node` would fetch for a stage.
    pub fn bytes(&self, node: usize, layers: &Range<usize>, model: &ModelShape) -> u64 {
        self.0.get(node).map_or(0, |missing| missing.stage(layers, model.layers(), model.tied))
    }

    /// Bytes that all nodes would fetch for a cut.
    pub fn of_cut(&self, cut: &[CutStage], model: &ModelShape) -> u64 {
        cut.iter().fold(0u64, |sum, (node, layers)| sum.saturating_add(self.bytes(*node, layers, model)))
    }
}

impl Costs<'_> {
    /// The cut to take when `best` is what `objective` alone would: one that fetches less and is as good within
    /// [`SLACK_PERCENT`], else `best` itself.
    ///
    /// Of the ways to one state the search keeps the one that fetches least, so it may miss a better one; it never gives
    /// one that is slower than the slack allows, or that fetches more than `best`.
    pub(crate) fn frugal(&self, objective: Objective, wanted: Wanted, best: Vec<CutStage>) -> Vec<CutStage> {
        let fetched = self.downloads.of_cut(&best, self.model);
        let Some(sums) = self.sums_of(&best).filter(|_| fetched > 0) else { return best };
        let limit = Sums { lap: with_slack(sums.lap), slowest: with_slack(sums.slowest), ..sums };
        let within = |sums: Sums| match objective {
            Objective::Latency => sums.lap <= limit.lap,
            Objective::Throughput => sums.slowest <= limit.slowest && sums.lap <= limit.lap,
            Objective::Fit => sums.nodes <= limit.nodes && sums.lap <= limit.lap,
        };
        let key = |sums: Sums| within(sums).then_some((sums.fetch, sums.slowest, sums.lap, sums.nodes));
        match self.cheapest(wanted, key) {
            Some(((fetch, ..), cut)) if fetch < u128::from(fetched) => cut,
            _ => best,
        }
    }
}
