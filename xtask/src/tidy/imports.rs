//! The import law, read from the crates' `Cargo.toml` files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The rooms in their order. A room uses only rooms above it; the testkit is for tests only.
pub const ROOMS: [&str; 12] = [
    "swarm-kernels",
    "swarm-weights",
    "swarm-text",
    "swarm-model",
    "swarm-wire",
    "swarm-ring",
    "swarm-link",
    "swarm-node",
    "swarm-api",
    "swarm-os",
    "swarm-py",
    TESTKIT,
];
const TESTKIT: &str = "swarm-testkit";
/// What the testkit's simulator runs. Both are pure.
const SIMULATED: [&str; 2] = ["swarm-wire", "swarm-ring"];

/// Uses that the order allows and a room's own rule does not.
const NEVER: [(&str, &str, &str); 4] = [
    ("swarm-text", "swarm-kernels", "text never sees tensors"),
    ("swarm-wire", "swarm-model", "wire only encodes and decodes"),
    ("swarm-ring", "swarm-weights", "ring never touches weights"),
    ("swarm-link", "swarm-model", "link does not understand the bytes it moves"),
];

#[derive(Debug, PartialEq)]
struct Dependency {
    name: String,
    dev: bool,
}

pub fn check(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("crates");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut rooms: Vec<String> = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.path().join("Cargo.toml").is_file() {
            rooms.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    rooms.sort();
    let mut findings = Vec::new();
    for room in rooms {
        let path = folder.join(&room).join("Cargo.toml");
        let manifest =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        findings.extend(check_room(&room, &manifest));
    }
    Ok(findings)
}

fn place(room: &str) -> Option<usize> {
    ROOMS.iter().position(|name| *name == room)
}

fn check_room(room: &str, manifest: &str) -> Vec<String> {
    let Some(own) = place(room) else {
        return vec![format!(
            "crates/{room} has no place in the order of rooms; add it to ROOMS of `cargo xtask tidy`"
        )];
    };
    let mut findings = Vec::new();
    for Dependency { name, dev } in dependencies(manifest) {
        let Some(other) = place(&name) else { continue };
        if name == TESTKIT || room == TESTKIT {
            if !dev && room != TESTKIT || room == TESTKIT && !SIMULATED.contains(&name.as_str()) {
                findings.push(format!(
                    "crates/{room} uses {name}: the testkit knows only wire and ring and is a dev-dependency only"
                ));
            }
        } else if other >= own {
            findings.push(format!("crates/{room} uses {name}, which is not above it in the order of rooms"));
        }
        if let Some((_, _, why)) = NEVER.iter().find(|(user, used, _)| *user == room && *used == name && !dev)
        {
            findings.push(format!("crates/{room} uses {name}: {why}"));
        }
    }
    findings
}

/// Dependencies named in a manifest: `name = ...`, `name.workspace = true`, `package = "name"`
/// and `[dependencies.name]`, in the plain, dev, build and target sections.
fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found = Vec::new();
    let mut section: Option<bool> = None;
    for line in manifest.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            section = None;
            for (word, dev) in
                [("dev-dependencies", true), ("build-dependencies", false), ("dependencies", false)]
            {
                if header == word || header.ends_with(&format!(".{word}")) {
                    section = Some(dev);
                    break;
                }
                let table = header.strip_prefix(word).and_then(|rest| rest.strip_prefix('.'));
                let table = table.or_else(|| header.split_once(&format!(".{word}.")).map(|(_, name)| name));
                if let Some(name) = table {
                    found.push(Dependency { name: name.trim_matches('"').to_owned(), dev });
                    break;
                }
            }
            continue;
        }
        let (Some(dev), Some((key, value))) = (section, line.split_once('=')) else { continue };
        let key = key.trim().split('.').next().unwrap_or_default().trim_matches('"');
        let renamed = value.split_once("package").and_then(|(_, rest)| rest.split('"').nth(1));
        found.push(Dependency { name: renamed.unwrap_or(key).to_owned(), dev });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_found_in_every_spelling() {
        let manifest = r#"
[package]
name = "swarm-x"
[dependencies]
swarm-wire.workspace = true
wire = { package = "swarm-ring", path = "../swarm-ring" } # a comment
[target.'cfg(unix)'.dependencies]
libc = "0.2"
[dependencies.swarm-link]
path = "../swarm-link"
[dev-dependencies]
swarm-testkit.workspace = true
[lints]
workspace = true
"#;
        let found: Vec<_> = dependencies(manifest).into_iter().map(|d| (d.name, d.dev)).collect();
        let want = [
            ("swarm-wire", false),
            ("swarm-ring", false),
            ("libc", false),
            ("swarm-link", false),
            ("swarm-testkit", true),
        ];
        assert_eq!(found, want.map(|(name, dev)| (name.to_owned(), dev)));
    }

    #[test]
    fn a_room_below_is_refused_and_a_room_above_is_not() {
        assert_eq!(check_room("swarm-ring", "[dependencies]\nswarm-link.workspace = true").len(), 1);
        assert_eq!(check_room("swarm-ring", "[dev-dependencies]\nswarm-link.workspace = true").len(), 1);
        assert!(check_room("swarm-ring", "[dependencies]\nswarm-wire.workspace = true").is_empty());
        assert_eq!(check_room("swarm-ring", "[dependencies]\nswarm-weights.workspace = true").len(), 1);
    }

    #[test]
    fn the_testkit_is_for_tests_only() {
        assert_eq!(check_room("swarm-model", "[dependencies]\nswarm-testkit.workspace = true").len(), 1);
        assert!(check_room("swarm-model", "[dev-dependencies]\nswarm-testkit.workspace = true").is_empty());
        assert!(check_room("swarm-testkit", "[dependencies]\nswarm-wire.workspace = true").is_empty());
        assert_eq!(check_room("swarm-testkit", "[dependencies]\nswarm-link.workspace = true").len(), 1);
        assert_eq!(check_room("swarm-new", "").len(), 1);
    }
}
