//! A worker: it becomes the stage it is told to be, serves one coordinator, and frees everything when that one goes.

use std::collections::BTreeMap;

use swarm_ring::{Gate, GateError, Refusal};
use swarm_wire::{
    Blame, DataKind, Epoch, Failed, Frame, FrameHead, FrameView, Hidden, HiddenView, NodeId, SegmentHead,
    SessionId, Tokens,
};

use super::Bug;
use super::model::{Failure, ToyStage, floats, hash};
use super::net::{ConnId, Msg, Net, Node, Order, Talk, Wake};

/// A worker gives a silent coordinator up after this long.
const COORDINATOR_SILENT_US: u64 = 8_000_000;
const BEAT_US: u64 = 1_000_000;

pub struct Worker {
    id: Node,
    bug: Option<Bug>,
    /// Rows take this long, in microseconds.
    row_us: u64,
    /// Sessions that fail here for no reason of theirs, of 1000 rows.
    fails: u64,
    /// Control connections, and when each was heard last.
    coordinators: BTreeMap<ConnId, u64>,
    slot: Option<Slot>,
}

struct Slot {
    owner: ConnId,
    order: Order,
    stage: ToyStage,
    gate: Gate,
    loaded: bool,
    begun: bool,
    told: bool,
    upstream: Option<ConnId>,
    downstream: Option<ConnId>,
    busy_until_us: u64,
}

impl Worker {
    pub fn new(net: &mut Net, id: Node, row_us: u64, fails: u64, bug: Option<Bug>) -> Self {
        net.wake(id, BEAT_US, Wake::Beat);
        Self { id, bug, row_us, fails, coordinators: BTreeMap::new(), slot: None }
    }

    pub fn hear(&mut self, net: &mut Net, conn: ConnId, msg: Msg) {
        match msg {
            Msg::Hello => {
                self.coordinators.insert(conn, net.now);
                net.send(self.id, conn, Msg::Talk(Talk::Welcome), 0);
            }
            Msg::DataHello(kind, epoch) => self.join(net, conn, kind, epoch),
            Msg::Talk(talk) => self.talk(net, conn, talk),
            Msg::Frame(bytes) => self.frame(net, conn, bytes),
            Msg::Closed => self.closed(net, conn),
        }
    }

    pub fn wake(&mut self, net: &mut Net, what: Wake) {
        match what {
            Wake::Beat => {
                net.wake(self.id, BEAT_US, Wake::Beat);
                let silent = |heard: u64| net.now.saturating_sub(heard) > COORDINATOR_SILENT_US;
                let gone: Vec<ConnId> = self
                    .coordinators
                    .iter()
                    .filter(|(_, heard)| silent(**heard))
                    .map(|(&conn, _)| conn)
                    .collect();
                if self.bug != Some(Bug::WaitsForever) {
                    for conn in gone {
                        net.saw("silent coordinator given up");
                        net.close(self.id, conn);
                        self.closed(net, conn);
                    }
                }
            }
            Wake::Loaded(epoch) => {
                if let Some(slot) = self.slot.as_mut().filter(|slot| slot.order.epoch == epoch) {
                    slot.loaded = true;
                    net.send(self.id, slot.owner, Msg::Talk(Talk::Ready(epoch)), 0);
                }
            }
        }
    }

    fn talk(&mut self, net: &mut Net, conn: ConnId, talk: Talk) {
        let Some(heard) = self.coordinators.get_mut(&conn) else { return };
        *heard = net.now;
        let owns = |slot: &Slot, epoch: Epoch| (slot.owner, slot.order.epoch) == (conn, epoch);
        match talk {
            Talk::Ping => net.send(self.id, conn, Msg::Talk(Talk::Pong), 0),
            Talk::Prepare(order) => self.prepare(net, conn, order),
            Talk::Start(epoch) => {
                let Some(slot) = self.slot.as_mut().filter(|slot| owns(slot, epoch) && slot.loaded) else {
                    return;
                };
                slot.begun = true;
                if let Some(next) = slot.order.next {
                    slot.downstream = Some(net.dial(self.id, next, Msg::DataHello(DataKind::Hidden, epoch)));
                }
                self.started(net);
            }
            Talk::Release(epoch) if self.slot.as_ref().is_some_and(|slot| owns(slot, epoch)) => {
                self.end(net, false);
            }
            _ => {}
        }
    }

    fn prepare(&mut self, net: &mut Net, conn: ConnId, order: Order) {
        if self.slot.as_ref().is_some_and(|slot| slot.owner != conn) {
            net.saw("second coordinator refused");
            return net.send(self.id, conn, Msg::Talk(Talk::Refused(order.epoch)), 0);
        }
        self.end(net, false);
        let load_us = net.rng.within(1_000, 50_000);
        net.wake(self.id, load_us, Wake::Loaded(order.epoch));
        self.slot = Some(Slot {
            owner: conn,
            stage: ToyStage::new(order.layers.clone(), order.sessions_max, self.bug),
            gate: Gate::new(order.epoch, order.limits),
            order,
            loaded: false,
            begun: false,
            told: false,
            upstream: None,
            downstream: None,
            busy_until_us: 0,
        });
    }

    fn join(&mut self, net: &mut Net, conn: ConnId, kind: DataKind, epoch: Epoch) {
        let slot = self.slot.as_mut().filter(|slot| slot.order.epoch == epoch);
        let place = slot.and_then(|slot| match kind {
            DataKind::Hidden => Some(&mut slot.upstream),
            DataKind::Tokens if slot.order.tail => Some(&mut slot.downstream),
            DataKind::Tokens => None,
        });
        match place {
            Some(place @ None) => {
                *place = Some(conn);
                self.started(net);
            }
            _ => {
                net.saw("data connection without a stage");
                net.close(self.id, conn);
            }
        }
    }

    fn started(&mut self, net: &mut Net) {
        let Some(slot) = &mut self.slot else { return };
        if slot.begun && !slot.told && slot.upstream.is_some() && slot.downstream.is_some() {
            slot.told = true;
            net.send(self.id, slot.owner, Msg::Talk(Talk::Started(slot.order.epoch)), 0);
        }
    }

    fn closed(&mut self, net: &mut Net, conn: ConnId) {
        self.coordinators.remove(&conn);
        let Some(slot) = &self.slot else { return };
        if slot.owner == conn {
            self.end(net, false);
        } else if slot.upstream == Some(conn) || slot.downstream == Some(conn) {
            self.end(net, true);
        }
    }

    /// The stage ends and frees everything; the coordinator is told unless it knows.
    fn end(&mut self, net: &mut Net, say: bool) {
        let Some(slot) = self.slot.take() else { return };
        for conn in [slot.upstream, slot.downstream].into_iter().flatten() {
            net.close(self.id, conn);
        }
        if say {
            net.send(self.id, slot.owner, Msg::Talk(Talk::Refused(slot.order.epoch)), 0);
        }
    }

    fn frame(&mut self, net: &mut Net, conn: ConnId, bytes: Vec<u8>) {
        let Some(slot) = self.slot.as_mut().filter(|slot| slot.upstream == Some(conn)) else { return };
        let admitted = match slot.gate.admit(&bytes) {
            Err(GateError::LapOrder { .. }) if self.bug == Some(Bug::TakesAnyOrder) => {
                Ok(FrameView::decode(&bytes, &slot.order.limits).ok())
            }
            admitted => admitted,
        };
        match admitted {
            Ok(Some(view)) => {
                let mut work = Work { net, id: self.id, slot, row_us: self.row_us, fails: self.fails };
                work.serve(&view, &bytes);
            }
            Ok(None) => net.saw("stale frame dropped"),
            Err(error) => {
                net.tell(|| format!("node {} refuses a frame: {error}", self.id));
                net.saw("frame refused");
                self.end(net, true);
            }
        }
    }

    /// What a peer makes this node hold stays within what was agreed.
    pub fn check(&self) -> Result<(), String> {
        let Some(slot) = &self.slot else { return Ok(()) };
        let (book, order) = (&slot.stage.book, &slot.order);
        let rows_max = order.sessions_max as u64 * u64::from(order.limits.context_max);
        if book.len() > order.sessions_max || book.rows() > rows_max {
            return Err(format!("P4: node {} holds {} sessions, {} rows", self.id, book.len(), book.rows()));
        }
        Ok(())
    }

    /// Sessions that still have rows here.
    pub fn sessions(&self) -> usize {
        self.slot.as_ref().map_or(0, |slot| slot.stage.book.len())
    }
}

/// One frame on its way through a stage.
struct Work<'a> {
    net: &'a mut Net,
    id: Node,
    slot: &'a mut Slot,
    row_us: u64,
    fails: u64,
}

impl Work<'_> {
    fn serve(&mut self, view: &FrameView<'_>, bytes: &[u8]) {
        match view {
            FrameView::Hidden(hidden) => self.batch(hidden),
            FrameView::Open(open) => match self.slot.stage.open(open.session) {
                Ok(()) => self.pass_on(bytes),
                Err(refusal) => self.fail(Failure { session: open.session, refusal: Some(refusal) }),
            },
            FrameView::Truncate { session, position, .. } => {
                match self.slot.stage.truncate(*session, *position) {
                    Ok(()) => self.pass_on(bytes),
                    Err(refusal) => self.fail(Failure { session: *session, refusal: Some(refusal) }),
                }
            }
            FrameView::Close { session, .. } => {
                self.slot.stage.close(*session);
                self.pass_on(bytes);
            }
            FrameView::Failed(failed) => {
                if let Some(session) = failed.session {
                    self.slot.stage.close(session);
                }
                self.send(bytes.to_vec());
            }
            _ => {}
        }
    }

    fn batch(&mut self, hidden: &HiddenView<'_>) {
        let mut values = vec![0.0; hidden.rows_len()];
        hidden.rows_into(&mut values).expect("the length was asked for");
        let mut rows: Vec<u64> = values.chunks_exact(4).map(hash).collect();
        let mut segments: Vec<SegmentHead> = hidden.segments().collect();
        let cost_us = self.row_us * rows.len() as u64;
        self.slot.busy_until_us = self.slot.busy_until_us.max(self.net.now) + cost_us;
        let unlucky =
            self.net.rng.chance(self.fails).then(|| segments.first().map(|head| head.session)).flatten();
        let failures = self.slot.stage.forward(&mut segments, &mut rows, |session| Some(session) == unlucky);
        failures.into_iter().for_each(|failure| self.fail(failure));
        let frame = encode(self.slot, hidden.head, &segments, &rows);
        self.send(frame);
    }

    fn fail(&mut self, failure: Failure) {
        self.slot.stage.close(failure.session);
        let text = match &failure.refusal {
            Some(refusal) => {
                let unknown = matches!(refusal, Refusal::Unknown(_));
                self.net.saw(if unknown { "rows of no session" } else { "session refused" });
                refusal.to_string()
            }
            None => {
                self.net.saw("session failed at a stage");
                "no memory for its rows".to_owned()
            }
        };
        let bytes = failed(self.slot.gate.epoch(), failure.session, &text, self.slot.order.limits);
        self.send(bytes);
    }

    fn pass_on(&mut self, bytes: &[u8]) {
        if !self.slot.order.tail {
            self.send(bytes.to_vec());
        }
    }

    fn send(&mut self, bytes: Vec<u8>) {
        let within_us = self.slot.busy_until_us.saturating_sub(self.net.now);
        if let Some(conn) = self.slot.downstream {
            self.net.send(self.id, conn, Msg::Frame(bytes), within_us);
        }
    }
}

fn failed(epoch: Epoch, session: SessionId, text: &str, limits: swarm_wire::Limits) -> Vec<u8> {
    let mut out = Vec::new();
    let from = NodeId([0; 32]);
    let frame = Frame::Failed(Failed { epoch, session: Some(session), blame: Blame::Us, from, text });
    frame.encode(&limits, &mut out).expect("a failure always fits");
    out
}

fn encode(slot: &Slot, head: FrameHead, segments: &[SegmentHead], rows: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    let values: Vec<f32> = rows.iter().flat_map(|&row| floats(row)).collect();
    let items = if slot.order.tail { slot.stage.sample(segments, rows) } else { Vec::new() };
    let frame = if slot.order.tail {
        Frame::Tokens(Tokens { head, items: &items, trail: &[] })
    } else {
        Frame::Hidden(Hidden { head, segments, trail: &[], rows: &values })
    };
    frame.encode(&slot.order.limits, &mut out).expect("what was admitted can be sent on");
    out
}
