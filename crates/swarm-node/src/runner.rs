//! A stage with its sessions: what happens to a batch between receive and send.
//!
//! Both ends of the ring use it, the coordinator for the first stage and workers for theirs. It owns no socket and
//! no thread but the compute pool.

use std::collections::BTreeMap;
use std::time::Instant;

use swarm_kernels::{KvType, Pool};
use swarm_model::{KvPool, SampleScratch, Scratch, Segment, SessionKv, Stage, StepError, sample};
use swarm_ring::{Refusal, SessionBook};
use swarm_wire::{Blame, Position, SegmentHead, SessionId, TokenOut};

use crate::profile::Meter;

/// Positions whose logits exist at once: a vocabulary of 150 000 makes them 20 MB.
const LOGITS_ROWS: usize = 32;

/// Why a session cannot go on.
#[derive(Debug)]
pub(crate) struct Failure {
    pub session: SessionId,
    pub blame: Blame,
    pub text: String,
}

/// A stage, its sessions, and buffers that grow to the largest step once.
pub(crate) struct StageRunner {
    stage: Stage,
    pool: Pool,
    kv: KvPool,
    sessions: BTreeMap<SessionId, Session>,
    book: SessionBook,
    scratch: Scratch,
    rows: Vec<f32>,
    logits: Vec<f32>,
    sampling: SampleScratch,
    /// Learns how fast this node is.
    meter: Option<Meter>,
}

struct Session {
    kv: SessionKv,
    /// On the tail: what sampling needs.
    tail: Option<TailSession>,
}

struct TailSession {
    sampling: swarm_model::Sampling,
    /// Token ids of all positions so far.
    history: Vec<u32>,
    logits_hash: bool,
}

impl StageRunner {
    /// `kv_bytes` bounds the KV rows of all sessions together.
    pub fn new(stage: Stage, pool: Pool, kv_type: KvType, kv_bytes: u64, sessions_max: usize) -> Self {
        let kv = KvPool::new(stage.kv_layout(kv_type), usize::try_from(kv_bytes).unwrap_or(usize::MAX));
        Self {
            stage,
            pool,
            kv,
            sessions: BTreeMap::new(),
            book: SessionBook::new(sessions_max),
            scratch: Scratch::default(),
            rows: Vec::new(),
            logits: Vec::new(),
            sampling: SampleScratch::default(),
            meter: None,
        }
    }

    /// Has `meter` watch the stage compute.
    pub fn with_meter(self, meter: Option<Meter>) -> Self {
        Self { meter, ..self }
    }

    /// The stage alone; sessions and their KV rows go.
    pub fn into_stage(self) -> Stage {
        self.stage
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    pub fn kv_bytes(&self) -> usize {
        self.kv.bytes_lent()
    }

    /// Starts a session, or goes on with one that is here from the rows it has. `prompt` is all token ids known so far.
    pub fn open(
        &mut self,
        session: SessionId,
        sampling: &swarm_wire::Sampling,
        prompt: impl Iterator<Item = u32>,
        logits_hash: bool,
    ) -> Result<(), Failure> {
        let again = self.book.is_open(session);
        if !again {
            self.book.open(session).map_err(|refusal| refused(session, &refusal))?;
        }
        let tail = self.stage.is_tail().then(|| TailSession {
            sampling: sampling_of(sampling),
            history: prompt.collect(),
            logits_hash,
        });
        let before = self.sessions.remove(&session).filter(|_| again);
        let kv = before.map_or_else(|| self.kv.open(), |before| before.kv);
        self.sessions.insert(session, Session { kv, tail });
        if again {
            // An answer has ended here, too.
            self.meter.iter_mut().for_each(Meter::keep);
        }
        Ok(())
    }

    /// The logits after every position of `ids`, on a stage that is a whole model: `give` gets `[rows, vocab]` for
    /// [`LOGITS_ROWS`] positions at a time, in order, and says whether to go on. A session of its own that is gone
    /// afterwards; others are unaffected.
    pub fn logits(&mut self, ids: &[u32], give: &mut dyn FnMut(Vec<f32>) -> bool) -> Result<(), StepError> {
        let (width, vocab) = (self.stage.config().hidden_size, self.stage.config().vocab_size);
        let mut kv = self.kv.open();
        let mut rows = Vec::new();
        let mut position = 0;
        for ids in ids.chunks(LOGITS_ROWS) {
            rows.resize(ids.len() * width, 0.0);
            self.stage.embed(ids, &mut rows)?;
            let segment = Segment { position, tokens: ids.len(), logits: ids.len(), kv: &mut kv };
            self.stage.forward(&self.pool, &mut [segment], &mut rows, &mut self.scratch)?;
            let mut logits = vec![0.0; ids.len() * vocab];
            self.stage.logits(&self.pool, &rows, &mut logits, &mut self.scratch)?;
            position += ids.len();
            if !give(logits) {
                break;
            }
        }
        Ok(())
    }

    /// Forgets a session; an unknown one is not an error, for it may have failed here before.
    pub fn close(&mut self, session: SessionId) {
        self.book.close(session);
        self.sessions.remove(&session);
        if self.sessions.is_empty() {
            // Nobody needs the pages now: they go back to the system.
            self.kv.trim();
            self.meter.iter_mut().for_each(Meter::keep);
        }
    }

    /// Forgets every session: the ring they ran on is gone.
    pub fn close_all(&mut self) {
        self.book.close_all();
        self.sessions.clear();
        self.kv.trim();
    }

    /// Forgets the KV rows and the history from `position` on.
    pub fn truncate(&mut self, session: SessionId, position: usize) -> Result<(), Failure> {
        let kept = Position(u32::try_from(position).unwrap_or(u32::MAX));
        self.book.truncate(session, kept).map_err(|refusal| refused(session, &refusal))?;
        let Some(state) = self.sessions.get_mut(&session) else {
            return Err(refused(session, &Refusal::Unknown(session)));
        };
        state.kv.truncate(position).map_err(|error| Failure {
            session,
            blame: Blame::Peer,
            text: error.to_string(),
        })?;
        if let Some(tail) = &mut state.tail {
            tail.history.truncate(position.saturating_add(1));
        }
        Ok(())
    }

    /// The first stage's beginning: room for the batch, filled with the embeddings of `ids`.
    pub fn embed(&mut self, ids: &[u32]) -> Result<(), StepError> {
        let width = self.stage.config().hidden_size;
        self.rows.resize(ids.len() * width, 0.0);
        self.stage.embed(ids, &mut self.rows)
    }

    /// Room for `tokens` rows that are about to be received.
    pub fn rows_mut(&mut self, tokens: usize) -> &mut [f32] {
        self.rows.resize(tokens * self.stage.config().hidden_size, 0.0);
        &mut self.rows
    }

    /// The rows of the batch, `[tokens, width]`.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Runs the layers over the batch in place. Sessions that cannot go on are taken out of `segments` and of the
    /// rows, and returned; the others are unaffected.
    pub fn forward(&mut self, segments: &mut Vec<SegmentHead>) -> Vec<Failure> {
        let mut failures = Vec::new();
        self.keep(segments, |runner, head| match runner.book.check(head) {
            Ok(()) => true,
            Err(refusal) => {
                failures.push(refused(head.session, &refusal));
                false
            }
        });
        let (started, tokens) = (Instant::now(), segments.iter().map(|head| head.tokens as usize).sum());
        let forwarded = self.forward_all(segments);
        if let Some(meter) = self.meter.as_mut().filter(|_| forwarded.is_ok()) {
            meter.forward(tokens, started.elapsed());
        }
        if let Err(error) = forwarded {
            // Somebody in the batch cannot go on. A step that fails changes nothing, and a row's bits do not depend
            // on its batch, so each session simply goes alone.
            self.forward_each(segments, error, &mut failures);
        }
        failures
    }

    fn forward_all(&mut self, segments: &[SegmentHead]) -> Result<(), StepError> {
        if segments.is_empty() {
            return Ok(());
        }
        // A frame names each session once, so every segment takes its own KV rows out of the map for the step.
        let mut states: Vec<(&SegmentHead, Session)> =
            segments.iter().filter_map(|head| Some((head, self.sessions.remove(&head.session)?))).collect();
        let mut batch: Vec<Segment<'_>> = states
            .iter_mut()
            .map(|(head, state)| Segment {
                kv: &mut state.kv,
                position: head.position.index(),
                tokens: head.tokens as usize,
                logits: usize::from(head.sample),
            })
            .collect();
        let result = self.stage.forward(&self.pool, &mut batch, &mut self.rows, &mut self.scratch);
        self.sessions.extend(states.into_iter().map(|(head, state)| (head.session, state)));
        if result.is_ok() {
            segments.iter().for_each(|head| self.book.grew(head));
        }
        result
    }

    fn forward_each(
        &mut self,
        segments: &mut Vec<SegmentHead>,
        error: StepError,
        failures: &mut Vec<Failure>,
    ) {
        if let [only] = segments[..] {
            failures.push(failure(only.session, &error));
            segments.clear();
            self.rows.clear();
            return;
        }
        let (width, all) = (self.stage.config().hidden_size, std::mem::take(&mut self.rows));
        let (mut at, mut kept, mut rows) = (0, Vec::new(), Vec::with_capacity(all.len()));
        for head in segments.iter() {
            let len = head.tokens as usize * width;
            self.rows.clear();
            self.rows.extend_from_slice(&all[at..at + len]);
            at += len;
            match self.forward_all(std::slice::from_ref(head)) {
                Ok(()) => {
                    rows.extend_from_slice(&self.rows);
                    kept.push(*head);
                }
                Err(error) => failures.push(failure(head.session, &error)),
            }
        }
        self.rows = rows;
        *segments = kept;
    }

    /// Keeps the segments (and their rows) that `wanted` says.
    fn keep(&mut self, segments: &mut Vec<SegmentHead>, mut wanted: impl FnMut(&Self, &SegmentHead) -> bool) {
        let verdicts: Vec<bool> = segments.iter().map(|head| wanted(self, head)).collect();
        if verdicts.iter().all(|&keep| keep) {
            return;
        }
        let (width, mut from, mut to) = (self.stage.config().hidden_size, 0, 0);
        for (head, keep) in segments.iter().zip(&verdicts) {
            let len = head.tokens as usize * width;
            if *keep {
                self.rows.copy_within(from..from + len, to);
                to += len;
            }
            from += len;
        }
        self.rows.truncate(to);
        let mut verdicts = verdicts.into_iter();
        segments.retain(|_| verdicts.next().unwrap_or(false));
    }

    /// The tail's end: logits and a token for every segment that asks for one. Call after [`StageRunner::forward`].
    pub fn sample(&mut self, segments: &[SegmentHead], failures: &mut Vec<Failure>) -> Vec<TokenOut> {
        let (width, vocab) = (self.stage.config().hidden_size, self.stage.config().vocab_size);
        let mut last = 0;
        let mut asked = Vec::new();
        for head in segments {
            last += head.tokens as usize;
            if head.sample {
                asked.push((*head, last - 1));
            }
        }
        if asked.is_empty() {
            return Vec::new();
        }
        let rows: Vec<f32> =
            asked.iter().flat_map(|&(_, row)| &self.rows[row * width..(row + 1) * width]).copied().collect();
        self.logits.resize(asked.len() * vocab, 0.0);
        let started = Instant::now();
        if let Err(error) = self.stage.logits(&self.pool, &rows, &mut self.logits, &mut self.scratch) {
            failures.extend(asked.iter().map(|(head, _)| failure(head.session, &error)));
            return Vec::new();
        }
        let mut tokens = Vec::with_capacity(asked.len());
        for ((head, _), logits) in asked.iter().zip(self.logits.chunks_exact(vocab)) {
            let tail = self.sessions.get_mut(&head.session).and_then(|state| state.tail.as_mut());
            let Some(tail) = tail else { continue };
            match pick(tail, head, logits, &mut self.sampling) {
                Ok(token) => tokens.push(token),
                Err(text) => failures.push(Failure { session: head.session, blame: Blame::Us, text }),
            }
        }
        if let (Some(meter), [_]) = (&mut self.meter, asked.as_slice()) {
            meter.head(started.elapsed());
        }
        tokens
    }
}

/// Samples the token that follows `head` and remembers it.
fn pick(
    tail: &mut TailSession,
    head: &SegmentHead,
    logits: &[f32],
    scratch: &mut SampleScratch,
) -> Result<TokenOut, String> {
    let position = head.position.after(head.tokens).ok_or("a position beyond the last")?;
    if tail.history.len() != position.index() {
        return Err(format!(
            "a token was asked for {position}, but {} ids are known here",
            tail.history.len()
        ));
    }
    let token = sample(logits, &tail.sampling, &tail.history, position.0.into(), scratch)
        .map_err(|e| e.to_string())?;
    tail.history.push(token);
    let logits_hash = tail.logits_hash.then(|| {
        let mut hasher = blake3::Hasher::new();
        // Little endian everywhere, so that the receipt of one machine can be compared with another's.
        logits.chunks(1024).for_each(|chunk| {
            let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
            hasher.update(&bytes);
        });
        *hasher.finalize().as_bytes()
    });
    Ok(TokenOut { session: head.session, position, token, logits_hash })
}

fn sampling_of(wire: &swarm_wire::Sampling) -> swarm_model::Sampling {
    swarm_model::Sampling {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: wire.top_p,
        min_p: wire.min_p,
        repetition_penalty: wire.repetition_penalty,
        seed: wire.seed,
    }
}

fn refused(session: SessionId, refusal: &Refusal) -> Failure {
    Failure { session, blame: refusal.blame(), text: refusal.to_string() }
}

fn failure(session: SessionId, error: &StepError) -> Failure {
    let blame = match error.blame() {
        swarm_model::Blame::Caller | swarm_model::Blame::Full => Blame::Caller,
        swarm_model::Blame::Peer => Blame::Peer,
        swarm_model::Blame::Us => Blame::Us,
    };
    Failure { session, blame, text: error.to_string() }
}
