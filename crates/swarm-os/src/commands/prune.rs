//! `swarm-os prune`: makes room on the disk.

use serde_json::json;
use swarm_weights::{Store, StoreError};

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
    let pruned = store.prune(keep).map_err(|error: StoreError| {
        Failure::new(Code::Failed, format!("not all was removed: {}", swarm_node::chain(&error)))
    })?;
    if args.json {
        let name = |entry: &swarm_weights::store::StoreEntry| json!({"name": entry.id, "commit": entry.commit, "bytes": entry.bytes});
        return Ok(report::json(&json!({
            "removed": pruned.removed.iter().map(name).collect::<Vec<_>>(),
            "in_use": pruned.in_use.iter().map(name).collect::<Vec<_>>(),
            "bytes_left": pruned.bytes, "folder": store.root(),
        }))?);
    }
    for entry in &pruned.removed {
        text::say(&format!("removed {} ({})", text::line(&entry.id), text::bytes(entry.bytes)))?;
    }
    for entry in &pruned.in_use {
        text::say(&format!("{} is in use and stays ({})", text::line(&entry.id), text::bytes(entry.bytes)))?;
    }
    let folder = text::line(&store.root().display().to_string());
    text::say(&format!("{} of fetched weights are left in {folder}", text::bytes(pruned.bytes)))?;
    Ok(())
}
