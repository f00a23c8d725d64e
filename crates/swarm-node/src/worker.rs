//! A worker: waits in the room, serves one stage at a time.
//!
//! Every authenticated connection says in its first message what it is: a control connection of a coordinator
//! (JSON), or a data connection of the ring (a fixed greeting). One coordinator at a time owns the worker's stage;
//! when its control connection ends, the stage and its sessions go, and the worker waits again.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};
use swarm_link::{
    Closer, Connection, Discovery, DiscoveryEvent, Identity, LinkError, LinkSettings, Listener, Scope,
    interfaces, own_address,
};
use swarm_wire::{
    Blame, CloseCode, Control, DATA_HELLO_BYTES, DataHello, DataKind, Epoch, Hello, NodeId, Pong, Refused,
    Role, Supply,
};

use crate::clock::now_us;
use crate::control::{self, ControlFault, ControlReceiver, ControlSender};
use crate::deadlines::{COORDINATOR_SILENT, FIRST_MESSAGE};
use crate::doctor::is_heard;
use crate::error::NodeError;
use crate::examine::serve_examine;
use crate::give::serve_fetch;
use crate::lend::serve_resolve;
use crate::link_probe::serve_probe;
use crate::listing::serve_list;
use crate::machine;
use crate::measure::answer_measure;
use crate::refusals::{Refusals, link_code};
use crate::serve::{StageEvent, StageHandle};
use crate::shelf::Shelf;
use crate::watch::WorkerStatus;

/// Connections served at once: each has a thread. A coordinator has one, a stage that is being connected two more.
const CONNECTIONS_MAX: usize = 64;

/// A connection holds so much at most before its stage's limits are agreed: a control message each way, what is read
/// ahead of it and what is sealed to be written.
const CONNECTION_BYTES_MAX: u64 = 2 * swarm_wire::CONTROL_BYTES_MAX as u64 + 512 * 1024;

/// What those who connect to a worker can make it hold, beside the stage, whose order is refused when it does not fit.
pub fn connections_bytes_max() -> u64 {
    CONNECTIONS_MAX as u64 * CONNECTION_BYTES_MAX
}

/// How a worker is started.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// What people call this node; the host name by default.
    pub name: String,
    /// The port to listen on, 0 for any.
    pub port: u16,
    /// The one address to listen on and to be announced with; all of them by default.
    pub bind: Option<IpAddr>,
    /// The network interfaces to be announced on, by name; all of them by default.
    pub interfaces: Vec<String>,
    /// Listen on loopback only and announce nothing: a worker of one command on this computer.
    pub local_only: bool,
    /// Show a pairing code while this computer knows no other.
    pub show_code: bool,
    /// The model to serve; by default whatever a coordinator names, if it is here.
    pub model: Option<PathBuf>,
    /// Compute threads; all cores by default.
    pub threads: Option<usize>,
    /// Cores to pin the compute threads to.
    pub cores: Option<Vec<usize>>,
    /// Most bytes to use; by default what is free.
    pub memory_bytes: Option<u64>,
    /// Measured read bandwidth, if it was measured.
    pub read_gb_s: Option<f64>,
    /// Where this node keeps what it learned of its speed; nowhere when absent.
    pub profile_dir: Option<PathBuf>,
    /// Weights that are quantized while they are loaded stay on the disk in that form.
    pub keep_quantized: bool,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            name: machine::host_name(),
            port: 0,
            bind: None,
            interfaces: Vec::new(),
            local_only: false,
            show_code: false,
            model: None,
            threads: None,
            cores: None,
            memory_bytes: None,
            read_gb_s: None,
            profile_dir: None,
            keep_quantized: false,
        }
    }
}

/// What a worker tells whoever watches it.
#[derive(Clone, Debug)]
pub enum WorkerEvent {
    /// It listens and (unless local) is announced.
    Waiting { port: u16 },
    /// Nobody can find it by mDNS, and why; `--peer` still works.
    DiscoveryUnavailable { why: String },
    /// Somebody without the swarm secret, or no node at all, tried to connect.
    Stranger { why: String },
    /// A code to show, and what becomes of it.
    Pairing(swarm_link::PairingEvent),
    /// A coordinator has come.
    Joined { coordinator: String },
    /// What happens to the stage.
    Stage(StageEvent),
    /// The coordinator has gone, and why.
    Left { coordinator: String, why: String },
}

/// Receives the events of a worker, from any of its threads.
pub type WorkerObserver = Arc<dyn Fn(WorkerEvent) + Send + Sync>;

/// A running worker. Stops when dropped.
pub struct Worker {
    shared: Arc<Shared>,
    port: u16,
    /// Says goodbye when dropped, so nobody else holds it.
    _discovery: Option<Arc<Discovery>>,
}

pub(crate) struct Shared {
    pub config: WorkerConfig,
    pub identity: Identity,
    pub observer: WorkerObserver,
    pub(crate) listener: Listener,
    discovery: Weak<Discovery>,
    slot: Mutex<Option<Slot>>,
    pub(crate) refusals: Refusals,
    /// What the coordinator's next placement may use again.
    pub(crate) shelf: Shelf,
    /// Closes when the last stage that was begun has ended, which is later than its slot is free.
    pub last_stage: Mutex<Option<Receiver<()>>>,
    connections: Mutex<Connections>,
    pub(crate) stopped: Receiver<()>,
    stop: Mutex<Option<Sender<()>>>,
}

/// The connections that have a thread, and the coordinators among them.
#[derive(Default)]
struct Connections {
    serving: usize,
    stopped: bool,
    last_owner: u64,
    coordinators: BTreeMap<u64, (ControlSender, Closer)>,
}

/// One of [`CONNECTIONS_MAX`] places, given back when dropped.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut connections = lock(&shared.connections);
        if connections.stopped || connections.serving >= CONNECTIONS_MAX {
            return None;
        }
        connections.serving += 1;
        Some(Self(shared.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.connections).serving -= 1;
    }
}

/// The coordinator that a stage is for.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    /// Its number here: each connection has another one.
    pub number: u64,
    pub node: NodeId,
    /// The static key of its machine.
    pub key: [u8; 32],
}

/// The stage that is being served, and who owns it.
struct Slot {
    owner: Owner,
    epoch: Epoch,
    stage: StageHandle,
}

impl Worker {
    /// Starts listening, announces the worker, and serves coordinators on threads of its own.
    pub fn start(
        config: WorkerConfig,
        identity: Identity,
        observer: WorkerObserver,
    ) -> Result<Self, NodeError> {
        let (held, offered) = (connections_bytes_max(), control::memory_offered(config.memory_bytes));
        if held > offered {
            return Err(NodeError::Request(format!(
                "{} of memory are free here, and connections alone may take {}; give this worker more --memory",
                crate::error::bytes_text(offered),
                crate::error::bytes_text(held)
            )));
        }
        let settings = LinkSettings::default();
        let bind = if config.local_only { Some(Ipv4Addr::LOCALHOST.into()) } else { config.bind };
        let listener = match bind {
            Some(ip) => {
                let address = own_address(ip, config.port, &interfaces().unwrap_or_default());
                Listener::bind_to(address, &identity, &settings)?
            }
            None => Listener::bind(config.port, &identity, &settings)?,
        };
        let port = listener.port();
        let (stop, stopped) = bounded(0);
        let discovery = announce(&config, &identity, port, &observer)?;
        let shared = Arc::new(Shared {
            config,
            identity,
            observer,
            listener,
            discovery: discovery.as_ref().map(Arc::downgrade).unwrap_or_default(),
            slot: Mutex::new(None),
            refusals: Refusals::default(),
            shelf: Shelf::default(),
            last_stage: Mutex::default(),
            connections: Mutex::default(),
            stopped,
            stop: Mutex::new(Some(stop)),
        });
        let accepting = shared.clone();
        spawn("worker", move || accept(&accepting))?;
        if !shared.config.local_only {
            crate::pairing::watch(shared.clone())?;
        }
        (shared.observer)(WorkerEvent::Waiting { port });
        Ok(Self { shared, port, _discovery: discovery })
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A look at the worker for another thread.
    pub fn watch(&self) -> WorkerWatch {
        WorkerWatch { shared: self.shared.clone(), port: self.port }
    }
}

/// Looks at a worker from any thread.
#[derive(Clone)]
pub struct WorkerWatch {
    shared: Arc<Shared>,
    port: u16,
}

impl WorkerWatch {
    /// What it is doing.
    pub fn status(&self) -> WorkerStatus {
        let Shared { config, identity, connections, slot, refusals, shelf, .. } = &*self.shared;
        WorkerStatus {
            name: control::node_name(&config.name, &control::wire_id(identity.node_id())),
            port: self.port,
            memory_bytes: control::memory_offered(config.memory_bytes),
            coordinators: lock(connections).coordinators.len(),
            stage: lock(slot).as_ref().map(|slot| slot.stage.status()),
            kept_bytes: shelf.bytes(),
            links_refused: refusals.by_name(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Closing the channel ends the accept loop; closing the stage ends its threads.
        lock(&self.shared.stop).take();
        self.shared.listener.close();
        let mut connections = lock(&self.shared.connections);
        connections.stopped = true;
        let coordinators = std::mem::take(&mut connections.coordinators);
        drop(connections);
        for (control, closer) in coordinators.values() {
            // A goodbye, so that the coordinator does not take this for a fault.
            let _ = control.send(&Control::Bye);
            closer.close();
        }
        lock(&self.shared.slot).take();
    }
}

/// Announces the worker by mDNS; a network where that does not work is news, not an error.
fn announce(
    config: &WorkerConfig,
    identity: &Identity,
    port: u16,
    observer: &WorkerObserver,
) -> Result<Option<Arc<Discovery>>, NodeError> {
    if config.local_only {
        return Ok(None);
    }
    let scope = Scope { interfaces: config.interfaces.clone(), address: config.bind };
    let discovery = Arc::new(Discovery::start_in(identity.instance(), scope)?);
    discovery.advertise(port);
    let (events, observer) = (discovery.events().clone(), observer.clone());
    spawn("announce", move || {
        for event in events {
            if let DiscoveryEvent::Unavailable { why, .. } = event {
                observer(WorkerEvent::DiscoveryUnavailable { why });
            }
        }
    })?;
    Ok(Some(discovery))
}

pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), NodeError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|source| NodeError::System { what: "a thread cannot be started".into(), source })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands each connection to a thread of its own until the worker stops.
fn accept(shared: &Arc<Shared>) {
    let (connections, refusals) = (shared.listener.connections(), shared.listener.refusals());
    loop {
        crossbeam_channel::select! {
            recv(shared.stopped) -> _ => return,
            recv(connections) -> connection => {
                let Ok(mut connection) = connection else { return };
                let Some(place) = Place::take(shared) else {
                    tracing::warn!("a connection is closed: {CONNECTIONS_MAX} others are served");
                    // Its buffer is empty, so this does not wait.
                    shared.refusals.tell(&mut connection.sender, Epoch(0), CloseCode::NoPlace);
                    continue;
                };
                if let Err(error) = spawn("serve", move || serve(&place.0, connection)) {
                    tracing::warn!("a connection is dropped: {}", error.chain());
                }
            }
            recv(refusals) -> refusal => {
                let Ok(refusal) = refusal else { return };
                if let Some(why) = turned_away(shared, &refusal.error) {
                    (shared.observer)(WorkerEvent::Stranger { why });
                }
            }
        }
    }
}

/// Why a stranger got no link, for this worker's user.
fn turned_away(shared: &Shared, error: &LinkError) -> Option<String> {
    match error {
        // The desk has said so already, and how many tries are left.
        LinkError::WrongCode { .. } => None,
        LinkError::Refused { address } if shared.config.show_code && shared.identity.is_fresh() => Some(
            format!("{address} is not paired with this computer; the code that is shown here pairs them"),
        ),
        error => Some(crate::error::chain(error)),
    }
}

/// Reads a connection's first message and goes on accordingly.
fn serve(shared: &Arc<Shared>, mut connection: Connection) {
    let mut first = Vec::new();
    connection.receiver.set_message_bytes_max(swarm_wire::CONTROL_BYTES_MAX);
    if connection.receiver.set_idle_timeout(Some(FIRST_MESSAGE)).is_err() {
        return;
    }
    if let Err(error) = connection.receiver.receive(&mut first) {
        if let Some(code) = link_code(&error) {
            shared.refusals.tell(&mut connection.sender, Epoch(0), code);
        }
        return;
    }
    if first.len() == DATA_HELLO_BYTES
        && let Ok(hello) = DataHello::decode(&first)
    {
        data(shared, connection, &hello);
        return;
    }
    match Control::decode(&first) {
        Ok(Control::Supply(supply)) => supplied(shared, connection, *supply),
        Ok(Control::Hello(hello)) => coordinator(shared, connection, &hello),
        Ok(Control::Probe) => serve_probe(connection),
        Ok(Control::Resolve { model }) => serve_resolve(connection, shared.config.model.as_ref(), &model),
        Ok(Control::List) => serve_list(connection, shared.config.model.as_ref(), &shared.config.name),
        Ok(Control::Fetch(id)) => serve_fetch(connection, shared.config.model.as_ref(), &id),
        Ok(Control::Examine(question)) => {
            let hears = |instance| shared.discovery.upgrade().map(|discovery| is_heard(&discovery, instance));
            serve_examine(connection, question, || own_hello(shared), hears);
        }
        Ok(_) => refuse_first(shared, connection, CloseCode::Unexpected, "a hello has to come first"),
        Err(error) if first.first() == Some(&b'{') => {
            refuse_first(shared, connection, CloseCode::Malformed, &crate::error::chain(&error));
        }
        Err(_) => shared.refusals.tell(&mut connection.sender, Epoch(0), CloseCode::Malformed),
    }
}

/// Refuses a control connection by its first message.
fn refuse_first(shared: &Shared, connection: Connection, code: CloseCode, why: &str) {
    tracing::warn!("a peer's first message is refused: {}", crate::error::printable(why));
    shared.refusals.count(code);
    let (_, sender, _, _) = control::split(connection);
    // Whoever does not hear it finds the link closed.
    let _ = sender.send(&Control::Refused(Refused::new(Blame::Peer, why).with_code(Some(code))));
}

/// A data connection goes to the stage it belongs to, or is closed.
fn data(shared: &Shared, mut connection: Connection, hello: &DataHello) {
    let mut refuse = |code| shared.refusals.tell(&mut connection.sender, hello.epoch, code);
    if hello.from != control::wire_id(connection.peer.node) {
        return refuse(CloseCode::Unexpected);
    }
    if connection.receiver.set_idle_timeout(None).is_err() {
        return;
    }
    match &*lock(&shared.slot) {
        Some(slot) if slot.epoch == hello.epoch => {
            slot.stage.connect(hello.kind, connection, &shared.refusals);
        }
        _ => {
            tracing::warn!("a data connection for {} does not belong to the stage served", hello.epoch);
            shared.refusals.tell(&mut connection.sender, hello.epoch, CloseCode::Epoch);
        }
    }
}

/// A coordinator's connection for bytes goes to the stage it belongs to, or is closed.
fn supplied(shared: &Shared, mut connection: Connection, supply: Supply) {
    let from = control::wire_id(connection.peer.node);
    match &*lock(&shared.slot) {
        Some(slot) if slot.epoch == supply.epoch && slot.owner.node == from => {
            slot.stage.supply(connection, supply);
        }
        _ => shared.refusals.tell(&mut connection.sender, supply.epoch, CloseCode::Epoch),
    }
}

/// Serves a coordinator until its control connection ends.
fn coordinator(shared: &Arc<Shared>, connection: Connection, hello: &Hello) {
    let (peer, sender, mut receiver, closer) = control::split(connection);
    let name = control::node_name(&hello.name, &hello.node_id);
    if let Err(error) = control::check_hello(&peer, hello) {
        error.code().into_iter().for_each(|code| shared.refusals.count(code));
        let refused = Refused::new(error.blame(), &error.chain()).with_code(error.code());
        let _ = sender.send(&Control::Refused(refused));
        return;
    }
    if sender.send(&Control::Welcome(own_hello(shared))).is_err() {
        return;
    }
    // A name that cannot be written down is asked for at the next meeting.
    let _ = shared.identity.note_met(&peer.static_key, &hello.name);
    let Some(number) = enrol(shared, &sender, &closer) else {
        // Stopped just after the welcome: this coordinator was not among those that were told.
        let _ = sender.send(&Control::Bye);
        return;
    };
    let owner = Owner { number, node: hello.node_id, key: peer.static_key };
    (shared.observer)(WorkerEvent::Joined { coordinator: name.clone() });
    let why = control_loop(shared, &sender, &mut receiver, owner, &closer);
    lock(&shared.connections).coordinators.remove(&number);
    release(shared, number);
    shared.shelf.close(number);
    (shared.observer)(WorkerEvent::Left { coordinator: name, why });
}

/// What this worker says of itself.
fn own_hello(shared: &Shared) -> Hello {
    let (config, id) = (&shared.config, control::wire_id(shared.identity.node_id()));
    let threads = config.threads.unwrap_or_else(machine::cores);
    let memory = control::memory_offered(config.memory_bytes);
    control::hello(id, &config.name, Role::Worker, threads, memory, config.read_gb_s)
}

/// Gives a coordinator the number under which it owns a stage; `None` when the worker stops.
fn enrol(shared: &Shared, sender: &ControlSender, closer: &Closer) -> Option<u64> {
    let mut connections = lock(&shared.connections);
    if connections.stopped {
        return None;
    }
    connections.last_owner += 1;
    let owner = connections.last_owner;
    connections.coordinators.insert(owner, (sender.clone(), closer.clone()));
    Some(owner)
}

/// Answers control messages until the link ends; returns why it ended, in words.
fn control_loop(
    shared: &Arc<Shared>,
    sender: &ControlSender,
    receiver: &mut ControlReceiver,
    owner: Owner,
    closer: &Closer,
) -> String {
    loop {
        let message = match receiver.receive(Some(COORDINATOR_SILENT)) {
            Ok(message) => message,
            Err(ControlFault::Link(swarm_link::LinkError::Closed)) => {
                return "it closed the connection".to_owned();
            }
            Err(error) => {
                if let Some(code) = error.code() {
                    shared.refusals.count(code);
                    let refused = Refused::new(Blame::Peer, &error.to_string()).with_code(Some(code));
                    let _ = sender.send(&Control::Refused(refused));
                }
                return error.to_string();
            }
        };
        let answer = match message {
            Control::Ping(ping) => {
                sender.send(&Control::Pong(Pong { id: ping.id, sent_us: ping.sent_us, node_us: now_us() }))
            }
            Control::Prepare(order) => match prepare(shared, sender, &order, owner, closer) {
                Ok(()) => Ok(()),
                Err(error) => {
                    let refused = Refused::new(error.blame(), &error.chain()).of(order.epoch);
                    let refused = refused.with_code(error.code());
                    sender.send(&Control::Refused(refused))
                }
            },
            Control::Start { epoch } => {
                if let Some(slot) = &*lock(&shared.slot)
                    && (slot.owner.number, slot.epoch) == (owner.number, epoch)
                {
                    slot.stage.start();
                }
                Ok(())
            }
            Control::Measure(request) => {
                let busy = lock(&shared.slot).as_ref().is_some_and(|slot| slot.owner.number != owner.number);
                answer_measure(shared, sender, *request, owner, busy);
                Ok(())
            }
            Control::StatsRequest { id } => {
                let stats = lock(&shared.slot).as_ref().map(|slot| slot.stage.stats(id)).unwrap_or_default();
                sender.send(&Control::Stats(swarm_wire::Stats { id, ..stats }))
            }
            Control::Release { .. } => {
                release(shared, owner.number);
                Ok(())
            }
            Control::Bye => return "it said goodbye".to_owned(),
            _ => {
                let (code, why) = (CloseCode::Unexpected, "it sent a message that is not for a worker");
                shared.refusals.count(code);
                let _ = sender.send(&Control::Refused(Refused::new(Blame::Peer, why).with_code(Some(code))));
                return why.to_owned();
            }
        };
        if let Err(error) = answer {
            return error.to_string();
        }
    }
}

/// Takes the slot for this coordinator and begins to load the stage.
fn prepare(
    shared: &Arc<Shared>,
    sender: &ControlSender,
    order: &swarm_wire::Prepare,
    owner: Owner,
    closer: &Closer,
) -> Result<(), NodeError> {
    let mut slot = lock(&shared.slot);
    if slot.as_ref().is_some_and(|slot| slot.owner.number != owner.number) {
        return Err(NodeError::Refused {
            node: "this worker".into(),
            blame: Blame::Link,
            reason: "it serves another coordinator; try again when that one is done".into(),
        });
    }
    // An earlier stage of the same coordinator goes first; weights of layers that stay here stay.
    slot.take();
    shared.shelf.open(owner.number);
    let stage = StageHandle::begin(shared, sender.clone(), order.clone(), owner, closer.clone())?;
    *slot = Some(Slot { owner, epoch: order.epoch, stage });
    Ok(())
}

fn release(shared: &Shared, owner: u64) {
    let mut slot = lock(&shared.slot);
    if slot.as_ref().is_some_and(|slot| slot.owner.number == owner) {
        slot.take();
    }
}

/// Which connection a stage waits for.
pub(crate) type DataLink = (DataKind, Connection);
