//! Which files of a repository a model is made of.

use std::collections::BTreeMap;

use super::StoreError;
use crate::checkpoint::Origin;
use crate::gguf::split;
use crate::hub::{Listed, ModelRef};
use crate::open::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};

/// A model of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// `config.json` and safetensors.
    Folder,
    /// The files of one GGUF model, in order.
    Gguf(Vec<String>),
}

/// Chooses by what the user named, else what there is to choose without a doubt.
pub(super) fn choose(model: &ModelRef, files: &BTreeMap<String, Listed>) -> Result<Choice, StoreError> {
    let leaders: Vec<&str> = files
        .keys()
        .map(String::as_str)
        .filter(|name| name.to_ascii_lowercase().ends_with(".gguf") && split::leads(name))
        .collect();
    let id = model.id.clone();
    let Some(wanted) = &model.pick else {
        let weights = files.contains_key(SINGLE_FILE) || files.contains_key(INDEX_FILE);
        if files.contains_key(CONFIG_FILE) && weights {
            return Ok(Choice::Folder);
        }
        return match leaders.as_slice() {
            [only] => whole(&id, only, files),
            [] => Err(StoreError::NotAModel { id, why: nothing_to_read(files) }),
            several => Err(StoreError::Ambiguous { choices: named(&id, several), id }),
        };
    };
    let matching = leaders.iter().filter(|name| is_meant(wanted, name)).copied();
    match matching.collect::<Vec<_>>().as_slice() {
        [only] => whole(&id, only, files),
        [] if leaders.is_empty() => {
            Err(StoreError::NotAModel { id, why: format!("it has no .gguf file, and {wanted:?} names one") })
        }
        [] => Err(StoreError::NoSuchFile { choices: named(&id, &leaders), wanted: wanted.clone(), id }),
        several => Err(StoreError::Ambiguous { choices: named(&id, several), id }),
    }
}

impl ModelRef {
    /// Whether a model of this origin can be meant. What commit a branch is, only the Hub knows: a revision that is none
    /// is taken to fit.
    pub fn may_be(&self, origin: &Origin) -> bool {
        let file = match (&self.pick, &origin.file) {
            (Some(wanted), Some(file)) => is_meant(wanted, file),
            (Some(_), None) => false,
            (None, _) => true,
        };
        let commit = !self.is_pinned() || self.revision.as_deref() == Some(origin.commit.as_str());
        file && commit && self.id == origin.id
    }
}

/// All files of the model that `leader` leads.
fn whole(id: &str, leader: &str, files: &BTreeMap<String, Listed>) -> Result<Choice, StoreError> {
    let parts = split::parts(leader);
    match parts.iter().find(|part| !files.contains_key(*part)) {
        Some(absent) => Err(StoreError::NotAModel {
            id: id.to_owned(),
            why: format!("{absent} is not there, but {leader} is"),
        }),
        None => Ok(Choice::Gguf(parts)),
    }
}

/// A file's path or name, any file of several, or a quantization: `Q4_K_M` is in `x-Q4_K_M.gguf`, and `Q4_K` is not.
fn is_meant(wanted: &str, leader: &str) -> bool {
    if wanted.to_ascii_lowercase().ends_with(".gguf") {
        let same = |name: &str| name == wanted || name.rsplit('/').next() == Some(wanted);
        return split::parts(leader).iter().any(|part| same(part));
    }
    let (stem, wanted) = (split::stem(leader).to_ascii_lowercase(), wanted.to_ascii_lowercase());
    stem.match_indices(&wanted).any(|(at, found)| {
        let before = stem.get(..at).and_then(|text| text.chars().next_back());
        let after = stem.get(at + found.len()..).and_then(|text| text.chars().next());
        before.is_none_or(|char| !char.is_alphanumeric())
            && after.is_none_or(|char| matches!(char, '-' | '.' | '/'))
    })
}

fn named(id: &str, leaders: &[&str]) -> Vec<String> {
    leaders.iter().map(|name| format!("{id}:{name}")).collect()
}

fn nothing_to_read(files: &BTreeMap<String, Listed>) -> String {
    let pickled =
        files.keys().find(|name| name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".pt"));
    match pickled {
        Some(name) => {
            format!("its weights are pickled ({name}); look for a repository with safetensors or GGUF")
        }
        None => format!("it has neither {CONFIG_FILE} with safetensors nor a .gguf file"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(model: &str, files: &[&str]) -> Result<Choice, String> {
        let files = files.iter().map(|name| ((*name).to_owned(), Listed::default())).collect();
        choose(&ModelRef::parse(model).unwrap(), &files).map_err(|error| error.to_string())
    }

    fn gguf(parts: &[&str]) -> Result<Choice, String> {
        Ok(Choice::Gguf(parts.iter().map(|part| (*part).to_owned()).collect()))
    }

    #[test]
    fn safetensors_come_first_and_a_name_decides() {
        let both = ["config.json", "model.safetensors", "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "x-Q8_0.gguf"];
        assert_eq!(chosen("a/b", &both), Ok(Choice::Folder));
        assert_eq!(chosen("a/b:q4_k_m", &both), gguf(&["x-Q4_K_M.gguf"]));
        assert_eq!(chosen("a/b:x-Q8_0.gguf", &both), gguf(&["x-Q8_0.gguf"]));
        let error = chosen("a/b:Q4_K", &both).unwrap_err();
        assert!(error.contains("a/b:x-Q4_K_M.gguf"), "{error}");
        assert_eq!(chosen("a/b", &["x.Q8_0.gguf"]), gguf(&["x.Q8_0.gguf"]));
        assert!(chosen("a/b", &both[2..]).unwrap_err().contains("several models"));
    }

    #[test]
    fn several_files_are_one_model() {
        let files = ["Q8_0/x-00001-of-00002.gguf", "Q8_0/x-00002-of-00002.gguf", "y-00001-of-00002.gguf"];
        for name in ["a/b:Q8_0", "a/b:x-00002-of-00002.gguf"] {
            assert_eq!(chosen(name, &files), gguf(&files[..2]), "{name}");
        }
        assert!(chosen("a/b:y", &files).unwrap_err().contains("y-00002-of-00002.gguf is not there"));
    }

    #[test]
    fn a_name_may_be_a_model() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let origin = |file: Option<&str>| Origin {
            id: "a/b".into(),
            commit: commit.into(),
            file: file.map(str::to_owned),
        };
        let may_be = |name: &str, file| ModelRef::parse(name).unwrap().may_be(&origin(file));
        let pinned = format!("a/b@{commit}");
        assert!(may_be("a/b", None) && may_be("a/b@v1", None) && may_be(&pinned, None));
        assert!(may_be("a/b:Q8_0", Some("x-Q8_0.gguf")) && may_be("a/b", Some("x-Q8_0.gguf")));
        assert!(
            !may_be("a/c", None) && !may_be("a/b:Q8_0", None) && !may_be("a/b:Q4_0", Some("x-Q8_0.gguf"))
        );
        assert!(!may_be(&pinned.replace('0', "1"), None));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        assert!(chosen("a/b", &["config.json", "pytorch_model.bin"]).unwrap_err().contains("pickled"));
        assert!(
            chosen("a/b:Q8_0", &["config.json", "model.safetensors"]).unwrap_err().contains("no .gguf file")
        );
    }
}
