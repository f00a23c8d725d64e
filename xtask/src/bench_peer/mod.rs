//! `cargo xtask bench-peer`: our engine beside llama.cpp, in alternation, on the same files with
//! the same threads on the same cores.

mod args;
mod engines;
mod table;
mod usage;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::fetch;
use crate::steps::{cargo, run_within};
use args::Args;
use engines::{Engines, Round};
use table::{Pair, Row};

const MODEL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Measures, and prints the tables on stdout; everything else goes to stderr.
pub fn bench_peer(root: &Path, words: &[&str]) -> Result<()> {
    if matches!(words, ["help" | "--help" | "-h"]) {
        println!("{}", args::HELP);
        return Ok(());
    }
    let args = Args::parse(words)?;
    let folder = root.join("target").join("bench-peer");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let engines = Engines::new(root, &folder, args.python.as_deref())?;
    let about = engines.about_peer()?;
    let models = args
        .formats
        .iter()
        .map(|format| model(root, &folder, format, args.layers))
        .collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (format, model) in args.formats.iter().zip(&models) {
        for (threads, sessions, prompt_tokens) in lines(&args) {
            let round = Round {
                model,
                threads,
                cores: &args.cores[..threads],
                prompt_tokens,
                gen_tokens: args.gen_tokens,
                sessions,
            };
            let pairs = pairs(&engines, &round, args.rounds, format)?;
            rows.push(Row { model: title(format), threads, sessions, prompt_tokens, pairs });
            // After every line, because the whole takes an hour or more.
            if let Some(path) = &args.json {
                save(path, &args, &about, &rows)?;
            }
        }
    }
    println!("{}", heading(&args, &about));
    println!("{}\n{}", table::ratios(&rows), table::details(&rows));
    let disturbed: usize = rows.iter().map(Row::disturbed).sum();
    if disturbed > 0 {
        println!(
            "Not to be relied on: other processes were busy during {disturbed} pairs. Measure again alone."
        );
    }
    Ok(())
}

/// `(threads, sessions, prompt tokens)` of every line of one model.
fn lines(args: &Args) -> Vec<(usize, usize, usize)> {
    let mut lines: Vec<_> = args.threads.iter().map(|&threads| (threads, 1, args.prompt_tokens)).collect();
    if args.sessions > 1 {
        lines.push((args.threads_max(), args.sessions, args.session_prompt_tokens));
    }
    lines
}

/// Both engines in turn, and who begins in turn too, so that a machine that gets warmer or
/// busier is fair to both.
fn pairs(engines: &Engines, round: &Round<'_>, rounds: usize, name: &str) -> Result<Vec<Pair>> {
    let pair = |index: usize| -> Result<Pair> {
        let pair = if index.is_multiple_of(2) {
            let peer = engines.peer(round)?;
            Pair { ours: engines.ours(round)?, peer }
        } else {
            let ours = engines.ours(round)?;
            Pair { ours, peer: engines.peer(round)? }
        };
        eprintln!(
            "bench-peer: {name}, {} threads, {} sessions, pair {} of {rounds}: prefill {:.1} to {:.1}, decode {:.1} to \
             {:.1} tok/s (ours to llama.cpp)",
            round.threads,
            round.sessions,
            index + 1,
            pair.ours.prefill_tok_per_s,
            pair.peer.prefill_tok_per_s,
            pair.ours.decode_tok_per_s,
            pair.peer.decode_tok_per_s,
        );
        if pair.disturbed() {
            eprintln!("bench-peer: other processes were busy during this pair, so it says little; stop them");
        }
        Ok(pair)
    };
    (0..rounds).map(pair).collect()
}

/// The file of one entry of `--formats`, made or fetched when it is not there.
fn model(root: &Path, folder: &Path, format: &str, layers: usize) -> Result<PathBuf> {
    if format == "smol" {
        return fetch::fetch(root);
    }
    let folder = folder.join("models");
    let path = folder.join(format!("tinyllama-shape-{layers}-{format}.gguf"));
    if path.is_file() {
        return Ok(path);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    eprintln!("bench-peer: making {}", path.display());
    let partial = path.with_extension("partial");
    let mut command = cargo(root);
    command.args(["run", "--quiet", "--release", "--package", "swarm-testkit", "--example", "toy", "--"]);
    command.args(["tinyllama", format]).arg(&partial).arg(format!("layers={layers}"));
    if !run_within(&mut command, MODEL_LIMIT)?.success() {
        bail!("cannot make {}: see above", path.display());
    }
    fs::rename(&partial, &path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// A model's name in the tables.
fn title(format: &str) -> String {
    match format {
        "smol" => "Q4_1 (SmolLM2)".to_owned(),
        format => format.to_ascii_uppercase(),
    }
}

/// What the tables were measured on and with.
fn heading(args: &Args, about: &Value) -> String {
    let peer = about["llama_cpp_python"].as_str().unwrap_or("?");
    let pinned = if about["pinned"] == true {
        format!("both pinned to cores {:?}", args.cores)
    } else {
        "not pinned: this system cannot".to_owned()
    };
    format!(
        "{}; llama-cpp-python {peer}; {pinned}; prompt of {} tokens, {} generated, {} pairs; random models of {} layers; \
         several sessions: prompts of {} tokens\n",
        cpu(),
        args.prompt_tokens,
        args.gen_tokens,
        args.rounds,
        args.layers,
        args.session_prompt_tokens,
    )
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn save(path: &Path, args: &Args, about: &Value, rows: &[Row]) -> Result<()> {
    let report = json!({
        "cpu": cpu(), "peer": about, "cores": args.cores, "layers": args.layers, "prompt_tokens": args.prompt_tokens,
        "gen_tokens": args.gen_tokens, "rounds": args.rounds, "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&report)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_measured_once_with_most_threads() {
        let args = Args::parse(&["--threads", "2,1"]).unwrap();
        assert_eq!(lines(&args), [(2, 1, 512), (1, 1, 512), (2, 8, 16)]);
        let args = Args::parse(&["--threads", "1", "--sessions", "0"]).unwrap();
        assert_eq!(lines(&args), [(1, 1, 512)]);
    }

    #[test]
    fn titles() {
        assert_eq!(title("smol"), "Q4_1 (SmolLM2)");
        assert_eq!(title("q4_k_m"), "Q4_K_M");
    }
}
