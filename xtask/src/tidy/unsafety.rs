//! The unsafe law: one room, one file, and a proof above every use.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::source;

const KERNELS: &str = "crates/swarm-kernels";
const MMAP: &str = "crates/swarm-weights/src/mmap.rs";

/// Findings of one `.rs` file: the word `unsafe` outside its places, or without a proof.
/// `code` is `text` with comments and literals blanked out, of the same lines.
pub fn check_file(path: &Path, text: &str, code: &str) -> Vec<String> {
    let allowed = path.starts_with(KERNELS) || path == Path::new(MMAP);
    let (text, code): (Vec<&str>, Vec<&str>) = (text.lines().collect(), code.lines().collect());
    let mut findings = Vec::new();
    for (index, line) in code.iter().enumerate() {
        if !source::words(line).any(|word| word == "unsafe") {
            continue;
        }
        let place = format!("{}:{}", path.display(), index + 1);
        if !allowed {
            findings.push(format!("{place}: `unsafe` belongs in {KERNELS} and {MMAP} only"));
        } else if !has_proof(&text, &code, index) {
            findings.push(format!("{place}: `unsafe` without a `SAFETY:` comment on the line above"));
        }
    }
    findings
}

/// Whether the comment directly above line `index`, or above the statement it belongs to, says
/// why it is sound. Attributes and the earlier lines of a statement may stand between.
fn has_proof(text: &[&str], code: &[&str], index: usize) -> bool {
    let is_proof = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    if text.get(index).is_some_and(|line| line.contains("// SAFETY:")) {
        return true;
    }
    let mut in_comment = false;
    for (text, code) in text.iter().zip(code).take(index).rev() {
        let (text, code) = (text.trim(), code.trim());
        if text.starts_with("//") {
            in_comment = true;
            if is_proof(text) {
                return true;
            }
            continue;
        }
        let attribute = code.starts_with("#[");
        let goes_on = !code.is_empty() && !code.ends_with([';', '{', '}', ',']);
        if in_comment || !(attribute || goes_on) {
            return false;
        }
    }
    false
}

/// Every crate but the two says at its root that it has no unsafe code; `swarm-weights` denies
/// it and allows it in its one file.
pub fn check_roots(root: &Path) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    let mut folders = vec![root.join("xtask")];
    let crates = root.join("crates");
    for entry in fs::read_dir(&crates).with_context(|| format!("cannot read {}", crates.display()))? {
        folders.push(entry?.path());
    }
    folders.sort();
    for folder in folders {
        if folder.ends_with("swarm-kernels") {
            continue;
        }
        for file in ["src/lib.rs", "src/main.rs"] {
            let path = folder.join(file);
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let code = source::code_only(&text);
            let denies = folder.ends_with("swarm-weights") && code.contains("#![deny(unsafe_code)]");
            if !denies && !code.contains("#![forbid(unsafe_code)]") {
                let shown = path.strip_prefix(root).unwrap_or(&path).display();
                findings.push(format!("{shown}: `#![forbid(unsafe_code)]` is missing"));
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> usize {
        check_file(Path::new(path), text, &source::code_only(text)).len()
    }

    #[test]
    fn the_word_is_refused_elsewhere_and_ignored_in_text() {
        assert_eq!(findings("crates/swarm-model/src/lib.rs", "unsafe { x() }"), 1);
        let harmless = "#![forbid(unsafe_code)]\n// unsafe\nlet s = \"unsafe\"; /* unsafe */";
        assert_eq!(findings("crates/swarm-model/src/lib.rs", harmless), 0);
        assert_eq!(
            findings("crates/swarm-weights/src/mmap.rs", "// SAFETY: no one writes.\nunsafe { x() }"),
            0
        );
        assert_eq!(
            findings("crates/swarm-weights/src/other.rs", "// SAFETY: no one writes.\nunsafe { x() }"),
            1
        );
    }

    #[test]
    fn a_proof_stands_directly_above() {
        let path = "crates/swarm-kernels/src/avx2.rs";
        assert_eq!(findings(path, "unsafe { x() }"), 1);
        assert_eq!(findings(path, "// SAFETY: checked.\nlet y = a;\nunsafe { x() }"), 1);
        assert_eq!(findings(path, "// SAFETY: checked\n// above.\nlet y =\n    unsafe { x() };"), 0);
        assert_eq!(
            findings(path, "/// # Safety\n/// `p` is valid.\n#[inline]\npub unsafe fn f(p: *const u8) {}"),
            0
        );
        assert_eq!(findings(path, "// SAFETY: old.\n\nunsafe { x() }"), 1);
        assert_eq!(findings(path, "// SAFETY: for f.\n\n// Other.\nunsafe { x() }"), 1);
    }
}
