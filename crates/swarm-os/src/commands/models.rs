//! `swarm-os models`: what is on this computer, in whole and in part, where was looked, and what the room has.

use std::time::SystemTime;

use serde_json::{Value, json};
use swarm_link::{ConfigDir, Identity};
use swarm_node::{Around, ListedModel, RoomModels, list_room, listing_within};
use swarm_weights::store::StoreEntry;
use swarm_weights::{Checkpoint, Store, cache, quantized};

use crate::args::ModelsArgs;
use crate::failure::Failure;
use crate::present::report;
use crate::present::text;
use crate::settings;

pub fn models(args: &ModelsArgs) -> Result<(), Failure> {
    let store = Store::of_user();
    let fetched: Vec<_> = store.entries().into_iter().map(|entry| (store.models(&entry), entry)).collect();
    if args.json {
        let mut object = object(&fetched);
        if let Some(fields) = object.as_object_mut() {
            fields.insert("room".to_owned(), room(args)?.as_ref().map_or(Value::Null, room_object));
        }
        return Ok(report::json(&object)?);
    }
    whole()?;
    in_part(&fetched)?;
    forms()?;
    presets()?;
    // Last, because it may take a moment.
    room(args)?.as_ref().map_or(Ok(()), say_room)
}

/// What the others have. Nobody is asked where nobody is known: then this command needs no network and no identity.
fn room(args: &ModelsArgs) -> Result<Option<RoomModels>, Failure> {
    let named = args.peer.iter().map(|peer| settings::peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
    let folders = ConfigDir::locate()?;
    if args.alone || (named.is_empty() && !Identity::is_made(folders.config())) {
        return Ok(None);
    }
    let identity = match Identity::load_or_create(folders.config()) {
        Ok(identity) => identity,
        Err(error) if named.is_empty() => {
            text::note(&format!("nobody is asked: {}", swarm_node::chain(&error)));
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let knows_others = !identity.peers().is_empty();
    if named.is_empty() && !knows_others {
        return Ok(None);
    }
    Ok(Some(list_room(&Around {
        identity: &identity,
        named: &named,
        discover: knows_others && !args.no_discovery,
        interfaces: &[],
        state_dir: knows_others.then(|| folders.state()),
        within: listing_within(),
        answers_within: listing_within(),
    })))
}

fn room_object(room: &RoomModels) -> Value {
    let model = |model: &ListedModel| {
        let held: Vec<_> = model.layers.iter().map(|range| [range.start, range.end]).collect();
        json!({"name": model.name, "commit": model.commit, "file": model.file, "format": model.format,
            "layers": model.layers_total, "layers_held": held, "bytes": model.bytes,
            "bytes_held": model.bytes_held})
    };
    let nodes = room.nodes.iter().map(|node| {
        let models: Vec<_> = node.models.iter().map(model).collect();
        json!({"node": node.name, "address": node.address.to_string(), "models": models,
            "left_out": node.left_out})
    });
    let nodes: Vec<_> = nodes.collect();
    let silent: Vec<_> = room.silent.iter().map(|(name, why)| json!({"node": name, "why": why})).collect();
    json!({"nodes": nodes, "silent": silent})
}

fn say_room(room: &RoomModels) -> Result<(), Failure> {
    let mut rows = vec![["node", "model", "commit", "here", "of", "layers here"].map(String::from).to_vec()];
    for node in &room.nodes {
        let name = text::line(&node.name);
        if node.models.is_empty() && node.left_out == 0 {
            rows.push(vec![name.clone(), "no model".to_owned()]);
        }
        for model in &node.models {
            let file = model.file.as_ref().map_or_else(String::new, |file| format!(":{file}"));
            let held: Vec<String> =
                model.layers.iter().map(|range| format!("{}..{}", range.start, range.end)).collect();
            let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
            rows.push(vec![
                name.clone(),
                text::line(&format!("{}{file}", model.name)),
                text::line(&model.commit.as_deref().unwrap_or("-").chars().take(12).collect::<String>()),
                text::bytes(model.bytes_held),
                text::bytes(model.bytes),
                format!("{held} of {}", model.layers_total),
            ]);
        }
        if node.left_out > 0 {
            rows.push(vec![name, format!("and {} more", node.left_out)]);
        }
    }
    if rows.len() > 1 {
        text::say(&format!("\n{}", text::table(&rows, &[3, 4])))?;
    }
    if !room.silent.is_empty() {
        let silent = room.silent.iter().map(|(name, why)| match why {
            Some(why) => format!("{} ({})", text::line(name), text::line(why)),
            None => text::line(name),
        });
        text::say(&format!("\nno answer from {}", silent.collect::<Vec<_>>().join(", ")))?;
    }
    Ok(())
}

fn object(fetched: &[(Vec<Checkpoint>, StoreEntry)]) -> Value {
    let models: Vec<_> = cache::list()
        .iter()
        .map(|model| {
            json!({"name": model.name, "path": model.path, "bytes": model.bytes, "format": model.format.name()})
        })
        .collect();
    let fetched: Vec<_> = fetched
        .iter()
        .map(|(models, entry)| {
            let models: Vec<_> = models.iter().map(held).collect();
            json!({"name": entry.id, "commit": entry.commit, "path": entry.path, "bytes": entry.bytes,
                "bytes_total": entry.bytes_total, "last_used_s": seconds(entry.last_used), "models": models})
        })
        .collect();
    let presets: Vec<_> = cache::PRESETS
        .iter()
        .map(|(name, repo)| {
            let path = cache::resolve_here(name).ok();
            json!({"name": name, "repository": repo, "path": path, "default": *name == cache::DEFAULT_MODEL})
        })
        .collect();
    let forms = quantized::entries(Store::of_user().root()).into_iter().map(|form| {
        json!({"name": form.model, "quant": form.quant, "path": form.path, "bytes": form.bytes,
            "last_used_s": seconds(form.last_used)})
    });
    let forms: Vec<_> = forms.collect();
    json!({"models": models, "fetched": fetched, "quantized": forms, "presets": presets, "models_folder": cache::models_folder(),
        "cache_folder": Store::of_user().root()})
}

/// Models in a quantized form.
fn forms() -> Result<(), Failure> {
    let forms = quantized::entries(Store::of_user().root());
    if forms.is_empty() {
        return Ok(());
    }
    let mut rows = vec![["quantized", "to", "bytes"].map(String::from).to_vec()];
    for form in forms {
        rows.push(vec![text::line(&form.model), text::line(&form.quant), text::bytes(form.bytes)]);
    }
    Ok(text::say(&format!("\n{}", text::table(&rows, &[2])))?)
}

/// One model of a repository and how much of it is here.
fn held(model: &Checkpoint) -> Value {
    let layers = 0..model.config().num_hidden_layers;
    let missing = model.missing_bytes(layers.clone());
    let held: Vec<_> = model.held_layers().into_iter().map(|range| [range.start, range.end]).collect();
    json!({"path": model.path(), "format": model.format().name(), "layers": layers.end, "layers_held": held,
        "bytes": model.weight_bytes(), "bytes_held": model.weight_bytes().saturating_sub(missing)})
}

/// Since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn whole() -> Result<(), Failure> {
    let mut rows = vec![["model", "size", "format", "path"].map(String::from).to_vec()];
    let models = cache::list();
    for model in &models {
        let path = text::line(&model.path.display().to_string());
        rows.push(vec![
            text::line(&model.name),
            text::bytes(model.bytes),
            model.format.name().to_owned(),
            path,
        ]);
    }
    if models.is_empty() {
        text::say("no whole models on this computer yet")?;
    } else {
        text::say(&text::table(&rows, &[1]))?;
    }
    Ok(())
}

fn in_part(fetched: &[(Vec<Checkpoint>, StoreEntry)]) -> Result<(), Failure> {
    let mut rows = vec![["fetched", "commit", "here", "of", "layers here"].map(String::from).to_vec()];
    for (models, entry) in fetched {
        for model in models {
            let layers = 0..model.config().num_hidden_layers;
            let missing = model.missing_bytes(layers.clone());
            let held: Vec<String> =
                model.held_layers().iter().map(|range| format!("{}..{}", range.start, range.end)).collect();
            let file = model.origin().and_then(|origin| origin.file.as_ref());
            let file = file.map_or_else(String::new, |file| format!(":{file}"));
            rows.push(vec![
                text::line(&format!("{}{file}", entry.id)),
                entry.commit.chars().take(12).collect(),
                text::bytes(model.weight_bytes().saturating_sub(missing)),
                text::bytes(model.weight_bytes()),
                format!(
                    "{} of {}",
                    if held.is_empty() { "none".to_owned() } else { held.join(", ") },
                    layers.end
                ),
            ]);
        }
    }
    if rows.len() > 1 {
        text::say(&format!("\n{}", text::table(&rows, &[2, 3])))?;
    }
    Ok(())
}

fn presets() -> Result<(), Failure> {
    let mut rows = vec![["preset", "repository", "here"].map(String::from).to_vec()];
    for (name, repo) in &cache::PRESETS {
        let here = if cache::resolve_here(name).is_ok() { "yes" } else { "no" };
        let name =
            if *name == cache::DEFAULT_MODEL { format!("{name} (default)") } else { (*name).to_owned() };
        rows.push(vec![name, (*repo).to_owned(), here.to_owned()]);
    }
    text::say(&format!("\n{}", text::table(&rows, &[])))?;
    text::say(&format!(
        "\nlooked in the Hugging Face cache, in {} and in {}; `--model` takes these names, presets, folders, .gguf files and repositories",
        text::line(&cache::models_folder().display().to_string()),
        text::line(&Store::of_user().root().display().to_string())
    ))?;
    Ok(())
}
