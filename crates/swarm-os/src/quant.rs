//! What `--quant` would do to a model, in words, before anything is loaded.

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
    let notes: Vec<String> = groups.iter().filter_map(|group| note(quant, group)).collect();
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

fn note(quant: Quant, group: &QuantGroup) -> Option<String> {
    let &QuantGroup { from, to, cols, matrices } = group;
    let (name, block) = (quant.dtype().name(), quant.dtype().block_len());
    let which = if matrices == 1 { "one matrix has".to_owned() } else { format!("{matrices} matrices have") };
    if from.is_quantized() {
        let are = if matrices == 1 { "one matrix is".to_owned() } else { format!("{matrices} matrices are") };
        Some(format!("{are} {} in the file and stay so", from.name()))
    } else if to == quant.dtype() {
        None
    } else if to == from {
        Some(format!("{which} rows of {cols} values, no whole blocks of 32, and stay {}", from.name()))
    } else {
        Some(format!(
            "{which} rows of {cols} values, no whole {name} blocks of {block}, and become {}",
            to.name()
        ))
    }
}

/// After a model's name.
pub fn suffix(quant: Option<Quant>) -> String {
    quant.map(|quant| format!(", quantized to {}", quant.name())).unwrap_or_default()
}
