//! What a worker shows of its work: lines for people, or JSON events.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use indicatif::ProgressBar;
use serde_json::{Value, json};
use swarm_node::{LoadSource, StageEvent, StepDone, WorkerEvent};

use super::pairing;
use super::progress::{bytes_bar, source};
use super::text::{bytes, line};

/// How a worker speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    Lines,
    Counter,
    Json,
}

/// Shows a worker's events, from any of its threads.
pub struct WorkerView {
    voice: Voice,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bar: Option<(LoadSource, ProgressBar)>,
    counter: Option<ProgressBar>,
    steps: u64,
    tokens: u64,
    bytes_in: u64,
    compute_us: u64,
    /// Connections of each coordinator that is here. One that finds several addresses of this worker tries them all,
    /// and keeps one.
    visits: BTreeMap<String, usize>,
    /// Tenths of the loading that were told, for JSON.
    tenths: BTreeMap<(usize, LoadSource), u64>,
}

impl WorkerView {
    pub fn new(voice: Voice) -> Self {
        Self { voice, state: Mutex::default() }
    }

    /// An event as one JSON object, with what a person would read as its `words`; `None`: no news.
    pub fn object(&self, event: &WorkerEvent) -> Option<Value> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.is_news(event) {
            return None;
        }
        state.count(event);
        let words = state.words(event, Voice::Lines);
        let mut object = state.object(event)?;
        object["words"] = words.into();
        Some(object)
    }

    pub fn event(&self, event: &WorkerEvent) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.is_news(event) {
            return;
        }
        state.count(event);
        if self.voice == Voice::Json {
            if let Some(object) = state.object(event) {
                put(&object.to_string());
            }
            return;
        }
        state.bars(event, self.voice);
        if let Some(text) = state.words(event, self.voice) {
            state.suspend(|| put(&text));
        }
    }
}

/// A line on standard output. When nobody reads it any more, the work goes on.
fn put(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

impl State {
    /// A coordinator comes with its first connection and leaves with its last.
    fn is_news(&mut self, event: &WorkerEvent) -> bool {
        match event {
            WorkerEvent::Joined { coordinator } => {
                let visits = self.visits.entry(coordinator.clone()).or_default();
                *visits += 1;
                *visits == 1
            }
            WorkerEvent::Left { coordinator, .. } => {
                let visits = self.visits.remove(coordinator).unwrap_or(0).saturating_sub(1);
                if visits > 0 {
                    self.visits.insert(coordinator.clone(), visits);
                }
                visits == 0
            }
            _ => true,
        }
    }

    fn count(&mut self, event: &WorkerEvent) {
        match event {
            WorkerEvent::Joined { .. } => {
                let (bar, visits) = (self.bar.take(), std::mem::take(&mut self.visits));
                *self = Self { bar, visits, ..Self::default() };
            }
            WorkerEvent::Stage(StageEvent::Step { done, .. }) => {
                self.steps += 1;
                self.tokens += done.tokens as u64;
                self.bytes_in += done.bytes_in;
                self.compute_us += done.compute_us;
            }
            _ => {}
        }
    }

    fn suspend(&self, act: impl FnOnce()) {
        match self.bar.as_ref().map(|(_, bar)| bar).or(self.counter.as_ref()) {
            Some(bar) => bar.suspend(act),
            None => act(),
        }
    }

    /// Progress bar and counter, which are hidden where standard error is no terminal.
    fn bars(&mut self, event: &WorkerEvent, voice: Voice) {
        match event {
            WorkerEvent::Stage(StageEvent::Loading { layers, bytes_done, bytes_total, from, .. }) => {
                if let Some((_, bar)) = self.bar.take_if(|(before, _)| before != from) {
                    bar.finish_and_clear();
                }
                let label = format!("loading layers {}..{}{}", layers.start, layers.end, source(*from));
                let (_, bar) = self.bar.get_or_insert_with(|| (*from, bytes_bar(*bytes_total, label)));
                bar.set_position(*bytes_done);
            }
            WorkerEvent::Stage(StageEvent::Step { .. }) if voice == Voice::Counter => {
                let summary = self.summary();
                self.counter.get_or_insert_with(ProgressBar::new_spinner).set_message(summary);
            }
            WorkerEvent::Stage(StageEvent::Running { .. } | StageEvent::Ended { .. })
            | WorkerEvent::Left { .. } => {
                self.bar.take().inspect(|(_, bar)| bar.finish_and_clear());
                self.counter.take().inspect(ProgressBar::finish_and_clear);
            }
            _ => {}
        }
    }

    fn summary(&self) -> String {
        let per_step = self.compute_us.checked_div(self.steps).unwrap_or(0) as f64 / 1e3;
        format!(
            "{} steps, {} tokens, {} received, {per_step:.2} ms of compute per step",
            self.steps,
            self.tokens,
            bytes(self.bytes_in)
        )
    }

    fn words(&self, event: &WorkerEvent, voice: Voice) -> Option<String> {
        Some(match event {
            // Said by the command itself, with all it knows.
            WorkerEvent::Waiting { .. } => return None,
            WorkerEvent::DiscoveryUnavailable { why } => format!(
                "nobody can find this worker by mDNS: {}; others can still use --peer with its address and port",
                line(why)
            ),
            WorkerEvent::Stranger { why } => format!("a stranger was turned away: {}", line(why)),
            WorkerEvent::Pairing(event) => pairing::words(event),
            WorkerEvent::Joined { coordinator } => format!("joined {}", line(coordinator)),
            WorkerEvent::Left { coordinator, why } => {
                let left = format!("left {}: {}", line(coordinator), line(why));
                if self.steps > 0 { format!("{left}\nserved {}", self.summary()) } else { left }
            }
            WorkerEvent::Stage(StageEvent::Loading { .. }) => return None,
            WorkerEvent::Stage(StageEvent::Running {
                layers,
                layers_total,
                weight_bytes,
                held_bytes_max,
                tail,
            }) => {
                format!(
                    "running layers {}..{} of {layers_total}{}, {} of weights, {} with KV rows and buffers at most",
                    layers.start,
                    layers.end,
                    if *tail { " and the head" } else { "" },
                    bytes(*weight_bytes),
                    bytes(*held_bytes_max)
                )
            }
            WorkerEvent::Stage(StageEvent::Step { .. }) if voice == Voice::Counter => return None,
            WorkerEvent::Stage(StageEvent::Step { done, layers, text }) => step(done, layers, text),
            // The end of a stage whose coordinator has left is no news.
            WorkerEvent::Stage(StageEvent::Ended { .. }) if self.visits.is_empty() => return None,
            WorkerEvent::Stage(StageEvent::Ended { why }) => format!("stage ended: {}", line(why)),
        })
    }

    fn object(&mut self, event: &WorkerEvent) -> Option<Value> {
        Some(match event {
            WorkerEvent::Waiting { .. } => return None,
            WorkerEvent::DiscoveryUnavailable { why } => {
                json!({"event": "discovery_unavailable", "why": why})
            }
            WorkerEvent::Stranger { why } => json!({"event": "stranger", "why": why}),
            WorkerEvent::Pairing(event) => pairing::object(event),
            WorkerEvent::Joined { coordinator } => json!({"event": "joined", "coordinator": coordinator}),
            WorkerEvent::Left { coordinator, why } => {
                json!({"event": "left", "coordinator": coordinator, "why": why})
            }
            WorkerEvent::Stage(StageEvent::Loading {
                layers,
                layers_total,
                bytes_done,
                bytes_total,
                from,
            }) => {
                let tenth = bytes_done.saturating_mul(10).checked_div(*bytes_total).unwrap_or(10);
                if self.tenths.insert((layers.start, *from), tenth) == Some(tenth) {
                    return None;
                }
                json!({"event": "loading", "layers": [layers.start, layers.end], "layers_total": layers_total,
                    "bytes_done": bytes_done, "bytes_total": bytes_total, "from": from})
            }
            WorkerEvent::Stage(StageEvent::Running {
                layers,
                layers_total,
                weight_bytes,
                held_bytes_max,
                tail,
            }) => {
                json!({"event": "running", "layers": [layers.start, layers.end], "layers_total": layers_total,
                    "weight_bytes": weight_bytes, "held_bytes_max": held_bytes_max, "tail": tail})
            }
            WorkerEvent::Stage(StageEvent::Step { done, layers, text }) => json!({
                "event": "step", "bytes_in": done.bytes_in, "bytes_out": done.bytes_out, "tokens": done.tokens,
                "layers": [layers.start, layers.end], "compute_ms": done.compute_us as f64 / 1e3,
                "tokens_predicted": done.sampled, "text": text,
            }),
            WorkerEvent::Stage(StageEvent::Ended { why }) => json!({"event": "ended", "why": why}),
        })
    }
}

/// One step for people; on the tail with what it predicted.
fn step(done: &StepDone, layers: &std::ops::Range<usize>, text: &[String]) -> String {
    let mut words = format!(
        "received {:>9}  {:>4} tokens  layers {}..{}  compute {:>8.2} ms",
        bytes(done.bytes_in),
        done.tokens,
        layers.start,
        layers.end,
        done.compute_us as f64 / 1e3,
    );
    for text in text {
        words += &format!("  predicted {text:?}");
    }
    words
}
