//! The ring's life over its placements: the first one, and the next one after a loss or a return.
//!
//! A placement that follows another raises the epoch and keeps the members that are left, their control connections
//! and the scheduler, whose session numbers go on. A node keeps the weights of layers that stay with it; sessions do not outlive their placement
//! yet, but the scheduler knows what would have to be computed again ([`swarm_ring::ReplayPoint`]).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};
use swarm_ring::Scheduler;
use swarm_wire::Epoch;

use crate::coordinator::{Command, Coordinator, Remains};
use crate::engine::{EngineObserver, Info, Model};
use crate::error::NodeError;
use crate::lookout::{Lookout, Wanted};
use crate::room::{Member, Room};
use crate::setup::{self, Assembled, Ground};
use crate::shelf::{OWN, Shelf};

/// Placements tried before a prompt is told that none can be made.
const TRIES: usize = 3;

/// The compute thread and what it takes to put another one in its place.
pub(crate) struct Live {
    pub commands: Sender<Command>,
    /// Held by every answer; alone here when nobody is being answered.
    pub busy: Arc<()>,
    thread: Option<JoinHandle<Remains>>,
    /// What is left of the last placement while there is none.
    parked: Option<Remains>,
    /// Where lost members were.
    absent: Vec<Vec<SocketAddr>>,
    /// Where members are that were let go because the ring was better without them.
    spare: Vec<Vec<SocketAddr>>,
    lookout: Option<Lookout>,
    /// This node's weights, while there is no ring.
    shelf: Shelf,
}

impl Live {
    /// The first placement.
    pub fn start(model: &Arc<Model>, observer: EngineObserver<'_>) -> Result<(Self, Arc<Info>), NodeError> {
        let mut room = setup::find_members(&model.config, &model.identity, observer, &model.checkpoint)?;
        let (mut epoch, mut tries) = (setup::first_epoch(), TRIES);
        let shelf = Shelf::default();
        shelf.open(OWN);
        let parts = loop {
            match setup::assemble(&ground(model, observer, &shelf), &mut room, epoch) {
                Ok(parts) => break parts,
                Err(error) if tries > 1 && matches!(error, NodeError::Broken { .. }) => again(&error),
                Err(error) => return Err(error),
            }
            room.release("the ring is placed anew");
            (epoch, tries) = (Epoch(epoch.0.saturating_add(1)), tries - 1);
        };
        let (commands, _) = unbounded();
        let mut live = Self {
            commands,
            busy: Arc::default(),
            thread: None,
            parked: None,
            absent: Vec::new(),
            spare: Vec::new(),
            lookout: None,
            shelf,
        };
        let info = live.run(model, parts, room, None, epoch)?;
        Ok((live, info))
    }

    /// A lost member is back, and nobody is being answered.
    pub fn may_grow(&self) -> bool {
        Arc::strong_count(&self.busy) == 1 && self.lookout.as_ref().is_some_and(Lookout::has_found)
    }

    /// Another placement, on those who are here now. `before` is what the last one was.
    pub fn heal(
        &mut self,
        model: &Arc<Model>,
        before: &Info,
        observer: EngineObserver<'_>,
    ) -> Result<Arc<Info>, NodeError> {
        let Some(mut remains) = self.stop() else {
            // The compute thread panicked, and took its room with it.
            let (live, info) = Self::start(model, observer)?;
            *self = live;
            return Ok(info);
        };
        if let Some(stage) = remains.stage.take() {
            self.shelf.put(OWN, setup::held_model(&model.checkpoint, model.fingerprint), stage.into());
        }
        let newcomers = self.lookout.as_ref().map(Lookout::take).unwrap_or_default();
        match self.place(model, &mut remains, newcomers, observer) {
            Ok((parts, epoch)) => {
                let Remains { room, scheduler, .. } = remains;
                self.look_out(model, &room);
                self.run(model, parts, room, Some(scheduler), epoch)
            }
            Err(error) => {
                remains.room.release("the ring could not be placed anew");
                // Without the lost ones, the ring may be glad of those it did not need.
                self.absent.append(&mut self.spare);
                *before.fault.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error.chain());
                self.look_out(model, &remains.room);
                self.parked = Some(remains);
                Err(error)
            }
        }
    }

    /// Tries placements until one stands: first with whoever came back, then without them, then without whoever was
    /// lost meanwhile.
    fn place(
        &mut self,
        model: &Arc<Model>,
        remains: &mut Remains,
        newcomers: Vec<Member>,
        observer: EngineObserver<'_>,
    ) -> Result<(Assembled, Epoch), NodeError> {
        self.part(&mut remains.room);
        for guest in &newcomers {
            // One that came back somewhere else stands for the first that is missed.
            let was_at = |place: &Vec<SocketAddr>| place.iter().any(|at| guest.addresses.contains(at));
            let at = self.absent.iter().position(was_at).unwrap_or(0);
            if at < self.absent.len() {
                self.absent.remove(at);
            }
        }
        let guests: Vec<_> = newcomers.iter().map(Member::id).collect();
        remains.room.take_in(newcomers);
        let mut epoch = remains.scheduler.epoch();
        let mut tried = 0;
        loop {
            epoch = Epoch(epoch.0.saturating_add(1));
            let error = match setup::assemble(&ground(model, observer, &self.shelf), &mut remains.room, epoch)
            {
                Ok(parts) => return Ok((parts, epoch)),
                Err(error) => error,
            };
            tried += 1;
            remains.room.release("the ring is placed anew");
            let lost = self.part(&mut remains.room);
            // A guest may serve somebody else by now, or lack the model: the others do without it. And there may be
            // another way than one that broke.
            let other_way = lost || matches!(error, NodeError::Broken { .. });
            if tried >= TRIES || !(other_way || remains.room.dismiss(&guests)) {
                return Err(error);
            }
            again(&error);
        }
    }

    /// Lets go of lost members and remembers where they were. True when there were any.
    fn part(&mut self, room: &mut Room) -> bool {
        let lost = room.without_lost();
        for member in &lost {
            member.closer.close();
            if !self.absent.contains(&member.addresses) {
                self.absent.push(member.addresses.clone());
            }
        }
        !lost.is_empty()
    }

    /// Looks for those who are absent, in the background. Without a thread for it they are not found again.
    fn look_out(&mut self, model: &Arc<Model>, room: &Room) {
        if self.absent.is_empty() {
            self.lookout = None;
            return;
        }
        let here = room.members.iter().map(|member| (member.id(), member.addresses.clone())).collect();
        // One that looks for the same may be about to find them.
        if self.lookout.as_ref().is_some_and(|lookout| lookout.is_for(&self.absent, &here)) {
            return;
        }
        let wanted = Wanted {
            places: self.absent.clone(),
            here,
            discover: model.config.search.discover,
            interfaces: model.config.search.interfaces.clone(),
            identity: model.identity.clone(),
            own: setup::own_hello(&model.config, &model.identity),
            circle: room.circle(),
        };
        self.lookout = Lookout::start(wanted).ok();
    }

    /// Ends the compute thread and takes what outlives it; nothing when it panicked.
    fn stop(&mut self) -> Option<Remains> {
        let _ = self.commands.send(Command::Stop);
        match self.thread.take() {
            Some(thread) => thread.join().ok(),
            None => self.parked.take(),
        }
    }

    /// Starts the compute thread of a placement.
    fn run(
        &mut self,
        model: &Arc<Model>,
        parts: Assembled,
        room: Room,
        earlier: Option<Scheduler>,
        epoch: Epoch,
    ) -> Result<Arc<Info>, NodeError> {
        let scheduler = setup::scheduler(&model.config, earlier, epoch, &parts)?;
        let Assembled { runner, limits, ring, plan, nodes, left_out } = parts;
        self.spare.extend(left_out);
        self.spare.sort();
        self.spare.dedup();
        let info = Arc::new(Info {
            model: model.clone(),
            pulses: room.members.iter().map(|member| member.pulse.clone()).collect(),
            fault: Arc::new(Mutex::new(None)),
            plan,
            meter: Arc::default(),
            kv_bytes: Arc::default(),
            nodes,
        });
        let (commands, inbox) = unbounded();
        let mut coordinator = Coordinator::new(runner, scheduler, limits, ring, room, inbox);
        coordinator.layers = info.nodes.iter().map(|node| node.layers.clone()).collect();
        coordinator.fault = info.fault.clone();
        coordinator.meter = info.meter.clone();
        coordinator.kv_bytes = info.kv_bytes.clone();
        coordinator.refusals = model.refusals.clone();
        let cores = model.config.cores.clone();
        let body = move || {
            crate::machine::pin_caller(cores.as_deref());
            coordinator.run()
        };
        let thread = std::thread::Builder::new()
            .name("coordinator".into())
            .spawn(body)
            .map_err(|source| NodeError::System { what: "a thread cannot be started".into(), source })?;
        (self.commands, self.thread) = (commands, Some(thread));
        Ok(info)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // The room ends with what is left.
        drop(self.stop());
    }
}

fn again(error: &NodeError) {
    tracing::warn!("a placement failed and is made anew: {}", error.chain());
}

fn ground<'a>(model: &'a Arc<Model>, observer: EngineObserver<'a>, shelf: &'a Shelf) -> Ground<'a> {
    let Model { config, identity, checkpoint, context, fingerprint, .. } = &**model;
    Ground {
        config,
        identity,
        observer,
        model: checkpoint,
        context: *context,
        fingerprint: *fingerprint,
        shelf,
    }
}
