//! The data path of a worker's stage: receive, admit, forward, send.
//!
//! One thread computes and sends, and receives while it has nothing to compute (`inbox.rs`). Otherwise another one
//! receives and decrypts, into a short bounded queue, so the next chunk of a prompt arrives while this one is computed,
//! and a slow stage slows its sender down instead of filling memory. Buffers go round; nothing is allocated per step
//! once they have grown.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use swarm_ring::Gate;
use swarm_wire::{
    CloseCode, Failed, Frame, FrameHead, FrameView, Hidden, HiddenView, Limits, NodeId, OpenView,
    SegmentHead, StageTime, Tokens, patch_sent_us,
};

use crate::clock::now_us;
use crate::error::NodeError;
use crate::inbox::{Inbound, Inbox};
use crate::outbox::Outbox;
use crate::runner::{Failure, StageRunner};
use crate::serve::broken_on;
use crate::traffic::TRAFFIC;

/// Where a stage sends its frames.
pub(crate) enum Downstream {
    /// Hidden rows to the next stage.
    Next(Outbox),
    /// Tokens to the coordinator: this stage is the tail.
    Coordinator(Outbox),
}

impl Downstream {
    fn send(&mut self, frame: &[u8]) -> Result<usize, NodeError> {
        match self {
            Self::Next(outbox) => outbox.send(frame).map_err(|error| broken_on(&error)),
            Self::Coordinator(outbox) => Ok(outbox.send(frame)?),
        }
    }
}

/// What a stage did for one frame, for whoever watches.
#[derive(Clone, Debug, PartialEq)]
pub struct StepDone {
    /// Bytes of the frame that arrived, as they were on the wire.
    pub bytes_in: u64,
    /// Bytes of the frame that left.
    pub bytes_out: u64,
    /// Rows computed.
    pub tokens: usize,
    /// Time the forward took (and the head and sampling on the tail), in microseconds.
    pub compute_us: u64,
    /// On the tail: token ids sampled in this step.
    pub sampled: Vec<u32>,
}

/// Counters of a stage, readable from any thread.
#[derive(Default)]
pub(crate) struct StageCounters {
    pub frames: AtomicU64,
    pub tokens: AtomicU64,
    pub frames_stale: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub kv_bytes: AtomicU64,
    pub sessions: AtomicU64,
}

/// A stage at work between its upstream and its downstream.
pub(crate) struct StageLoop<'a> {
    pub runner: StageRunner,
    pub limits: Limits,
    pub gate: Gate,
    pub id: NodeId,
    pub downstream: Downstream,
    pub counters: Arc<StageCounters>,
    pub observer: &'a dyn Fn(StepDone),
    pub out: Vec<u8>,
    pub segments: Vec<SegmentHead>,
    pub trail: Vec<StageTime>,
}

impl StageLoop<'_> {
    /// Serves frames until the upstream ends (`Ok`) or something breaks.
    pub fn run(&mut self, inbox: &Inbox) -> Result<(), NodeError> {
        while let Some(inbound) = inbox.next() {
            let under_way = TRAFFIC.step();
            self.step(&inbound)?;
            drop(under_way);
            inbox.recycle(inbound);
        }
        Ok(())
    }

    /// One frame: admitted, computed, sent on.
    fn step(&mut self, inbound: &Inbound) -> Result<(), NodeError> {
        self.counters.bytes_in.fetch_add(inbound.wire_bytes, Ordering::Relaxed);
        let Some(view) = self.admit(&inbound.bytes)? else { return Ok(()) };
        match view {
            FrameView::Hidden(hidden) => return self.batch(&hidden, inbound),
            FrameView::Open(open) => self.open(&open, &inbound.bytes)?,
            FrameView::Truncate { session, position, .. } => {
                match self.runner.truncate(session, position.index()) {
                    Ok(()) => self.pass_on(&inbound.bytes)?,
                    Err(failure) => self.report(vec![failure])?,
                }
            }
            FrameView::Close { session, .. } => {
                self.runner.close(session);
                self.pass_on(&inbound.bytes)?;
            }
            FrameView::Failed(failed) => {
                if let Some(session) = failed.session {
                    self.runner.close(session);
                }
                self.send_frame(&inbound.bytes)?;
            }
            FrameView::Tokens(_) => {
                return Err(broke("it sent tokens down the ring", CloseCode::Unexpected));
            }
            _ => return Err(broke("it sent a frame of another protocol version", CloseCode::Version)),
        }
        self.gauges();
        Ok(())
    }

    /// Decodes a frame that belongs to this placement and comes when it is due; `None` for a straggler of an older
    /// one, which must not touch the new KV rows.
    fn admit<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<FrameView<'b>>, NodeError> {
        let admitted = self.gate.admit(bytes).map_err(|error| broke(error.to_string(), error.code()));
        self.counters.frames_stale.store(self.gate.stale(), Ordering::Relaxed);
        admitted
    }

    /// A batch of hidden rows: the layers over it, and on the tail the head and the sampler.
    fn batch(&mut self, hidden: &HiddenView<'_>, inbound: &Inbound) -> Result<(), NodeError> {
        hidden
            .rows_into(self.runner.rows_mut(hidden.tokens()))
            .map_err(|e| broke(e.to_string(), CloseCode::Malformed))?;
        if !self.runner.rows().iter().all(|value| value.is_finite()) {
            return Err(broke("it sent rows that are not numbers", CloseCode::NotNumbers));
        }
        self.segments.clear();
        self.segments.extend(hidden.segments());
        self.trail.clear();
        self.trail.extend(hidden.trail());
        let started_us = now_us();
        let mut failures = self.runner.forward(&mut self.segments);
        let items = match self.downstream {
            Downstream::Coordinator(_) => self.runner.sample(&self.segments, &mut failures),
            Downstream::Next(_) => Vec::new(),
        };
        let finished_us = now_us();
        self.trail.push(StageTime {
            arriving_us: inbound.arrival.arriving_us,
            received_us: inbound.arrival.received_us,
            started_us,
            finished_us,
            sent_us: finished_us,
            bytes_in: inbound.wire_bytes,
        });
        self.report(failures)?;
        let bytes_out = self.send_batch(hidden.head, &items)?;
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
        self.counters.tokens.fetch_add(hidden.tokens() as u64, Ordering::Relaxed);
        self.gauges();
        (self.observer)(StepDone {
            bytes_in: inbound.wire_bytes,
            bytes_out,
            tokens: hidden.tokens(),
            compute_us: finished_us.saturating_sub(started_us),
            sampled: items.iter().map(|item| item.token).collect(),
        });
        Ok(())
    }

    fn send_batch(&mut self, head: FrameHead, items: &[swarm_wire::TokenOut]) -> Result<u64, NodeError> {
        let frame = match self.downstream {
            Downstream::Next(_) => {
                let (segments, trail) = (&self.segments[..], &self.trail[..]);
                Frame::Hidden(Hidden { head, segments, trail, rows: self.runner.rows() })
            }
            Downstream::Coordinator(_) => Frame::Tokens(Tokens { head, items, trail: &self.trail }),
        };
        let ours =
            |error: swarm_wire::EncodeError| NodeError::Bug(format!("a frame cannot be encoded: {error}"));
        frame.encode(&self.limits, &mut self.out).map_err(ours)?;
        patch_sent_us(&mut self.out, now_us()).map_err(ours)?;
        let sent = self.downstream.send(&self.out)?;
        self.counters.bytes_out.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(sent as u64)
    }

    fn open(&mut self, open: &OpenView<'_>, bytes: &[u8]) -> Result<(), NodeError> {
        match self.runner.open(open.session, &open.sampling, open.prompt(), open.logits_hash) {
            Ok(()) => self.pass_on(bytes),
            Err(failure) => self.report(vec![failure]),
        }
    }

    /// Session messages go on as they came; the tail is where they end.
    fn pass_on(&mut self, bytes: &[u8]) -> Result<(), NodeError> {
        match self.downstream {
            Downstream::Next(_) => self.send_frame(bytes),
            Downstream::Coordinator(_) => Ok(()),
        }
    }

    fn send_frame(&mut self, bytes: &[u8]) -> Result<(), NodeError> {
        let sent = self.downstream.send(bytes)?;
        self.counters.bytes_out.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the coordinator, by way of the tail, which sessions cannot go on. Their KV rows go at once.
    fn report(&mut self, failures: Vec<Failure>) -> Result<(), NodeError> {
        for failure in failures {
            self.runner.close(failure.session);
            let frame = Frame::Failed(Failed {
                epoch: self.gate.epoch(),
                session: Some(failure.session),
                blame: failure.blame,
                from: self.id,
                text: &failure.text,
            });
            let mut bytes = Vec::new();
            frame
                .encode(&self.limits, &mut bytes)
                .map_err(|error| NodeError::Bug(format!("a frame cannot be encoded: {error}")))?;
            self.send_frame(&bytes)?;
        }
        Ok(())
    }

    fn gauges(&self) {
        self.counters.kv_bytes.store(self.runner.kv_bytes() as u64, Ordering::Relaxed);
        self.counters.sessions.store(self.runner.sessions() as u64, Ordering::Relaxed);
    }
}

fn broke(what: impl Into<String>, code: CloseCode) -> NodeError {
    NodeError::BadPeer { node: "the stage before this one".to_owned(), what: what.into(), code }
}
