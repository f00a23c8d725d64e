//! `organisation/name@revision:file`: what a user types, and what may become part of a path or a URL.

use std::fmt;

/// A model of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    /// `organisation/name`.
    pub id: String,
    /// A branch, tag or commit.
    pub revision: Option<String>,
    /// A `.gguf` file of the repository, or the quantization that one is called after.
    pub pick: Option<String>,
}

impl ModelRef {
    /// Reads `organisation/name`, `…@revision`, `…:file.gguf`, `…:Q4_K_M`. Nothing when it is none of these.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, pick) = match text.split_once(':') {
            Some((rest, pick)) => (rest, Some(pick)),
            None => (text, None),
        };
        let (id, revision) = match rest.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (rest, None),
        };
        let (organisation, name) = id.split_once('/')?;
        let sound = is_plain(organisation)
            && is_plain(name)
            && revision.is_none_or(is_revision)
            && pick.is_none_or(is_file_name);
        let owned = |text: &str| text.to_owned();
        sound.then(|| Self { id: id.to_owned(), revision: revision.map(owned), pick: pick.map(owned) })
    }

    /// Whether it names a commit, whose content never changes.
    pub fn is_pinned(&self) -> bool {
        self.revision.as_deref().is_some_and(is_commit)
    }

    /// The folder of a repository in a cache.
    pub fn folder(id: &str) -> String {
        format!("models--{}", id.replace('/', "--"))
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        self.pick.iter().try_for_each(|pick| write!(f, ":{pick}"))
    }
}

/// A name that cannot leave the folder it is joined to. The rules are the Hub's own.
pub fn is_plain(name: &str) -> bool {
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

/// A branch or tag may have slashes (`refs/pr/1`).
fn is_revision(name: &str) -> bool {
    name.len() <= 128 && !name.is_empty() && name.split('/').all(is_part)
}

/// The path of a file inside a repository.
pub fn is_file_name(name: &str) -> bool {
    name.len() <= 256 && !name.is_empty() && name.split('/').all(is_part)
}

/// One part of a path: nothing that a file system or a URL reads in another way.
fn is_part(part: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'=');
    !part.is_empty() && part.bytes().all(allowed) && !part.starts_with('.') && !part.ends_with('.')
}

/// A commit is 40 hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together() {
        for text in [
            "org/name",
            "org/name@main",
            "org/name@refs/pr/1",
            "org/name:Q4_K_M",
            "org/name@v1.0:sub/x-00001-of-00002.gguf",
        ] {
            assert_eq!(ModelRef::parse(text).unwrap().to_string(), text);
        }
        let model = ModelRef::parse("a/b@c:d").unwrap();
        assert_eq!((model.revision.as_deref(), model.pick.as_deref()), (Some("c"), Some("d")));
    }

    #[test]
    fn what_could_leave_its_place_is_no_name() {
        for bad in [
            "",
            "a",
            "a/b/c",
            "a/..",
            "../a",
            "a/b@",
            "a/b:",
            "a/b@..",
            "a/b@x/../y",
            "a/b:../x",
            "a/b:/x",
            "a/b:x\\y",
            "a/b@c?d",
            "a/b@c%2f",
            "a/b:x y",
            "a--b/c",
            "a/b@.git",
            "a/b:C:x",
            "a/b@x//y",
            "/a/b",
            "a/b\n",
        ] {
            assert_eq!(ModelRef::parse(bad), None, "{bad:?}");
        }
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567"));
        assert!(!is_commit("0123456789ABCDEF0123456789abcdef01234567") && !is_commit("main"));
    }
}
