//! Where models are on this computer: a path, a preset, the Hugging Face cache, the project's own folder.
//!
//! Only looked up here, never downloaded or written.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::checkpoint::Format;
use crate::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, folder_name, gguf_files, is_gguf};

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "smol";

/// Short names and the repositories they stand for.
pub const PRESETS: [(&str, &str); 3] = [
    ("tiny", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("qwen", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("smol", "HuggingFaceTB/SmolLM2-135M-Instruct"),
];

/// Why a model name led nowhere.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    #[error("{model:?} is neither a path that exists, nor a preset ({presets}), nor a repository id (organisation/name)", presets = preset_names())]
    Unknown { model: String },
    #[error("no model {model:?} on this computer; looked for {}; download it there, or give the path of a folder or of a .gguf file", looked.join(", "))]
    NotFound { model: String, looked: Vec<String> },
    #[error("{model:?} could be any of {}; give the path of one", found.join(", "))]
    Ambiguous { model: String, found: Vec<String> },
}

fn preset_names() -> String {
    PRESETS.map(|(name, _)| name).join(", ")
}

/// A model found on this computer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelEntry {
    /// `organisation/name` for repositories, else the file's or folder's name.
    pub name: String,
    /// What [`crate::Checkpoint::open`] takes.
    pub path: PathBuf,
    /// Size of the weight files.
    pub bytes: u64,
    pub format: Format,
}

/// Finds `model` on this computer: an existing folder or file, a preset, or a repository id that is
/// complete in the Hugging Face cache or in the project's models folder (in that order).
///
/// A bare word that is also a preset means the preset, unless a model of that name lies in the current
/// folder; `./word` always means the path.
///
/// # Errors
/// [`ResolveError`], which says where was looked and what to do.
pub fn resolve(model: &str) -> Result<PathBuf, ResolveError> {
    Places::from_env(&|key| std::env::var_os(key)).resolve(model)
}

/// The models on this computer, by name.
pub fn list() -> Vec<ModelEntry> {
    Places::from_env(&|key| std::env::var_os(key)).list()
}

/// The project's own models folder: `SWARM_OS_MODELS`, else `swarm-os/models` in the user's cache.
pub fn models_folder() -> PathBuf {
    Places::from_env(&|key| std::env::var_os(key)).models
}

/// The two folders that are searched.
#[derive(Clone, Debug)]
struct Places {
    hub: PathBuf,
    models: PathBuf,
}

impl Places {
    /// `env` looks a variable up; an empty one counts as not set.
    fn from_env(env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let folder = |key: &str| env(key).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = folder("HOME").or_else(|| folder("USERPROFILE")).unwrap_or_default();
        let dot_cache = folder("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
        let own_cache = if cfg!(target_os = "macos") {
            home.join("Library").join("Caches")
        } else if cfg!(windows) {
            folder("LOCALAPPDATA").unwrap_or_else(|| home.join("AppData").join("Local"))
        } else {
            dot_cache.clone()
        };
        let hf_home = folder("HF_HOME").unwrap_or_else(|| dot_cache.join("huggingface"));
        Self {
            hub: folder("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub")),
            models: folder("SWARM_OS_MODELS").unwrap_or_else(|| own_cache.join("swarm-os").join("models")),
        }
    }

    fn resolve(&self, model: &str) -> Result<PathBuf, ResolveError> {
        let path = Path::new(model);
        let bare = path.components().count() == 1 && !is_gguf(path);
        if !model.is_empty() && path.exists() && (!bare || looks_like_a_model(path)) {
            return Ok(path.to_owned());
        }
        let preset = PRESETS.iter().find(|(name, _)| *name == model);
        let id = preset.map_or(model, |(_, id)| *id);
        let Some((organisation, name)) = split_repo_id(id) else {
            return self.own_name(model);
        };
        let mut looked = vec![];
        let repo = self.hub.join(format!("models--{organisation}--{name}"));
        looked.push(format!("a complete snapshot in {}", repo.display()));
        if let Some(snapshot) = main_snapshot(&repo) {
            let files = gguf_files(&snapshot);
            if files.len() > 1 && !is_hf_folder(&snapshot) {
                return ambiguous(model, &files);
            }
            return Ok(snapshot);
        }
        let models = self.models.display();
        looked.push(format!("{organisation}--{name}, {name} or {name}*.gguf in {models}"));
        let folders = [format!("{organisation}--{name}"), name.to_owned()];
        if let Some(folder) = folders.iter().map(|f| self.models.join(f)).find(|f| looks_like_a_model(f)) {
            return Ok(folder);
        }
        match self.gguf_named(name).as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(ResolveError::NotFound { model: model.to_owned(), looked }),
            several => ambiguous(model, several),
        }
    }

    /// A name as [`list`] prints it for a folder or file of the project's models folder.
    fn own_name(&self, model: &str) -> Result<PathBuf, ResolveError> {
        let unknown = || ResolveError::Unknown { model: model.to_owned() };
        if !is_plain(model) {
            return Err(unknown());
        }
        let folder = self.models.join(model);
        if looks_like_a_model(&folder) {
            return Ok(folder);
        }
        let mut files = gguf_files(&self.models).into_iter();
        let named = |file: &PathBuf| {
            file.file_name().is_some_and(|name| name == model) || file.file_stem().is_some_and(|s| s == model)
        };
        files.find(named).ok_or_else(unknown)
    }

    /// `.gguf` files of the models folder whose name is `name`, or `name` and a suffix such as `.Q4_1`
    /// or `-Q8_0`. Letter case is ignored, as publishers vary it.
    fn gguf_named(&self, name: &str) -> Vec<PathBuf> {
        let name = name.to_lowercase();
        let fits = |file: &PathBuf| {
            let stem = file.file_stem().map(|stem| stem.to_string_lossy().to_lowercase());
            let rest = stem.as_deref().and_then(|stem| stem.strip_prefix(name.as_str()));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-', '_']))
        };
        gguf_files(&self.models).into_iter().filter(fits).collect()
    }

    fn list(&self) -> Vec<ModelEntry> {
        let mut entries = Vec::new();
        for repo in folders_in(&self.hub) {
            let is_repo = repo.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"));
            if is_repo && let Some(snapshot) = main_snapshot(&repo) {
                entries.extend(entries_of(&snapshot));
            }
        }
        for folder in folders_in(&self.models) {
            entries.extend(entries_of(&folder));
        }
        entries.extend(gguf_files(&self.models).iter().map(|file| gguf_entry(file, None)));
        entries.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
        entries
    }
}

fn ambiguous(model: &str, files: &[PathBuf]) -> Result<PathBuf, ResolveError> {
    let found = files.iter().map(|file| file.display().to_string()).collect();
    Err(ResolveError::Ambiguous { model: model.to_owned(), found })
}

/// The models in a folder: one of safetensors, or one per `.gguf` file.
fn entries_of(folder: &Path) -> Vec<ModelEntry> {
    let name = folder_name(folder).replace("--", "/");
    if is_hf_folder(folder) {
        let bytes = weight_files(folder).unwrap_or_default().iter().map(|file| file_bytes(file)).sum();
        return vec![ModelEntry { name, path: folder.to_owned(), bytes, format: Format::Safetensors }];
    }
    gguf_files(folder).iter().map(|file| gguf_entry(file, Some(&name))).collect()
}

fn gguf_entry(file: &Path, folder: Option<&str>) -> ModelEntry {
    let stem = file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let name = folder.map_or(stem.clone(), |folder| format!("{folder}/{stem}"));
    ModelEntry { name, path: file.to_owned(), bytes: file_bytes(file), format: Format::Gguf }
}

fn file_bytes(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |metadata| metadata.len())
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn looks_like_a_model(path: &Path) -> bool {
    if path.is_dir() {
        is_hf_folder(path) || !gguf_files(path).is_empty()
    } else {
        is_gguf(path) && path.is_file()
    }
}

/// `config.json` and every weight file it takes.
fn is_hf_folder(folder: &Path) -> bool {
    folder.join(CONFIG_FILE).is_file() && weight_files(folder).is_some()
}

/// The safetensors files of a folder, `None` unless all are there.
fn weight_files(folder: &Path) -> Option<Vec<PathBuf>> {
    let single = folder.join(SINGLE_FILE);
    if single.is_file() {
        return Some(vec![single]);
    }
    let index = crate::hf::read_index(&folder.join(INDEX_FILE)).ok()??;
    let mut files: Vec<PathBuf> = index.values().map(|name| folder.join(name)).collect();
    files.sort_unstable();
    files.dedup();
    files.iter().all(|file| file.is_file()).then_some(files)
}

/// The snapshot that `refs/main` names, when its weights are complete. The cache's files are symbolic
/// links to blobs; one that is still downloading leads nowhere and does not count as a file.
fn main_snapshot(repo: &Path) -> Option<PathBuf> {
    /// A commit is 40 hexadecimal digits.
    const REF_BYTES_MAX: u64 = 256;
    let commit = crate::hf::read_optional(&repo.join("refs").join("main"), REF_BYTES_MAX).ok()??;
    let commit = String::from_utf8(commit).ok()?;
    let commit = commit.trim();
    if !is_plain(commit) {
        return None;
    }
    let snapshot = repo.join("snapshots").join(commit);
    looks_like_a_model(&snapshot).then_some(snapshot)
}

/// A repository id is `organisation/name`, both plain.
fn split_repo_id(id: &str) -> Option<(&str, &str)> {
    let (organisation, name) = id.split_once('/')?;
    (is_plain(organisation) && is_plain(name)).then_some((organisation, name))
}

/// A name that cannot leave the folder it is joined to. The rules are the Hub's own.
fn is_plain(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let ends = |c: char| matches!(c, '-' | '.');
    !name.is_empty()
        && name.len() <= 96
        && name.bytes().all(allowed)
        && !name.starts_with(ends)
        && !name.ends_with(ends)
        && !name.contains("..")
        && !name.contains("--")
}
