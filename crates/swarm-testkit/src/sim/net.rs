//! The virtual network and clock: connections that deliver in order or not at all, links that are slow, cut one way
//! or both, machines that stop, die or lose power. Everything happens in one order that the seed alone decides.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::ops::Range;

use swarm_wire::{DataKind, Epoch};

use super::rng::Rng;

pub type Node = usize;
pub type ConnId = usize;

/// What a control connection carries: the control plane's messages, as far as they matter here.
#[derive(Clone, Debug, PartialEq)]
pub enum Talk {
    Welcome,
    Ping,
    Pong,
    Prepare(Order),
    Ready(Epoch),
    Start(Epoch),
    Started(Epoch),
    /// The stage of this epoch has ended or was never begun.
    Refused(Epoch),
    Release(Epoch),
}

/// A stage to become.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    pub epoch: Epoch,
    pub layers: Range<usize>,
    pub tail: bool,
    pub next: Option<Node>,
    pub limits: swarm_wire::Limits,
    pub sessions_max: usize,
}

#[derive(Clone, Debug)]
pub enum Msg {
    /// First on a control connection.
    Hello,
    /// First on a data connection.
    DataHello(DataKind, Epoch),
    Talk(Talk),
    Frame(Vec<u8>),
    /// The other end has closed, or its kernel says that nobody is there.
    Closed,
}

/// A node's own wake-ups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    Beat,
    Loaded(Epoch),
}

#[derive(Clone, Debug)]
pub enum Happening {
    Deliver { conn: ConnId, to_dialled: bool },
    Wake { node: Node, life: u32, what: Wake },
    Fault,
    Mend(Mend),
}

/// The end of a fault.
#[derive(Clone, Copy, Debug)]
pub enum Mend {
    Join(Node, Node),
    Resume(Node),
    Restart(Node),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    On,
    /// The process is gone; the machine's kernel answers for it.
    Killed,
    /// Nobody answers at all.
    Off,
}

pub struct Machine {
    pub power: Power,
    pub paused: bool,
    /// Counts starts: what was meant for an earlier one is lost.
    pub life: u32,
    held: Vec<Happening>,
    /// Frames that once arrived here, for a network that repeats old ones.
    old_frames: Vec<Vec<u8>>,
}

struct Conn {
    /// Who dialled, who was dialled.
    ends: [Node; 2],
    lives: [u32; 2],
    /// Whether each end still listens.
    open: [bool; 2],
    /// To the dialler, to the dialled.
    queues: [VecDeque<(u64, Msg)>; 2],
}

struct Timed {
    at: u64,
    order: u64,
    what: Happening,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// How often, of 1000 frames, a hostile network does what no link should.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hostile {
    pub duplicate: u64,
    pub swap: u64,
    pub replay: u64,
}

pub struct Net {
    pub now: u64,
    pub rng: Rng,
    pub machines: Vec<Machine>,
    pub hostile: Hostile,
    /// Base delay in microseconds, from and to.
    pub delay_us: Vec<Vec<u64>>,
    pub jitter_us: u64,
    cut: Vec<Vec<bool>>,
    conns: Vec<Conn>,
    queue: BinaryHeap<Reverse<Timed>>,
    order: u64,
    /// What happened how often, for coverage; and the last lines of the story, when it is told.
    pub seen: BTreeMap<&'static str, u64>,
    pub story: Option<VecDeque<String>>,
    pub digest: u64,
}

impl Net {
    pub fn new(nodes: usize, mut rng: Rng, slowest_us: u64, jitter_us: u64) -> Self {
        let mut delays = || (0..nodes).map(|_| rng.within(50, slowest_us)).collect();
        let delay_us = (0..nodes).map(|_| delays()).collect();
        let machine =
            || Machine { power: Power::On, paused: false, life: 0, held: Vec::new(), old_frames: Vec::new() };
        Self {
            now: 0,
            rng,
            machines: (0..nodes).map(|_| machine()).collect(),
            hostile: Hostile::default(),
            delay_us,
            jitter_us,
            cut: vec![vec![false; nodes]; nodes],
            conns: Vec::new(),
            queue: BinaryHeap::new(),
            order: 0,
            seen: BTreeMap::new(),
            story: None,
            digest: 0,
        }
    }

    pub fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            if story.len() == 80 {
                story.pop_front();
            }
            story.push_back(format!("{:>9} us  {}", self.now, line()));
        }
    }

    pub fn at(&mut self, at: u64, what: Happening) {
        self.order += 1;
        self.queue.push(Reverse(Timed { at: at.max(self.now), order: self.order, what }));
    }

    /// The next thing that happens, with the clock set to it.
    pub fn next(&mut self) -> Option<Happening> {
        let Reverse(timed) = self.queue.pop()?;
        self.now = timed.at;
        self.digest = super::rng::scramble(self.digest ^ timed.at ^ (timed.order << 40));
        Some(timed.what)
    }

    pub fn wake(&mut self, node: Node, within_us: u64, what: Wake) {
        let life = self.machines[node].life;
        self.at(self.now + within_us, Happening::Wake { node, life, what });
    }

    /// Opens a connection with its first message. Whether anybody answers is another question.
    pub fn dial(&mut self, from: Node, to: Node, first: Msg) -> ConnId {
        let lives = [self.machines[from].life, self.machines[to].life];
        self.conns.push(Conn { ends: [from, to], lives, open: [true, true], queues: Default::default() });
        let conn = self.conns.len() - 1;
        self.send(from, conn, first, 0);
        conn
    }

    /// Sends after `within_us`; bytes of a connection arrive in order.
    pub fn send(&mut self, from: Node, conn: ConnId, msg: Msg, within_us: u64) {
        let side = self.side_of(from, conn);
        let (to, open) = (self.conns[conn].ends[1 - side], self.conns[conn].open[side]);
        if !open {
            return;
        }
        let due = self.now + within_us + self.delay_us[from][to] + self.rng.below(self.jitter_us + 1);
        let queue = &mut self.conns[conn].queues[1 - side];
        let due = queue.back().map_or(due, |(last, _)| due.max(*last));
        queue.push_back((due, msg));
        self.at(due, Happening::Deliver { conn, to_dialled: side == 0 });
    }

    fn side_of(&self, node: Node, conn: ConnId) -> usize {
        usize::from(self.conns[conn].ends[0] != node)
    }

    /// Closes this end; the other hears of it when the network lets it.
    pub fn close(&mut self, node: Node, conn: ConnId) {
        self.send(node, conn, Msg::Closed, 0);
        let side = self.side_of(node, conn);
        self.conns[conn].open[side] = false;
    }

    /// Takes the next message of a connection that is due and can arrive, with its receiver.
    pub fn arrive(&mut self, conn: ConnId, to_dialled: bool) -> Option<(Node, Msg)> {
        let side = usize::from(to_dialled);
        let c = &self.conns[conn];
        let (from, to) = (c.ends[1 - side], c.ends[side]);
        let front_due = c.queues[side].front()?.0;
        if front_due > self.now || self.cut[from][to] {
            return None; // comes with a later wake-up, or when the cut ends
        }
        let machine = &mut self.machines[to];
        if machine.paused {
            machine.held.push(Happening::Deliver { conn, to_dialled });
            return None;
        }
        if machine.power == Power::Off {
            return None;
        }
        if c.lives[side] != machine.life || machine.power == Power::Killed || !c.open[side] {
            self.refuse(conn, side);
            return None;
        }
        self.misbehave(conn, side);
        let (_, msg) = self.conns[conn].queues[side].pop_front()?;
        if matches!(msg, Msg::Closed) {
            self.conns[conn].open[side] = false;
        }
        Some((to, msg))
    }

    /// The kernel answers for a process that is gone.
    fn refuse(&mut self, conn: ConnId, side: usize) {
        let c = &mut self.conns[conn];
        let had = c.queues[side].iter().any(|(_, msg)| !matches!(msg, Msg::Closed));
        c.queues[side].clear();
        let node = c.ends[side];
        c.open[side] = true;
        if had && c.open[1 - side] {
            self.send(node, conn, Msg::Closed, 0);
        }
        self.conns[conn].open[side] = false;
    }

    /// What an authenticated, ordered link never does, and a stage must survive all the same.
    fn misbehave(&mut self, conn: ConnId, side: usize) {
        let Hostile { duplicate, swap, replay } = self.hostile;
        if duplicate + swap + replay == 0 {
            return;
        }
        let to = self.conns[conn].ends[side];
        let Some((due, Msg::Frame(frame))) = self.conns[conn].queues[side].front().cloned() else { return };
        let old = &mut self.machines[to].old_frames;
        if old.len() < 64 {
            old.push(frame.clone());
        }
        let extra = if self.rng.chance(duplicate) {
            self.saw("frame repeated");
            Some(frame)
        } else if self.rng.chance(replay) {
            let pick = self.rng.index(self.machines[to].old_frames.len());
            self.saw("old frame replayed");
            Some(self.machines[to].old_frames[pick].clone())
        } else {
            None
        };
        let swapped = self.rng.chance(swap);
        let queue = &mut self.conns[conn].queues[side];
        if let Some(frame) = extra {
            queue.insert(1, (due, Msg::Frame(frame)));
            self.at(due, Happening::Deliver { conn, to_dialled: side == 1 });
        } else if swapped && matches!(queue.get(1), Some((_, Msg::Frame(_)))) {
            let second = queue[1].1.clone();
            queue[1].1 = std::mem::replace(&mut queue[0].1, second);
            self.saw("frames swapped");
        }
    }

    /// Whether an alarm rings now; a paused machine hears it when it goes on.
    pub fn rings(&mut self, node: Node, life: u32, what: Wake) -> bool {
        let machine = &mut self.machines[node];
        if machine.life != life || machine.power != Power::On {
            return false;
        }
        if machine.paused {
            machine.held.push(Happening::Wake { node, life, what });
            return false;
        }
        true
    }

    pub fn cut(&mut self, from: Node, to: Node) {
        self.cut[from][to] = true;
    }

    pub fn is_cut(&self, from: Node, to: Node) -> bool {
        self.cut[from][to]
    }

    /// Ends the cut; what was held back arrives now.
    pub fn join(&mut self, from: Node, to: Node) {
        if !std::mem::take(&mut self.cut[from][to]) {
            return;
        }
        for conn in 0..self.conns.len() {
            for side in [0, 1] {
                let ends = self.conns[conn].ends;
                if (ends[1 - side], ends[side]) == (from, to) {
                    let waiting = self.conns[conn].queues[side].len();
                    (0..waiting)
                        .for_each(|_| self.at(self.now, Happening::Deliver { conn, to_dialled: side == 1 }));
                }
            }
        }
    }

    pub fn pause(&mut self, node: Node) {
        self.machines[node].paused = true;
    }

    pub fn resume(&mut self, node: Node) {
        self.machines[node].paused = false;
        let held = std::mem::take(&mut self.machines[node].held);
        held.into_iter().for_each(|what| self.at(self.now, what));
    }

    /// The process ends. Killed, its kernel closes its connections; without power nobody does.
    pub fn stop(&mut self, node: Node, power: Power) {
        for conn in 0..self.conns.len() {
            for side in [0, 1] {
                let c = &self.conns[conn];
                let ours = c.ends[side] == node && c.lives[side] == self.machines[node].life;
                if ours && c.open[side] && power == Power::Killed {
                    self.close(node, conn);
                }
            }
        }
        let machine = &mut self.machines[node];
        machine.power = power;
        machine.paused = false;
        machine.held.clear();
    }

    /// A new process on the same machine.
    pub fn start(&mut self, node: Node) {
        self.machines[node].power = Power::On;
        self.machines[node].life += 1;
    }

    /// The connection is lost: each end hears of it in its time, and what was under way is gone.
    pub fn lose(&mut self, conn: ConnId) {
        let ends = self.conns[conn].ends;
        self.conns[conn].queues.iter_mut().for_each(VecDeque::clear);
        ends.into_iter().for_each(|end| self.send(end, conn, Msg::Closed, 0));
    }

    /// A connection with both ends open, if there is one.
    pub fn any_open(&mut self) -> Option<ConnId> {
        let open: Vec<ConnId> =
            (0..self.conns.len()).filter(|&conn| self.conns[conn].open == [true, true]).collect();
        if open.is_empty() { None } else { Some(open[self.rng.index(open.len())]) }
    }
}
