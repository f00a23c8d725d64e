//! `swarm-fuzz`: long runs of the fuzz targets, and single inputs again.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use swarm_fuzz::{Budget, TARGETS, Target, check, fuzz, target};

const USAGE: &str = "\
swarm-fuzz [TARGET] [--minutes N] [--seed N]   fuzz one target, or all of them in turn; 1 minute each when not said
swarm-fuzz TARGET --input FILE                 run one input again
An input that breaks a promise is written to fuzz/crashes/ and shown; the exit code is then 1.
Targets:";

struct Options {
    target: Option<&'static Target>,
    minutes: f64,
    seed: u64,
    input: Option<PathBuf>,
}

fn usage() -> String {
    TARGETS.iter().fold(USAGE.to_owned(), |text, target| text + " " + target.name)
}

fn options(args: impl Iterator<Item = String>) -> Result<Options> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut options = Options { target: None, minutes: 1.0, seed: now, input: None };
    let mut args = args;
    while let Some(word) = args.next() {
        let mut value = || args.next().with_context(|| format!("{word} needs a value\n{}", usage()));
        match word.as_str() {
            "--minutes" => options.minutes = value()?.parse().context("--minutes is no number")?,
            "--seed" => options.seed = value()?.parse().context("--seed is no number")?,
            "--input" => options.input = Some(value()?.into()),
            name => {
                options.target = Some(target(name).with_context(|| format!("no target {name}\n{}", usage()))?)
            }
        }
    }
    if !(options.minutes > 0.0 && options.minutes < 1e6) {
        bail!("--minutes is out of range");
    }
    Ok(options)
}

fn crashes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("crashes")
}

/// True when no promise was broken.
fn run(options: &Options) -> Result<bool> {
    if let Some(path) = &options.input {
        let target = options.target.with_context(usage)?;
        let input = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(match check(target, &input) {
            Ok(outcome) => {
                println!("{}: no promise is broken, outcome {outcome:016x}", target.name);
                true
            }
            Err(crash) => {
                println!("{crash}");
                false
            }
        });
    }
    let folder = crashes();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut sound = true;
    let targets = TARGETS.iter().filter(|each| options.target.is_none_or(|only| only.name == each.name));
    for target in targets {
        let until = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
        // What takes the whole process along is found here afterwards.
        let last = folder.join(format!("{}-last", target.name));
        let keep = |input: &[u8]| drop(std::fs::write(&last, input));
        match fuzz(target, options.seed, Budget::Until(until), keep) {
            Ok(stats) => {
                drop(std::fs::remove_file(&last));
                println!(
                    "{}: {} runs, {} outcomes, {} inputs kept, seed {}",
                    target.name, stats.runs, stats.outcomes, stats.corpus, options.seed
                );
            }
            Err(crash) => {
                sound = false;
                let path = folder.join(format!("{}-{}", target.name, options.seed));
                std::fs::write(&path, &crash.input).context("cannot write the input down")?;
                println!("{crash}\nwritten to {}", path.display());
            }
        }
    }
    Ok(sound)
}

fn main() -> ExitCode {
    match options(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("swarm-fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}
