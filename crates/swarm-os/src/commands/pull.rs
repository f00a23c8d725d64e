//! `swarm-os pull`: fetches a model, or some of its layers.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use swarm_kernels::Quant;
use swarm_node::{Around, FoundModel, NodeError, find_model};
use swarm_weights::{Attached, Checkpoint, FetchControl, FetchSource, StoreError};

use crate::args::{PullArgs, QuantArg};
use crate::failure::{Code, Failure};
use crate::interrupt::{self, Repeat};
use crate::present::progress::bytes_bar;
use crate::present::{report, text};
use crate::{quant, settings};

pub fn pull(args: &PullArgs) -> Result<(), Failure> {
    let FoundModel { path, lender: _lender } = find(args)?;
    let quant = args.quant.map(QuantArg::kernel);
    quant::check(&path, quant)?.iter().for_each(|note| text::note(note));
    let model = Checkpoint::open(&path).map_err(NodeError::from)?.quantized(quant);
    let layers = layers(args.layers.as_deref(), model.config().num_hidden_layers)?;
    let _asked = ask(args, &model)?;
    let started = Instant::now();
    let missing = model.missing_bytes(layers.clone());
    let abort = Arc::new(AtomicBool::new(false));
    let called_off = abort.clone();
    let _interrupt = interrupt::during(Repeat::End, move || called_off.store(true, Ordering::Relaxed));
    let bar =
        bytes_bar(missing, format!("{} layers {}..{}", text::line(model.name()), layers.start, layers.end));
    let (mut from_hub, mut from_peers) = (0, 0);
    let mut progress = |done: swarm_weights::FetchProgress| {
        match done.from {
            FetchSource::Hub => from_hub = done.bytes_done,
            FetchSource::Peer => from_peers = done.bytes_done,
        }
        bar.set_length(done.bytes_total);
        bar.set_position(done.bytes_done);
    };
    let fetched = model.fetch(layers.clone(), &mut FetchControl { progress: &mut progress, abort: &abort });
    bar.finish_and_clear();
    match fetched {
        Err(StoreError::Aborted) => return Err(Failure::silent(Code::Interrupted)),
        other => {
            other.map_err(|source| NodeError::Fetch { layers: layers.clone(), source: Box::new(source) })?
        }
    }
    let bytes_fetched = from_hub + from_peers;
    let kept = keep(&model, &layers, &abort)?;
    let stage_bytes = model.stage_bytes(layers.clone());
    if args.json {
        return Ok(report::json(&json!({
            "model": model.name(), "path": path, "commit": model.origin().map(|origin| &origin.commit),
            "layers": [layers.start, layers.end], "bytes": stage_bytes, "bytes_fetched": bytes_fetched, "bytes_from_peers": from_peers,
            "quant": quant.map(Quant::name), "quantized": kept,
            "ms": started.elapsed().as_secs_f64() * 1e3,
        }))?);
    }
    let of = model.config().num_hidden_layers;
    text::say(&format!(
        "{}: layers {}..{} of {of} are here, {}, of which {} were fetched now\n{}",
        text::line(model.name()),
        layers.start,
        layers.end,
        text::bytes(stage_bytes),
        text::bytes(bytes_fetched),
        text::line(&path.display().to_string()),
    ))?;
    if let Some(kept) = kept {
        text::say(&format!(
            "quantized they are in {}; start with --quant {}",
            text::line(&kept.display().to_string()),
            quant.map(Quant::name).unwrap_or_default()
        ))?;
    }
    Ok(())
}

/// Where the model is; the workers that are named say so where the Hub cannot.
fn find(args: &PullArgs) -> Result<FoundModel, Failure> {
    if args.peer.is_empty() {
        return Ok(find_model(&args.model, None, &|_| {})?);
    }
    let named = args.peer.iter().map(|peer| settings::peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
    let (_, identity) = settings::identity()?;
    let around = Around {
        identity: &identity,
        named: &named,
        discover: false,
        interfaces: &[],
        state_dir: None,
        within: Duration::ZERO,
        answers_within: Duration::ZERO,
    };
    Ok(find_model(&args.model, Some(&around), &|news| text::note(news))?)
}

/// The workers that are named. One that cannot be asked is said, and the others and the Hub do without it.
fn ask(args: &PullArgs, model: &Checkpoint) -> Result<Vec<Attached>, Failure> {
    if args.peer.is_empty() {
        return Ok(Vec::new());
    }
    let (_, identity) = settings::identity()?;
    let mut asked = Vec::new();
    for peer in &args.peer {
        match swarm_node::ask_worker(&identity, &settings::peer_addresses(peer)?, &args.model, model) {
            Ok(attached) => asked.extend(attached),
            Err(error) => {
                text::note(&format!("{} is not asked: {}", text::line(peer), text::line(&error.chain())))
            }
        }
    }
    Ok(asked)
}

/// Quantizes the layers into the cache, where that is asked for. Gives the folder.
fn keep(
    model: &Checkpoint,
    layers: &Range<usize>,
    abort: &Arc<AtomicBool>,
) -> Result<Option<PathBuf>, Failure> {
    if model.quant().is_none() {
        return Ok(None);
    }
    let label = format!("{} layers {}..{}, quantizing", text::line(model.name()), layers.start, layers.end);
    let bar = bytes_bar(model.stage_bytes(layers.clone()), label);
    let kept = swarm_node::keep_quantized(model, layers.clone(), abort, &mut |bytes_done, bytes_total| {
        bar.set_length(bytes_total);
        bar.set_position(bytes_done);
    });
    bar.finish_and_clear();
    match kept? {
        Some(folder) => Ok(Some(folder)),
        None => Err(Failure::silent(Code::Interrupted)),
    }
}

/// `0..11`, within the model; all layers when nothing is said.
fn layers(typed: Option<&str>, count: usize) -> Result<Range<usize>, Failure> {
    let Some(typed) = typed else { return Ok(0..count) };
    let (names, ranges) = settings::layers(typed)?;
    match ranges.as_slice() {
        [range] if names.is_empty() && range.start < range.end && range.end <= count => Ok(range.clone()),
        _ => Err(Failure::usage(format!(
            "--layers: {typed:?} is no range of this model's layers; write it like 0..{count}"
        ))),
    }
}
