//! `cargo xtask tidy`: the project's rules that a script can hold.
//!
//! - import law: a room uses only rooms above it in [`imports::ROOMS`];
//! - unsafe law: `unsafe` only in its two places, each use with its proof above;
//! - lengths: files of at most 700 lines, functions of at most 70;
//! - no large files;
//! - tests that a page names are there.

mod imports;
mod named_tests;
mod source;
mod unsafety;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

const FILE_LINES_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 70;
const FILE_BYTES_MAX: u64 = 300_000;

/// Checks the whole workspace.
///
/// # Errors
/// When a rule is broken; every finding was printed before.
pub fn tidy(root: &Path) -> Result<()> {
    let files = files(root)?;
    let mut findings = imports::check(root)?;
    for path in &files {
        check_file(root, path, &mut findings)?;
    }
    findings.extend(unsafety::check_roots(root)?);
    findings.extend(named_tests::check(root, &files)?);
    findings.iter().for_each(|finding| eprintln!("tidy: {finding}"));
    if !findings.is_empty() {
        bail!("tidy has {} finding(s), see above", findings.len());
    }
    eprintln!("tidy: {} files in order", files.len());
    Ok(())
}

fn check_file(root: &Path, path: &Path, findings: &mut Vec<String>) -> Result<()> {
    let shown = path.display();
    let full = root.join(path);
    let bytes = fs::metadata(&full).with_context(|| format!("cannot read {shown}"))?.len();
    if bytes > FILE_BYTES_MAX {
        findings
            .push(format!("{shown} has {bytes} bytes; at most {FILE_BYTES_MAX} belong in the repository"));
    }
    if path.extension().is_none_or(|extension| extension != "rs") {
        return Ok(());
    }
    let text = fs::read_to_string(&full).with_context(|| format!("cannot read {shown}"))?;
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        findings.push(format!("{shown} has {lines} lines; split it ({FILE_LINES_MAX} at most)"));
    }
    let code = source::code_only(&text);
    for function in source::functions(&code) {
        if function.lines > FUNCTION_LINES_MAX {
            let source::Function { name, line, lines } = function;
            findings.push(format!(
                "{shown}:{line}: fn {name} has {lines} lines; split it ({FUNCTION_LINES_MAX} at most)"
            ));
        }
    }
    findings.extend(unsafety::check_file(path, &text, &code));
    Ok(())
}

/// Files of the repository, relative to `root`: what git tracks or would track; without git,
/// everything outside build and model folders.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let git = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output();
    if let Ok(output) = git
        && output.status.success()
    {
        let listed = String::from_utf8_lossy(&output.stdout);
        let paths = listed.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from);
        // A tracked file may be deleted in the working tree.
        return Ok(paths.filter(|path| root.join(path).is_file()).collect());
    }
    let mut paths = Vec::new();
    walk(root, Path::new(""), &mut paths)?;
    Ok(paths)
}

fn walk(root: &Path, folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    const LEFT_OUT: [&str; 6] = ["target", "models", ".git", ".venv", "__pycache__", "node_modules"];
    let full = root.join(folder);
    let entries = fs::read_dir(&full).with_context(|| format!("cannot read {}", full.display()))?;
    for entry in entries {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        if kind.is_dir() && !LEFT_OUT.iter().any(|left_out| name == *left_out) {
            walk(root, &folder.join(&name), paths)?;
        } else if kind.is_file() {
            paths.push(folder.join(&name));
        }
    }
    Ok(())
}
