//! Where a model is: a path, a preset, the Hugging Face cache, the project's own folder, and for a repository that is
//! in none of them the store, which fetches from the Hub what is needed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::checkpoint::{Format, Origin};
use crate::gguf::split;
use crate::hub::{ModelRef, is_commit, is_plain};
use crate::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, folder_name, gguf_files, is_gguf};
use crate::store::{Needs, Store, StoreError};

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "smol";

/// Short names and the repositories they stand for.
pub const PRESETS: [(&str, &str); 3] = [
    ("tiny", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ("qwen", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("smol", "HuggingFaceTB/SmolLM2-135M-Instruct"),
];

/// Why a model name led nowhere.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    #[error("{model:?} is neither a path that exists, nor a preset ({presets}), nor a repository id (organisation/name)", presets = preset_names())]
    Unknown { model: String },
    #[error("there is no file or folder {path:?}")]
    NoSuchPath { path: String },
    #[error("no model {model:?} on this computer; looked for {}; download it there, or give the path of a folder or of a .gguf file", looked.join(", "))]
    NotFound { model: String, looked: Vec<String> },
    #[error("{model:?} could be any of {}; give the path of one", found.join(", "))]
    Ambiguous { model: String, found: Vec<String> },
    #[error("{model:?} is neither on this computer (looked for {}) nor to be had from the Hub", looked.join(", "))]
    Hub { model: String, looked: Vec<String>, source: Box<StoreError> },
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
    resolve_for(model, Needs::Everything)
}

/// [`resolve`], for who may not need the tokenizer. A repository that is not on this computer is looked up on the Hub:
/// its small files are fetched, its weights when they are read.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve_for(model: &str, needs: Needs) -> Result<PathBuf, ResolveError> {
    look_up(model, needs, false)
}

/// [`resolve`] for who has others to ask: then a Hub that cannot be reached is asked once.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve_or_ask(model: &str) -> Result<PathBuf, ResolveError> {
    look_up(model, Needs::Everything, true)
}

fn look_up(model: &str, needs: Needs, others: bool) -> Result<PathBuf, ResolveError> {
    match resolve_here(model) {
        Err(ResolveError::NotFound { model: name, looked }) => {
            let Some(wanted) = repository(model) else {
                return Err(ResolveError::NotFound { model: name, looked });
            };
            Store::of_user().look_up(&wanted, needs, others).map_err(|source| ResolveError::Hub {
                model: name,
                looked,
                source: Box::new(source),
            })
        }
        here => here,
    }
}

/// [`resolve`], without the Hub and without what was fetched from it.
///
/// # Errors
/// [`ResolveError`].
pub fn resolve_here(model: &str) -> Result<PathBuf, ResolveError> {
    Places::from_env(&|key| std::env::var_os(key)).resolve(model)
}

/// The repository that a name means, with what a preset stands for.
pub fn repository(model: &str) -> Option<ModelRef> {
    let preset = PRESETS.iter().find(|(name, _)| *name == model);
    ModelRef::parse(preset.map_or(model, |(_, id)| *id))
}

/// The name of a model of the store that leads to the same commit again, for a path that [`resolve`] gave; `None` for
/// any other path.
pub fn pinned_name(path: &Path) -> Option<String> {
    let full = std::path::absolute(path).ok()?;
    crate::store::Folder::around(&full)?;
    let format = if is_gguf(path) { Format::Gguf } else { Format::Safetensors };
    let Origin { id, commit, file } = Origin::of(path, format)?;
    let file = file.map_or_else(String::new, |file| format!(":{file}"));
    Some(format!("{id}@{commit}{file}"))
}

/// The models on this computer, by name. Those of [`Store::entries`] are not among them.
pub fn list() -> Vec<ModelEntry> {
    Places::from_env(&|key| std::env::var_os(key)).list()
}

/// The project's own models folder: `SWARM_OS_MODELS`, else `swarm-os/models` in the user's cache.
pub fn models_folder() -> PathBuf {
    Places::from_env(&|key| std::env::var_os(key)).models
}

/// The folders that are searched.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The Hugging Face cache.
    pub hub: PathBuf,
    pub hf_home: PathBuf,
    models: PathBuf,
    /// What was fetched by range.
    pub store: PathBuf,
}

impl Places {
    /// `env` looks a variable up; an empty one counts as not set.
    pub fn from_env(env: &dyn Fn(&str) -> Option<OsString>) -> Self {
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
            hub: folder("HF_HUB_CACHE")
                .or_else(|| folder("HUGGINGFACE_HUB_CACHE")) // the variable's older name
                .unwrap_or_else(|| hf_home.join("hub")),
            hf_home,
            models: folder("SWARM_OS_MODELS").unwrap_or_else(|| own_cache.join("swarm-os").join("models")),
            store: folder("SWARM_OS_CACHE").unwrap_or_else(|| own_cache.join("swarm-os").join("hub")),
        }
    }

    fn resolve(&self, model: &str) -> Result<PathBuf, ResolveError> {
        let path = Path::new(model);
        let preset = PRESETS.iter().find(|(name, _)| *name == model);
        if !model.is_empty() && path.exists() && (preset.is_none() || looks_like_a_model(path)) {
            return Ok(path.to_owned());
        }
        let names_a_file = ModelRef::parse(model).is_some_and(|model| model.pick.is_some());
        if is_written_as_path(model) || (is_gguf(path) && model.contains('/') && !names_a_file) {
            return Err(ResolveError::NoSuchPath { path: model.to_owned() });
        }
        let id = preset.map_or(model, |(_, id)| *id);
        let Some(wanted) = ModelRef::parse(id) else {
            return self.own_name(model);
        };
        let mut looked = vec![];
        let repo = self.hub.join(ModelRef::folder(&wanted.id));
        looked.push(format!("a complete snapshot in {}", repo.display()));
        let revision = wanted.revision.as_deref().unwrap_or("main");
        if let Some(snapshot) = snapshot(&repo, revision) {
            let mut files = gguf_files(&snapshot);
            let named = |pick: &String| {
                let file = snapshot.join(pick);
                files.contains(&file).then_some(file)
            };
            match &wanted.pick {
                Some(pick) => {
                    if let Some(file) = named(pick) {
                        return Ok(file);
                    }
                }
                None if is_hf_folder(&snapshot) => return Ok(snapshot),
                None if files.len() > 1 => return ambiguous(model, &files),
                None => return Ok(files.pop().unwrap_or(snapshot)),
            }
        }
        // Only the newest version of a repository has a bare name here, and only whole ones.
        let (Some((organisation, name)), None, None) =
            (wanted.id.split_once('/'), &wanted.revision, &wanted.pick)
        else {
            return Err(ResolveError::NotFound { model: model.to_owned(), looked });
        };
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
            if is_repo && let Some(snapshot) = snapshot(&repo, "main") {
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
    let file_name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let stem = split::stem(&file_name).to_owned();
    let name = folder.map_or(stem.clone(), |folder| format!("{folder}/{stem}"));
    let bytes = split::parts(&file_name).iter().map(|part| file_bytes(&file.with_file_name(part))).sum();
    ModelEntry { name, path: file.to_owned(), bytes, format: Format::Gguf }
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

/// The snapshot of a revision, when its weights are complete. The cache's files are symbolic
/// links to blobs; one that is still downloading leads nowhere and does not count as a file.
fn snapshot(repo: &Path, revision: &str) -> Option<PathBuf> {
    const REF_BYTES_MAX: u64 = 256;
    let commit = if is_commit(revision) {
        revision.to_owned()
    } else {
        let name = revision.split('/').fold(repo.join("refs"), |path, part| path.join(part));
        String::from_utf8(crate::hf::read_optional(&name, REF_BYTES_MAX).ok()??).ok()?
    };
    let commit = commit.trim();
    if !is_plain(commit) {
        return None;
    }
    let snapshot = repo.join("snapshots").join(commit);
    looks_like_a_model(&snapshot).then_some(snapshot)
}

/// `./x`, `../x`, `/x`, `~/x`, `C:\x`: never a name.
fn is_written_as_path(model: &str) -> bool {
    let path = Path::new(model);
    path.is_absolute() || model.starts_with(['.', '~', '/']) || model.contains('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    struct Room {
        folder: tempfile::TempDir,
        places: Places,
    }

    impl Room {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let at = |name: &str| folder.path().join(name);
            let places =
                Places { hub: at("hub"), hf_home: at("hf"), models: at("models"), store: at("store") };
            Self { folder, places }
        }

        /// Writes an empty file, with its folders.
        fn touch(&self, path: impl AsRef<Path>) -> PathBuf {
            let path = self.folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, b"12345").unwrap();
            path
        }

        fn snapshot(&self, repo: &str, files: &[&str]) -> PathBuf {
            let refs = self.touch(format!("hub/models--{repo}/refs/main"));
            std::fs::write(refs, format!("{COMMIT}\n")).unwrap();
            let snapshot = format!("hub/models--{repo}/snapshots/{COMMIT}");
            files.iter().for_each(|file| drop(self.touch(format!("{snapshot}/{file}"))));
            self.folder.path().join(snapshot)
        }

        fn error(&self, model: &str) -> String {
            self.places.resolve(model).unwrap_err().to_string()
        }
    }

    #[test]
    fn folders_follow_the_environment() {
        let places = |set: &[(&str, &str)]| {
            let env = |key: &str| set.iter().find(|(k, _)| *k == key).map(|(_, v)| OsString::from(v));
            let places = Places::from_env(&env);
            (places.hub, places.models)
        };
        let own = if cfg!(target_os = "macos") {
            "/h/Library/Caches"
        } else if cfg!(windows) {
            "/h/AppData/Local"
        } else {
            "/h/.cache"
        };
        let path = PathBuf::from;
        let models = Path::new(own).join("swarm-os").join("models");
        assert_eq!(places(&[("HOME", "/h")]), (path("/h/.cache/huggingface/hub"), models));
        let set = [("HOME", "/h"), ("HF_HOME", "/x"), ("SWARM_OS_MODELS", "/m")];
        assert_eq!(places(&set), (path("/x/hub"), path("/m")));
        let set = [("HF_HUB_CACHE", "/c"), ("HF_HOME", "/x"), ("SWARM_OS_MODELS", "/m"), ("HOME", "")];
        assert_eq!(places(&set), (path("/c"), path("/m")));
    }

    #[test]
    fn presets_and_ids_find_a_complete_snapshot() {
        let room = Room::new();
        let text = room.error("smol");
        assert!(text.contains("models--HuggingFaceTB--SmolLM2-135M-Instruct"), "{text}");
        assert!(text.contains("SmolLM2-135M-Instruct*.gguf") && text.contains("give the path"), "{text}");
        let repo = "HuggingFaceTB--SmolLM2-135M-Instruct";
        let snapshot = room.snapshot(repo, &["config.json", "model.safetensors.index.json"]);
        assert!(room.places.resolve("smol").is_err(), "the index is not an index");
        let index = r#"{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}"#;
        std::fs::write(snapshot.join(INDEX_FILE), index).unwrap();
        room.snapshot(repo, &["a.safetensors"]);
        assert!(room.places.resolve("smol").is_err(), "b.safetensors is missing");
        room.snapshot(repo, &["b.safetensors"]);
        assert_eq!(room.places.resolve("smol").unwrap(), snapshot);
        assert_eq!(room.places.resolve("HuggingFaceTB/SmolLM2-135M-Instruct").unwrap(), snapshot);
        let listed = room.places.list();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].name.as_str(), listed[0].bytes), ("HuggingFaceTB/SmolLM2-135M-Instruct", 10));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_blob_that_is_not_there_yet_is_not_complete() {
        let room = Room::new();
        let snapshot = room.snapshot("a--b", &["config.json"]);
        std::os::unix::fs::symlink("../../blobs/x", snapshot.join(SINGLE_FILE)).unwrap();
        assert!(room.places.resolve("a/b").is_err());
        room.touch("hub/models--a--b/blobs/x");
        assert_eq!(room.places.resolve("a/b").unwrap(), snapshot);
    }

    #[test]
    fn the_models_folder_holds_folders_and_files() {
        let room = Room::new();
        let file = room.touch("models/smollm2-135m-instruct.Q4_1.gguf");
        room.touch("models/SmolLM2-135M-Instruct2.gguf");
        assert_eq!(room.places.resolve("smol").unwrap(), file);
        assert_eq!(room.places.resolve("smollm2-135m-instruct.Q4_1").unwrap(), file);
        assert_eq!(room.places.resolve("smollm2-135m-instruct.Q4_1.gguf").unwrap(), file);
        room.touch("models/SmolLM2-135M-Instruct-Q8_0.gguf");
        let text = room.error("smol");
        assert!(text.contains("Q4_1") && text.contains("Q8_0") && !text.contains("Instruct2"), "{text}");
        let folder = room.touch("models/Qwen--Qwen2.5-1.5B-Instruct/config.json");
        assert!(room.places.resolve("qwen").is_err(), "no weights yet");
        room.touch("models/Qwen--Qwen2.5-1.5B-Instruct/model.safetensors");
        assert_eq!(room.places.resolve("qwen").unwrap(), folder.parent().unwrap());
        let names: Vec<String> = room.places.list().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), 4, "{names:?}");
        assert!(names.contains(&"Qwen/Qwen2.5-1.5B-Instruct".to_owned()), "{names:?}");
    }

    #[test]
    fn a_path_is_a_path() {
        let room = Room::new();
        let file = room.touch("some where/x.gguf");
        assert_eq!(room.places.resolve(file.to_str().unwrap()).unwrap(), file);
        assert_eq!(room.places.resolve(room.folder.path().to_str().unwrap()).unwrap(), room.folder.path());
        for absent in ["./absent", "/absent/x", "~/x", "models/x.gguf", "../up"] {
            assert!(room.error(absent).contains("there is no file or folder"), "{absent}");
        }
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        let room = Room::new();
        room.touch("secret/config.json");
        room.touch("secret/model.safetensors");
        for bad in [
            "", "a/..", "x/../y", "a/b/c", "a--b/c", "a/b--c", "a/-b", "a b/c", "a/b\n", "a/\u{e9}", "-",
            "a:b",
        ] {
            let error = room.places.resolve(bad).unwrap_err();
            assert!(matches!(error, ResolveError::Unknown { .. }), "{bad:?}: {error}");
        }
        let refs = room.touch("hub/models--a--b/refs/main");
        for bad in ["../../../secret", "..", "", "a/b"] {
            std::fs::write(&refs, bad).unwrap();
            assert!(room.places.resolve("a/b").is_err(), "{bad:?}");
        }
    }
}
