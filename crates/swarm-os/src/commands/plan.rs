//! `swarm-os plan`: which layers would go where, how fast that would be, and why (not) to split.

use serde::Serialize;
use swarm_kernels::Quant;
use swarm_node::{Objective, Plan, Split, ToFetch};
use swarm_ring::Placement;

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::present::progress::Progress;
use crate::present::report::json;
use crate::present::text;
use crate::quant;
use crate::settings::{Search, Start};

/// What `plan --json` prints: the placement and what it is compared with.
#[derive(Serialize)]
pub struct PlanReport<'a> {
    #[serde(flatten)]
    plan: &'a swarm_ring::Plan,
    model: &'a str,
    context: usize,
    quant: Option<&'static str>,
    /// The lap with all layers here; null when they do not fit.
    alone_lap_ms: Option<f64>,
    /// Bytes that each stage would fetch before it starts, at most, in ring order.
    to_fetch_bytes: Vec<u64>,
}

impl<'a> PlanReport<'a> {
    /// `to_fetch` as [`Plan::to_fetch`].
    pub fn new(
        plan: &'a swarm_ring::Plan,
        model: &'a str,
        context: usize,
        quant: Option<Quant>,
        to_fetch: &[ToFetch],
    ) -> Self {
        let alone_lap_ms = alone(plan).map(|alone| alone.lap_ms);
        let to_fetch_bytes = to_fetch.iter().map(|stage| stage.bytes).collect();
        Self { plan, model, context, quant: quant.map(Quant::name), alone_lap_ms, to_fetch_bytes }
    }
}

pub fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let mut start = Start::new(&args.model, &args.ring, Search::of(&args.look, false))?;
    if args.ring.split.is_none() {
        // What would be done with these nodes, if nothing else were said.
        start.config.split = Split::Auto;
    }
    let progress = Progress::new(start.local.is_none());
    let plan = start.plan(&progress)?;
    if args.json {
        let (model, quant) = (plan.model.name(), plan.model.quant());
        return Ok(json(&PlanReport::new(&plan.plan, model, plan.context, quant, &plan.to_fetch))?);
    }
    text::say(&words(&plan))?;
    Ok(())
}

fn alone(plan: &swarm_ring::Plan) -> Option<&Placement> {
    let others = plan.alternatives.iter().filter_map(|other| other.placement.as_ref());
    std::iter::once(&plan.placement).chain(others).find(|placement| placement.stages.len() == 1)
}

fn words(plan: &Plan) -> String {
    let Plan { model, plan, context, to_fetch } = plan;
    let aim = match plan.objective {
        Objective::Latency => "the speed of one user",
        Objective::Throughput => "the speed of many users together",
        Objective::Fit => "few nodes",
    };
    let mut parts = vec![
        format!("{}{}, context {context}, for {aim}", text::line(model.name()), quant::suffix(model.quant())),
        stages(&plan.placement),
        totals(&plan.placement),
    ];
    parts.extend(fetching(&plan.placement, to_fetch));
    if !plan.alternatives.is_empty() {
        parts.push(alternatives(plan));
    }
    parts.push(text::line(&plan.sentence));
    parts.join("\n")
}

fn stages(placement: &Placement) -> String {
    let head = ["node", "layers", "weights", "KV", "buffers", "memory", "offers", "compute", "hop"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for stage in &placement.stages {
        rows.push(vec![
            text::line(&stage.name),
            format!("{}..{}", stage.layers.start, stage.layers.end),
            text::bytes(stage.weight_bytes),
            text::bytes(stage.kv_bytes),
            text::bytes(stage.buffer_bytes),
            text::bytes(stage.memory_bytes),
            text::bytes(stage.offered_bytes),
            format!("{:.2} ms ({})", stage.predicted_ms, text::source(stage.source)),
            match (placement.stages.len(), stage.hop_measured) {
                (1, _) => "-".to_owned(),
                (_, true) => format!("{:.2} ms", stage.hop_ms),
                (_, false) => format!("{:.2} ms (assumed)", stage.hop_ms),
            },
        ]);
    }
    text::table(&rows, &[2, 3, 4, 5, 6, 7, 8])
}

/// What each node would fetch; nothing when all is there.
fn fetching(placement: &Placement, to_fetch: &[ToFetch]) -> Option<String> {
    let total: u64 = to_fetch.iter().map(|stage| stage.bytes).sum();
    let each = placement.stages.iter().zip(to_fetch).filter(|(_, fetch)| fetch.bytes > 0);
    let each = each.map(|(stage, fetch)| {
        let most = if fetch.known { "" } else { "at most " };
        format!("{} {most}{}", text::line(&stage.name), text::bytes(fetch.bytes))
    });
    (total > 0).then(|| {
        format!("to fetch before it starts: {} ({})", text::bytes(total), each.collect::<Vec<_>>().join(", "))
    })
}

fn totals(placement: &Placement) -> String {
    format!(
        "a token takes {:.2} ms: {:.2} ms of compute, {:.2} ms of hops; prompt {:.0} tok/s",
        placement.lap_ms, placement.compute_ms, placement.hops_ms, placement.prefill_tok_per_s
    )
}

fn alternatives(plan: &swarm_ring::Plan) -> String {
    let mut rows =
        vec![["instead", "one user", "many users", "compute", "hops", "layers"].map(String::from).to_vec()];
    for other in &plan.alternatives {
        let label = text::line(&other.label);
        let Some(placement) = &other.placement else {
            let why = other.why_not.as_deref().map(text::line).unwrap_or_default();
            rows.push(vec![label, format!("does not fit: {why}")]);
            continue;
        };
        let layers: Vec<String> = placement
            .stages
            .iter()
            .map(|stage| format!("{}..{}", stage.layers.start, stage.layers.end))
            .collect();
        rows.push(vec![
            label,
            format!("{:.1} tok/s", placement.tok_per_s),
            format!("{:.1} tok/s", placement.tok_per_s_many),
            format!("{:.2} ms", placement.compute_ms),
            format!("{:.2} ms", placement.hops_ms),
            layers.join(","),
        ]);
    }
    text::table(&rows, &[])
}
