//! `cargo xtask check-arm`: the kernels built for AArch64, their tests on emulated CPUs, and the rest of the workspace
//! checked.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::steps::{Steps, cargo, succeeds};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATORS: [&str; 2] = ["qemu-aarch64-static", "qemu-aarch64"];
/// Where the C library of the target lies.
const SYSROOT: &str = "/usr/aarch64-linux-gnu";
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Emulated CPUs and the kernels that each has to choose by itself.
const CPUS: [(&str, &str); 3] = [("cortex-a72", "neon"), ("cortex-a76", "neondot"), ("max", "neoni8mm")];

/// Every path on every CPU that has it: all tests, and one digest over every operation equal to this computer's.
pub fn check_arm(root: &Path) -> Result<ExitCode> {
    let emulator = tools()?;
    let mut steps = Steps::default();
    let paths = ["test", "--quiet", "--package", "swarm-kernels", "--test", "paths"];
    let want = steps.step("digest here", || digest(cargo(root).args(paths), Some("scalar")))?;
    for (cpu, best) in CPUS {
        let on_cpu = |args: &[&str]| {
            let mut command = cargo(root);
            command.args(args).args(["--target", TARGET]);
            for_target(&mut command, &format!("{emulator} -L {SYSROOT} -cpu {cpu}"));
            command
        };
        let tests = ["test", "--package", "swarm-kernels", "--lib", "--test", "gguf_vectors"];
        steps.command(&format!("tests on {cpu}"), &mut on_cpu(&tests), LIMIT)?;
        steps.step(&format!("digests on {cpu}"), || {
            let here = CPUS.iter().map(|(_, path)| *path).take_while(|path| *path != best);
            for forced in here.map(Some).chain([Some("scalar"), None]) {
                let name = forced.unwrap_or(best);
                let got = digest(&mut on_cpu(&paths), forced)?;
                if got.0 != name || got.1 != want.1 {
                    bail!("{cpu}, asked for {name}: {} gave {}; here scalar gave {}", got.0, got.1, want.1);
                }
            }
            Ok(())
        })?;
    }
    let mut check = cargo(root);
    for_target(check.args(["check", "--workspace", "--all-targets", "--target", TARGET]), emulator);
    steps.command("check of the workspace", &mut check, LIMIT)?;
    println!("xtask: passed on emulated CPUs: {}", steps.summary());
    Ok(ExitCode::SUCCESS)
}

/// What this needs beyond the toolchain; says what is missing and how Debian calls it. Returns the emulator.
fn tools() -> Result<&'static str> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
    let folder = output.context("cannot run rustc")?.stdout;
    let folder = String::from_utf8_lossy(&folder).trim().to_owned();
    let emulator = EMULATORS.into_iter().find(|name| succeeds(Command::new(name).arg("--version")));
    let mut missing = Vec::new();
    if folder.is_empty() || !Path::new(&folder).is_dir() {
        missing.push(format!(
            "the standard library of {TARGET} (`rustup target add {TARGET}`, or RUSTC names a compiler that has it)"
        ));
    }
    if !succeeds(Command::new(LINKER).arg("--version")) || !Path::new(SYSROOT).is_dir() {
        missing.push(format!("{LINKER} (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross)"));
    }
    if emulator.is_none() {
        missing.push(format!("{} (Debian: qemu-user-static)", EMULATORS[0]));
    }
    match emulator {
        Some(emulator) if missing.is_empty() => Ok(emulator),
        _ => bail!("nothing was checked, because this is not installed: {}", missing.join("; ")),
    }
}

/// Tells cargo and the C compiler of build scripts about the target.
fn for_target(command: &mut Command, runner: &str) {
    command
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner)
        .env("CC_aarch64_unknown_linux_gnu", LINKER);
}

/// The path and the digest that `tests/paths.rs` prints when asked to.
fn digest(test: &mut Command, forced: Option<&str>) -> Result<(String, String)> {
    test.args(["--", "--nocapture"]).env("SWARM_OS_TEST_DIGEST", "1").env_remove("SWARM_OS_KERNELS");
    if let Some(name) = forced {
        test.env("SWARM_OS_KERNELS", name);
    }
    let output = test.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.split("digest of ").nth(1).unwrap_or("").split_whitespace().collect::<Vec<_>>();
    match words[..] {
        [path, digest, ..] if output.status.success() => Ok((path.to_owned(), digest.to_owned())),
        _ => bail!("no digest from the test: {text}"),
    }
}
