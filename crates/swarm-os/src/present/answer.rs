//! What is said about an answer once it is there. Every number was measured; one that was not is `-`.

use swarm_node::{Engine, Outcome};
use swarm_ring::SpeedSource;

use super::report::hops;
use super::text::{bytes, ms, number, table};

/// Tokens, times, and the ring's links.
pub fn telemetry(engine: &Engine, outcome: &Outcome) -> String {
    let seconds = match (outcome.ttft_us, outcome.decode_us) {
        (Some(first), Some(rest)) => Some((first + rest) as f64 / 1e6),
        _ => None,
    };
    let mut lines = vec![format!(
        "{} tokens in {}: {} tok/s, first token after {}",
        outcome.token_ids.len(),
        number(seconds, 2, " s"),
        number(outcome.decode_tok_per_s(), 1, ""),
        number(ms(outcome.ttft_us), 0, " ms"),
    )];
    lines.extend(against_prediction(engine, outcome));
    let mut prompt = format!(
        "prompt: {} tokens, {} tok/s",
        outcome.prompt_tokens,
        number(outcome.prefill_tok_per_s(), 1, "")
    );
    if outcome.telemetry.prompt_kept > 0 {
        prompt += &format!(" for all but {} that were computed before", outcome.telemetry.prompt_kept);
    }
    let nodes = engine.nodes();
    if nodes.len() > 1 {
        prompt += &format!(", {} sent to {}", bytes(outcome.telemetry.prompt_bytes), nodes[1].name);
    }
    lines.push(prompt);
    let mut rows = Vec::new();
    let decode = &outcome.telemetry.decode;
    if nodes.len() > 1 {
        rows.push(vec![
            "lap".to_owned(),
            format!("{} laps", decode.lap_us.count()),
            format!("lap p50 {}", number(ms(decode.lap_us.p50()), 2, " ms")),
            format!("p99 {}", number(ms(decode.lap_us.p99()), 2, " ms")),
        ]);
    }
    for (node, stage) in nodes.iter().zip(&decode.stages) {
        rows.push(vec![
            node.name.clone(),
            format!("layers {}..{}", node.layers.start, node.layers.end),
            format!("compute p50 {}", number(ms(stage.compute_us.p50()), 2, " ms")),
            format!("p99 {}", number(ms(stage.compute_us.p99()), 2, " ms")),
        ]);
    }
    for hop in hops(&nodes, outcome) {
        rows.push(vec![
            format!("{} -> {}", hop.from, hop.to),
            format!("{} frames x {}", hop.frames, number(hop.bytes_per_token, 0, " B")),
            format!("hop p50 {}", number(hop.ms_p50, 2, " ms")),
            format!("p99 {}", number(hop.ms_p99, 2, " ms")),
        ]);
    }
    if !rows.is_empty() {
        lines.push(table(&rows, &[]));
    }
    lines.join("\n")
}

/// Measured speed against the planner's; nothing for an answer too short to tell.
fn against_prediction(engine: &Engine, outcome: &Outcome) -> Option<String> {
    let (measured, placement) = (outcome.decode_tok_per_s()?, engine.placement());
    let predicted = placement.tok_per_s;
    let how = match placement.stages.iter().map(|stage| stage.source).min()? {
        SpeedSource::Assumed => "from assumed speeds",
        SpeedSource::Probe => "from a probe",
        SpeedSource::Layers => "from earlier answers",
    };
    let apart = (measured / predicted - 1.0) * 100.0;
    apart
        .is_finite()
        .then(|| format!("predicted {predicted:.1} tok/s ({how}), measured {measured:.1}: {apart:+.0} %"))
}

/// The nodes of a ring: what each holds.
pub fn nodes(engine: &Engine) -> String {
    let mut rows = vec![["node", "layers", "weights", "memory", "round trip"].map(String::from).to_vec()];
    for (node, stage) in engine.nodes().iter().zip(&engine.placement().stages) {
        rows.push(vec![
            node.name.clone(),
            format!("{}..{}", node.layers.start, node.layers.end),
            bytes(node.bytes_loaded),
            bytes(stage.memory_bytes),
            number(ms(node.round_trip_us), 2, " ms"),
        ]);
    }
    table(&rows, &[2, 3, 4])
}
