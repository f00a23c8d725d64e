//! The page about testing names tests: each of them is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::source;

const PAGE: &str = "docs/testing.md";
const SECTION: &str = "## Faults and their tests";

/// Findings about tests that the page names and nobody wrote.
pub fn check(root: &Path, files: &[PathBuf]) -> Result<Vec<String>> {
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let mut named = names(&page);
    if named.is_empty() {
        return Ok(vec![format!("{PAGE} has no `{SECTION}` that names tests")]);
    }
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        let text =
            fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {}", path.display()))?;
        for function in source::functions(&source::code_only(&text)) {
            named.remove(function.name.as_str());
        }
    }
    Ok(named.iter().map(|name| format!("{PAGE}: there is no test {name}")).collect())
}

/// What is in backquotes in the section.
fn names(page: &str) -> BTreeSet<&str> {
    let section = page.split_once(SECTION).map_or("", |(_, rest)| rest);
    let section = section.split("\n## ").next().unwrap_or_default();
    section.split('`').skip(1).step_by(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_section() {
        let page = format!("`a`\n{SECTION}\n\n| x | `b_c`, `d` |\n\n## Others\n`e`");
        assert_eq!(names(&page), BTreeSet::from(["b_c", "d"]));
        assert!(names("`a`").is_empty());
    }
}
