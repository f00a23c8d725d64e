//! Placement in plain words.

use std::fmt;

use crate::place::{
    Alternative, KV_PAGE as PAGE, Objective, PlaceError, Placement, RoomProfile, SpeedSource, Split,
};
use crate::plan::{Costs, CutStage, Wanted};

/// A byte count as people write it: powers of ten, one decimal.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} bytes", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.1} GB", bytes / 1e9),
        }
    }
}

/// A stranger's name, escaped so that it cannot steer a terminal.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A stranger's name on one line.
pub(crate) fn plain(name: &str) -> String {
    name.escape_debug().to_string()
}

fn name(room: &RoomProfile, node: usize) -> String {
    room.nodes.get(node).map(|node| plain(&node.name)).unwrap_or_default()
}

/// `alone`, or `with` the names of the other nodes.
pub(crate) fn label(room: &RoomProfile, cut: &[CutStage]) -> String {
    let others: Vec<String> = cut.iter().skip(1).map(|(node, _)| name(room, *node)).collect();
    if others.is_empty() { "alone".to_owned() } else { format!("with {}", others.join(" and ")) }
}

/// Which two nodes do not reach each other.
pub(crate) fn no_link(room: &RoomProfile, from: usize, to: usize) -> String {
    format!("{} does not reach {}", name(room, from), name(room, to))
}

/// Why the model does not fit on the coordinator.
pub(crate) fn lacks(costs: &Costs<'_>) -> String {
    let need = costs.model.stage_memory(&(0..costs.model.layers())).total();
    let have = costs.offered(0);
    format!("needs {} here, {} too much", Bytes(need), Bytes(need.saturating_sub(have)))
}

/// What the sentence is about.
pub(crate) struct Choice {
    pub objective: Objective,
    pub split: Split,
    /// The cut was given, not chosen.
    pub given: bool,
    pub label: String,
}

/// Why this placement, in one sentence.
pub(crate) fn sentence(
    choice: &Choice,
    placement: &Placement,
    alternatives: &[Alternative],
    left_out: &[String],
) -> String {
    let Choice { objective, split, given, .. } = *choice;
    let splits = placement.stages.len() > 1;
    let start = match (given, split, splits) {
        (true, ..) => "as the given layers say".to_owned(),
        (_, Split::Never, _) => "not splitting, as asked".to_owned(),
        (_, Split::Always, true) => "splitting, as asked".to_owned(),
        (_, _, false) if left_out.is_empty() => "nobody to share with".to_owned(),
        (_, _, false) => "not splitting".to_owned(),
        (_, _, true) => "splitting".to_owned(),
    };
    let mut parts = vec![format!("{} {}", choice.label, speed(objective, placement))];
    for other in alternatives {
        match (&other.placement, &other.why_not) {
            (Some(placement), _) => parts.push(format!("{} {}", other.label, speed(objective, placement))),
            (None, Some(why)) => parts.push(format!("{} it does not fit ({why})", other.label)),
            (None, None) => {}
        }
    }
    let mut words = format!("{start}: {}", parts.join(", "));
    if splits && !left_out.is_empty() {
        words += &format!("; left out: {}", left_out.join(", "));
    }
    let assumed: Vec<String> = placement
        .stages
        .iter()
        .filter(|stage| stage.source == SpeedSource::Assumed)
        .map(|stage| plain(&stage.name))
        .collect();
    if !assumed.is_empty() {
        words += &format!("; not measured, assumed: {}", assumed.join(", "));
    }
    words
}

fn speed(objective: Objective, placement: &Placement) -> String {
    match objective {
        Objective::Throughput => format!("{:.1} tok/s for many users together", placement.tok_per_s_many),
        Objective::Latency | Objective::Fit => format!("{:.1} tok/s", placement.tok_per_s),
    }
}

/// Why there is no cut, and what would help.
pub(crate) fn why_not(costs: &Costs<'_>, wanted: Wanted) -> PlaceError {
    let (model, nodes) = (costs.model, costs.room.nodes.as_slice());
    let all = match wanted {
        Wanted::Exactly(count) => count == nodes.len(),
        Wanted::Any => false,
    };
    let shared = if wanted == Wanted::Exactly(1) { &nodes[..1] } else { nodes };
    for (index, node) in shared.iter().enumerate() {
        // The coordinator is always in the ring; the others only where everybody is.
        if index > 0 && !all {
            break;
        }
        if let Some(need_bytes) = too_small(costs, index) {
            let (name, have_bytes) = (node.name.clone(), node.memory_bytes);
            return PlaceError::NodeTooSmall { name, need_bytes, have_bytes };
        }
    }
    let (mut start, mut last) = (0, (0, 0));
    for index in 0..shared.len() {
        let end = (start + 1..=model.layers()).take_while(|&end| costs.fits(index, &(start..end))).last();
        if let Some(end) = end {
            last = (index, start);
            start = end;
        }
    }
    if start == model.layers() {
        return PlaceError::NoWay(unreached(costs.room));
    }
    let (index, from) = last;
    let need = model.stage_memory(&(from..model.layers())).total();
    let offers: Vec<String> = shared
        .iter()
        .map(|node| format!("{} offers {}", Quoted(&node.name), Bytes(node.memory_bytes)))
        .collect();
    PlaceError::NoHome {
        layers: start..model.layers(),
        missing_bytes: need.saturating_sub(costs.offered(index)).max(1),
        offers: offers.join(", "),
        help: help(costs, wanted),
    }
}

/// The least a node must offer at its place in the ring, if it offers less.
fn too_small(costs: &Costs<'_>, index: usize) -> Option<u64> {
    let layers = costs.model.layers();
    let alone = (0..layers).map(|layer| if index == 0 { 0..1 } else { layer..layer + 1 });
    let need = alone.map(|stage| costs.model.stage_memory(&stage).total()).min()?;
    (need > costs.offered(index)).then_some(need)
}

fn unreached(room: &RoomProfile) -> String {
    let nodes = room.nodes.len();
    let pairs = (0..nodes).flat_map(|from| (0..nodes).map(move |to| (from, to)));
    let missing: Vec<String> = pairs
        .filter(|&(from, to)| from != to && room.link(from, to).is_none())
        .map(|(from, to)| no_link(room, from, to))
        .take(4)
        .collect();
    missing.join(", ")
}

/// A smaller context where that is enough, and what else there is to do.
fn help(costs: &Costs<'_>, wanted: Wanted) -> String {
    let others = "add a node, free memory, or use a smaller quantization";
    let context = costs.model.context;
    let smaller = (1..=6).map(|halvings| (context >> halvings) / PAGE * PAGE).find(|&context| {
        context > 0 && {
            let shape = costs.model.with_context(context);
            let costs = Costs::new(costs.room, &shape);
            costs.is_ok_and(|costs| costs.search(Objective::Fit, wanted).is_some())
        }
    });
    match smaller {
        Some(context) => format!("--context {context} would fit; or {others}"),
        None => others.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_and_names() {
        assert_eq!(Bytes(999).to_string(), "999 bytes");
        assert_eq!(Bytes(1_500).to_string(), "1.5 kB");
        assert_eq!(Bytes(2_000_000).to_string(), "2.0 MB");
        assert_eq!(Bytes(u64::MAX).to_string(), "18446744073.7 GB");
        assert_eq!(Quoted("a\u{1b}[2Jb").to_string(), "\"a\\u{1b}[2Jb\"");
    }
}
