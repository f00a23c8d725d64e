//! A model of hashes: a row at a stage depends on every row before it and on every layer, so that one lost,
//! repeated, reordered or foreign row changes the tokens that follow.

use std::collections::BTreeMap;
use std::ops::Range;

use swarm_ring::{Refusal, SessionBook};
use swarm_wire::{Position, SegmentHead, SessionId, TokenOut};

use super::Bug;
use super::rng::scramble;

/// Floats of a row: a 64-bit hash in four exact pieces.
pub const WIDTH: u32 = 4;
pub const VOCAB: u32 = 997;

fn mix(a: u64, b: u64) -> u64 {
    scramble(a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn embed(token: u32) -> u64 {
    mix(0x656d_6265, token.into())
}

/// One layer over one row; the row joins the layer's cache.
fn layer(number: usize, row: u64, cache: &mut Vec<u64>) -> u64 {
    let seen = mix(cache.last().copied().unwrap_or(number as u64), row);
    cache.push(seen);
    mix(seen, number as u64 + 1)
}

fn token_of(row: u64) -> u32 {
    ((row >> 20) % u64::from(VOCAB)) as u32
}

pub fn floats(row: u64) -> [f32; 4] {
    [0, 16, 32, 48].map(|shift| f32::from((row >> shift) as u16))
}

pub fn hash(floats: &[f32]) -> u64 {
    floats.iter().enumerate().fold(0, |row, (at, &value)| row | (u64::from(value as u16) << (16 * at)))
}

/// What one machine alone says after `prompt`: `count` tokens.
pub fn alone(layers: usize, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut caches = vec![Vec::new(); layers];
    let mut said: Vec<u32> = Vec::with_capacity(count);
    let mut feed: Vec<u32> = prompt.to_vec();
    while said.len() < count {
        let mut row = 0;
        for token in feed.drain(..) {
            row = embed(token);
            for (number, cache) in caches.iter_mut().enumerate() {
                row = layer(number, row, cache);
            }
        }
        said.push(token_of(row));
        feed.push(token_of(row));
    }
    said
}

/// A session that cannot go on at a stage, and why.
pub struct Failure {
    pub session: SessionId,
    pub refusal: Option<Refusal>,
}

/// A stage's layers, its sessions, and their caches.
pub struct ToyStage {
    layers: Range<usize>,
    bug: Option<Bug>,
    pub book: SessionBook,
    caches: BTreeMap<SessionId, Vec<Vec<u64>>>,
}

impl ToyStage {
    pub fn new(layers: Range<usize>, sessions_max: usize, bug: Option<Bug>) -> Self {
        Self { layers, bug, book: SessionBook::new(sessions_max), caches: BTreeMap::new() }
    }

    pub fn open(&mut self, session: SessionId) -> Result<(), Refusal> {
        self.book.open(session)?;
        self.caches.insert(session, vec![Vec::new(); self.layers.len()]);
        Ok(())
    }

    pub fn close(&mut self, session: SessionId) {
        if self.bug == Some(Bug::KeepsSessions) {
            return;
        }
        self.book.close(session);
        self.caches.remove(&session);
    }

    pub fn close_all(&mut self) {
        self.book.close_all();
        self.caches.clear();
    }

    pub fn truncate(&mut self, session: SessionId, position: Position) -> Result<(), Refusal> {
        self.book.truncate(session, position)?;
        let caches = self.caches.get_mut(&session).into_iter().flatten();
        caches.for_each(|cache| cache.truncate(position.index()));
        Ok(())
    }

    pub fn embed(ids: &[u32]) -> Vec<u64> {
        ids.iter().map(|&id| embed(id)).collect()
    }

    /// The layers over a batch; sessions that cannot go on leave it with their rows. `fail` may fail one more.
    pub fn forward(
        &mut self,
        segments: &mut Vec<SegmentHead>,
        rows: &mut Vec<u64>,
        fail: impl Fn(SessionId) -> bool,
    ) -> Vec<Failure> {
        let (mut failures, mut kept_rows, mut at) = (Vec::new(), Vec::with_capacity(rows.len()), 0);
        segments.retain(|segment| {
            let own = rows.get(at..at + segment.tokens as usize).unwrap_or_default();
            at += segment.tokens as usize;
            let checked = match self.book.check(segment) {
                Err(Refusal::OutOfOrder { .. }) if self.bug == Some(Bug::TakesAnyOrder) => Ok(()),
                checked => checked,
            };
            let refusal = checked.err();
            if refusal.is_some() || fail(segment.session) {
                failures.push(Failure { session: segment.session, refusal });
                return false;
            }
            let Some(caches) = self.caches.get_mut(&segment.session) else { return false };
            let numbers = self.layers.clone();
            kept_rows.extend(own.iter().map(|&row| {
                caches
                    .iter_mut()
                    .zip(numbers.clone())
                    .fold(row, |row, (cache, number)| layer(number, row, cache))
            }));
            self.book.grew(segment);
            true
        });
        *rows = kept_rows;
        failures
    }

    /// The tail's end: a token for every segment that asks for one.
    pub fn sample(&self, segments: &[SegmentHead], rows: &[u64]) -> Vec<TokenOut> {
        let (mut items, mut at) = (Vec::new(), 0);
        for segment in segments {
            let first = at;
            at += segment.tokens as usize;
            let row = if self.bug == Some(Bug::SamplesFirstRow) { first } else { at - 1 };
            if let (true, Some(&row), Some(position)) =
                (segment.sample, rows.get(row), segment.position.after(segment.tokens))
            {
                let token = token_of(row);
                items.push(TokenOut { session: segment.session, position, token, logits_hash: None });
            }
        }
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_survives_the_wire() {
        for row in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert_eq!(hash(&floats(row)), row);
        }
    }

    #[test]
    fn two_stages_say_what_one_says_and_a_repeated_row_does_not() {
        let prompt = [3, 1, 4, 1, 5];
        let want = alone(4, &prompt, 1);
        let run = |chunks: &[&[u32]]| {
            let mut stages = [ToyStage::new(0..3, 1, None), ToyStage::new(3..4, 1, None)];
            stages.iter_mut().for_each(|stage| stage.open(SessionId(1)).unwrap());
            let (mut position, mut said) = (0, Vec::new());
            for chunk in chunks {
                let tokens = chunk.len() as u32;
                let head =
                    SegmentHead { session: SessionId(1), position: Position(position), tokens, sample: true };
                let (mut segments, mut rows) = (vec![head], ToyStage::embed(chunk));
                for stage in &mut stages {
                    assert!(stage.forward(&mut segments, &mut rows, |_| false).is_empty());
                }
                position += tokens;
                said = stages[1].sample(&segments, &rows);
            }
            said[0].token
        };
        assert_eq!(run(&[&prompt]), want[0]);
        assert_eq!(run(&[&prompt[..2], &prompt[2..]]), want[0]);
        assert_ne!(run(&[&prompt[..2], &prompt[1..]]), want[0]);
    }
}
