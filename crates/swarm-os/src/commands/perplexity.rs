//! `swarm-os perplexity`: how likely a text is to a model, and whether fast arithmetic or small weights changed that.

use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use swarm_kernels::{KernelPath, Quant};
use swarm_node::{EngineEvent, EngineObserver, TextScore, score_text};

use crate::args::{ModelArgs, PerplexityArgs};
use crate::failure::{Code, Failure};
use crate::present::progress::Progress;
use crate::present::report::json;
use crate::present::text;
use crate::settings;

/// What is scored when nothing else is asked for.
const TEXT: &str = include_str!("../perplexity.txt");

/// Largest part by which quantized arithmetic may change a perplexity.
const TOLERANCE: f64 = 0.005;

/// Forces a kernel path, as `docs/numerics.md` says.
const KERNELS_VARIABLE: &str = "SWARM_OS_KERNELS";

/// What `perplexity --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Report {
    model: String,
    fingerprint: String,
    numerics: String,
    kernels: String,
    /// `stored`, or what they were quantized to; `f32` when all were widened then.
    weights: String,
    context: usize,
    tokens: usize,
    log_probability_sum: f64,
    /// The same number, exactly.
    log_probability_sum_bits: String,
    perplexity: f64,
    tokens_per_s: f64,
}

/// What `perplexity --compare --json` prints.
#[derive(Debug, Serialize)]
struct Comparison {
    /// The scalar path gave the same bits.
    equal: bool,
    /// Perplexity with weights as stored over that with f32 weights, less 1.
    difference: f64,
    /// The difference is small enough.
    close: bool,
    fast: Report,
    scalar: Report,
    f32: Report,
}

pub fn perplexity(args: &PerplexityArgs) -> Result<(), Failure> {
    let text = match args.text.as_deref() {
        None => Ok(TEXT.to_owned()),
        Some("-") => std::io::read_to_string(std::io::stdin().lock()),
        Some(path) => std::fs::read_to_string(path),
    };
    let text = text.map_err(|error| {
        Failure::usage(format!("--text: {} cannot be read: {error}", args.text.as_deref().unwrap_or("-")))
    })?;
    let progress = Progress::new(true);
    let fast = scored(&args.model, &text, args.dequantized, &progress)?;
    if !args.compare {
        return if args.json { Ok(json(&fast)?) } else { Ok(text::say(&words(&[("", &fast)]))?) };
    }
    let scalar = elsewhere(args, &text, "scalar", false)?;
    let f32 = elsewhere(args, &text, &fast.kernels, true)?;
    let difference = fast.perplexity / f32.perplexity - 1.0;
    let equal = fast.log_probability_sum_bits == scalar.log_probability_sum_bits;
    let close = difference.abs() <= TOLERANCE;
    let comparison = Comparison { equal, difference, close, fast, scalar, f32 };
    if args.json {
        json(&comparison)?;
    } else {
        text::say(&comparison.words())?;
    }
    if equal && close { Ok(()) } else { Err(Failure::silent(Code::Failed)) }
}

/// Scores the text in this process.
fn scored(model: &ModelArgs, text: &str, dequantized: bool, progress: &Progress) -> Result<Report, Failure> {
    let config = settings::model_config(model, &swarm_node::resolve_model(&model.model)?)?;
    let observer: EngineObserver<'_> = &|event: EngineEvent| progress.event(event);
    let score = score_text(&config, text, dequantized, observer, &mut |_, _| progress.clear())?;
    progress.clear();
    Ok(Report::new(&score, dequantized))
}

/// Scores the text in another process: the kernels are chosen once in each.
fn elsewhere(args: &PerplexityArgs, text: &str, kernels: &str, dequantized: bool) -> Result<Report, Failure> {
    let failed =
        |what: &str| Failure::new(Code::Failed, format!("the comparison with {kernels} kernels {what}"));
    let program = std::env::current_exe().map_err(|error| failed(&format!("cannot start: {error}")))?;
    let mut command = Command::new(program);
    command.args(["perplexity", "--json", "--text", "-"]).args(args.model.words());
    if dequantized {
        command.arg("--dequantized");
    }
    command.env(KERNELS_VARIABLE, kernels).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(&format!("cannot start: {error}")))?;
    let written = child.stdin.take().map(|mut input| std::io::Write::write_all(&mut input, text.as_bytes()));
    let output = child.wait_with_output().map_err(|error| failed(&format!("was lost: {error}")))?;
    if !output.status.success() {
        return Err(failed("failed; its error is above"));
    }
    if let Some(Err(error)) = written {
        return Err(failed(&format!("did not take the text: {error}")));
    }
    let report: Report = serde_json::from_slice(&output.stdout).map_err(|_| failed("gave no report"))?;
    if report.kernels == kernels { Ok(report) } else { Err(failed("took other kernels")) }
}

impl Report {
    fn new(score: &TextScore, dequantized: bool) -> Self {
        Self {
            model: score.model_name.clone(),
            fingerprint: text::hex(&score.fingerprint),
            numerics: swarm_kernels::numerics(score.quant),
            kernels: KernelPath::current().name().to_owned(),
            weights: if dequantized { "f32" } else { score.quant.map_or("stored", Quant::name) }.to_owned(),
            context: score.context,
            tokens: score.tokens,
            log_probability_sum: score.log_probability,
            log_probability_sum_bits: format!("{:016x}", score.log_probability.to_bits()),
            perplexity: score.perplexity,
            tokens_per_s: score.tokens as f64 / score.seconds,
        }
    }
}

impl Comparison {
    fn words(&self) -> String {
        let table = words(&[("fast", &self.fast), ("scalar", &self.scalar), ("f32", &self.f32)]);
        let equal =
            if self.equal { "equal to the scalar path, bit for bit" } else { "NOT equal to the scalar path" };
        let within = if self.close { "within" } else { "NOT within" };
        format!(
            "{table}\n{equal}; {within} {} % of f32 weights ({:+.3} %)",
            TOLERANCE * 100.0,
            self.difference * 100.0
        )
    }
}

fn words(reports: &[(&str, &Report)]) -> String {
    let head = ["", "kernels", "weights", "perplexity", "log probability", "bits", "tok/s"];
    let mut table = vec![head.map(String::from).to_vec()];
    for (name, report) in reports {
        table.push(vec![
            (*name).to_owned(),
            report.kernels.clone(),
            report.weights.clone(),
            format!("{:.4}", report.perplexity),
            format!("{:.6}", report.log_probability_sum),
            report.log_probability_sum_bits.clone(),
            format!("{:.1}", report.tokens_per_s),
        ]);
    }
    let first = reports.first().map(|(_, report)| {
        format!("{}: {} tokens in windows of {}\n", text::line(&report.model), report.tokens, report.context)
    });
    first.unwrap_or_default() + &text::table(&table, &[3, 4, 6])
}
