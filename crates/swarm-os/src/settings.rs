//! What the command line means: checked once, before anything is opened or started.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use swarm_kernels::KvType;
use swarm_link::{ConfigDir, Identity, PairCode, parse_peer};
use swarm_node::pairing::pair_with_any;
use swarm_node::{
    Around, EngineConfig, FoundModel, Message, NodeError, Objective, Prompt, Request, Sampling, Split,
    WorkerSearch, find_model, machine,
};
use swarm_ring::PlaceError;

use crate::args::{
    AnswerArgs, ComputeArgs, Kv, LookArgs, ModelArgs, ObjectiveArg, QuantArg, RingArgs, SplitArg,
    absolute_model,
};
use crate::commands::pair::pair_failure;
use crate::failure::Failure;
use crate::present::{pairing, text};
use crate::quant;

/// Longest wait for a peer's name to be looked up.
const LOOK_UP: Duration = Duration::from_secs(3);
/// How long to look when nobody is needed.
const WAIT_OPTIONAL: u32 = 3;
/// How long to look when somebody is needed.
const WAIT_REQUIRED: u32 = 30;
/// Workers of this computer answer at once; a very busy computer takes longer.
const WAIT_LOCAL: Duration = Duration::from_secs(20);
/// More than this is fetched only when somebody says so.
const FETCH_UNASKED: u64 = 2_000_000_000;
/// Sessions of a command that has one at a time: the next may begin while the last is being closed.
const SESSIONS: usize = 4;

/// Everything needed to start an engine.
pub struct Start {
    pub config: EngineConfig,
    pub identity: Identity,
    pub local: Option<LocalRing>,
    /// The code of a worker that is not paired yet.
    pub join: Option<PairCode>,
}

/// The nodes that are started on this computer.
pub struct LocalRing {
    pub workers: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// Node `i` gets the cores `i * threads ..`, modulo their number.
    pub pinned: bool,
    pub model: PathBuf,
    /// They keep what they quantize.
    pub keep_quantized: bool,
}

/// Whom a command looks for, beyond the peers it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Search {
    /// Look in the room.
    pub discover: bool,
    /// Nobody found is an error.
    pub required: bool,
}

impl Search {
    /// Nobody.
    pub const NONE: Self = Self { discover: false, required: false };

    /// Of a command that looks by itself.
    pub fn of(look: &LookArgs, required: bool) -> Self {
        Self { discover: !look.alone && !look.no_discovery, required }
    }

    /// Of a command that looks when told to, by a code or a split as well: then somebody must be there.
    pub fn when(discover: bool, ring: &RingArgs) -> Self {
        let here = ring.nodes.is_some() || ring.layers.is_some();
        let split = ring.split == Some(SplitArg::Always) && !here;
        let others = ring.workers.is_some() || split || (ring.join.is_some() && ring.nodes.is_none());
        let discover = discover || (others && ring.peer.is_empty());
        Self { discover, required: discover }
    }
}

/// This user's folders and who this node is.
pub fn identity() -> Result<(ConfigDir, Identity), Failure> {
    let folders = ConfigDir::locate()?;
    let identity = Identity::load_or_create(folders.config())?;
    Ok((folders, identity))
}

/// Where things are kept that may be lost.
pub fn state_folder() -> Result<PathBuf, Failure> {
    Ok(ConfigDir::locate()?.state().to_path_buf())
}

impl Start {
    /// Checks `model` and `ring` and puts them together.
    pub fn new(model: &ModelArgs, ring: &RingArgs, search: Search) -> Result<Self, Failure> {
        let (cut_nodes, cut) = ring.layers.as_deref().map(layers).transpose()?.unzip();
        let split = split(ring);
        let nodes = local_nodes(ring, cut.as_deref(), search)?.filter(|_| split != Split::Never);
        let peers = ring.peer.iter().map(|peer| peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
        let (folders, identity) = identity()?;
        let interfaces = interfaces(&ring.interface)?;
        let around = Around {
            identity: &identity,
            named: &peers,
            discover: search.discover,
            interfaces: &interfaces,
            state_dir: search.discover.then(|| folders.state()),
            within: Duration::from_secs(u64::from(ring.wait.unwrap_or(WAIT_OPTIONAL))),
            answers_within: Duration::ZERO,
        };
        // Whoever shares the layers with nobody asks nobody for them.
        let shares = nodes.is_none() && split != Split::Never && (search.discover || !peers.is_empty());
        let join = ring.join.as_deref().map(|code| pair_code("--join", code)).transpose()?;
        let FoundModel { path, lender } = find(&model.model, shares.then_some(&around), join.as_ref())?;
        let mut config = model_config(model, &path)?;
        config.lender = lender;
        config.sessions_max = SESSIONS;
        config.state_dir = Some(folders.state().to_path_buf());
        config.profile_dir = config.state_dir.clone();
        config.split = split;
        config.objective = ring.objective.map(|objective| match objective {
            ObjectiveArg::Latency => Objective::Latency,
            ObjectiveArg::Throughput => Objective::Throughput,
            ObjectiveArg::Fit => Objective::Fit,
        });
        config.cut_nodes = cut_nodes.unwrap_or_default();
        let mut local = None;
        if let Some(nodes) = nodes.filter(|&nodes| nodes > 1) {
            room_for(nodes, &path)?;
            // Workers of one command are gone with it.
            config.state_dir = None;
            let threads = model.compute.threads.unwrap_or_else(|| (machine::cores() / nodes).max(1));
            config.threads = Some(threads);
            config.name = node_name(0, nodes);
            config.search = WorkerSearch {
                at_least: nodes - 1,
                at_most: nodes - 1,
                within: WAIT_LOCAL,
                ..WorkerSearch::default()
            };
            local = Some(LocalRing {
                workers: nodes - 1,
                threads,
                pinned: false,
                model: absolute_model(path),
                keep_quantized: config.keep_quantized,
            });
        } else if nodes.is_none() && split != Split::Never {
            config.search = worker_search(ring, search, peers, cut.as_deref())?;
        }
        config.cut = cut;
        Ok(Self { config, identity, local, join })
    }

    /// The same model on this computer alone, with all its cores.
    pub fn alone(&self, compute: &ComputeArgs) -> Result<Self, Failure> {
        let mut config = self.config.clone();
        config.search = WorkerSearch::default();
        config.cut = None;
        config.cut_nodes = Vec::new();
        config.split = Split::Never;
        if config.threads != compute.threads {
            config.threads = compute.threads;
            // Measured with other threads.
            config.read_gb_s = None;
        }
        // Another instance: two engines of one process must not be taken for one node.
        let identity = self.identity.another_instance()?;
        Ok(Self { config, identity, local: None, join: None })
    }
}

/// Where a model is. Where the Hub is away, it may be with a worker that shows the code of `--join`.
fn find(model: &str, around: Option<&Around<'_>>, join: Option<&PairCode>) -> Result<FoundModel, Failure> {
    let look = || find_model(model, around, &|news| text::note(news));
    let found = match (look(), around, join) {
        (Err(NodeError::NotLent { showing, .. }), Some(around), Some(code)) if !showing.is_empty() => {
            let met = pair_with_any(&showing, around.identity, code, &machine::host_name());
            let met = met.map_err(pair_failure)?;
            text::note(&pairing::paired(&met.name, met.joined));
            look()?
        }
        (found, _, _) => found?,
    };
    if let Some(lender) = &found.lender {
        text::note(&format!("{} has it", lender.name()));
    }
    Ok(found)
}

/// What `model` says, for an engine that is alone.
pub fn model_config(model: &ModelArgs, path: &std::path::Path) -> Result<EngineConfig, Failure> {
    let mut config = EngineConfig::new(path_text(&model.model, path));
    config.context = model.context;
    config.fetch_bytes_max = (!model.yes).then_some(FETCH_UNASKED);
    config.kv_type = match model.kv {
        Kv::F16 => KvType::F16,
        Kv::F32 => KvType::F32,
    };
    config.quant = model.quant.map(QuantArg::kernel);
    config.keep_quantized = model.keep_quantized;
    quant::check(path, config.quant)?.iter().for_each(|note| text::note(note));
    compute(&model.compute, &mut config)?;
    Ok(config)
}

/// Opens the model, so that one that cannot be used is told before any worker is started.
fn room_for(nodes: usize, model: &std::path::Path) -> Result<(), Failure> {
    let opened = swarm_weights::Checkpoint::open(model).map_err(NodeError::from)?;
    let layers = opened.config().num_hidden_layers;
    if nodes <= layers {
        Ok(())
    } else {
        Err(NodeError::from(PlaceError::TooManyNodes { nodes, layers }).into())
    }
}

/// Workers of one command are there to be used; those of others are used where they help.
fn split(ring: &RingArgs) -> Split {
    match ring.split {
        Some(SplitArg::Auto) => Split::Auto,
        Some(SplitArg::Always) => Split::Always,
        Some(SplitArg::Never) => Split::Never,
        None if ring.nodes.is_some() => Split::Always,
        None => Split::Auto,
    }
}

/// The name of node `index` of a ring on one computer. Names are padded, because ring order is their order.
pub fn node_name(index: usize, nodes: usize) -> String {
    let digits = nodes.to_string().len();
    format!("node-{:0digits$}", index + 1)
}

/// What workers are told the model is called: what the user typed, unless that is a path, which leads nowhere on
/// other computers but says here what is meant. The revision of a repository is looked up once: all nodes and all
/// later steps mean the same commit.
fn path_text(typed: &str, path: &std::path::Path) -> String {
    if std::path::Path::new(typed).exists() {
        return absolute_model(path.to_path_buf()).to_string_lossy().into_owned();
    }
    swarm_weights::cache::pinned_name(path).unwrap_or_else(|| typed.to_owned())
}

/// Threads, cores and memory, into `config`.
fn compute(compute: &ComputeArgs, config: &mut EngineConfig) -> Result<(), Failure> {
    config.threads = compute.threads;
    config.cores = cores(compute)?;
    config.memory_bytes = memory(compute)?;
    Ok(())
}

/// The cores to pin to, each of which must be there.
pub fn cores(compute: &ComputeArgs) -> Result<Option<Vec<usize>>, Failure> {
    let Some(cores) = &compute.cores else { return Ok(None) };
    let here = machine::core_ids();
    match cores.iter().find(|core| !here.contains(core)) {
        Some(core) => {
            let here: Vec<String> = here.iter().map(ToString::to_string).collect();
            Err(Failure::usage(format!(
                "--cores: there is no core {core} for this process; there are {}",
                here.join(",")
            )))
        }
        None => Ok(Some(cores.clone())),
    }
}

/// `--memory`, in bytes.
pub fn memory(compute: &ComputeArgs) -> Result<Option<u64>, Failure> {
    compute
        .memory
        .as_deref()
        .map(|text| parse_bytes(text).map_err(|why| Failure::usage(format!("--memory: {why}"))))
        .transpose()
}

/// How many nodes this computer gets; `None` when the ring is made of others.
fn local_nodes(
    ring: &RingArgs,
    cut: Option<&[Range<usize>]>,
    search: Search,
) -> Result<Option<usize>, Failure> {
    match (ring.nodes, cut) {
        (Some(nodes), Some(cut)) if nodes != cut.len() => Err(Failure::usage(format!(
            "--layers names the layers of {} nodes, but --nodes is {nodes}; make them agree",
            cut.len()
        ))),
        (Some(nodes), _) => Ok(Some(nodes)),
        // Without anybody to look for, a cut says how many nodes there are.
        (None, Some(cut)) if !search.discover && ring.peer.is_empty() => Ok(Some(cut.len())),
        (None, _) => Ok(None),
    }
}

fn worker_search(
    ring: &RingArgs,
    search: Search,
    peers: Vec<Vec<SocketAddr>>,
    cut: Option<&[Range<usize>]>,
) -> Result<WorkerSearch, Failure> {
    let somebody = usize::from(search.required || !peers.is_empty());
    let of_cut = cut.map_or(0, |cut| cut.len().saturating_sub(1));
    let at_least = ring.workers.unwrap_or(0).max(somebody).max(of_cut);
    let anywhere = search.discover || !peers.is_empty();
    if at_least > 0 && !anywhere {
        return Err(Failure::usage(
            "a worker is required, but there is nowhere to look for one; say --peer HOST:PORT, or leave out --no-discovery",
        ));
    }
    let wait = ring.wait.unwrap_or(if at_least > 0 { WAIT_REQUIRED } else { WAIT_OPTIONAL });
    Ok(WorkerSearch {
        peers,
        discover: search.discover,
        at_least,
        at_most: if anywhere { usize::MAX } else { 0 },
        within: Duration::from_secs(u64::from(wait)),
        pairing: false,
        interfaces: interfaces(&ring.interface)?,
    })
}

/// The network interfaces of `--interface`, each of which must be there.
pub fn interfaces(names: &[String]) -> Result<Vec<String>, Failure> {
    // Where the system does not tell, the names are taken as they are.
    let here = if names.is_empty() { Vec::new() } else { swarm_link::interfaces().unwrap_or_default() };
    let missing = |name: &&String| !here.is_empty() && !here.iter().any(|found| found.name == **name);
    match names.iter().find(missing) {
        Some(name) => {
            let mut here: Vec<&str> = here.iter().map(|found| found.name.as_str()).collect();
            here.dedup();
            let here = here.join(", ");
            Err(Failure::usage(format!("--interface: no {name:?} with an address is here; there are {here}")))
        }
        None => Ok(names.to_vec()),
    }
}

/// The code that `setting` gives, as the person who gave it calls that setting: `--join`, or `CODE`.
pub fn pair_code(setting: &str, text: &str) -> Result<PairCode, Failure> {
    PairCode::parse(text)
        .map_err(|error| Failure::usage(format!("{setting}: {text:?} is no pairing code: {error}")))
}

/// The addresses behind one `--peer`.
pub fn peer_addresses(peer: &str) -> Result<Vec<SocketAddr>, Failure> {
    parse_peer(peer, LOOK_UP)
        .map_err(|error| Failure::usage(format!("--peer: {}", swarm_node::chain(&error))))
}

/// `0..11,11..22`, or `here=0..11,den=11..22`: the names, if there are any, and the ranges.
pub fn layers(text: &str) -> Result<(Vec<String>, Vec<Range<usize>>), Failure> {
    let range = |part: &str| -> Option<Range<usize>> {
        let (start, end) = part.trim().split_once("..")?;
        Some(start.parse().ok()?..end.parse().ok()?)
    };
    let (mut names, mut ranges) = (Vec::new(), Vec::new());
    for part in text.split(',') {
        let (name, layers) =
            part.rsplit_once('=').map_or((None, part), |(name, layers)| (Some(name), layers));
        names.extend(name.map(|name| name.trim().to_owned()));
        ranges.extend(range(layers));
    }
    let parts = text.split(',').count();
    if ranges.len() == parts && (names.is_empty() || names.len() == parts) {
        return Ok((names, ranges));
    }
    Err(Failure::usage(format!(
        "--layers: {text:?} is not a list of layer ranges; write it like 0..11,11..22 or here=0..11,den=11..22"
    )))
}

/// `8GB`, `512 MiB`, `1000000`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(format!("{text:?} has a unit that is not known; write it like 8GB or 512MiB")),
    };
    let wrong = || format!("{text:?} is not an amount of memory; write it like 8GB or 512MiB");
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    if !bytes.is_finite() || bytes < 1.0 || bytes >= u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// A request with these sampling numbers, which are checked here.
pub fn request(args: &AnswerArgs, prompt: Prompt) -> Result<Request, Failure> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    sampling.validate().map_err(|error| NodeError::Request(error.to_string()))?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Failure::usage("--stop: an empty text would end every answer at once; leave it out"));
    }
    Ok(Request {
        max_tokens: Some(args.max_tokens),
        sampling,
        stop: args.stop.clone(),
        ..Request::new(prompt)
    })
}

/// One question, put into the chat template unless it is `raw`.
pub fn prompt(text: String, system: Option<&str>, raw: bool) -> Prompt {
    if raw {
        return Prompt::Raw(text);
    }
    let system = system.map(Message::system);
    Prompt::Chat(system.into_iter().chain([Message::user(text)]).collect())
}

/// What was typed as the prompt, or all of standard input for `-`, without its last newline.
pub fn prompt_text(typed: &str) -> Result<String, Failure> {
    if typed != "-" {
        return Ok(typed.to_owned());
    }
    let mut text = std::io::read_to_string(std::io::stdin().lock())
        .map_err(|error| Failure::usage(format!("the prompt cannot be read from standard input: {error}")))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        for (text, bytes) in [("8GB", 8_000_000_000), ("1.5 MiB", 1_572_864), ("12", 12), ("2k", 2_000)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1", "1..2", "8 XB", "0", "1e9", "99999999999999999999TB", "nan"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_code_or_a_split_means_that_somebody_is_there() {
        #[derive(clap::Parser)]
        struct Ring {
            #[command(flatten)]
            ring: RingArgs,
        }
        let when = |args: &[&str]| {
            let ring = <Ring as clap::Parser>::parse_from([&["test"], args].concat()).ring;
            Search::when(false, &ring)
        };
        assert_eq!(when(&["--join", "1234-5678"]), Search { discover: true, required: true });
        assert_eq!(when(&["--join", "1234-5678", "--peer", "den:7000"]), Search::NONE);
        assert_eq!(when(&["--join", "1234-5678", "--nodes", "2"]), Search::NONE);
        assert_eq!(when(&["--split", "always"]), Search { discover: true, required: true });
        assert_eq!(when(&["--split", "always", "--nodes", "2"]), Search::NONE);
        assert_eq!(when(&["--split", "always", "--layers", "0..5,5..10"]), Search::NONE);
        assert_eq!(when(&["--split", "always", "--peer", "den:7000"]), Search::NONE);
        assert_eq!(when(&["--split", "auto"]), Search::NONE);
        assert_eq!(when(&[]), Search::NONE);
    }

    #[test]
    fn cuts() {
        assert_eq!(layers("0..2, 2..5").unwrap(), (Vec::new(), vec![0..2, 2..5]));
        let named = (vec!["a=b".to_owned(), "den".to_owned()], vec![0..2, 2..5]);
        assert_eq!(layers("a=b=0..2, den = 2..5").unwrap(), named);
        assert!(layers("a=0..2,2..5").is_err());
        for text in ["", "0-2", "0..", "..2", "0..2;2..3", "0..2,", "-1..2", "0..99999999999999999999"] {
            assert!(layers(text).is_err(), "{text}");
        }
    }

    #[test]
    fn local_names_sort_like_their_places() {
        let names: Vec<_> = (0..12).map(|index| node_name(index, 12)).collect();
        assert!(names.is_sorted(), "{names:?}");
        assert_eq!(node_name(1, 3), "node-2");
    }
}
