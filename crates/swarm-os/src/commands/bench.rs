//! `swarm-os bench`: prefill, decode, memory, and what the ring itself costs. What each number means is under
//! `--help`.

use std::thread;
use std::time::Instant;

use serde::Serialize;
use swarm_kernels::Quant;
use swarm_node::{Engine, Finish, Outcome, Prompt, Request, machine};

use super::run;
use crate::args::BenchArgs;
use crate::failure::{Code, Failure};
use crate::present::progress::Progress;
use crate::present::report::json;
use crate::present::text::{self, ms, number};
use crate::settings::{Search, Start};
use crate::start::{Running, node_cores, read_bandwidth};

/// What `bench --json` prints.
#[derive(Debug, Serialize)]
struct BenchReport {
    model: String,
    fingerprint: String,
    quant: Option<&'static str>,
    numerics: String,
    prompt_tokens: usize,
    gen_tokens: usize,
    sessions: usize,
    rounds: usize,
    /// Medians over the rounds, all sessions together.
    prefill_tok_per_s: Option<f64>,
    decode_tok_per_s: Option<f64>,
    /// `[min, max]` over the rounds.
    prefill_range: Option<[f64; 2]>,
    decode_range: Option<[f64; 2]>,
    /// Of one session alone; with one session the same as above.
    decode_tok_per_s_single: Option<f64>,
    /// Of one session, as the planner said before the layers were loaded.
    predicted_tok_per_s: f64,
    ttft_ms_p50: Option<f64>,
    weight_bytes_per_token: u64,
    read_bandwidth_gb_s: f64,
    decode_bandwidth_fraction: Option<f64>,
    peak_rss_bytes: Option<u64>,
    loading_rss_bytes: Option<u64>,
    beyond_bytes: Option<i64>,
    ready_ms: Option<f64>,
    file_read_ms: Option<f64>,
    huge_page_bytes: Option<u64>,
    hop_overhead_us_p50: Option<f64>,
    /// All that a lap takes beyond its computes, per hop: the links, too.
    hop_us_p50: Option<f64>,
    hop_us_p99: Option<f64>,
    lap_ms_p50: Option<f64>,
    nodes: Vec<BenchNode>,
}

#[derive(Debug, Serialize)]
struct BenchNode {
    name: String,
    layers: [usize; 2],
    threads: Option<usize>,
    bytes_loaded: u64,
    weight_bytes_per_token: u64,
    compute_ms_p50: Option<f64>,
    round_trip_us: Option<u64>,
    /// Of the processes on this computer.
    peak_rss_bytes: Option<u64>,
}

pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let mut start = Start::new(&args.model, &args.ring, Search::when(args.discover, &args.ring))?;
    if start.config.context.is_none() {
        start.config.context = Some(args.prompt_tokens + args.gen_tokens);
    }
    start.config.sessions_max = args.sessions + 1;
    start.config.chunk = args.chunk;
    if let Some(local) = &mut start.local {
        local.pinned = args.model.compute.threads.is_some();
    }
    if let (None, None, Some(threads)) = (&start.local, &start.config.cores, start.config.threads) {
        start.config.cores = Some(node_cores(0, threads));
    }
    let threads = start.config.threads;
    let cores = start.first_cores();
    let local = start.local.is_some();
    let progress = Progress::new(!local);
    let alone = !local && start.config.search.at_most == 0;
    let mut loading = if alone { Some(Loading::read(&start.config.model)?) } else { None };
    let starting = Instant::now();
    let running = start.go(&progress)?;
    if let Some(loading) = &mut loading {
        loading.ready_ms = starting.elapsed().as_secs_f64() * 1e3;
        loading.rss_bytes = machine::peak_rss();
    }
    // A round that is not counted: memory is touched, pools are awake.
    round(&running.engine, args, args.sessions)?;
    let mut rounds = Vec::new();
    for _ in 0..args.rounds {
        rounds.push(round(&running.engine, args, args.sessions)?);
    }
    // The ring's cost and the bandwidth fraction are of one session, whose laps wait for nobody.
    let single = if args.sessions == 1 { None } else { Some(round(&running.engine, args, 1)?) };
    let mut report = report(args, &running, &rounds, single.as_ref(), threads.filter(|_| local));
    report.huge_page_bytes = machine::huge_page_bytes();
    if let Some(loading) = loading {
        let kv = kv_bytes(&running, args.sessions.max(1));
        let known = report.nodes.iter().map(|node| node.bytes_loaded).sum::<u64>().saturating_add(kv);
        report.beyond_bytes = report.peak_rss_bytes.map(|peak| peak as i64 - known as i64);
        report.loading_rss_bytes = loading.rss_bytes;
        report.ready_ms = Some(loading.ready_ms);
        report.file_read_ms = Some(loading.file_read_ms);
    }
    drop(running);
    // Last, because its buffer would count as peak memory.
    report.read_bandwidth_gb_s = read_bandwidth(threads, cores)?;
    report.decode_bandwidth_fraction = report
        .decode_tok_per_s_single
        .map(|speed| speed * report.weight_bytes_per_token as f64 / (report.read_bandwidth_gb_s * 1e9));
    if args.json {
        json(&report)?
    } else {
        text::say(&words(&report))?
    }
    if let Some(warning) = small_pages(report.huge_page_bytes, report.nodes.first()) {
        text::note(&warning);
    }
    Ok(())
}

/// What becoming ready takes, beside the least it could take.
struct Loading {
    file_read_ms: f64,
    ready_ms: f64,
    rss_bytes: Option<u64>,
}

impl Loading {
    /// Reads the model's files twice: once so that the page cache has what it can hold, once to measure.
    fn read(model: &str) -> Result<Self, Failure> {
        let model = swarm_node::open_model(model)?;
        let unread = |error| Failure::usage(format!("the model's files cannot be read: {error}"));
        let mut buffer = vec![0; 1 << 20];
        let mut read = || -> Result<f64, Failure> {
            let start = Instant::now();
            for file in model.files() {
                let mut file = std::fs::File::open(file).map_err(unread)?;
                while std::io::Read::read(&mut file, &mut buffer).map_err(unread)? > 0 {}
            }
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        read()?;
        Ok(Self { file_read_ms: read()?, ready_ms: 0.0, rss_bytes: None })
    }
}

/// KV rows of `sessions` that came to their end, on the first node.
fn kv_bytes(running: &Running, sessions: usize) -> u64 {
    let positions = running.engine.context().next_multiple_of(swarm_kernels::TILE) as u64;
    let nodes = running.engine.nodes();
    let one = nodes.first().and_then(|node| node.kv_bytes_per_position).unwrap_or(0);
    one.saturating_mul(positions).saturating_mul(sessions as u64)
}

/// One sentence when large weights are mostly in small pages. Nothing where the system does not say.
fn small_pages(huge: Option<u64>, node: Option<&BenchNode>) -> Option<String> {
    /// Smaller weights fit the translation buffers in small pages too.
    const LARGE: u64 = 64 << 20;
    let (huge, weights) = (huge?, node?.bytes_loaded);
    (weights >= LARGE && huge < weights / 2).then(|| {
        format!(
            "warning: {} of {} of weights are in huge pages, which costs speed; as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            text::bytes(huge),
            text::bytes(weights)
        )
    })
}

/// One round of `sessions` answers at the same time.
struct Round {
    prefill_tok_per_s: Option<f64>,
    decode_tok_per_s: Option<f64>,
    outcomes: Vec<Outcome>,
}

/// When a session's first and last token came, and its outcome.
type Timed = (Instant, Instant, Outcome);

fn round(engine: &Engine, args: &BenchArgs, sessions: usize) -> Result<Round, Failure> {
    let start = Instant::now();
    let answers: Vec<Result<Timed, Failure>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..sessions)
            .map(|session| scope.spawn(move || timed(engine, request(engine, args, session))))
            .collect();
        let lost = || Err(Failure::new(Code::Failed, "a session of the benchmark ended by itself"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| lost())).collect()
    });
    let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let first = answers.iter().map(|answer| answer.0).min().unwrap_or(start);
    let prefilled = answers.iter().map(|answer| answer.0).max().unwrap_or(start);
    let last = answers.iter().map(|answer| answer.1).max().unwrap_or(start);
    let rate = |count: usize, seconds: f64| (count > 0 && seconds > 0.0).then(|| count as f64 / seconds);
    let outcomes: Vec<Outcome> = answers.into_iter().map(|answer| answer.2).collect();
    let (prefill, decode) = match outcomes.as_slice() {
        // Of one session the engine knows it better: without the start of this round's threads.
        [one] => (one.prefill_tok_per_s(), one.decode_tok_per_s()),
        all => (
            rate(all.iter().map(|one| one.prompt_tokens).sum(), (prefilled - start).as_secs_f64()),
            rate(
                all.iter().map(|one| one.token_ids.len().saturating_sub(1)).sum(),
                (last - first).as_secs_f64(),
            ),
        ),
    };
    Ok(Round { prefill_tok_per_s: prefill, decode_tok_per_s: decode, outcomes })
}

fn timed(engine: &Engine, request: Request) -> Result<Timed, Failure> {
    let mut generation = engine.generate(request)?;
    let mut last = Instant::now();
    let mut first = None;
    for _ in &mut generation {
        last = Instant::now();
        first.get_or_insert(last);
    }
    let outcome = generation.outcome().clone();
    run::check(engine, &outcome)?;
    match (&outcome.finish, first) {
        (Finish::Cancelled, _) | (_, None) => Err(Failure::silent(Code::Interrupted)),
        (_, Some(first)) => Ok((first, last, outcome)),
    }
}

/// A prompt of valid ids that no cache can know: equal in every run, different in every session.
fn request(engine: &Engine, args: &BenchArgs, session: usize) -> Request {
    let vocabulary = engine.tokenizer().vocab_size().max(1) as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ session as u64;
    let mut next = || {
        // The generator of Knuth's MMIX; the upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    };
    let ids = (0..args.prompt_tokens).map(|_| next()).collect();
    Request { max_tokens: Some(args.gen_tokens), ignore_end: true, ..Request::new(Prompt::Ids(ids)) }
}

fn report(
    args: &BenchArgs,
    running: &Running,
    rounds: &[Round],
    single: Option<&Round>,
    threads: Option<usize>,
) -> BenchReport {
    let engine = &running.engine;
    let prefill = sorted(rounds.iter().filter_map(|round| round.prefill_tok_per_s));
    let decode = sorted(rounds.iter().filter_map(|round| round.decode_tok_per_s));
    let ttft = sorted(rounds.iter().flat_map(|round| &round.outcomes).filter_map(|one| ms(one.ttft_us)));
    let alone = single.or(rounds.last()).and_then(|round| round.outcomes.first());
    let nodes = nodes(running, alone, threads);
    BenchReport {
        model: engine.model_name().to_owned(),
        fingerprint: text::hex(&engine.fingerprint()),
        quant: engine.quant().map(Quant::name),
        numerics: swarm_kernels::numerics(engine.quant()),
        prompt_tokens: args.prompt_tokens,
        gen_tokens: args.gen_tokens,
        sessions: args.sessions,
        rounds: args.rounds,
        prefill_tok_per_s: median(&prefill),
        decode_tok_per_s: median(&decode),
        prefill_range: range(&prefill),
        decode_range: range(&decode),
        decode_tok_per_s_single: single.map_or(median(&decode), |single| single.decode_tok_per_s),
        predicted_tok_per_s: engine.placement().tok_per_s,
        ttft_ms_p50: median(&ttft),
        weight_bytes_per_token: nodes.iter().map(|node| node.weight_bytes_per_token).sum(),
        read_bandwidth_gb_s: 0.0,
        decode_bandwidth_fraction: None,
        peak_rss_bytes: nodes.iter().filter_map(|node| node.peak_rss_bytes).reduce(|sum, bytes| sum + bytes),
        loading_rss_bytes: None,
        beyond_bytes: None,
        ready_ms: None,
        file_read_ms: None,
        huge_page_bytes: None,
        hop_overhead_us_p50: alone.and_then(|outcome| hop_overhead(&nodes, outcome)),
        hop_us_p50: alone.and_then(|outcome| hop(nodes.len(), outcome.telemetry.decode.overhead_us.p50())),
        hop_us_p99: alone.and_then(|outcome| hop(nodes.len(), outcome.telemetry.decode.overhead_us.p99())),
        lap_ms_p50: alone.and_then(|outcome| ms(outcome.telemetry.decode.lap_us.p50())),
        nodes,
    }
}

fn nodes(running: &Running, alone: Option<&Outcome>, threads: Option<usize>) -> Vec<BenchNode> {
    let workers = running.workers.as_ref().map(|workers| workers.process_ids()).unwrap_or_default();
    let stages = alone.map(|outcome| outcome.telemetry.decode.stages.as_slice()).unwrap_or_default();
    let node = |(index, node): (usize, swarm_node::NodeReport)| BenchNode {
        peak_rss_bytes: match index {
            0 => machine::peak_rss(),
            worker => workers.get(worker - 1).and_then(|&process| machine::peak_rss_of(process)),
        },
        layers: [node.layers.start, node.layers.end],
        threads,
        bytes_loaded: node.bytes_loaded,
        weight_bytes_per_token: node.weight_bytes_per_token,
        compute_ms_p50: stages.get(index).and_then(|stage| ms(stage.compute_us.p50())),
        round_trip_us: node.round_trip_us,
        name: node.name,
    };
    running.engine.nodes().into_iter().enumerate().map(node).collect()
}

/// What a hop costs beyond the network: encryption, frames, threads that wake. Null for one node.
fn hop_overhead(nodes: &[BenchNode], outcome: &Outcome) -> Option<f64> {
    let hops = nodes.len();
    if hops < 2 {
        return None;
    }
    let lap = outcome.telemetry.decode.overhead_us.p50()? as f64;
    let round_trip = nodes.iter().filter_map(|node| node.round_trip_us).min()? as f64;
    Some(lap / hops as f64 - round_trip / 2.0)
}

/// A lap's overhead on each of its hops. Null for one node.
fn hop(hops: usize, overhead_us: Option<u64>) -> Option<f64> {
    overhead_us.filter(|_| hops > 1).map(|us| us as f64 / hops as f64)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

fn range(sorted: &[f64]) -> Option<[f64; 2]> {
    Some([*sorted.first()?, *sorted.last()?])
}

/// Memory that went back to the system before its peak can make a difference negative.
fn signed_bytes(bytes: i64) -> String {
    format!("{}{}", if bytes < 0 { "-" } else { "" }, text::bytes(bytes.unsigned_abs()))
}

fn words(report: &BenchReport) -> String {
    let speed = |median: Option<f64>, range: Option<[f64; 2]>| match range {
        Some([min, max]) => format!("{} tok/s ({min:.1} to {max:.1})", number(median, 1, "")),
        None => "-".to_owned(),
    };
    let rows = [
        ("prefill", speed(report.prefill_tok_per_s, report.prefill_range)),
        ("decode", speed(report.decode_tok_per_s, report.decode_range)),
        ("decode, one session", number(report.decode_tok_per_s_single, 1, " tok/s")),
        ("predicted", format!("{:.1} tok/s", report.predicted_tok_per_s)),
        ("first token", number(report.ttft_ms_p50, 1, " ms")),
        ("lap", number(report.lap_ms_p50, 2, " ms")),
        ("weights per token", text::bytes(report.weight_bytes_per_token)),
        ("read bandwidth", format!("{:.1} GB/s", report.read_bandwidth_gb_s)),
        ("decode reaches", number(report.decode_bandwidth_fraction.map(|part| part * 100.0), 0, " % of it")),
        ("peak memory", report.peak_rss_bytes.map_or_else(|| "-".to_owned(), text::bytes)),
        ("beyond weights and KV", report.beyond_bytes.map_or_else(|| "-".to_owned(), signed_bytes)),
        ("in huge pages", report.huge_page_bytes.map_or_else(|| "-".to_owned(), text::bytes)),
        ("ready after", number(report.ready_ms, 0, " ms")),
        ("reading the file", number(report.file_read_ms, 0, " ms")),
        (
            "hop",
            format!("{} (p99 {})", number(report.hop_us_p50, 0, " us"), number(report.hop_us_p99, 0, "")),
        ),
        ("of it not the link", number(report.hop_overhead_us_p50, 0, " us")),
    ];
    let rows: Vec<Vec<String>> = rows.map(|(name, value)| vec![name.to_owned(), value]).to_vec();
    let mut table = vec![["node", "layers", "weights", "compute", "peak memory"].map(String::from).to_vec()];
    for node in &report.nodes {
        table.push(vec![
            node.name.clone(),
            format!("{}..{}", node.layers[0], node.layers[1]),
            text::bytes(node.bytes_loaded),
            number(node.compute_ms_p50, 2, " ms"),
            node.peak_rss_bytes.map_or_else(|| "-".to_owned(), text::bytes),
        ]);
    }
    format!(
        "{}: {} prompt tokens, {} generated, {} sessions, median of {} rounds\n{}\n{}",
        text::line(&report.model),
        report.prompt_tokens,
        report.gen_tokens,
        report.sessions,
        report.rounds,
        text::table(&rows, &[]),
        text::table(&table, &[2, 3, 4])
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pages_are_told_of_when_they_matter() {
        let node = |bytes_loaded| BenchNode {
            name: String::new(),
            layers: [0, 1],
            threads: None,
            bytes_loaded,
            weight_bytes_per_token: bytes_loaded,
            compute_ms_p50: None,
            round_trip_us: None,
            peak_rss_bytes: None,
        };
        let large = node(100 << 20);
        let warning = small_pages(Some(2 << 20), Some(&large)).unwrap();
        assert!(
            warning.contains("of weights are in huge pages") && warning.lines().count() == 1,
            "{warning}"
        );
        assert_eq!(small_pages(None, Some(&large)), None);
        assert_eq!(small_pages(Some(90 << 20), Some(&large)), None);
        assert_eq!(small_pages(Some(0), Some(&node(1 << 20))), None);
        assert_eq!(small_pages(Some(0), None), None);
    }
}
