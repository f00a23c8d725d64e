//! What a running node shows of itself while it works, to whoever asks: `status` and the trace of an answer.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::Serialize;
use swarm_ring::{Arrival, LapTimes, Percentiles, Telemetry};
use swarm_wire::{StageTime, Stats};

use crate::clock::now_us;
use crate::engine::{Info, Model, NodeReport, NodeState};

/// The speed is that of the tokens of so many microseconds.
const SPEED_US: u64 = 5_000_000;
/// Tokens remembered for it.
const RECENT_MAX: usize = 1 << 14;
/// Laps of one answer that a trace keeps; later ones are left out.
pub(crate) const TRACE_LAPS_MAX: usize = 1 << 16;

/// One lap as the nodes' clocks saw it.
#[derive(Clone, Debug)]
pub struct LapTrace {
    /// Counts the laps of the placement.
    pub lap: u64,
    /// It carried prompt rows.
    pub prefill: bool,
    /// One per stage, coordinator first; each in its own node's microseconds.
    pub trail: Vec<StageTime>,
    /// `clock of stage i - coordinator's clock`, where it is known.
    pub offsets_us: Vec<Option<i64>>,
    /// When the tokens were here, on the coordinator's clock.
    pub arrival: Arrival,
}

/// What the compute thread counts for others to read.
#[derive(Default)]
pub(crate) struct Meter(Mutex<Metered>);

#[derive(Default)]
struct Metered {
    decode: Telemetry,
    tokens: u64,
    recent: VecDeque<u64>,
    sessions: usize,
}

impl Meter {
    fn lock(&self) -> MutexGuard<'_, Metered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn lap(&self, lap: &LapTimes) {
        self.lock().decode.add(lap);
    }

    pub fn token(&self, at_us: u64) {
        let mut metered = self.lock();
        metered.tokens += 1;
        if metered.recent.len() == RECENT_MAX {
            metered.recent.pop_front();
        }
        metered.recent.push_back(at_us);
    }

    pub fn sessions(&self, sessions: usize) {
        self.lock().sessions = sessions;
    }
}

impl Metered {
    /// Tokens per second of the last seconds; nothing when none came.
    fn speed(&mut self, now_us: u64) -> Option<f64> {
        while self.recent.front().is_some_and(|&at| at.saturating_add(SPEED_US) < now_us) {
            self.recent.pop_front();
        }
        let first = *self.recent.front()?;
        let intervals = self.recent.len().checked_sub(1).filter(|&n| n > 0)?;
        let last = *self.recent.back()?;
        // A burst that has ended fades with the time that went by since.
        let over = if now_us.saturating_sub(last) > SPEED_US / 5 { now_us } else { last };
        Some(intervals as f64 * 1e6 / over.saturating_sub(first).max(1) as f64)
    }
}

/// A coordinator, as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct EngineStatus {
    pub model: String,
    pub context: usize,
    /// Why the ring is down; absent while it is up.
    pub fault: Option<String>,
    /// Answers on their way.
    pub sessions: usize,
    /// Tokens handed out under this placement.
    pub tokens: u64,
    /// Of the last five seconds.
    pub tok_per_s: Option<f64>,
    pub lap_ms_p50: Option<f64>,
    pub lap_ms_p99: Option<f64>,
    /// The way of the tokens from the tail.
    pub return_ms_p50: Option<f64>,
    pub nodes: Vec<NodeStatus>,
    /// Links closed because of what came on them, by code, since the engine started.
    pub links_refused: BTreeMap<&'static str, u64>,
}

/// One node of a ring, as its coordinator sees it.
#[derive(Clone, Debug, Serialize)]
pub struct NodeStatus {
    pub name: String,
    pub layers: [usize; 2],
    /// `up`, `suspect` (silent for a second) or `lost`.
    pub state: &'static str,
    /// What its stage takes in all, as it was planned.
    pub memory_bytes: u64,
    /// Weights in its memory.
    pub weight_bytes: u64,
    /// KV rows in use, as it said last.
    pub kv_bytes: Option<u64>,
    /// Shortest control round trip lately.
    pub round_trip_ms: Option<f64>,
    pub compute_ms_p50: Option<f64>,
    /// Of the hop to this node.
    pub hop_ms_p50: Option<f64>,
    pub hop_ms_p99: Option<f64>,
}

/// Looks at an engine from any thread, as long as one likes.
#[derive(Clone)]
pub struct EngineWatch {
    pub(crate) model: Arc<Model>,
    pub(crate) info: Arc<RwLock<Arc<Info>>>,
}

impl EngineWatch {
    /// What it is doing. Costs some microseconds, and the compute thread nothing.
    pub fn status(&self) -> EngineStatus {
        let info = self.info.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (nodes, fault) = (info.reports(), info.fault());
        let stats = |node: usize| {
            let pulse = info.pulses.get(node.checked_sub(1)?)?;
            *pulse.stats.lock().unwrap_or_else(PoisonError::into_inner)
        };
        let mut metered = info.meter.lock();
        let decode = &metered.decode;
        let status = |(index, node): (usize, &NodeReport)| {
            let stage = decode.stages.get(index);
            let own = (index == 0).then_some(info.kv_bytes.load(std::sync::atomic::Ordering::Relaxed));
            NodeStatus {
                name: node.name.clone(),
                layers: [node.layers.start, node.layers.end],
                state: match node.state {
                    NodeState::Up => "up",
                    NodeState::Suspect => "suspect",
                    NodeState::Lost => "lost",
                },
                memory_bytes: info.plan.placement.stages.get(index).map_or(0, |stage| stage.memory_bytes),
                weight_bytes: node.bytes_loaded,
                kv_bytes: own.or_else(|| stats(index).map(|stats: Stats| stats.kv_bytes)),
                round_trip_ms: ms(node.round_trip_us),
                compute_ms_p50: stage.and_then(|stage| ms(stage.compute_us.p50())),
                hop_ms_p50: stage.filter(|_| index > 0).and_then(|stage| ms(stage.hop_us.p50())),
                hop_ms_p99: stage.filter(|_| index > 0).and_then(|stage| ms(stage.hop_us.p99())),
            }
        };
        let nodes = nodes.iter().enumerate().map(status).collect();
        let of = |times: &Percentiles| ms(times.p50());
        EngineStatus {
            model: self.model.checkpoint.name().to_owned(),
            context: self.model.context,
            fault,
            sessions: metered.sessions,
            tokens: metered.tokens,
            lap_ms_p50: of(&decode.lap_us),
            lap_ms_p99: ms(decode.lap_us.p99()),
            return_ms_p50: of(&decode.return_us),
            nodes,
            links_refused: self.model.refusals.by_name(),
            tok_per_s: metered.speed(now_us()),
        }
    }
}

fn ms(us: Option<u64>) -> Option<f64> {
    us.map(|us| us as f64 / 1e3)
}

/// A worker, as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerStatus {
    pub name: String,
    pub port: u16,
    /// Memory it offers to the next coordinator.
    pub memory_bytes: u64,
    /// Control connections of coordinators.
    pub coordinators: usize,
    /// The stage it serves; absent while it waits.
    pub stage: Option<StageStatus>,
    /// Weights of its last stage, kept for the same coordinator's next placement.
    pub kept_bytes: u64,
    /// Links closed because of what came on them, by code, since the worker started.
    pub links_refused: BTreeMap<&'static str, u64>,
}

/// A worker's stage, in numbers since it began.
#[derive(Clone, Debug, Serialize)]
pub struct StageStatus {
    pub layers: [usize; 2],
    pub epoch: u32,
    pub sessions: u32,
    /// Frames with rows.
    pub frames: u64,
    /// Rows computed.
    pub tokens: u64,
    /// Frames of an older placement that were dropped.
    pub frames_stale: u64,
    pub kv_bytes: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_is_of_the_last_seconds() {
        let meter = Meter::default();
        assert_eq!(meter.lock().speed(0), None);
        (0..=40).for_each(|token| meter.token(token * 100_000));
        assert_eq!(meter.lock().speed(4_000_000), Some(10.0));
        // Half of them have gone by, and nothing came since.
        let late = meter.lock().speed(7_000_000).unwrap();
        assert!(late < 5.0, "{late}");
        assert_eq!(meter.lock().speed(60_000_000), None);
        assert_eq!(meter.lock().tokens, 41);
    }
}
