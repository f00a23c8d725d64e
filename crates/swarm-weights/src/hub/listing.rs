//! The Hub's answer to what a repository holds.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{is_commit, is_file_name};

/// Repositories with more files are no models.
const FILES_MAX: usize = 100_000;

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    pub commit: String,
    /// By path. Those whose path could not be a file's here are left out.
    pub files: BTreeMap<String, Listed>,
}

/// What is known of a file before it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, Deserialize)]
pub(crate) struct Listed {
    pub size: Option<u64>,
    /// Of its content: a sha256 for large files, a git id for small ones.
    pub tag: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listing {
    /// Reads the answer; the text says what is wrong with it.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if !is_commit(&answer.sha) {
            return Err("its sha is no commit".into());
        }
        if answer.siblings.len() > FILES_MAX {
            return Err(format!("it has more than {FILES_MAX} files"));
        }
        let file = |sibling: Sibling| {
            let Sibling { rfilename, size, blob_id, lfs } = sibling;
            let (lfs_size, sha256) = lfs.map_or((None, None), |lfs| (lfs.size, lfs.sha256));
            (rfilename, Listed { size: lfs_size.or(size), tag: sha256.or(blob_id) })
        };
        let files = answer.siblings.into_iter().map(file).filter(|(name, _)| is_file_name(name));
        Ok(Self { commit: answer.sha, files: files.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_read_with_and_without_sizes() {
        let json = r#"{"sha": "0123456789abcdef0123456789abcdef01234567", "id": "a/b", "siblings": [
            {"rfilename": "config.json", "size": 12, "blobId": "cd"},
            {"rfilename": "a.safetensors", "size": 134, "lfs": {"sha256": "ab", "size": 99, "pointerSize": 134}},
            {"rfilename": "old.bin"}, {"rfilename": "../../etc/passwd"}, {"rfilename": ".gitattributes"}]}"#;
        let listing = Listing::parse(json.as_bytes()).unwrap();
        let file = |name: &str| listing.files[name].clone();
        assert_eq!(file("config.json"), Listed { size: Some(12), tag: Some("cd".into()) });
        assert_eq!(file("a.safetensors"), Listed { size: Some(99), tag: Some("ab".into()) });
        assert_eq!(file("old.bin"), Listed::default());
        assert_eq!(listing.files.len(), 3);
        for bad in ["", "{}", r#"{"sha": "main"}"#, r#"{"sha": 5}"#, "[]"] {
            assert!(Listing::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
