//! One life, from the first heartbeat to the proof that nothing is left behind.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use super::Bug;
use super::coordinator::{Coordinator, Shape};
use super::faults::{Weather, strike};
use super::net::{Happening, Mend, Msg, Net, Node, Power, Wake};
use super::rng::Rng;
use super::worker::Worker;

/// After the last fault, everything works again within this virtual time.
const MENDED_US: u64 = 40_000_000;
/// Sessions that have to be answered in full after the last fault.
const PROOFS: u64 = 2;

/// What happened in a life that kept its promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The number that decided everything.
    pub seed: u64,
    /// Tokens emitted, each of them checked.
    pub tokens: u64,
    /// Sessions answered in full.
    pub completed: u64,
    /// Sessions that ended with an error.
    pub errors: u64,
    /// Virtual microseconds.
    pub lasted_us: u64,
    /// Equal for equal lives: a digest of the times and order of all events.
    pub digest: u64,
    /// Faults and their consequences, and how often each happened.
    pub seen: BTreeMap<&'static str, u64>,
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The life.
    pub seed: u64,
    /// When, in virtual microseconds.
    pub at_us: u64,
    /// What, beginning with the promise: `P1`, `P2` or `P4`.
    pub what: String,
    /// The last events before it.
    pub story: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.story.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        let Self { seed, at_us, what, .. } = self;
        writeln!(f, "SWARM_SIM_SEED={seed} broke a promise after {at_us} us of virtual time: {what}")?;
        write!(f, "replay it: SWARM_SIM_SEED={seed} cargo test -p swarm-testkit --test sim")
    }
}

impl std::error::Error for Violation {}

enum Role {
    Coordinator(Box<Coordinator>),
    Worker(Box<Worker>),
    Gone,
}

struct Life {
    net: Net,
    bug: Option<Bug>,
    shape: Shape,
    weather: Weather,
    roles: Vec<Role>,
    coordinators: usize,
    fails: u64,
    totals: [u64; 3],
}

/// Lives the life of `seed`; with `bug`, one rule is broken on purpose.
///
/// # Errors
/// The first broken promise. Costs about a millisecond.
pub fn live(seed: u64, bug: Option<Bug>) -> Result<Report, Violation> {
    let told = Life::new(seed, bug).run(seed);
    match told {
        Ok(report) => Ok(report),
        // Once more, with its story told; telling changes nothing.
        Err(_) => {
            let mut life = Life::new(seed, bug);
            life.net.story = Some(VecDeque::new());
            life.run(seed)
        }
    }
}

impl Life {
    fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = Rng::new(seed);
        let coordinators = if rng.chance(200) { 2 } else { 1 };
        let workers = rng.within(1, 4) as usize;
        let layers = rng.within(workers as u64 + 1, 12) as usize;
        let slowest_us = *[500, 5_000, 40_000].get(rng.index(3)).unwrap_or(&500);
        let jitter_us = if rng.chance(500) { slowest_us / 2 } else { 0 };
        let shape = Shape {
            layers,
            // Sometimes any two nodes will do, sometimes all are needed.
            layers_per_node: rng.within(layers.div_ceil(workers + 1) as u64, layers as u64) as usize,
            chunk: rng.within(2, 8) as u32,
            row_us: rng.within(20, 2_000),
            opens: rng.within(100, 800),
            cancels: rng.within(0, 60),
        };
        let fails = if rng.chance(200) { 5 } else { 0 };
        let mut net = Net::new(coordinators + workers, rng, slowest_us, jitter_us);
        let weather = Weather::draw(&mut net);
        let mut life = Self {
            net,
            bug,
            shape,
            weather,
            roles: Vec::new(),
            coordinators,
            fails: if weather.calm() { 0 } else { fails },
            totals: [0; 3],
        };
        for node in 0..coordinators + workers {
            let role = life.born(node);
            life.roles.push(role);
        }
        life
    }

    fn born(&mut self, node: Node) -> Role {
        let (net, bug) = (&mut self.net, self.bug);
        if node < self.coordinators {
            let workers: Vec<Node> = (self.coordinators..net.machines.len()).collect();
            Role::Coordinator(Box::new(Coordinator::new(net, node, &workers, self.shape, bug)))
        } else {
            Role::Worker(Box::new(Worker::new(net, node, self.shape.row_us, self.fails, bug)))
        }
    }

    fn run(mut self, seed: u64) -> Result<Report, Violation> {
        let lived = self.safety().and_then(|()| self.liveness());
        for node in 0..self.roles.len() {
            self.bury(node);
        }
        let Net { now, digest, seen, story, .. } = self.net;
        let [tokens, completed, errors] = self.totals;
        match lived {
            Ok(()) => Ok(Report { seed, tokens, completed, errors, lasted_us: now, digest, seen }),
            Err(what) => {
                let story = story.into_iter().flatten().collect();
                Err(Violation { seed, at_us: now, what, story })
            }
        }
    }

    /// Everything may go wrong, and no promise may be broken.
    fn safety(&mut self) -> Result<(), String> {
        self.weather.next(&mut self.net);
        while self.net.now < self.weather.until_us {
            self.step()?;
        }
        Ok(())
    }

    /// Nothing goes wrong any more: what was open ends, new sessions are answered, and then nothing is left.
    fn liveness(&mut self) -> Result<(), String> {
        self.mend();
        let until_us = self.net.now + MENDED_US;
        let before = self.completed();
        while !(self.completed() >= before + PROOFS && self.is_up()) {
            self.in_time(until_us, "P2: no ring works although nothing goes wrong any more")?;
        }
        if let Some(Role::Coordinator(coordinator)) = self.roles.first_mut() {
            coordinator.busy = false;
        }
        while self.live() > 0 {
            self.in_time(until_us, "P2: a session neither goes on nor ends")?;
        }
        // A frame that overtook another may have opened a session after its end: that one goes with the ring.
        if let (true, Some(Role::Coordinator(coordinator))) = (self.weather.hostile, self.roles.first_mut()) {
            coordinator.leave(&mut self.net);
        }
        while self.held() > 0 {
            self.in_time(until_us, "P4: sessions have ended, but a stage still holds them")?;
        }
        self.fair()
    }

    fn in_time(&mut self, until_us: u64, what: &str) -> Result<(), String> {
        if self.net.now > until_us { Err(what.to_owned()) } else { self.step() }
    }

    /// Without a hostile network nobody breaks the protocol, and without faults nothing is lost.
    fn fair(&self) -> Result<(), String> {
        let count = |what: &str| self.net.seen.get(what).copied().unwrap_or(0);
        if !self.weather.hostile {
            for what in ["frame refused", "answer refused", "session refused"] {
                if count(what) > 0 {
                    return Err(format!("P1: {what} although every link kept its order"));
                }
            }
            // Rows that were under way when their session failed at a stage come to nothing; no others do.
            if self.fails == 0 && count("rows of no session") > 0 {
                return Err("P1: rows for a session that no stage has failed".to_owned());
            }
        }
        let alone = self.coordinators == 1;
        if self.weather.calm() && alone && (self.totals[2] + self.errors() > 0 || count("ring lost") > 0) {
            return Err("P2: a session or a ring was lost although nothing went wrong".to_owned());
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        let Some(what) = self.net.next() else { return Err("P2: nothing happens any more".to_owned()) };
        let node = match what {
            Happening::Deliver { conn, to_dialled } => {
                let Some((node, msg)) = self.net.arrive(conn, to_dialled) else { return Ok(()) };
                self.hear(node, conn, msg);
                node
            }
            Happening::Wake { node, life, what } => {
                if !self.net.rings(node, life, what) {
                    return Ok(());
                }
                self.wake(node, what);
                node
            }
            Happening::Fault => {
                if self.net.now < self.weather.until_us {
                    self.weather.next(&mut self.net);
                    if let Some(node) = strike(&mut self.net) {
                        self.bury(node);
                    }
                }
                return Ok(());
            }
            Happening::Mend(mend) => {
                self.heal(mend);
                return Ok(());
            }
        };
        match &self.roles[node] {
            Role::Coordinator(coordinator) => coordinator.check(self.net.now),
            Role::Worker(worker) => worker.check(),
            Role::Gone => Ok(()),
        }
    }

    fn hear(&mut self, node: Node, conn: usize, msg: Msg) {
        match &mut self.roles[node] {
            Role::Coordinator(coordinator) => coordinator.hear(&mut self.net, conn, msg),
            Role::Worker(worker) => worker.hear(&mut self.net, conn, msg),
            Role::Gone => {}
        }
    }

    fn wake(&mut self, node: Node, what: Wake) {
        match &mut self.roles[node] {
            Role::Coordinator(coordinator) => coordinator.wake(&mut self.net, what),
            Role::Worker(worker) => worker.wake(&mut self.net, what),
            Role::Gone => {}
        }
    }

    /// A process is gone; what its users saw was counted.
    fn bury(&mut self, node: Node) {
        if let Role::Coordinator(coordinator) = std::mem::replace(&mut self.roles[node], Role::Gone) {
            let clients = &coordinator.clients;
            for (total, more) in
                self.totals.iter_mut().zip([clients.tokens, clients.completed, clients.errors])
            {
                *total += more;
            }
        }
    }

    fn heal(&mut self, mend: Mend) {
        match mend {
            Mend::Join(from, to) => self.net.join(from, to),
            Mend::Resume(node) => {
                if self.net.machines[node].paused {
                    self.net.resume(node);
                    if let Role::Coordinator(coordinator) = &mut self.roles[node] {
                        coordinator.clients.sign_of_life(self.net.now);
                    }
                }
            }
            Mend::Restart(node) => {
                // A second coordinator does not come back once the faults are over.
                let retired = (1..self.coordinators).contains(&node) && self.net.now >= self.weather.until_us;
                if self.net.machines[node].power != Power::On && !retired {
                    self.net.tell(|| format!("node {node} starts again"));
                    self.net.start(node);
                    self.roles[node] = self.born(node);
                }
            }
        }
    }

    /// All faults end at once. A second coordinator leaves, with or without a word, for one room has one ring.
    fn mend(&mut self) {
        self.net.tell(|| "all faults end".to_owned());
        self.net.hostile = Default::default();
        let nodes = self.roles.len();
        for node in 1..self.coordinators {
            let power = if self.net.rng.chance(500) { Power::Killed } else { Power::Off };
            self.net.stop(node, power);
            self.bury(node);
        }
        for node in 0..nodes {
            for far in 0..nodes {
                self.net.join(node, far);
                self.net.delay_us[node][far] = self.net.delay_us[node][far].min(40_000);
            }
            self.heal(Mend::Resume(node));
            self.heal(Mend::Restart(node));
        }
    }

    fn first(&self) -> Option<&Coordinator> {
        match self.roles.first() {
            Some(Role::Coordinator(coordinator)) => Some(coordinator),
            _ => None,
        }
    }

    fn completed(&self) -> u64 {
        self.first().map_or(0, |coordinator| coordinator.clients.completed)
    }

    fn errors(&self) -> u64 {
        self.first().map_or(0, |coordinator| coordinator.clients.errors)
    }

    fn is_up(&self) -> bool {
        self.first().is_some_and(Coordinator::is_up)
    }

    fn live(&self) -> usize {
        self.first().map_or(0, |coordinator| coordinator.clients.live())
    }

    fn held(&self) -> usize {
        let held = |role: &Role| if let Role::Worker(worker) = role { worker.sessions() } else { 0 };
        self.roles.iter().map(held).sum()
    }
}
