//! The users of a coordinator: they know what they must be told.

use std::collections::{BTreeMap, BTreeSet};

use swarm_ring::{Event, FinishReason, Scheduler, SessionRequest};
use swarm_wire::{Sampling, SessionId};

use super::model::{VOCAB, alone};
use super::net::Net;

/// Longest silence of a ring that is not given up, in virtual microseconds: the longest lap and a heartbeat.
pub const PATIENCE_US: u64 = 9_000_000;
pub const CONTEXT: u32 = 64;

struct Client {
    want: Vec<u32>,
    got: usize,
    prompt: u32,
    since_us: u64,
}

/// All users of one coordinator, and what they have seen.
pub struct Clients {
    layers: usize,
    live: BTreeMap<SessionId, Client>,
    pub tokens: u64,
    pub completed: u64,
    pub errors: u64,
    pub refused: u64,
    /// The first broken promise.
    pub wrong: Option<String>,
}

impl Clients {
    pub fn new(layers: usize) -> Self {
        Self { layers, live: BTreeMap::new(), tokens: 0, completed: 0, errors: 0, refused: 0, wrong: None }
    }

    pub fn live(&self) -> usize {
        self.live.len()
    }

    pub fn open(&mut self, net: &mut Net, scheduler: &mut Scheduler) {
        let prompt: Vec<u32> =
            (0..net.rng.within(1, 20)).map(|_| net.rng.below(u64::from(VOCAB)) as u32).collect();
        let max_tokens = net.rng.within(1, 12) as u32;
        let request = SessionRequest {
            prompt: prompt.clone(),
            max_tokens,
            sampling: Sampling::default(),
            end_tokens: BTreeSet::new(),
            context: CONTEXT,
            logits_hash: false,
        };
        let Ok(id) = scheduler.open(request) else {
            self.refused += 1;
            return;
        };
        let want = alone(self.layers, &prompt, max_tokens as usize);
        let client = Client { want, got: 0, prompt: prompt.len() as u32, since_us: net.now };
        if self.live.insert(id, client).is_some() {
            self.wrong = Some(format!("P1: {id} was given twice"));
        }
    }

    pub fn cancel_one(&mut self, net: &mut Net, scheduler: &mut Scheduler) {
        let pick = net.rng.index(self.live.len());
        if let Some(&id) = self.live.keys().nth(pick) {
            scheduler.cancel(id);
        }
    }

    /// Reads everything the scheduler has to say.
    pub fn read(&mut self, now_us: u64, scheduler: &mut Scheduler) {
        while let Some(event) = scheduler.next_event() {
            if let Err(what) = self.take(now_us, event) {
                self.wrong.get_or_insert(what);
            }
        }
    }

    fn take(&mut self, now_us: u64, event: Event) -> Result<(), String> {
        match event {
            Event::Token { session, position, token, .. } => {
                let client = self
                    .live
                    .get_mut(&session)
                    .ok_or(format!("P1: a token for {session}, which has ended"))?;
                let want = client.want.get(client.got).copied();
                if want != Some(token) || position.0 != client.prompt + client.got as u32 {
                    return Err(format!(
                        "P1: {session} was told {token} at {position}, as token {} of its answer; alone it is {want:?}",
                        client.got
                    ));
                }
                client.got += 1;
                client.since_us = now_us;
                self.tokens += 1;
            }
            Event::Finished { session, reason, tokens } => {
                let client = self.live.remove(&session).ok_or(format!("P1: {session} ended twice"))?;
                if tokens as usize != client.got {
                    return Err(format!("P1: {session} ended with {tokens} tokens, but {} came", client.got));
                }
                match reason {
                    FinishReason::Length if client.got == client.want.len() => self.completed += 1,
                    FinishReason::Cancelled => {}
                    FinishReason::Error(_) => self.errors += 1,
                    other => {
                        return Err(format!(
                            "P1: {session} ended with {other:?} after {} tokens",
                            client.got
                        ));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Nobody waits for ever.
    pub fn check(&self, now_us: u64) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        match self.live.iter().find(|(_, client)| now_us.saturating_sub(client.since_us) > PATIENCE_US) {
            Some((id, client)) => Err(format!(
                "P2: {id} has heard nothing for {} ms, after {} tokens",
                (now_us - client.since_us) / 1000,
                client.got
            )),
            None => Ok(()),
        }
    }

    /// A lap came back, which is a sign of life for all; or the process itself was stopped.
    pub fn sign_of_life(&mut self, now_us: u64) {
        self.live.values_mut().for_each(|client| client.since_us = now_us);
    }
}
