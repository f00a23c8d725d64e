//! A coordinator: it finds workers, forms a ring of those that answer, runs sessions over it, and forms another when
//! one is lost. Sessions, laps, deadlines and heartbeats are those of `swarm-ring`.

use std::collections::BTreeSet;

use swarm_ring::{
    Action, Health, Heartbeat, Scheduler, SchedulerConfig, SessionError, StepPlan, Timers, partition,
};
use swarm_wire::{Blame, DataKind, Epoch, Frame, FrameHead, FrameView, Hidden, Limits};

use super::Bug;
use super::clients::{CONTEXT, Clients};
use super::model::{ToyStage, VOCAB, WIDTH, floats};
use super::net::{ConnId, Msg, Net, Node, Order, Talk, Wake};

const SESSIONS_MAX: u32 = 4;
/// Longest time from the first order to a running ring.
const FORMING_US: u64 = 5_000_000;
const REDIAL_US: u64 = 300_000;
/// A connection nobody answered is given up after this long.
const WELCOME_US: u64 = 3_000_000;

struct Peer {
    node: Node,
    conn: Option<ConnId>,
    welcome: bool,
    heartbeat: Heartbeat,
    /// Not dialled, or not asked to be a stage, before this.
    dial_us: u64,
    ask_us: u64,
}

struct Party {
    epoch: Epoch,
    members: Vec<Node>,
    own: std::ops::Range<usize>,
    ready: BTreeSet<Node>,
    started: BTreeSet<Node>,
    hidden: Option<ConnId>,
    tokens: Option<ConnId>,
    until_us: u64,
    up: bool,
}

/// What a coordinator is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: usize,
    /// Layers one node can hold.
    pub layers_per_node: usize,
    pub chunk: u32,
    pub row_us: u64,
    /// Sessions opened per heartbeat, of 1000.
    pub opens: u64,
    pub cancels: u64,
}

pub struct Coordinator {
    id: Node,
    bug: Option<Bug>,
    shape: Shape,
    scheduler: Scheduler,
    stage: ToyStage,
    peers: Vec<Peer>,
    party: Option<Party>,
    epoch: Epoch,
    form_us: u64,
    plan: StepPlan,
    busy_until_us: u64,
    pub clients: Clients,
    /// Whether users open sessions now.
    pub busy: bool,
}

fn limits(stages: usize) -> Limits {
    Limits {
        width: WIDTH,
        vocab: VOCAB,
        context_max: CONTEXT,
        tokens_max: 8,
        segments_max: SESSIONS_MAX,
        stages_max: stages as u32,
    }
}

fn timers() -> Timers {
    Timers {
        lap_us_min: 1_000_000,
        factor: 8,
        first_lap_us: 4_000_000,
        first_row_us: 100_000,
        lap_us_max: 8_000_000,
    }
}

impl Coordinator {
    pub fn new(net: &mut Net, id: Node, workers: &[Node], shape: Shape, bug: Option<Bug>) -> Self {
        let epoch = Epoch(1 + net.rng.below(1 << 30) as u32);
        let config = SchedulerConfig {
            epoch,
            limits: limits(workers.len() + 1),
            sessions_max: SESSIONS_MAX,
            chunk: shape.chunk,
            stages: 2,
            frames_in_flight_max: 3,
            timers: timers(),
        };
        let mut scheduler = Scheduler::new(config).expect("a sound configuration");
        scheduler.fail(&SessionError::RingLost { blame: Blame::Link, text: "no ring yet".into() });
        let peer = |&node: &Node| Peer {
            node,
            conn: None,
            welcome: false,
            heartbeat: Heartbeat::default(),
            dial_us: 0,
            ask_us: 0,
        };
        net.wake(id, 0, Wake::Beat);
        Self {
            id,
            bug,
            shape,
            scheduler,
            stage: ToyStage::new(0..0, 0, None),
            peers: workers.iter().map(peer).collect(),
            party: None,
            epoch,
            form_us: 0,
            plan: StepPlan::default(),
            busy_until_us: 0,
            clients: Clients::new(shape.layers),
            busy: true,
        }
    }

    pub fn is_up(&self) -> bool {
        self.party.as_ref().is_some_and(|party| party.up)
    }

    pub fn hear(&mut self, net: &mut Net, conn: ConnId, msg: Msg) {
        match msg {
            Msg::Talk(talk) => self.talk(net, conn, talk),
            Msg::Frame(bytes) => self.answer(net, conn, &bytes),
            Msg::Closed => self.closed(net, conn),
            Msg::Hello | Msg::DataHello(..) => net.close(self.id, conn),
        }
        self.pump(net);
    }

    pub fn wake(&mut self, net: &mut Net, what: Wake) {
        if what == Wake::Beat {
            net.wake(self.id, Heartbeat::PING_EVERY_US, Wake::Beat);
            (0..self.peers.len()).for_each(|at| self.beat(net, at));
            let overdue = self.bug != Some(Bug::NeverGivesUp) && self.scheduler.tick(net.now).is_some();
            let late = self.party.as_ref().is_some_and(|party| !party.up && net.now > party.until_us);
            if overdue || late {
                net.saw(if overdue { "lap overdue" } else { "forming took too long" });
                self.lose(net);
            }
            if self.party.is_none() && net.now >= self.form_us {
                self.form(net);
            }
            if self.busy {
                self.use_it(net);
            }
        }
        self.pump(net);
    }

    fn use_it(&mut self, net: &mut Net) {
        for _ in 0..2 {
            if net.rng.chance(self.shape.opens) {
                self.clients.open(net, &mut self.scheduler);
            }
        }
        if net.rng.chance(self.shape.cancels) {
            self.clients.cancel_one(net, &mut self.scheduler);
        }
    }

    fn beat(&mut self, net: &mut Net, at: usize) {
        let Some(peer) = self.peers.get_mut(at) else { return };
        let Some(conn) = peer.conn else {
            if net.now >= peer.dial_us {
                peer.conn = Some(net.dial(self.id, peer.node, Msg::Hello));
                (peer.welcome, peer.heartbeat, peer.ask_us) = (false, Heartbeat::default(), 0);
                peer.dial_us = net.now + WELCOME_US;
            }
            return;
        };
        let dead = peer.heartbeat.ping() == Health::Dead && self.bug != Some(Bug::NeverGivesUp);
        if dead || !peer.welcome && net.now >= peer.dial_us {
            net.saw(if dead { "member given up" } else { "no welcome" });
            net.close(self.id, conn);
            return self.closed(net, conn);
        }
        net.send(self.id, conn, Msg::Talk(Talk::Ping), 0);
    }

    fn talk(&mut self, net: &mut Net, conn: ConnId, talk: Talk) {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.conn == Some(conn)) else { return };
        peer.heartbeat.pong();
        let node = peer.node;
        match talk {
            Talk::Welcome => peer.welcome = true,
            Talk::Ready(epoch) => self.ready(net, node, epoch),
            Talk::Started(epoch) => self.started(net, node, epoch),
            Talk::Refused(epoch) if self.party.as_ref().is_some_and(|party| party.epoch == epoch) => {
                peer.ask_us = net.now + REDIAL_US;
                self.lose(net);
            }
            _ => {}
        }
    }

    /// Asks every worker that answers to become a stage; waits for more when the layers do not fit.
    fn form(&mut self, net: &mut Net) {
        let fresh =
            |peer: &&Peer| peer.welcome && peer.heartbeat.health() == Health::Alive && net.now >= peer.ask_us;
        let mut members: Vec<Node> = self.peers.iter().filter(fresh).map(|peer| peer.node).collect();
        members.truncate(self.shape.layers.saturating_sub(1));
        if members.is_empty() || (members.len() + 1) * self.shape.layers_per_node < self.shape.layers {
            return;
        }
        if self.bug != Some(Bug::KeepsEpoch) {
            self.epoch = Epoch(self.epoch.0 + 1);
        }
        let cuts = partition(self.shape.layers, &vec![1; members.len() + 1]);
        for (at, (&node, layers)) in members.iter().zip(&cuts[1..]).enumerate() {
            let skip = usize::from(self.bug == Some(Bug::SkipsLayer) && at == 0);
            let order = Order {
                epoch: self.epoch,
                layers: layers.start + skip..layers.end,
                tail: at + 1 == members.len(),
                next: members.get(at + 1).copied(),
                limits: limits(members.len() + 1),
                sessions_max: SESSIONS_MAX as usize,
            };
            self.say(net, node, Talk::Prepare(order));
        }
        net.saw("ring formed");
        net.tell(|| format!("node {} forms a ring with {members:?} at {}", self.id, self.epoch));
        self.party = Some(Party {
            epoch: self.epoch,
            members,
            own: cuts[0].clone(),
            ready: BTreeSet::new(),
            started: BTreeSet::new(),
            hidden: None,
            tokens: None,
            until_us: net.now + FORMING_US,
            up: false,
        });
    }

    fn say(&self, net: &mut Net, node: Node, talk: Talk) {
        if let Some(conn) = self.peers.iter().find(|peer| peer.node == node).and_then(|peer| peer.conn) {
            net.send(self.id, conn, Msg::Talk(talk), 0);
        }
    }

    fn ready(&mut self, net: &mut Net, node: Node, epoch: Epoch) {
        let Some(party) = self.party.as_mut().filter(|party| party.epoch == epoch && !party.up) else {
            return;
        };
        party.ready.insert(node);
        let (Some(&first), Some(&tail)) = (party.members.first(), party.members.last()) else { return };
        if party.ready.len() < party.members.len() || party.hidden.is_some() {
            return;
        }
        party.tokens = Some(net.dial(self.id, tail, Msg::DataHello(DataKind::Tokens, epoch)));
        party.hidden = Some(net.dial(self.id, first, Msg::DataHello(DataKind::Hidden, epoch)));
        let members = party.members.clone();
        members.into_iter().for_each(|node| self.say(net, node, Talk::Start(epoch)));
    }

    fn started(&mut self, net: &mut Net, node: Node, epoch: Epoch) {
        let Some(party) = self.party.as_mut().filter(|party| party.epoch == epoch && !party.up) else {
            return;
        };
        party.started.insert(node);
        if party.started.len() < party.members.len() {
            return;
        }
        match self.scheduler.start_epoch(epoch, limits(party.members.len() + 1)) {
            Ok(true) => {
                party.up = true;
                self.stage = ToyStage::new(party.own.clone(), SESSIONS_MAX as usize, self.bug);
                net.saw("ring up");
                net.tell(|| format!("node {} has a ring at {epoch}", self.id));
            }
            Ok(false) | Err(_) => self.lose(net),
        }
    }

    fn closed(&mut self, net: &mut Net, conn: ConnId) {
        let data = self.party.as_ref().is_some_and(|p| p.hidden == Some(conn) || p.tokens == Some(conn));
        let mut member = false;
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.conn == Some(conn)) {
            (peer.conn, peer.welcome) = (None, false);
            peer.dial_us = net.now + REDIAL_US;
            member = self.party.as_ref().is_some_and(|party| party.members.contains(&peer.node));
        }
        if data || member {
            self.lose(net);
        }
    }

    /// The ring is lost: its sessions end, its members are released, and another is formed.
    fn lose(&mut self, net: &mut Net) {
        let Some(party) = self.party.take() else { return };
        net.saw("ring lost");
        net.tell(|| format!("node {} loses the ring of {}", self.id, party.epoch));
        self.scheduler.fail(&SessionError::RingLost { blame: Blame::Link, text: "a member is lost".into() });
        for conn in [party.hidden, party.tokens].into_iter().flatten() {
            net.close(self.id, conn);
        }
        for &node in &party.members {
            self.say(net, node, Talk::Release(party.epoch));
        }
        self.stage.close_all();
        self.form_us = net.now + net.rng.within(50_000, 300_000);
    }

    /// Gives the ring up for good.
    pub fn leave(&mut self, net: &mut Net) {
        self.lose(net);
        self.form_us = u64::MAX;
    }

    /// Does what the scheduler says until it says nothing.
    fn pump(&mut self, net: &mut Net) {
        loop {
            self.clients.read(net.now, &mut self.scheduler);
            let mut plan = std::mem::take(&mut self.plan);
            let action = self.scheduler.poll(net.now, limits(1).tokens_max, &mut plan);
            self.plan = plan;
            match action {
                None => return,
                Some(Action::Open(session)) => {
                    let Some(open) = self.scheduler.open_message(session) else { continue };
                    let bytes = self.encode(&Frame::Open(open));
                    if self.stage.open(session).is_err() {
                        self.scheduler.session_failed(session, Blame::Us, "no place");
                    }
                    self.send(net, bytes);
                }
                Some(Action::Close(session)) => {
                    self.stage.close(session);
                    let bytes = self.encode(&Frame::Close { epoch: self.scheduler.epoch(), session });
                    self.send(net, bytes);
                }
                Some(Action::Step(head)) => self.step(net, head),
                Some(_) => {}
            }
        }
    }

    fn step(&mut self, net: &mut Net, head: FrameHead) {
        let mut rows = ToyStage::embed(&self.plan.ids);
        let mut segments = std::mem::take(&mut self.plan.segments);
        self.busy_until_us = self.busy_until_us.max(net.now) + self.shape.row_us * rows.len() as u64;
        for failure in self.stage.forward(&mut segments, &mut rows, |_| false) {
            self.stage.close(failure.session);
            self.scheduler.session_failed(failure.session, Blame::Us, "refused at the first stage");
        }
        let values: Vec<f32> = rows.iter().flat_map(|&row| floats(row)).collect();
        let bytes =
            self.encode(&Frame::Hidden(Hidden { head, segments: &segments, trail: &[], rows: &values }));
        self.send(net, bytes);
    }

    fn encode(&self, frame: &Frame<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        let stages = self.party.as_ref().map_or(1, |party| party.members.len() + 1);
        frame.encode(&limits(stages), &mut out).expect("the scheduler keeps the limits");
        out
    }

    fn send(&mut self, net: &mut Net, bytes: Vec<u8>) {
        let within_us = self.busy_until_us.saturating_sub(net.now);
        if let Some(conn) = self.party.as_ref().and_then(|party| party.hidden) {
            net.send(self.id, conn, Msg::Frame(bytes), within_us);
        }
    }

    /// A frame from the tail.
    fn answer(&mut self, net: &mut Net, conn: ConnId, bytes: &[u8]) {
        let Some(party) = self.party.as_ref().filter(|party| party.tokens == Some(conn)) else { return };
        let sound = match FrameView::decode(bytes, &limits(party.members.len() + 1)) {
            Ok(FrameView::Tokens(view)) => {
                self.clients.sign_of_life(net.now);
                self.scheduler.lap_arrived(net.now, view.head, view.items()).is_ok()
            }
            Ok(FrameView::Failed(failed)) => {
                if let Some(session) = failed.session {
                    self.scheduler.session_failed(session, failed.blame, failed.text);
                }
                true
            }
            _ => false,
        };
        if !sound {
            net.saw("answer refused");
            self.lose(net);
        }
    }

    /// The sessions' owners are neither told lies nor forgotten, and no more is under way than may be.
    pub fn check(&self, now_us: u64) -> Result<(), String> {
        if self.scheduler.frames_in_flight() > 3 || self.scheduler.sessions() > SESSIONS_MAX as usize {
            return Err("P4: more frames or sessions than were agreed".into());
        }
        self.clients.check(now_us)
    }
}
