//! `swarm-os prune`: makes room on the disk.

use serde_json::json;
use swarm_weights::{Store, quantized};

use crate::args::PruneArgs;
use crate::failure::{Code, Failure};
use crate::present::{report, text};
use crate::settings;

pub fn prune(args: &PruneArgs) -> Result<(), Failure> {
    let keep = match args.keep.trim() {
        "0" => 0,
        typed => settings::parse_bytes(typed).map_err(|why| Failure::usage(format!("--keep: {why}")))?,
    };
    let store = Store::of_user();
    let not_all = |error: &dyn std::error::Error| {
        Failure::new(Code::Failed, format!("not all was removed: {}", swarm_node::chain(error)))
    };
    // What was quantized is made again without asking anybody, so it goes first.
    let fetched: u64 = store.entries().iter().map(|entry| entry.bytes).sum();
    let room = keep.saturating_sub(fetched);
    let forms = quantized::prune(store.root(), room).map_err(|error| not_all(&error))?;
    let forms_left: u64 = quantized::entries(store.root()).iter().map(|entry| entry.bytes).sum();
    let pruned = store.prune(keep.saturating_sub(forms_left)).map_err(|error| not_all(&error))?;
    if args.json {
        let name = |entry: &swarm_weights::store::StoreEntry| json!({"name": entry.id, "commit": entry.commit, "bytes": entry.bytes});
        return Ok(report::json(&json!({
            "removed": pruned.removed.iter().map(name).collect::<Vec<_>>(),
            "in_use": pruned.in_use.iter().map(name).collect::<Vec<_>>(),
            "removed_quantized": forms.iter().map(|form| json!({"name": form.model, "quant": form.quant, "bytes": form.bytes})).collect::<Vec<_>>(),
            "quantized_bytes_left": forms_left, "bytes_left": pruned.bytes, "folder": store.root(),
        }))?);
    }
    for entry in &pruned.removed {
        text::say(&format!("removed {} ({})", text::line(&entry.id), text::bytes(entry.bytes)))?;
    }
    for form in &forms {
        let name = text::line(&form.model);
        text::say(&format!(
            "removed {name} quantized to {} ({})",
            text::line(&form.quant),
            text::bytes(form.bytes)
        ))?;
    }
    for entry in &pruned.in_use {
        text::say(&format!("{} is in use and stays ({})", text::line(&entry.id), text::bytes(entry.bytes)))?;
    }
    let folder = text::line(&store.root().display().to_string());
    text::say(&format!("{} of fetched weights are left in {folder}", text::bytes(pruned.bytes)))?;
    if forms_left > 0 {
        text::say(&format!("and {} of quantized ones", text::bytes(forms_left)))?;
    }
    Ok(())
}
