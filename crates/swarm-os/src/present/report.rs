//! The JSON contract. Field names are fixed; what could not be measured is null.

use serde::Serialize;
use swarm_kernels::Quant;
use swarm_node::{Engine, NodeReport, Outcome};
use swarm_ring::Telemetry;

use super::text::{hex, ms};

/// What `run --json` prints.
#[derive(Debug, Serialize)]
pub struct RunReport {
    pub model: String,
    pub fingerprint: String,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub prompt_tokens: usize,
    /// Of these, tokens whose rows were there from the answer before.
    pub prompt_tokens_kept: usize,
    pub completion_tokens: usize,
    pub finish_reason: &'static str,
    pub ttft_ms: Option<f64>,
    pub prefill_tok_per_s: Option<f64>,
    pub decode_tok_per_s: Option<f64>,
    /// What the planner said before the layers were loaded.
    pub predicted_tok_per_s: f64,
    pub nodes: Vec<NodeTimes>,
    pub hops: Vec<Hop>,
    pub lap_ms_p50: Option<f64>,
    pub lap_ms_p99: Option<f64>,
    /// Where the time of a token goes; null before the second token.
    pub waterfall: Option<Waterfall>,
    /// Bytes sent to the second node for the prompt; null when there is none.
    pub prompt_bytes: Option<u64>,
    pub token_hash: String,
    pub logits_hash: Option<String>,
    /// What float weights were quantized to; null when they are as stored.
    pub quant: Option<&'static str>,
    pub numerics: String,
}

/// A typical token, in milliseconds: means over the middle half of the decode laps, by length. The parts come from the
/// clocks of the nodes, the wall time from the tokens as they were handed out.
#[derive(Debug, Serialize)]
pub struct Waterfall {
    pub nodes: Vec<WaterfallNode>,
    /// The way of the token from the last node to the first.
    pub return_ms: f64,
    pub sum_ms: f64,
    /// From one token to the next, as they were handed out.
    pub wall_ms: f64,
}

/// One node's parts of a token, in the order in which they happen.
#[derive(Debug, Serialize)]
pub struct WaterfallNode {
    pub name: String,
    /// From the write of the node before to the first bytes of the frame being here.
    pub wire_ms: f64,
    /// Until all of it is here, decrypted. On the first node that is the answer of the lap.
    pub receive_ms: f64,
    /// Until the forward begins.
    pub queue_ms: f64,
    pub compute_ms: f64,
    /// From the end of the forward to the write.
    pub serialize_ms: f64,
}

/// One node's part of a decode lap.
#[derive(Debug, Serialize)]
pub struct NodeTimes {
    pub name: String,
    pub layers: [usize; 2],
    pub bytes_loaded: u64,
    pub weight_bytes_per_token: u64,
    /// From the first bytes of a frame to all of it being here; on the first node, of the answer.
    pub receive_ms_p50: Option<f64>,
    /// From the last byte's arrival to the start of the forward.
    pub queue_ms_p50: Option<f64>,
    pub compute_ms_p50: Option<f64>,
    /// From the end of the forward to the write.
    pub serialize_ms_p50: Option<f64>,
}

/// One link of the ring, in decode laps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hop {
    pub from: String,
    pub to: String,
    pub frames: u64,
    pub bytes_per_token: Option<f64>,
    pub ms_p50: Option<f64>,
    pub ms_p99: Option<f64>,
}

impl RunReport {
    pub fn new(engine: &Engine, outcome: &Outcome) -> Self {
        let nodes = engine.nodes();
        let decode = &outcome.telemetry.decode;
        Self {
            model: engine.model_name().to_owned(),
            fingerprint: hex(&engine.fingerprint()),
            text: outcome.text.clone(),
            token_ids: outcome.token_ids.clone(),
            prompt_tokens: outcome.prompt_tokens,
            prompt_tokens_kept: outcome.telemetry.prompt_kept,
            completion_tokens: outcome.token_ids.len(),
            finish_reason: outcome.finish.as_str(),
            ttft_ms: ms(outcome.ttft_us),
            prefill_tok_per_s: outcome.prefill_tok_per_s(),
            decode_tok_per_s: outcome.decode_tok_per_s(),
            predicted_tok_per_s: engine.placement().tok_per_s,
            hops: hops(&nodes, outcome),
            prompt_bytes: (nodes.len() > 1).then_some(outcome.telemetry.prompt_bytes),
            nodes: node_times(&nodes, decode),
            lap_ms_p50: ms(decode.lap_us.p50()),
            lap_ms_p99: ms(decode.lap_us.p99()),
            waterfall: waterfall(&engine.nodes(), outcome),
            token_hash: hex(&outcome.token_hash()),
            logits_hash: outcome.logits_hash.map(|hash| hex(&hash)),
            quant: engine.quant().map(Quant::name),
            numerics: swarm_kernels::numerics(engine.quant()),
        }
    }
}

fn node_times(nodes: &[NodeReport], decode: &Telemetry) -> Vec<NodeTimes> {
    let times = |(index, node): (usize, &NodeReport)| {
        let stage = decode.stages.get(index);
        NodeTimes {
            name: node.name.clone(),
            layers: [node.layers.start, node.layers.end],
            bytes_loaded: node.bytes_loaded,
            weight_bytes_per_token: node.weight_bytes_per_token,
            receive_ms_p50: stage.and_then(|stage| ms(stage.receive_us.p50())),
            queue_ms_p50: stage.and_then(|stage| ms(stage.queue_us.p50())),
            compute_ms_p50: stage.and_then(|stage| ms(stage.compute_us.p50())),
            serialize_ms_p50: stage.and_then(|stage| ms(stage.serialize_us.p50())),
        }
    };
    nodes.iter().enumerate().map(times).collect()
}

fn waterfall(nodes: &[NodeReport], outcome: &Outcome) -> Option<Waterfall> {
    let lap = outcome.telemetry.decode.typical()?;
    let part = |(node, stage): (&NodeReport, &swarm_ring::TypicalStage)| WaterfallNode {
        name: node.name.clone(),
        wire_ms: stage.wire_us / 1e3,
        receive_ms: stage.receive_us / 1e3,
        queue_ms: stage.queue_us / 1e3,
        compute_ms: stage.compute_us / 1e3,
        serialize_ms: stage.serialize_us / 1e3,
    };
    let nodes: Vec<WaterfallNode> = nodes.iter().zip(&lap.stages).map(part).collect();
    let return_ms = lap.return_us / 1e3;
    let own = |node: &WaterfallNode| {
        node.wire_ms + node.receive_ms + node.queue_ms + node.compute_ms + node.serialize_ms
    };
    let sum_ms = nodes.iter().map(own).sum::<f64>() + return_ms;
    Some(Waterfall { nodes, return_ms, sum_ms, wall_ms: outcome.token_us.middle_mean()? / 1e3 })
}

/// The links of a ring of several nodes, the last one from the tail to the coordinator. One node has none.
pub fn hops(nodes: &[NodeReport], outcome: &Outcome) -> Vec<Hop> {
    if nodes.len() < 2 {
        return Vec::new();
    }
    let telemetry = &outcome.telemetry;
    let decode = &telemetry.decode;
    let frames = decode.lap_us.count();
    (0..nodes.len())
        .map(|from| {
            let to = (from + 1) % nodes.len();
            let stage = decode.stages.get(to);
            let (bytes, times) = match to {
                0 => (Some(telemetry.return_bytes), Some(&decode.return_us)),
                _ => (stage.map(|stage| stage.bytes_in), stage.map(|stage| &stage.hop_us)),
            };
            let times = times.filter(|_| telemetry.hops_measured);
            Hop {
                from: nodes[from].name.clone(),
                to: nodes[to].name.clone(),
                frames,
                bytes_per_token: bytes.filter(|_| frames > 0).map(|bytes| bytes as f64 / frames as f64),
                ms_p50: times.and_then(|times| ms(times.p50())),
                ms_p99: times.and_then(|times| ms(times.p99())),
            }
        })
        .collect()
}

/// One JSON object on one line.
pub fn json<T: Serialize>(value: &T) -> std::io::Result<()> {
    super::text::say(&serde_json::to_string(value).map_err(std::io::Error::other)?)
}
