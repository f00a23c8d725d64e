//! Peers that follow the protocol by hand, so that a test can stop in the middle of it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use swarm_link::{Connection, Identity, LinkSettings, Listener, dial};
use swarm_weights::Checkpoint;
use swarm_wire::{
    Ack, CONTROL_BYTES_MAX, CloseCode, Closing, Control, DataHello, DataKind, Echo, Epoch, Fingerprint,
    Hello, KvType, Limits, NodeId, Pong, Prepare, Ready, Refused, Role, Stats,
};

const WAIT: Duration = Duration::from_secs(10);

fn hello(identity: &Identity, name: &str, role: Role) -> Hello {
    Hello {
        protocol_major: swarm_wire::PROTOCOL_MAJOR,
        protocol_minor: swarm_wire::PROTOCOL_MINOR,
        build: "puppet".into(),
        numerics: swarm_kernels::NUMERICS.into(),
        node_id: NodeId(*identity.node_id().as_bytes()),
        name: name.into(),
        role,
        memory_bytes_available: 1 << 33,
        cores: 1,
        read_gb_s: None,
        models: None,
    }
}

/// A control connection.
pub struct Talk {
    pub link: Connection,
    buffer: Vec<u8>,
}

impl Talk {
    fn new(mut link: Connection) -> Self {
        link.sender.set_message_bytes_max(CONTROL_BYTES_MAX);
        link.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
        Self { link, buffer: Vec::new() }
    }

    pub fn say(&mut self, message: &Control) {
        message.encode(&mut self.buffer).unwrap();
        self.link.sender.send(&[&self.buffer]).unwrap();
    }

    pub fn hear(&mut self, within: Duration) -> Result<Control, swarm_link::LinkError> {
        self.link.receiver.set_idle_timeout(Some(within))?;
        self.link.receiver.receive(&mut self.buffer)?;
        Ok(Control::decode(&self.buffer).unwrap())
    }

    /// The first message that `wanted` takes.
    pub fn hear_until<T>(&mut self, mut wanted: impl FnMut(Control) -> Option<T>) -> T {
        let deadline = Instant::now() + WAIT;
        loop {
            if let Some(found) = wanted(self.hear(deadline - Instant::now()).unwrap()) {
                return found;
            }
        }
    }
}

/// A worker that takes any stage, computes nothing, and falls silent when told to, as a stopped process does.
pub struct Puppet {
    pub address: SocketAddr,
    pub pings: Arc<AtomicUsize>,
    /// Links for tokens that the coordinator has not closed.
    pub open: Arc<AtomicUsize>,
    mute: Arc<AtomicBool>,
    gives_up: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Control>>>,
    tail: Arc<Mutex<Tail>>,
    loses: Arc<Mutex<Option<Loses>>>,
    _alive: Sender<()>,
}

/// Hidden rows are read and acknowledged, but one batch.
#[derive(Clone, Copy)]
struct Loses {
    lap: u64,
    /// When it was lost.
    at: Option<Instant>,
}

/// The connection for tokens: what is still to be said on it, and how the coordinator closed it.
#[derive(Default)]
struct Tail {
    says: Option<Vec<u8>>,
    closings: Vec<CloseCode>,
}

impl Puppet {
    pub fn start(identity: &Identity, name: &str) -> Self {
        Self::chatty(identity, name, 0)
    }

    /// One that says `chatter` things nobody asked for when it is given a stage.
    pub fn chatty(identity: &Identity, name: &str, chatter: u64) -> Self {
        let own = identity.another_instance().unwrap();
        let settings = LinkSettings::default();
        let listener = Listener::bind_to(([127, 0, 0, 1], 0).into(), &own, &settings).unwrap();
        let address = listener.address();
        let (alive, dead) = bounded(0);
        let (pings, open) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let mute = Arc::<AtomicBool>::default();
        let (gives_up, heard) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<Control>>>::default());
        let (tail, loses) = (Arc::<Mutex<Tail>>::default(), Arc::<Mutex<Option<Loses>>>::default());
        let body = PuppetBody {
            hello: hello(&own, name, Role::Worker),
            chatter,
            dead,
            pings: pings.clone(),
            open: open.clone(),
            mute: mute.clone(),
            gives_up: gives_up.clone(),
            heard: heard.clone(),
            tail: tail.clone(),
            loses: loses.clone(),
        };
        std::thread::spawn(move || body.accept(&listener));
        Self { address, pings, open, mute, gives_up, heard, tail, loses, _alive: alive }
    }

    /// Says once that its stage cannot go on.
    pub fn give_up(&self) {
        self.gives_up.store(true, Ordering::SeqCst);
    }

    /// Sends these bytes as the tail's answer.
    pub fn say_as_tail(&self, bytes: Vec<u8>) {
        self.tail.lock().unwrap().says = Some(bytes);
    }

    /// From the next placement on it reads hidden rows and does all that a receiving thread does, but for the batch `lap`,
    /// which it drops as if it had never come.
    pub fn lose(&self, lap: u64) {
        *self.loses.lock().unwrap() = Some(Loses { lap, at: None });
    }

    /// When it dropped that batch.
    pub fn lost_at(&self) -> Option<Instant> {
        self.loses.lock().unwrap().and_then(|loses| loses.at)
    }

    /// Why the coordinator closed the connection for tokens, each time.
    pub fn closings(&self) -> Vec<CloseCode> {
        self.tail.lock().unwrap().closings.clone()
    }

    /// What it was told, except pings.
    pub fn told(&self) -> Vec<Control> {
        self.heard.lock().unwrap().clone()
    }

    /// The placements it was given a stage of.
    pub fn orders(&self) -> Vec<Epoch> {
        let epoch = |message: Control| match message {
            Control::Prepare(order) => Some(order.epoch),
            _ => None,
        };
        self.told().into_iter().filter_map(epoch).collect()
    }

    /// From now on it reads and answers nothing, and its sockets stay open.
    pub fn stop(&self) {
        self.mute.store(true, Ordering::SeqCst);
    }
}

#[derive(Clone)]
struct PuppetBody {
    hello: Hello,
    chatter: u64,
    dead: Receiver<()>,
    pings: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    mute: Arc<AtomicBool>,
    gives_up: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Control>>>,
    tail: Arc<Mutex<Tail>>,
    loses: Arc<Mutex<Option<Loses>>>,
}

impl PuppetBody {
    fn accept(self, listener: &Listener) {
        loop {
            crossbeam_channel::select! {
                recv(self.dead) -> _ => return,
                recv(listener.connections()) -> link => {
                    let (Ok(link), body) = (link, self.clone()) else { return };
                    std::thread::spawn(move || body.serve(link));
                }
            }
        }
    }

    /// Until the coordinator ends it.
    fn be_tail(&self, mut link: Connection) {
        let mut bytes = Vec::new();
        link.sender.set_message_bytes_max(1 << 26);
        link.receiver.set_idle_timeout(Some(Duration::from_millis(20))).unwrap();
        loop {
            if let Some(says) = self.tail.lock().unwrap().says.take() {
                let _ = link.sender.send(&[&says]);
            }
            match link.receiver.receive(&mut bytes) {
                Ok(_) => {
                    let code = Closing::decode(&bytes).ok().map(|closing| closing.code);
                    self.tail.lock().unwrap().closings.extend(code);
                }
                Err(swarm_link::LinkError::Idle { .. }) => {}
                Err(_) => return,
            }
        }
    }

    /// Acknowledges every batch but one, and sends echoes back.
    fn take_rows(&self, mut link: Connection) {
        let mut bytes = Vec::new();
        link.receiver.set_message_bytes_max(1 << 26);
        while link.receiver.receive(&mut bytes).is_ok() {
            let answer = match (Ack::of(&bytes), Echo::decode(&bytes)) {
                (Some(ack), _) => match self.loses.lock().unwrap().as_mut() {
                    Some(loses) if loses.lap == ack.lap => {
                        loses.at = Some(Instant::now());
                        continue;
                    }
                    _ => ack.encode(),
                },
                (_, Ok(echo)) => echo.encode(),
                _ => continue,
            };
            let _ = link.sender.send(&[&answer]);
        }
    }

    fn serve(self, mut link: Connection) {
        let mut first = Vec::new();
        link.receiver.receive(&mut first).unwrap();
        if let Ok(greeting) = DataHello::decode(&first) {
            match greeting.kind {
                DataKind::Tokens => {
                    self.open.fetch_add(1, Ordering::SeqCst);
                    self.be_tail(link);
                    self.open.fetch_sub(1, Ordering::SeqCst);
                }
                _ if self.loses.lock().unwrap().is_some() => self.take_rows(link),
                // Held, and never read.
                _ => drop(self.dead.recv()),
            }
            return;
        }
        let mut talk = Talk::new(link);
        talk.say(&Control::Welcome(self.hello.clone()));
        let mut epoch = None;
        while !self.mute.load(Ordering::SeqCst) {
            if epoch.is_some() && self.gives_up.swap(false, Ordering::SeqCst) {
                let refused = Refused::new(swarm_wire::Blame::Us, "it gives up on purpose");
                talk.say(&Control::Refused(Refused { epoch, ..refused }));
            }
            let heard = talk.hear(Duration::from_millis(20));
            if let Ok(message) = &heard
                && !matches!(message, Control::Ping(_))
            {
                self.heard.lock().unwrap().push(message.clone());
            }
            match heard {
                Ok(Control::Ping(ping)) => {
                    self.pings.fetch_add(1, Ordering::SeqCst);
                    if !self.mute.load(Ordering::SeqCst) {
                        talk.say(&Control::Pong(Pong { id: ping.id, sent_us: ping.sent_us, node_us: 1 }));
                    }
                }
                Ok(Control::Prepare(order)) => {
                    epoch = Some(order.epoch);
                    // Many at once, while the coordinator is busy with its own layers.
                    (0..self.chatter)
                        .for_each(|id| talk.say(&Control::Stats(Stats { id, ..Stats::default() })));
                    let ready = Ready { epoch: order.epoch, bytes_loaded: 1, weight_bytes_per_token: 1 };
                    talk.say(&Control::Ready(ready));
                }
                Ok(Control::Start { epoch }) => talk.say(&Control::Started { epoch }),
                Ok(_) | Err(swarm_link::LinkError::Idle { .. }) => {}
                Err(_) => return,
            }
            if self.dead.recv_timeout(Duration::ZERO) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
        let _ = self.dead.recv();
    }
}

/// A coordinator by hand.
pub struct Caller {
    pub identity: Identity,
    pub talk: Talk,
    pub worker: NodeId,
    address: SocketAddr,
}

impl Caller {
    /// Says hello to the worker at `port` and takes its welcome.
    pub fn greet(identity: &Identity, port: u16) -> Self {
        Self::greet_as(identity, port, |_| {}).unwrap()
    }

    /// The same with another hello than this build's; or why that was refused.
    pub fn greet_as(
        identity: &Identity,
        port: u16,
        change: impl FnOnce(&mut Hello),
    ) -> Result<Self, Box<Refused>> {
        let (identity, address) =
            (identity.another_instance().unwrap(), SocketAddr::from(([127, 0, 0, 1], port)));
        let mut talk = Talk::new(dial(&[address], &identity, &LinkSettings::default(), WAIT).unwrap());
        let mut own = hello(&identity, "caller", Role::Coordinator);
        change(&mut own);
        talk.say(&Control::Hello(own));
        match talk.hear(WAIT) {
            Ok(Control::Welcome(worker)) => Ok(Self { identity, talk, worker: worker.node_id, address }),
            Ok(Control::Refused(refused)) => Err(Box::new(refused)),
            other => panic!("no welcome: {other:?}"),
        }
    }

    /// An order for all layers but the first of `model`.
    pub fn order(model: &std::path::Path, epoch: Epoch) -> Prepare {
        let checkpoint = Checkpoint::open(model).unwrap();
        let config = checkpoint.config();
        let layers = u32::try_from(config.num_hidden_layers).unwrap();
        Prepare {
            epoch,
            model: "toy".into(),
            fingerprint: Fingerprint(checkpoint.fingerprint().unwrap()),
            origin: None,
            layers: [1, layers].into(),
            layers_total: layers,
            tail: true,
            quant: None,
            kv_type: KvType::F16,
            context: 512,
            sessions_max: 4,
            limits: Limits {
                width: u32::try_from(config.hidden_size).unwrap(),
                vocab: u32::try_from(config.vocab_size).unwrap(),
                context_max: 512,
                tokens_max: 32,
                segments_max: 4,
                stages_max: 2,
            },
            next: None,
            threads: None,
            numerics: swarm_kernels::NUMERICS.into(),
            sources: Vec::new(),
        }
    }

    /// Orders the stage and waits until it is in memory.
    pub fn prepare(&mut self, order: Prepare) {
        let epoch = order.epoch;
        self.talk.say(&Control::Prepare(Box::new(order)));
        self.talk.hear_until(|message| match message {
            Control::Ready(ready) => (ready.epoch == epoch).then_some(()),
            Control::Refused(refused) => panic!("{}", refused.reason),
            _ => None,
        });
    }

    /// A data connection to the worker.
    pub fn connect(&self, epoch: Epoch, kind: DataKind) -> Connection {
        let mut link = dial(&[self.address], &self.identity, &LinkSettings::default(), WAIT).unwrap();
        let from = NodeId(*self.identity.node_id().as_bytes());
        link.sender.send(&[&DataHello { epoch, kind, from }.encode()]).unwrap();
        link
    }

    /// Both data connections, and the worker's word that its stage runs.
    pub fn join(&mut self, epoch: Epoch) -> (Connection, Connection) {
        let links = (self.connect(epoch, DataKind::Hidden), self.connect(epoch, DataKind::Tokens));
        self.talk.hear_until(|message| match message {
            Control::Started { .. } => Some(()),
            Control::Refused(refused) => panic!("{}", refused.reason),
            _ => None,
        });
        links
    }
}

/// The link ends within `within`; what comes before that is not looked at.
pub fn ends(link: &mut Connection, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    let mut buffer = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || link.receiver.set_idle_timeout(Some(left)).is_err() {
            return left.is_zero().then_some(()).is_none();
        }
        match link.receiver.receive(&mut buffer) {
            Ok(_) => {}
            Err(swarm_link::LinkError::Idle { .. }) => return false,
            Err(_) => return true,
        }
    }
}
