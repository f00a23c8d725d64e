//! Quantized weights that are made ahead, for starts to come.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use swarm_model::{LoadError, LoadOptions};
use swarm_weights::{Checkpoint, QuantizedStore};

use crate::error::NodeError;
use crate::machine;

/// Quantizes `layers` of a model that is opened to be quantized, as far as they are not on the disk in that form, with all
/// cores and with little memory. Gives the folder; `None` when `abort` was set meanwhile, and for a model that is not to be
/// quantized. `progress` is told bytes of the originals, done and in all.
///
/// # Errors
/// [`NodeError::Load`] when the originals cannot be read, [`NodeError::Keep`] when the disk does not take what they become.
pub fn keep_quantized(
    model: &Checkpoint,
    layers: Range<usize>,
    abort: &Arc<AtomicBool>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<PathBuf>, NodeError> {
    let Some(store) = QuantizedStore::of_user(model, true)?.map(Arc::new) else { return Ok(None) };
    let options = LoadOptions {
        threads: machine::cores(),
        quantized: Some(store.clone()),
        abort: Some(abort.clone()),
        ..LoadOptions::default()
    };
    let mut told = |done: swarm_model::LoadProgress| progress(done.bytes_done, done.bytes_total);
    match swarm_model::keep_quantized(model, layers.clone(), &options, &mut told) {
        Err(LoadError::Aborted) => return Ok(None),
        other => other.map_err(|source| NodeError::Load { layers, source: Box::new(source) })?,
    }
    match store.trouble() {
        Some(error) => Err(NodeError::Keep(Box::new(error))),
        None => Ok(Some(store.folder().to_owned())),
    }
}
