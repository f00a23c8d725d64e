//! `swarm-os plan`: which layers would go where, and why (not) to split.

use serde::Serialize;
use swarm_node::Plan;
use swarm_ring::Placement;

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::present::progress::Progress;
use crate::present::report::json;
use crate::present::text;
use crate::settings::{Search, Start};

/// What `plan --json` prints: the placement and what it is compared with.
#[derive(Serialize)]
struct PlanReport<'a> {
    #[serde(flatten)]
    placement: &'a Placement,
    model: &'a str,
    context: usize,
    /// The lap with all layers here; null when they do not fit.
    alone_lap_ms: Option<f64>,
}

pub fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let mut start = Start::new(&args.model, &args.ring, Search::of(&args.look, false))?;
    start.measure()?;
    let mut alone = start.alone(&args.model.compute)?;
    if start.config.search.at_most > 0 {
        alone.measure()?;
    }
    let progress = Progress::new(start.local.is_none());
    let plan = start.plan(&progress)?;
    let alone = alone.plan(&progress).ok().map(|plan| plan.placement);
    let alone_lap_ms = alone.as_ref().map(|alone| alone.lap_ms);
    if args.json {
        let (model, context) = (plan.model.name(), plan.context);
        return Ok(json(&PlanReport { placement: &plan.placement, model, context, alone_lap_ms })?);
    }
    text::say(&words(&plan, alone_lap_ms))?;
    Ok(())
}

fn words(plan: &Plan, alone_lap_ms: Option<f64>) -> String {
    let placement = &plan.placement;
    let mut rows = vec![["node", "layers", "memory", "predicted", "why"].map(String::from).to_vec()];
    for stage in &placement.stages {
        rows.push(vec![
            text::line(&stage.name),
            format!("{}..{}", stage.layers.start, stage.layers.end),
            text::bytes(stage.memory_bytes),
            format!("{:.2} ms", stage.predicted_ms),
            text::line(&stage.reason),
        ]);
    }
    format!(
        "{}, context {}\n{}\n{}",
        text::line(plan.model.name()),
        plan.context,
        text::table(&rows, &[2, 3]),
        advice(placement, alone_lap_ms)
    )
}

/// Whether to split, in plain words.
fn advice(placement: &Placement, alone_lap_ms: Option<f64>) -> String {
    let nodes = placement.stages.len();
    let (lap, slowest) = (placement.lap_ms, placement.slowest_ms);
    match (nodes, alone_lap_ms) {
        (0 | 1, _) => format!("all layers here: a token takes at least {lap:.2} ms"),
        (_, None) => format!(
            "the model does not fit here alone: it needs these {nodes} nodes; a token takes at least {lap:.2} ms, plus {nodes} hops"
        ),
        // Predictions closer than this are equal, and the hops decide.
        (_, Some(alone)) if alone <= lap * 1.02 => format!(
            "the whole model fits here, and one conversation is faster alone: {alone:.2} ms per token here, {lap:.2} ms plus {nodes} hops over {nodes} nodes; splitting pays for several conversations at once (a token every {slowest:.2} ms), for long prompts, or to free memory here; --alone keeps it here"
        ),
        (_, Some(alone)) => format!(
            "the whole model fits here, too: {alone:.2} ms per token here, {lap:.2} ms plus {nodes} hops over {nodes} nodes; splitting is faster while a hop takes less than {:.2} ms",
            (alone - lap) / nodes as f64
        ),
    }
}
