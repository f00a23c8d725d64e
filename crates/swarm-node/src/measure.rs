//! The room measured: every node's speed for a model, and the links between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use swarm_link::Identity;
use swarm_ring::{Link, ModelShape, NodeProfile, NodeSpeed, RoomProfile, SpeedSource};
use swarm_wire::{Control, Held, LayerShape, Measure, Measured, MeasuredLink, ModelId, NextHop};

use crate::control::{self, ControlSender};
use crate::deadlines::MEASURING;
use crate::engine::EngineConfig;
use crate::error::NodeError;
use crate::holdings;
use crate::link_probe::measure_link;
use crate::machine;
use crate::profile::Profiles;
use crate::room::{Member, NoteKind, Room};
use crate::worker::{Owner, Shared, spawn};

/// Round trips are told apart in such steps: smaller differences are noise, and would change the order of equal nodes.
const ROUND_TRIP_STEP_NS: u64 = 50_000;
/// A link of which nothing is known: an ordinary wireless network.
const ROUND_TRIP_ASSUMED_NS: u64 = 4_000_000;
const BYTES_PER_S_ASSUMED: u64 = 10_000_000;
/// How much faster a row is among many than alone, where only bandwidth is known.
const ROW_GAIN_ASSUMED: u64 = 4;
/// Read bandwidth of an ordinary core, where not even that is known.
const CORE_BYTES_PER_S_ASSUMED: f64 = 5e9;

/// What the coordinator measures for: the model, and this node's own settings.
pub(crate) struct Survey<'a> {
    pub config: &'a EngineConfig,
    pub identity: &'a Identity,
    pub shape: Option<LayerShape>,
    pub model: &'a ModelShape,
    /// Which model workers are asked to look for on their disks.
    pub id: Option<ModelId>,
    /// Bytes of weights that are here from the placement before, and make room for this one.
    pub held_bytes: u64,
}

impl Survey<'_> {
    /// This node alone.
    pub fn own(&self) -> NodeProfile {
        let config = self.config;
        let threads = config.threads.unwrap_or_else(machine::cores);
        let memory_bytes = control::memory_offered_with(config.memory_bytes, self.held_bytes);
        let profiles = Profiles::new(config.profile_dir.as_deref());
        let speed = self.shape.as_ref().filter(|_| config.measure);
        let speed =
            speed.and_then(|shape| profiles.speed(shape, threads, config.cores.clone(), memory_bytes));
        NodeProfile {
            id: control::wire_id(self.identity.node_id()),
            name: config.name.clone(),
            memory_bytes,
            speed: speed.unwrap_or_else(|| self.assumed(config.read_gb_s, threads)),
        }
    }

    /// Everybody, and the links between them.
    ///
    /// # Errors
    /// [`NodeError::Lost`] when a member is lost meanwhile. One that does not answer is placed by what its hello says.
    pub fn room(&self, room: &Room) -> Result<(RoomProfile, Vec<Option<Held>>), NodeError> {
        let own = self.own();
        let answers = if self.config.measure { self.ask_all(room)? } else { vec![None; room.members.len()] };
        let mut nodes = vec![own];
        for (member, answer) in room.members.iter().zip(&answers) {
            let known = answer.as_ref().filter(|answer| answer.layer_ns > 0).map(|answer| NodeSpeed {
                layer_ns: answer.layer_ns,
                row_ns: answer.row_ns.max(1),
                head_ns: answer.head_ns,
                source: if answer.layers { SpeedSource::Layers } else { SpeedSource::Probe },
            });
            let cores = member.hello.cores as usize;
            nodes.push(NodeProfile {
                id: member.id(),
                name: member.hello.name.clone(),
                memory_bytes: member.hello.memory_bytes_available,
                speed: known.unwrap_or_else(|| self.assumed(member.hello.read_gb_s, cores)),
            });
        }
        let links = self.links(room, &answers);
        let held = answers.into_iter().map(|answer| answer?.held).collect();
        Ok((RoomProfile { links, nodes }, held))
    }

    /// From memory bandwidth alone: decode reads every weight once.
    fn assumed(&self, read_gb_s: Option<f64>, cores: usize) -> NodeSpeed {
        let speed = read_gb_s.map_or(CORE_BYTES_PER_S_ASSUMED * cores.max(1) as f64, |speed| speed * 1e9);
        let ns = |bytes: u64| (bytes as f64 * 1e9 / speed.max(1.0)) as u64;
        let layers = self.model.layer_bytes.len().max(1) as u64;
        let sum = self.model.layer_bytes.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
        let layer_ns = ns(sum / layers).max(1);
        let (row_ns, head_ns) = ((layer_ns / ROW_GAIN_ASSUMED).max(1), ns(self.model.head_bytes));
        NodeSpeed { layer_ns, row_ns, head_ns, source: SpeedSource::Assumed }
    }

    /// Asks every worker to measure. Those of this computer one after the other, because they share its cores and its
    /// memory; the others at the same time.
    fn ask_all(&self, room: &Room) -> Result<Vec<Option<Measured>>, NodeError> {
        let mut answers = vec![None; room.members.len()];
        let Some(shape) = &self.shape else { return Ok(answers) };
        let (here, there): (Vec<usize>, Vec<usize>) =
            (0..room.members.len()).partition(|&index| room.members[index].is_local());
        let rounds = std::iter::once(there).chain(here.into_iter().map(|index| vec![index]));
        for round in rounds.filter(|round| !round.is_empty()) {
            for &index in &round {
                let member = &room.members[index];
                let others = room.members.iter().filter(|other| other.id() != member.id());
                let request = Measure {
                    id: index as u64,
                    shape: shape.clone(),
                    threads: self.config.worker_threads.and_then(|threads| u32::try_from(threads).ok()),
                    targets: others.take(swarm_wire::TARGETS_MAX).map(|other| member.way_to(other)).collect(),
                    model: self.id.clone(),
                };
                // One that cannot be told is lost, and that is news.
                let _ = member.control.send(&Control::Measure(Box::new(request)));
            }
            await_answers(room, &round, &mut answers)?;
        }
        Ok(answers)
    }

    fn links(&self, room: &Room, answers: &[Option<Measured>]) -> Vec<Vec<Option<Link>>> {
        let count = room.members.len() + 1;
        let mut links = vec![vec![None; count]; count];
        let own: Vec<Link> = room.members.iter().map(|member| self.own_link(member)).collect();
        for (index, link) in own.iter().enumerate() {
            // The coordinator dials: the way back is the same connection.
            links[0][index + 1] = Some(*link);
            links[index + 1][0] = Some(*link);
        }
        for (from, answer) in answers.iter().enumerate() {
            for (to, other) in room.members.iter().enumerate().filter(|(to, _)| *to != from) {
                let told = answer
                    .as_ref()
                    .and_then(|answer| answer.links.iter().find(|link| link.node_id == other.id()));
                let id = room.members[from].id();
                let measured = told.is_some_and(|link| link.bytes_per_s.is_some());
                links[from + 1][to + 1] = match told {
                    _ if room.is_broken(id, other.id(), measured) => None,
                    Some(told) => link_of(told),
                    // Nothing is known: at worst all goes the way over this node.
                    None => own.get(from).zip(own.get(to)).map(|(a, b)| Link {
                        round_trip_ns: a.round_trip_ns.saturating_add(b.round_trip_ns),
                        bytes_per_s: a.bytes_per_s.min(b.bytes_per_s),
                        measured: false,
                    }),
                };
            }
        }
        links
    }

    fn own_link(&self, member: &Member) -> Link {
        let target = NextHop { node_id: member.id(), addresses: member.addresses.clone() };
        let measured = self.config.measure.then(|| measure_link(self.identity, &target));
        let heartbeat = member.round_trip_us().map(|us| step(us.saturating_mul(1000)));
        measured.as_ref().and_then(link_of).unwrap_or(Link {
            round_trip_ns: heartbeat.unwrap_or(ROUND_TRIP_ASSUMED_NS),
            bytes_per_s: BYTES_PER_S_ASSUMED,
            measured: false,
        })
    }
}

fn step(ns: u64) -> u64 {
    ns.div_ceil(ROUND_TRIP_STEP_NS).saturating_mul(ROUND_TRIP_STEP_NS)
}

fn link_of(measured: &MeasuredLink) -> Option<Link> {
    Some(Link {
        round_trip_ns: step(measured.round_trip_ns?),
        bytes_per_s: measured.bytes_per_s.unwrap_or(BYTES_PER_S_ASSUMED),
        measured: measured.bytes_per_s.is_some(),
    })
}

/// Waits for the answers of `round`; who does not answer in time is left without one.
fn await_answers(room: &Room, round: &[usize], answers: &mut [Option<Measured>]) -> Result<(), NodeError> {
    let deadline = Instant::now() + MEASURING;
    while round.iter().any(|&index| answers[index].is_none()) {
        let Ok(note) = room.notes.recv_deadline(deadline) else { return Ok(()) };
        let Some(index) = room.members.iter().position(|member| member.id() == note.node) else { continue };
        match note.what {
            NoteKind::Lost(why) => {
                let (node, what) =
                    (room.members[index].name.clone(), format!("was lost while it measured: {why}"));
                return Err(NodeError::Lost { node, what });
            }
            NoteKind::Says(message) => match *message {
                Control::Measured(measured) if measured.id == index as u64 => answers[index] = Some(measured),
                Control::Bye => {
                    let node = room.members[index].name.clone();
                    return Err(NodeError::Lost { node, what: "left while it measured".into() });
                }
                _ => {}
            },
        }
    }
    Ok(())
}

/// A worker's side, on a thread of its own, so that heartbeats are answered meanwhile. One measurement at a time; a
/// worker that serves a stage tells what it knows and disturbs nobody.
pub(crate) fn answer_measure(
    shared: &Arc<Shared>,
    sender: &ControlSender,
    request: Measure,
    owner: Owner,
    busy: bool,
) {
    let (shared, sender, id) = (shared.clone(), sender.clone(), request.id);
    let nothing =
        Measured { id, layer_ns: 0, row_ns: 0, head_ns: 0, layers: false, links: Vec::new(), held: None };
    let turn = if busy { None } else { Turn::take() };
    let Some(turn) = turn else {
        let _ = sender.send(&Control::Measured(nothing));
        return;
    };
    let spawned = spawn("measure", move || {
        let config = &shared.config;
        let own = config.threads.unwrap_or_else(machine::cores);
        let threads = request.threads.map_or(own, |asked| own.min(asked as usize));
        let memory = control::memory_offered(config.memory_bytes);
        let profiles = Profiles::new(config.profile_dir.as_deref());
        let speed = profiles.speed(&request.shape, threads, config.cores.clone(), memory);
        let links = request.targets.iter().map(|target| measure_link(&shared.identity, target)).collect();
        drop(turn);
        let held = request.model.as_ref();
        let held = held.map(|id| holdings::answer(config.model.as_ref(), id, owner.key, &shared.stopped));
        let nothing = Measured { held, ..nothing };
        let answer = match speed {
            Some(NodeSpeed { layer_ns, row_ns, head_ns, source }) => Measured {
                layer_ns,
                row_ns,
                head_ns,
                layers: source == SpeedSource::Layers,
                links,
                ..nothing
            },
            None => Measured { links, ..nothing },
        };
        // A coordinator that has gone is noticed by the control thread.
        let _ = sender.send(&Control::Measured(answer));
    });
    if let Err(error) = spawned {
        tracing::warn!("nothing is measured: {}", error.chain());
    }
}

/// The right to measure, of one at a time in this process.
struct Turn;

static MEASURING_NOW: AtomicBool = AtomicBool::new(false);

impl Turn {
    fn take() -> Option<Self> {
        (!MEASURING_NOW.swap(true, Ordering::SeqCst)).then_some(Self)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        MEASURING_NOW.store(false, Ordering::SeqCst);
    }
}
