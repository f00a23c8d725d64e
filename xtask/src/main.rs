//! Chores of the project: `cargo xtask help` lists them.
#![forbid(unsafe_code)]

mod bench_peer;
mod check_arm;
mod demo;
mod fetch;
mod fuzz;
mod netlab;
mod python;
mod steps;
mod test;
mod tidy;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask fetch              get the default model (SmolLM2-135M-Instruct, 98 MB)
cargo xtask demo [--nodes N]   answer a prompt over N nodes of this computer (3 when not said)
cargo xtask test               fetch, tidy, fmt, clippy, then every test; what CI runs
cargo xtask check              the same, and cargo deny
cargo xtask check-arm          the kernels' tests on emulated AArch64 CPUs (needs a cross toolchain and qemu-user)
cargo xtask wheel              the Python package as a wheel, in target/python/release; says where
cargo xtask test-python        the tests of the Python package alone
cargo xtask tidy               import law, unsafe law, file and function lengths
cargo xtask netlab ...         time per token against the delay of the links, in network namespaces; needs root
cargo xtask fuzz [TARGET] [--minutes N]   long runs of the fuzz targets; --help lists them
cargo xtask bench-peer ...     compare speed with llama.cpp; --help lists the options";

/// The folder with the workspace's `Cargo.toml`.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_path_buf()
}

fn run(args: &[&str]) -> Result<ExitCode> {
    match args {
        ["fetch"] => {
            fetch::share(&fetch::fetch(&root())?)?;
            Ok(ExitCode::SUCCESS)
        }
        ["demo", rest @ ..] => demo::demo(&root(), rest),
        ["test"] => test::test(&root(), false),
        ["check"] => test::test(&root(), true),
        ["check-arm"] => check_arm::check_arm(&root()),
        ["netlab", rest @ ..] => netlab::netlab(&root(), rest).map(|()| ExitCode::SUCCESS),
        ["fuzz", rest @ ..] => fuzz::fuzz(&root(), rest),
        ["bench-peer", rest @ ..] => bench_peer::bench_peer(&root(), rest).map(|()| ExitCode::SUCCESS),
        ["wheel"] => python::wheel(&root()).map(|()| ExitCode::SUCCESS),
        ["test-python"] => test::test_python(&root()),
        ["tidy"] => tidy::tidy(&root()).map(|()| ExitCode::SUCCESS),
        [] | ["help" | "--help" | "-h"] => {
            println!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        other => bail!("no chore `{}`\n{HELP}", other.join(" ")),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
