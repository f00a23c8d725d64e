//! `swarm-os verify`: the same prompt alone and over the ring, and a receipt.

use serde::Serialize;
use swarm_kernels::Quant;
use swarm_node::{Engine, Outcome, Prompt, Request, Split};
use swarm_ring::Placement;

use super::run;
use crate::args::VerifyArgs;
use crate::failure::{Code, Failure};
use crate::interrupt::Repeat;
use crate::present::progress::Progress;
use crate::present::report::json;
use crate::present::text;
use crate::settings::{self, Search, Start};

const QUESTION: &str = "Why is the sky blue?";

/// What `verify --json` prints.
#[derive(Debug, Serialize)]
pub struct Receipt {
    pub equal: bool,
    pub model: String,
    pub fingerprint: String,
    pub prompt_tokens: usize,
    /// Tokens compared.
    pub tokens: usize,
    pub token_hash_single: String,
    pub token_hash_ring: String,
    pub logits_hash_single: Option<String>,
    pub logits_hash_ring: Option<String>,
    pub nodes: Vec<String>,
    pub placement: Placement,
    pub quant: Option<&'static str>,
    pub numerics: String,
}

pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let typed = args.prompt.as_deref().map(settings::prompt_text).transpose()?;
    let mut ring = Start::new(&args.model, &args.ring, Search::when(args.discover, &args.ring))?;
    if args.ring.split.is_none() {
        ring.config.split = Split::Always;
    }
    if ring.local.is_none() && ring.config.search.at_most == 0 {
        return Err(Failure::usage(
            "there is no ring to compare with; say --nodes N for workers on this computer, --discover, or --peer HOST:PORT",
        ));
    }
    // The same context on both sides, so that both have room for the same answer.
    let single = ring.alone(&args.model.compute)?;
    ring.config.context = args.model.context;
    let progress = Progress::new(ring.local.is_none());
    let alone = single.go(&progress)?;
    let raw = args.raw || (typed.is_none() && !alone.engine.can_chat());
    let prompt = settings::prompt(typed.unwrap_or_else(|| QUESTION.to_owned()), None, raw);
    let request = request(prompt, args.max_tokens);
    let first = finished(&alone.engine, request.clone())?;
    drop(alone);
    let running = ring.go(&progress)?;
    let second = finished(&running.engine, request)?;
    let receipt = Receipt::new(&running.engine, &first, &second);
    if args.json {
        json(&receipt)?;
    } else {
        text::say(&receipt.words())?;
    }
    if receipt.equal { Ok(()) } else { Err(Failure::silent(Code::Failed)) }
}

/// A greedy request whose logits are digested.
pub fn request(prompt: Prompt, max_tokens: usize) -> Request {
    Request { max_tokens: Some(max_tokens), logits_hash: true, ..Request::new(prompt) }
}

/// The whole answer; one that ended in an error or by Ctrl-C is no receipt.
fn finished(engine: &Engine, request: Request) -> Result<Outcome, Failure> {
    let outcome = run::answer(engine, request, Repeat::End, |_| Ok(()))?;
    run::check(engine, &outcome)?;
    match outcome.finish {
        swarm_node::Finish::Cancelled => Err(Failure::silent(Code::Interrupted)),
        _ => Ok(outcome),
    }
}

impl Receipt {
    /// Compares `single`, an answer of one node, with `ring`, the same of `engine`.
    pub fn new(engine: &Engine, single: &Outcome, ring: &Outcome) -> Self {
        let logits = |outcome: &Outcome| outcome.logits_hash.map(|hash| text::hex(&hash));
        let same_logits = single.logits_hash.is_some() && single.logits_hash == ring.logits_hash;
        Self {
            equal: single.token_ids == ring.token_ids && single.finish == ring.finish && same_logits,
            model: engine.model_name().to_owned(),
            fingerprint: text::hex(&engine.fingerprint()),
            prompt_tokens: ring.prompt_tokens,
            tokens: single.token_ids.len().max(ring.token_ids.len()),
            token_hash_single: text::hex(&single.token_hash()),
            token_hash_ring: text::hex(&ring.token_hash()),
            logits_hash_single: logits(single),
            logits_hash_ring: logits(ring),
            nodes: engine.nodes().into_iter().map(|node| node.name).collect(),
            placement: engine.placement(),
            quant: engine.quant().map(Quant::name),
            numerics: swarm_kernels::numerics(engine.quant()),
        }
    }

    /// For people.
    pub fn words(&self) -> String {
        let cell = |text: &str| text.to_owned();
        let hash = |hash: &Option<String>| hash.clone().unwrap_or_else(|| "-".to_owned());
        let rows = [
            ("model", text::line(&self.model)),
            ("fingerprint", self.fingerprint.clone()),
            ("numerics", self.numerics.clone()),
            ("tokens", format!("{} after a prompt of {}", self.tokens, self.prompt_tokens)),
            ("token hash, one node", self.token_hash_single.clone()),
            ("token hash, ring", self.token_hash_ring.clone()),
            ("logits hash, one node", hash(&self.logits_hash_single)),
            ("logits hash, ring", hash(&self.logits_hash_ring)),
        ];
        let rows: Vec<Vec<String>> = rows.map(|(name, value)| vec![cell(name), value]).to_vec();
        format!(
            "{}\n{}\nequal to one node: {}",
            text::table(&rows, &[]),
            text::placement(&self.placement, &self.nodes),
            if self.equal { "yes" } else { "no" }
        )
    }
}
