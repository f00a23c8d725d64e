//! What `--quant` would do to a model, in words, before anything is loaded.

use std::collections::BTreeMap;
use std::path::Path;

use swarm_kernels::Quant;
use swarm_node::NodeError;
use swarm_weights::{Checkpoint, QuantGroup};

use crate::failure::Failure;
use crate::present::text;

/// What is to be said of matrices that `quant` cannot, or need not, turn into its own format.
///
/// # Errors
/// A model of which it would change nothing: whoever asks expects smaller weights.
pub fn check(model: &Path, quant: Option<Quant>) -> Result<Vec<String>, Failure> {
    let Some(quant) = quant else { return Ok(Vec::new()) };
    let opened = Checkpoint::open(model).map_err(NodeError::from)?.quantized(Some(quant));
    let groups = opened.quant_groups();
    let notes = notes(quant, &groups);
    if groups.iter().any(|group| group.to != group.from) {
        return Ok(notes);
    }
    Err(Failure::usage(format!(
        "--quant {} would change nothing of {}: {}; leave it out",
        quant.name(),
        text::line(opened.name()),
        notes.join("; ")
    )))
}

/// Float matrices by the length of their rows, which decides what they become; of the others only how many there are.
fn notes(quant: Quant, groups: &[QuantGroup]) -> Vec<String> {
    let mut stay = BTreeMap::<_, usize>::new();
    for group in groups.iter().filter(|group| group.from.is_quantized()) {
        *stay.entry(group.from).or_default() += group.matrices;
    }
    let stay = stay.into_iter().map(|(dtype, matrices)| match matrices {
        1 => format!("one matrix is {} in the file and stays so", dtype.name()),
        _ => format!("{matrices} matrices are {} in the file and stay so", dtype.name()),
    });
    let floats = groups.iter().filter(|group| !group.from.is_quantized());
    floats.filter_map(|group| note(quant, group)).chain(stay).collect()
}

fn note(quant: Quant, group: &QuantGroup) -> Option<String> {
    let &QuantGroup { from, to, cols, matrices } = group;
    let (name, block) = (quant.dtype().name(), quant.dtype().block_len());
    let one = matrices == 1;
    let which = if one { "one matrix has".to_owned() } else { format!("{matrices} matrices have") };
    if to == quant.dtype() {
        None
    } else if to == from {
        let stay = if one { "stays" } else { "stay" };
        Some(format!("{which} rows of {cols} values, no whole blocks of 32, and {stay} {}", from.name()))
    } else {
        let turn = if one { "becomes" } else { "become" };
        Some(format!(
            "{which} rows of {cols} values, no whole {name} blocks of {block}, and {turn} {}",
            to.name()
        ))
    }
}

/// After a model's name.
pub fn suffix(quant: Option<Quant>) -> String {
    quant.map(|quant| format!(", quantized to {}", quant.name())).unwrap_or_default()
}
