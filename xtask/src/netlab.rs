//! `cargo xtask netlab`: real processes in network namespaces, with a measured delay between them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use swarm_testkit::toy::{Storage, spec};
use swarm_testkit::{NetLab, Proc, TempHome};

use crate::steps::{cargo, run_within};

const HELP: &str = "\
cargo xtask netlab [--nodes N] [--delays MS,MS,...] [--mbit N] [--tokens N] [--rounds N] [--cores C,C,...] [--dev]
                    [--model M --layers CUT]
Runs `swarm-os` on N nodes (2 when not said), each in a network namespace of its own, every link through swarm-lossy,
and prints the time per token for each delay (0,1,5,20,100 ms one way when not said), with links of --mbit (unlimited
when not said). `beyond both` is what a token takes beyond one node alone and the delays of a lap, the relays' own lateness
too; `of it computing` is how much longer the nodes compute than one does. Each delay has --rounds (1 when not said) pairs of
a run alone and one over the ring; medians are shown. Greedy tokens are compared with one node alone. Every node has one thread, on the core of --cores that is its own. The model is a toy of four layers, so that the link is what is measured; --layers cuts another one.
Needs root (CAP_NET_ADMIN) and `ip` of iproute2. --dev runs the dev build; the release build is the default.";
const SOON: Duration = Duration::from_secs(60);
const BUILD: Duration = Duration::from_secs(30 * 60);
const PROMPT: &str = "in the tin";
const PORT: u16 = 4100;

struct Options {
    nodes: usize,
    delays_ms: Vec<u64>,
    /// Of each link, each way, in Mbit/s.
    mbit: Option<u64>,
    tokens: usize,
    rounds: usize,
    /// Of each node; empty where the system chooses.
    cores: Vec<usize>,
    dev: bool,
    model: Option<(PathBuf, String)>,
}

fn options(args: &[&str]) -> Result<Options> {
    let delays_ms = vec![0, 1, 5, 20, 100];
    let mut options = Options {
        nodes: 2,
        delays_ms,
        mbit: None,
        tokens: 32,
        rounds: 1,
        cores: vec![],
        dev: false,
        model: None,
    };
    let (mut model, mut layers) = (None, None);
    let mut args = args.iter();
    while let Some(&name) = args.next() {
        let mut value = || args.next().copied().with_context(|| format!("{name} needs a value\n{HELP}"));
        match name {
            "--nodes" => options.nodes = value()?.parse().context("--nodes is no number")?,
            "--tokens" => options.tokens = value()?.parse().context("--tokens is no number")?,
            "--delays" => {
                options.delays_ms = list(value()?).context("--delays is no list of milliseconds")?;
            }
            "--mbit" => options.mbit = Some(value()?.parse().context("--mbit is no number")?),
            "--rounds" => options.rounds = value()?.parse().context("--rounds is no number")?,
            "--cores" => options.cores = list(value()?).context("--cores is no list of cores")?,
            "--dev" => options.dev = true,
            "--model" => model = Some(PathBuf::from(value()?)),
            "--layers" => layers = Some(value()?.to_owned()),
            _ => bail!("{HELP}"),
        }
    }
    if options.rounds == 0 || options.mbit == Some(0) {
        bail!("--rounds and --mbit begin at 1\n{HELP}");
    }
    if ![0, options.nodes].contains(&options.cores.len()) {
        bail!("--cores needs one core per node\n{HELP}");
    }
    options.model = match (model, layers) {
        (None, None) if (2..=4).contains(&options.nodes) => None,
        (Some(model), Some(layers)) if layers.split(',').count() == options.nodes && options.nodes > 1 => {
            Some((std::path::absolute(model)?, layers))
        }
        _ => {
            bail!("2 to 4 nodes share the toy model; --model needs --layers with one range per node\n{HELP}")
        }
    };
    Ok(options)
}

fn list<T: FromStr>(text: &str) -> Result<Vec<T>, T::Err> {
    text.split(',').map(str::parse).collect()
}

/// What one run measured.
struct Measured {
    token_ids: Value,
    ms_per_token: f64,
    /// Of all nodes.
    compute_ms: f64,
    lap_ms: f64,
    first_ms: f64,
}

struct Lab {
    net: NetLab,
    home: TempHome,
    binary: PathBuf,
    model: PathBuf,
    layers: String,
    tokens: usize,
    cores: Vec<usize>,
    relays: Vec<Proc>,
    /// Kept for their drop, which ends them.
    _workers: Vec<Proc>,
}

/// Runs the table. Where there can be no namespaces this fails, and says so.
pub fn netlab(root: &Path, args: &[&str]) -> Result<()> {
    let options = options(args)?;
    // Before the build: who cannot have it should not wait for it.
    let net = NetLab::new(options.nodes + 1).context("NOT RUN: the network lab cannot be opened here")?;
    let (binary, lossy) = build(root, options.dev)?;
    let folder = tempfile::tempdir()?;
    let (model, layers) = match options.model {
        Some(model) => model,
        None => {
            let path = folder.path().join("toy");
            spec("llama").write_hf(&path, Storage::F32)?;
            let cut = ["0..2,2..4", "0..1,1..3,3..4", "0..1,1..2,2..3,3..4"];
            (path, cut.get(options.nodes - 2).copied().unwrap_or_default().to_owned())
        }
    };
    let home = TempHome::new()?;
    let (tokens, cores) = (options.tokens, options.cores);
    let mut lab = Lab { net, home, binary, model, layers, tokens, cores, relays: vec![], _workers: vec![] };
    for node in 1..options.nodes {
        lab.add_worker(node, options.nodes, &lossy)?;
    }
    if let Some(mbit) = options.mbit {
        lab.set_links(&format!("rate {}", mbit.saturating_mul(125_000)))?;
    }
    lab.table(options.nodes, &options.delays_ms, options.rounds)
}

/// `swarm-os` and `swarm-lossy`, new.
fn build(root: &Path, dev: bool) -> Result<(PathBuf, PathBuf)> {
    let here = env::current_exe()?;
    let debug = here.parent().context("xtask is nowhere")?;
    let make = |args: &[&str]| {
        let status = run_within(cargo(root).args(args), BUILD)?;
        if status.success() { Ok(()) } else { Err(anyhow::anyhow!("`cargo {}` failed", args.join(" "))) }
    };
    make(&["build", "--package", "swarm-testkit", "--bin", "swarm-lossy"])?;
    let profile = if dev { "debug" } else { "release" };
    let release: &[&str] = if dev { &[] } else { &["--release"] };
    make(&[&["build", "--package", "swarm-os"], release].concat())?;
    let target = debug.parent().context("xtask is not in a target folder")?;
    let name = |name: &str| format!("{name}{}", env::consts::EXE_SUFFIX);
    Ok((target.join(profile).join(name("swarm-os")), debug.join(name("swarm-lossy"))))
}

impl Lab {
    /// `swarm-os` as `node` runs it.
    fn swarm_os(&self, node: usize, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args);
        if let Some(core) = self.cores.get(node) {
            command.args(["--cores", &core.to_string()]);
        }
        self.home.apply(&mut command);
        command
    }

    fn start(&self, node: usize, args: &[&str]) -> Result<Proc> {
        Proc::spawn(&mut self.net.run_in(node, &self.swarm_os(node, args)))
    }

    /// A worker in its own namespace, and the relay before it in the last one.
    fn add_worker(&mut self, node: usize, relay_node: usize, lossy: &Path) -> Result<()> {
        let (name, port, model) = (format!("node{node}"), PORT.to_string(), self.model.display().to_string());
        let args =
            ["worker", "--json", "--name", &name, "--port", &port, "--threads", "1", "--model", &model];
        let mut worker = self.start(node, &args)?;
        worker.expect(SOON, "\"waiting\"")?;
        let mut command = Command::new(lossy);
        let target = format!("{}:{PORT}", self.net.address(node));
        command.args(["--listen", &self.relay_address(node), "--to", &target]);
        let mut relay = Proc::spawn(&mut self.net.run_in(relay_node, &command))?;
        relay.expect(SOON, "listening")?;
        self.relays.push(relay);
        self._workers.push(worker);
        Ok(())
    }

    fn relay_address(&self, node: usize) -> String {
        let relays = self.layers.split(',').count();
        format!("{}:{}", self.net.address(relays), usize::from(PORT) + node)
    }

    fn run(&self, nodes: usize) -> Result<Measured> {
        let (tokens, model) = (self.tokens.to_string(), self.model.display().to_string());
        let mut args = vec!["run", "--json", "--raw", "--threads", "1", "--max-tokens", &tokens];
        args.extend(["--model", &model]);
        let peers: Vec<String> = (1..nodes).map(|node| self.relay_address(node)).collect();
        peers.iter().for_each(|peer| args.extend(["--peer", peer]));
        let workers = peers.len().to_string();
        if nodes > 1 {
            args.extend(["--workers", &workers, "--layers", &self.layers]);
        }
        args.push(PROMPT);
        let finished = self.start(0, &args)?.finish(3 * SOON)?;
        if !finished.status.success() {
            bail!("`swarm-os {}` failed: {}", args.join(" "), finished.stderr);
        }
        let report: Value = serde_json::from_str(&finished.stdout).context("run --json printed no JSON")?;
        let number = |key: &str| report[key].as_f64().with_context(|| format!("run --json has no {key}"));
        let parts = report["waterfall"]["nodes"].as_array().context("run --json has no waterfall")?;
        Ok(Measured {
            compute_ms: parts.iter().filter_map(|node| node["compute_ms"].as_f64()).sum(),
            ms_per_token: 1000.0 / number("decode_tok_per_s")?,
            lap_ms: number("lap_ms_p50")?,
            first_ms: number("ttft_ms")?,
            token_ids: report["token_ids"].clone(),
        })
    }

    /// Tells every relay.
    fn set_links(&mut self, command: &str) -> Result<()> {
        for relay in &mut self.relays {
            relay.say(command)?;
            relay.expect(SOON, "ok")?;
        }
        Ok(())
    }

    fn table(&mut self, nodes: usize, delays_ms: &[u64], rounds: usize) -> Result<()> {
        println!(
            "{nodes} nodes, layers {}, {} tokens, {rounds} rounds, {}",
            self.layers,
            self.tokens,
            self.model.display()
        );
        println!(
            " one way | links a lap | alone ms | ms per token | beyond both ms | of it computing | lap p50 ms | first token ms | tokens"
        );
        for &delay in delays_ms {
            self.set_links(&format!("delay {delay}"))?;
            let (mut alone, mut ring) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                alone.push(self.run(1)?);
                ring.push(self.run(nodes)?);
            }
            let token_ids = &alone.first().context("no round")?.token_ids;
            if let Some(other) = ring.iter().find(|run| run.token_ids != *token_ids) {
                bail!("{} on the ring, {token_ids} alone", other.token_ids);
            }
            let links_ms = delay as f64 * nodes as f64;
            let of = |runs: &[Measured], part: fn(&Measured) -> f64| median(runs.iter().map(part).collect());
            let pairs = |part: fn(&Measured) -> f64| {
                median(alone.iter().zip(&ring).map(|(one, all)| part(all) - part(one)).collect())
            };
            println!(
                "{delay:>5} ms | {links_ms:>8.0} ms | {:>8.3} | {:>12.3} | {:>14.3} | {:>15.3} | {:>10.3} | {:>14.1} | as alone",
                of(&alone, |run| run.ms_per_token),
                of(&ring, |run| run.ms_per_token),
                pairs(|run| run.ms_per_token) - links_ms,
                pairs(|run| run.compute_ms),
                of(&ring, |run| run.lap_ms),
                of(&ring, |run| run.first_ms),
            );
        }
        Ok(())
    }
}

/// The middle one; of an even number, the upper of the two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_or_refused() {
        let read = options(&["--nodes", "3", "--delays", "0,7", "--tokens", "9", "--dev"]).unwrap();
        assert_eq!((read.nodes, read.delays_ms, read.tokens, read.dev), (3, vec![0, 7], 9, true));
        let read = options(&["--mbit", "1000", "--rounds", "5", "--cores", "0,1"]).unwrap();
        assert_eq!((read.mbit, read.rounds, read.cores), (Some(1000), 5, vec![0, 1]));
        assert!(options(&["--model", "m", "--layers", "0..1,1..2"]).unwrap().model.is_some());
        let bad: [&[&str]; 9] = [
            &["--nodes", "5"],
            &["--nodes"],
            &["--delays", "a"],
            &["--model", "m"],
            &["--model", "m", "--layers", "0..2"],
            &["--rounds", "0"],
            &["--mbit", "0"],
            &["--cores", "0"],
            &["x"],
        ];
        bad.into_iter().for_each(|args| assert!(options(args).is_err(), "{args:?}"));
    }
}
