//! `swarm-os models`: what is on this computer, and where was looked.

use serde_json::json;
use swarm_weights::cache;

use crate::args::ModelsArgs;
use crate::failure::Failure;
use crate::present::report;
use crate::present::text;

pub fn models(args: &ModelsArgs) -> Result<(), Failure> {
    let models = cache::list();
    let presets: Vec<_> =
        cache::PRESETS.iter().map(|(name, repo)| (*name, *repo, cache::resolve(name).ok())).collect();
    let folder = cache::models_folder();
    if args.json {
        let models: Vec<_> = models
            .iter()
            .map(|model| {
                json!({"name": model.name, "path": model.path, "bytes": model.bytes, "format": model.format.name()})
            })
            .collect();
        let presets: Vec<_> = presets
            .iter()
            .map(|(name, repo, path)| {
                json!({"name": name, "repository": repo, "path": path, "default": *name == cache::DEFAULT_MODEL})
            })
            .collect();
        return Ok(report::json(&json!({"models": models, "presets": presets, "models_folder": folder}))?);
    }
    let mut rows = vec![["model", "size", "format", "path"].map(String::from).to_vec()];
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
        text::say("no models on this computer yet")?;
    } else {
        text::say(&text::table(&rows, &[1]))?;
    }
    let mut rows = vec![["preset", "repository", "here"].map(String::from).to_vec()];
    for (name, repo, path) in &presets {
        let name =
            if *name == cache::DEFAULT_MODEL { format!("{name} (default)") } else { (*name).to_owned() };
        rows.push(vec![name, (*repo).to_owned(), if path.is_some() { "yes" } else { "no" }.to_owned()]);
    }
    text::say(&format!("\n{}", text::table(&rows, &[])))?;
    text::say(&format!(
        "\nlooked in the Hugging Face cache and in {}; `--model` takes these names, presets, folders and .gguf files",
        text::line(&folder.display().to_string())
    ))?;
    Ok(())
}
