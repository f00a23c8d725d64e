//! The trace of an answer, for chrome://tracing and ui.perfetto.dev: every node a process, every part of a lap a slice,
//! all on the coordinator's clock.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Value, json};
use swarm_node::{LapTrace, NodeReport};

use crate::failure::{Code, Failure};

/// The file of a trace, opened before the answer, so that a path that will not do costs nobody an answer. What it held
/// stays until the trace is there.
pub struct TraceFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> TraceFile<'a> {
    /// # Errors
    /// A path that cannot be written to: bad input.
    pub fn open(path: &'a Path) -> Result<Self, Failure> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|error| Failure::usage(format!("--trace: {}: {error}", path.display())))?;
        Ok(Self { path, file })
    }

    /// Writes the laps of an answer.
    ///
    /// # Errors
    /// A disk that is full, or fails.
    pub fn write(self, nodes: &[NodeReport], laps: &[LapTrace]) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            let path = self.path.display();
            Failure::new(Code::Failed, format!("the trace cannot be written to {path}: {error}"))
        };
        self.file.set_len(0).map_err(failed)?;
        let mut out = BufWriter::new(&self.file);
        out.write_all(text(nodes, laps).as_bytes()).and_then(|()| out.flush()).map_err(failed)
    }
}

fn text(nodes: &[NodeReport], laps: &[LapTrace]) -> String {
    let mut events: Vec<Value> = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let name = format!("{} (layers {}..{})", node.name, node.layers.start, node.layers.end);
        events.push(json!({"ph": "M", "name": "process_name", "pid": index, "args": {"name": name}}));
        events.push(
            json!({"ph": "M", "name": "process_sort_index", "pid": index, "args": {"sort_index": index}}),
        );
    }
    laps.iter().for_each(|lap| events.extend(slices(lap)));
    json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string()
}

/// The parts of a lap. Times of a node whose clock offset is not known are left out.
fn slices(lap: &LapTrace) -> Vec<Value> {
    let kind = if lap.prefill { "prefill" } else { "decode" };
    let slice = |node: usize, part: &str, from: i64, to: i64| {
        json!({"ph": "X", "name": part, "cat": kind, "pid": node, "tid": 0, "ts": from, "dur": to.saturating_sub(from).max(0),
            "args": {"lap": lap.lap}})
    };
    let signed = |us: u64| i64::try_from(us).unwrap_or(i64::MAX);
    let mut slices = Vec::new();
    let mut left: Option<i64> = None;
    for (node, time) in lap.trail.iter().enumerate() {
        let offset = if node == 0 { Some(0) } else { lap.offsets_us.get(node).copied().flatten() };
        let Some(offset) = offset else {
            left = None;
            continue;
        };
        let here = |us: u64| signed(us).saturating_sub(offset);
        if let Some(left) = left {
            slices.push(slice(node, "wire", left, here(time.arriving_us)));
            slices.push(slice(node, "receive", here(time.arriving_us), here(time.received_us)));
        }
        slices.push(slice(node, "queue", here(time.received_us), here(time.started_us)));
        slices.push(slice(node, "compute", here(time.started_us), here(time.finished_us)));
        slices.push(slice(node, "serialize", here(time.finished_us), here(time.sent_us)));
        left = Some(here(time.sent_us));
    }
    if let Some(left) = left.filter(|_| lap.trail.len() > 1) {
        let (arriving, received) = (signed(lap.arrival.arriving_us), signed(lap.arrival.received_us));
        slices.push(slice(0, "wire", left, arriving));
        slices.push(slice(0, "receive", arriving, received));
    }
    slices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stand_on_the_coordinators_clock() {
        let time = |at: u64| swarm_wire::StageTime {
            arriving_us: at - 3,
            received_us: at,
            started_us: at + 1,
            finished_us: at + 11,
            sent_us: at + 12,
            bytes_in: 0,
        };
        let trail = vec![time(100), time(1120)];
        let arrival = swarm_node::Arrival { arriving_us: 138, received_us: 140 };
        let lap = LapTrace { lap: 3, prefill: false, trail, offsets_us: vec![None, Some(1000)], arrival };
        let seen: Vec<_> =
            slices(&lap).iter().map(|s| (s["pid"].clone(), s["ts"].clone(), s["dur"].clone())).collect();
        let want = [
            (0, 100, 1),
            (0, 101, 10),
            (0, 111, 1),
            (1, 112, 5),
            (1, 117, 3),
            (1, 120, 1),
            (1, 121, 10),
            (1, 131, 1),
            (0, 132, 6),
            (0, 138, 2),
        ];
        assert_eq!(seen, want.map(|(pid, ts, dur)| (json!(pid), json!(ts), json!(dur))));
        let unknown = LapTrace { offsets_us: vec![None, None], ..lap };
        assert_eq!(slices(&unknown).len(), 3);
    }
}
