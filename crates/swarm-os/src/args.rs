//! The command line as it is typed. Numbers are numbers here and words are words; what they mean together is
//! checked in `settings.rs`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Args, Parser, Subcommand, ValueEnum};
use swarm_kernels::Quant;

/// Shown under `--help`.
const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    an answer ended in an error, or verify found a difference
  2    bad usage or input
  3    no worker was found, or the ring was lost
  130  stopped by Ctrl-C

Environment:
  SWARM_OS_HOME     folder of this node's identity and secret
  SWARM_OS_MODELS   folder of models
  SWARM_OS_CACHE    folder of what is fetched from the Hub
  SWARM_OS_JOIN     pairing code, as --join
  SWARM_OS_LOG      what to log on standard error: error, warn, info, debug
  SWARM_OS_KERNELS  the instructions to compute with, for example scalar, avx2, avx512, neon
  HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE
                    the Hub and its cache, as for its own tools";

/// What `--version` prints: two nodes need the same protocol and the same numerics.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\nprotocol {}.{}\nnumerics {}",
        env!("CARGO_PKG_VERSION"),
        swarm_wire::PROTOCOL_MAJOR,
        swarm_wire::PROTOCOL_MINOR,
        swarm_kernels::NUMERICS
    )
});

/// One language model on several computers of one room
#[derive(Debug, Parser)]
#[command(name = "swarm-os", version = VERSION.as_str(), after_help = EXIT_CODES)]
#[command(arg_required_else_help = true, subcommand_required = true, disable_help_subcommand = true)]
pub struct Cli {
    /// A: `chat`, with at least one worker. B: `worker`. Takes that command's options
    #[arg(long, value_name = "ROLE", value_parser = ["A", "B"], ignore_case = true)]
    role: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Offer this computer to the room
    Worker(WorkerArgs),
    /// Talk to a model; finds workers and spreads the layers over them
    Chat(ChatArgs),
    /// One prompt, one answer on standard output
    Run(RunArgs),
    /// Show which layers would go where, and why (not) to split
    Plan(PlanArgs),
    /// Prove that a ring gives the same tokens and logits as one node
    Verify(VerifyArgs),
    /// Several nodes on this computer answer, then prove themselves equal to one
    Demo(DemoArgs),
    /// Measure prefill, decode, memory and the ring's own cost
    Bench(BenchArgs),
    /// How likely a text is to a model, and whether fast kernels or small weights change it
    Perplexity(PerplexityArgs),
    /// Show what this computer's workers and coordinators are doing
    Status(StatusArgs),
    /// The same on the whole screen, live; q leaves
    Top,
    /// List the models on this computer and on the machines of this swarm
    Models(ModelsArgs),
    /// Fetch a model, or some of its layers, from the Hub
    Pull(PullArgs),
    /// Remove fetched models, least recently used first
    Prune(PruneArgs),
    /// Bring two computers together: show a code, or type the one that the other shows
    Pair(PairArgs),
    /// Look at this computer, its network and the way to the others, and say what to do next
    Doctor(DoctorArgs),
    /// List the computers that belong to this swarm
    Peers(PeersArgs),
    /// Take a computer out of this swarm; the others get a new secret
    Forget(ForgetArgs),
    /// Copy the swarm's secret to another computer
    #[command(subcommand)]
    Secret(SecretCommand),
}

#[derive(Debug, Args)]
pub struct PairArgs {
    /// The code that the other computer shows [default: show one here]
    pub code: Option<String>,
    /// The same, as other commands take it
    #[arg(long, value_name = "CODE", env = "SWARM_OS_JOIN", hide_env = true)]
    pub join: Option<String>,
    /// Address of the computer that shows the code, where discovery does not reach it; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// What people call this computer [default: its own name]
    #[arg(long)]
    pub name: Option<String>,
    /// Port to listen on while a code is shown, 0 for any
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// How long to show a code or to look for one [default: 600 and 30]
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub wait: Option<u32>,
    /// One JSON event per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Ends with 1 only when something is broken, here or on the way to a computer that was found or named."
)]
pub struct DoctorArgs {
    /// Address of a computer to look at, where discovery does not reach it; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// The port of this computer that others should reach [default: that of the worker that runs here, else any]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Look on this network interface only; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    pub interface: Vec<String>,
    /// How long to listen for others at most
    #[arg(long, value_name = "SECS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub wait: u32,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PeersArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("whom").required(true).args(["name", "all"]))]
pub struct ForgetArgs {
    /// A name, or a key where names collide, as `swarm-os peers` lists them
    pub name: Option<String>,
    /// Everybody: leave the swarm with a new secret and a new key
    #[arg(long, conflicts_with = "peer")]
    pub all: bool,
    /// Address of another computer to tell, where discovery does not reach it; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// How long to look for the others, who are told the new secret [default: 5]
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u32).range(1..=600))]
    pub wait: Option<u32>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "`swarm-os --role B` is the same.")]
pub struct WorkerArgs {
    /// What people call this node [default: the computer's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Port to listen on, 0 for any [default: the one of last time where it is free, else any]
    #[arg(long)]
    pub port: Option<u16>,
    /// The one address to listen on and to be announced with [default: all]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "local")]
    pub bind: Option<std::net::IpAddr>,
    /// Be announced on this network interface only; may be repeated [default: all]
    #[arg(long, value_name = "NAME", conflicts_with = "local")]
    pub interface: Vec<String>,
    /// Serve this model only: a folder, a .gguf file, a preset or a repository id [default: any that is here]
    #[arg(long)]
    pub model: Option<String>,
    /// Join the computer that shows this code before anything else
    #[arg(long, value_name = "CODE", env = "SWARM_OS_JOIN", hide_env = true, conflicts_with = "local")]
    pub join: Option<String>,
    /// Keep on the disk what a coordinator had quantized here, so that the next start only reads it
    #[arg(long)]
    pub keep_quantized: bool,
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// A running counter instead of a line per step
    #[arg(long)]
    pub quiet: bool,
    /// One JSON event per line
    #[arg(long)]
    pub json: bool,
    /// Listen on this computer only, and end when standard input closes
    #[arg(long)]
    pub local: bool,
    #[arg(long, hide = true, value_parser = ["B"], ignore_case = true)]
    pub role: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "`swarm-os --role A` is the same, and requires at least one worker.")]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub ring: RingArgs,
    #[command(flatten)]
    pub look: LookArgs,
    #[arg(long, hide = true, value_parser = ["A"], ignore_case = true, conflicts_with = "alone")]
    pub role: Option<String>,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// What to ask; `-` reads it from standard input
    pub prompt: String,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    #[command(flatten)]
    pub ring: RingArgs,
    /// Look for workers in the room
    #[arg(long)]
    pub discover: bool,
    /// One JSON object with the answer and everything measured
    #[arg(long)]
    pub json: bool,
    /// Print what was measured on standard error
    #[arg(long)]
    pub stats: bool,
    /// Write when each node did what, for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ring: RingArgs,
    #[command(flatten)]
    pub look: LookArgs,
    /// The placement as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// What to ask; `-` reads it from standard input [default: a question about the sky]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens to compare
    #[arg(long, default_value_t = 64, value_parser = count())]
    pub max_tokens: usize,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub ring: RingArgs,
    /// Look for workers in the room
    #[arg(long)]
    pub discover: bool,
    /// The receipt as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Nodes on this computer
    #[arg(long, default_value_t = 3, value_parser = count())]
    pub nodes: usize,
    /// Tokens of the answer at most
    #[arg(long, default_value_t = 64, value_parser = count())]
    pub max_tokens: usize,
    /// What to ask
    #[arg(long, default_value = "Why is the sky blue? Answer in two sentences.")]
    pub prompt: String,
}

/// Definitions of what `bench` prints, shown under its `--help`.
const BENCH_TERMS: &str = "\
weight_bytes_per_token    weight bytes that one decode step reads, all nodes together
read_bandwidth_gb_s       sequential reads of a large buffer with the threads of one node, in 10^9 bytes/s
decode_bandwidth_fraction decode tok/s of one session x weight_bytes_per_token / read bandwidth
peak_rss_bytes            peak resident memory, this computer's processes together
loading_rss_bytes         the same when the weights were loaded; one node only
beyond_bytes              peak_rss_bytes less weights and KV rows of all sessions; one node only
ready_ms                  from opening the model to ready for a prompt; one node only
file_read_ms              reading the model's files front to back with one thread just before, from the
                          page cache where they fit; one node only
huge_page_bytes           memory in huge pages, of the first node; null where the system does not say
hop_us_p50, hop_us_p99    (lap - sum of computes) / hops: links, encryption, frames, threads that wake
hop_overhead_us_p50       hop_us_p50 - half the shortest round trip of a link";

#[derive(Debug, Args)]
#[command(after_help = BENCH_TERMS)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub ring: RingArgs,
    /// Look for workers in the room
    #[arg(long)]
    pub discover: bool,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_parser = count())]
    pub prompt_tokens: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 64, value_parser = count())]
    pub gen_tokens: usize,
    /// Sessions at the same time
    #[arg(long, default_value_t = 1, value_parser = count())]
    pub sessions: usize,
    /// Measured rounds, after one that is not counted
    #[arg(long, default_value_t = 3, value_parser = count())]
    pub rounds: usize,
    /// Prompt rows in one frame [default: 256 on one node, 64 on several]
    #[arg(long, value_parser = count())]
    pub chunk: Option<usize>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Definitions of what `perplexity` prints, shown under its `--help`.
const PERPLEXITY_TERMS: &str = "\
The text is cut into windows of --context tokens. Each begins with the last token of the one before,
so that every token but the first is predicted once.

log_probability_sum       sum over the tokens of ln(probability the model gave it)
perplexity                e ^ (-log_probability_sum / tokens)";

#[derive(Debug, Args)]
#[command(after_help = PERPLEXITY_TERMS)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text, in a file; `-` reads it from standard input [default: a short story that comes with the program]
    #[arg(long, value_name = "FILE")]
    pub text: Option<String>,
    /// Hold all weights as f32, at four bytes each: the reference that quantized arithmetic is held against
    #[arg(long)]
    pub dequantized: bool,
    /// Also by the scalar kernels and by f32 weights: the first must be equal to the bit, the second within 0.5 %
    #[arg(long, conflicts_with = "dequantized")]
    pub compare: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Machines that belong to this swarm are asked what they have, for three seconds at most; who does not answer is named."
)]
pub struct ModelsArgs {
    /// Address of a worker to ask, where discovery does not reach it; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// Do not search the room; ask only those of --peer, and where workers were last
    #[arg(long)]
    pub no_discovery: bool,
    /// Show this computer alone, and ask nobody
    #[arg(long, conflicts_with_all = ["peer", "no_discovery"])]
    pub alone: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// A repository id such as org/name, org/name@revision or org/name:Q4_K_M, or a preset
    pub model: String,
    /// Only these layers, for example 0..11; with the first the embedding, with the last the head
    #[arg(long, value_name = "RANGE")]
    pub layers: Option<String>,
    /// A worker of the swarm that may have it, asked before the Hub; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// Quantize them as well, and keep that form for starts with the same --quant
    #[arg(long, value_enum, ignore_case = true)]
    pub quant: Option<QuantArg>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// What may stay, for example 20GB; 0 removes all that is not in use
    #[arg(long, value_name = "SIZE")]
    pub keep: String,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum SecretCommand {
    /// Print this swarm's secret; whoever has it can join
    Export,
    /// Join the swarm of a secret; the old secret is kept in a file beside it
    Import {
        /// The secret [default: read from standard input, where other users cannot see it]
        secret: Option<String>,
    },
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A folder, a .gguf file, a repository (org/name, org/name@revision, org/name:Q4_K_M), or a preset: smol, tiny, qwen
    #[arg(long, default_value = swarm_weights::cache::DEFAULT_MODEL)]
    pub model: String,
    /// Positions of a session [default: the model's own maximum, at most 4096]
    #[arg(long, value_parser = count())]
    pub context: Option<usize>,
    /// How KV rows are stored
    #[arg(long, value_enum, default_value_t = Kv::F16)]
    pub kv: Kv,
    /// Quantize float weights while they are loaded, on every node: layers and head [default: as they are stored]
    #[arg(long, value_enum, ignore_case = true)]
    pub quant: Option<QuantArg>,
    /// Keep on this computer's disk what was quantized, so that the next start only reads it
    #[arg(long, requires = "quant")]
    pub keep_quantized: bool,
    /// Fetch more than 2 GB without asking
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub compute: ComputeArgs,
}

impl ModelArgs {
    /// The same arguments for another process.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec![format!("--model={}", self.model)];
        words.extend(self.context.map(|context| format!("--context={context}")));
        words.extend(self.yes.then(|| "--yes".to_owned()));
        words.extend(self.quant.map(|quant| format!("--quant={}", quant.kernel().name())));
        words.extend(self.keep_quantized.then(|| "--keep-quantized".to_owned()));
        words.push(format!("--kv={}", if matches!(self.kv, Kv::F16) { "f16" } else { "f32" }));
        let ComputeArgs { threads, cores, memory } = &self.compute;
        words.extend(threads.map(|threads| format!("--threads={threads}")));
        words.extend(cores.as_ref().map(|cores| {
            let cores: Vec<String> = cores.iter().map(ToString::to_string).collect();
            format!("--cores={}", cores.join(","))
        }));
        words.extend(memory.as_ref().map(|memory| format!("--memory={memory}")));
        words
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kv {
    F16,
    F32,
}

/// What float weights become.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum QuantArg {
    /// 8.5 bits a weight, nearly as good as 16
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits a weight
    #[value(name = "q4_0")]
    Q4_0,
    /// 4.5 bits a weight, better than q4_0 where rows are whole blocks of 256; else 5.5
    #[value(name = "q4_k")]
    Q4_K,
}

impl QuantArg {
    /// As the kernels call it.
    pub fn kernel(self) -> Quant {
        match self {
            Self::Q8_0 => Quant::Q8_0,
            Self::Q4_0 => Quant::Q4_0,
            Self::Q4_K => Quant::Q4_K,
        }
    }
}

#[derive(Debug, Args)]
pub struct ComputeArgs {
    /// Compute threads of this node [default: all cores]
    #[arg(long, value_parser = count())]
    pub threads: Option<usize>,
    /// Cores to pin the compute threads to, for example 0,1
    #[arg(long, value_delimiter = ',')]
    pub cores: Option<Vec<usize>>,
    /// Memory to use at most, for example 8GB [default: what is free]
    #[arg(long)]
    pub memory: Option<String>,
}

/// How answers are made.
#[derive(Debug, Args)]
pub struct AnswerArgs {
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 512, value_parser = count())]
    pub max_tokens: usize,
    /// 0 takes the most likely token, higher is more varied
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Choose among this many most likely tokens, 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: u32,
    /// Choose among the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Above 1: make tokens that came already less likely
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Equal seeds give equal answers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// What the model is told first
    #[arg(long)]
    pub system: Option<String>,
    /// Text that ends the answer; may be repeated
    #[arg(long)]
    pub stop: Vec<String>,
}

/// Who is in the ring.
#[derive(Debug, Default, Args)]
pub struct RingArgs {
    /// Nodes on this computer: all but one are started for the duration of the command
    #[arg(long, value_parser = count(), conflicts_with_all = ["peer", "workers"])]
    pub nodes: Option<usize>,
    /// Address of a worker, where discovery does not reach it; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// The code that an unpaired worker shows [default: asked for, on a terminal]
    #[arg(long, value_name = "CODE", env = "SWARM_OS_JOIN", hide_env = true)]
    pub join: Option<String>,
    /// Fewer workers than this are an error
    #[arg(long, value_name = "N", value_parser = count())]
    pub workers: Option<usize>,
    /// Search on this network interface only; may be repeated [default: all]
    #[arg(long, value_name = "NAME", conflicts_with = "nodes")]
    pub interface: Vec<String>,
    /// How long to look for workers [default: 3, or 30 when workers are required]
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    pub wait: Option<u32>,
    /// The layers of each node, this one first, for example 0..11,11..22 or here=0..11,den=11..22 [default: by memory
    /// and speed]
    #[arg(long)]
    pub layers: Option<String>,
    /// Share the layers: where it gains or must be, with every node, or not at all [default: auto, with --nodes always]
    #[arg(long, value_enum)]
    pub split: Option<SplitArg>,
    /// What the placement is best at [default: latency, where a split is asked for throughput]
    #[arg(long, value_enum)]
    pub objective: Option<ObjectiveArg>,
}

/// Whether layers are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SplitArg {
    Auto,
    Always,
    Never,
}

/// What a placement is best at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ObjectiveArg {
    /// One user's tokens per second
    Latency,
    /// All users' tokens per second together, and long prompts
    Throughput,
    /// Few nodes, with room left
    Fit,
}

/// How commands that look for workers by themselves are kept from it.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// Do not search the room; use --peer only
    #[arg(long)]
    pub no_discovery: bool,
    /// Use this computer alone
    #[arg(long, conflicts_with_all = ["peer", "workers", "nodes", "no_discovery"])]
    pub alone: bool,
}

/// A number from 1 on.
fn count() -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser;
    clap::value_parser!(u32).range(1..).map(|number| number as usize)
}

/// The command line with the original's `--role A` and `--role B` turned into a command.
pub fn with_role(mut args: Vec<OsString>) -> Vec<OsString> {
    let is_option = |arg: &OsString| arg.to_str().is_some_and(|arg| arg.starts_with('-'));
    if !args.get(1).is_some_and(is_option) {
        return args;
    }
    let words: Vec<String> = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let at = words.iter().position(|word| word == "--role" || word.starts_with("--role="));
    let role = at.and_then(|at| match words[at].strip_prefix("--role=") {
        Some(role) => Some(role),
        None => words.get(at + 1).map(String::as_str),
    });
    let command = match role {
        Some("A" | "a") => "chat",
        Some("B" | "b") => "worker",
        _ => return args,
    };
    args.insert(1, command.into());
    args
}

/// A model by what the user typed, as a path where it is one, so that it does not depend on the folder of the
/// process that opens it.
pub fn absolute_model(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}
