//! One request and its answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use swarm_ring::{FinishReason, Percentiles, SessionRequest};
use swarm_text::{ChatTemplate, Detokenizer, EncodeOptions, Message, RenderOptions, StopStrings, Tokenizer};
use swarm_wire::{Sampling, SessionId};

use crate::coordinator::{Command, SessionNews, SessionTelemetry};
use crate::deadlines::ANSWER_SILENT;
use crate::engine::Info;
use crate::error::NodeError;

/// What to go on from.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A conversation, put into the model's chat template.
    Chat(Vec<Message>),
    /// Text as it is; special tokens in it count.
    Raw(String),
    /// Token ids as they are.
    Ids(Vec<u32>),
}

impl Prompt {
    pub(crate) fn ids(
        &self,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Vec<u32>, NodeError> {
        match self {
            Self::Ids(ids) => Ok(ids.clone()),
            Self::Raw(text) => Ok(tokenizer.encode(text, EncodeOptions::PROMPT)?),
            Self::Chat(messages) => {
                let template = template.ok_or_else(|| {
                    NodeError::Request(
                        "this model has no chat template; ask with --raw, or use a chat model".into(),
                    )
                })?;
                Ok(template.encode(tokenizer, messages, &RenderOptions::default())?)
            }
        }
    }
}

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Prompt,
    /// Tokens at most; by default as many as the context holds.
    pub max_tokens: Option<usize>,
    pub sampling: Sampling,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Digest the logits of every token, for receipts. Costs a pass over them.
    pub logits_hash: bool,
    /// Go on after an end token (benchmarks).
    pub ignore_end: bool,
    /// Keep the times of every lap, for a trace.
    pub trace: bool,
    /// Leave the rows of this answer where they are, so that a next request that begins with the same tokens computes
    /// only the rest: for conversations. They stay until another answer begins that does not go on from them.
    pub keep: bool,
}

impl Request {
    /// Greedy, to the end of the answer.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            max_tokens: None,
            sampling: Sampling::default(),
            stop: Vec::new(),
            logits_hash: false,
            ignore_end: false,
            trace: false,
            keep: false,
        }
    }

    pub(crate) fn session(&self, prompt: Vec<u32>, tokenizer: &Tokenizer, context: usize) -> SessionRequest {
        let small = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let end_tokens = if self.ignore_end { Default::default() } else { tokenizer.end_of_turn().clone() };
        SessionRequest {
            prompt,
            max_tokens: small(self.max_tokens.unwrap_or(context)),
            sampling: self.sampling,
            end_tokens,
            context: small(context),
            logits_hash: self.logits_hash,
        }
    }
}

/// Why an answer ended, as the OpenAI API says it where it has a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn, or a stop text came.
    Stop,
    /// `max_tokens` were reached, or the context is full.
    Length,
    /// The caller ended it.
    Cancelled,
    /// The ring could not go on.
    Error(String),
}

impl Finish {
    /// `stop`, `length`, `cancelled` or `error`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Error(_) => "error",
        }
    }
}

/// Everything about a finished answer.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub prompt_tokens: usize,
    pub finish: Finish,
    /// From the request to the first token.
    pub ttft_us: Option<u64>,
    /// From the first prompt chunk to the first token.
    pub prefill_us: Option<u64>,
    /// From the first token to the last.
    pub decode_us: Option<u64>,
    /// Between two tokens, as they were handed out.
    pub token_us: Percentiles,
    /// BLAKE3 over the digests of all logits rows, when asked for.
    pub logits_hash: Option<[u8; 32]>,
    pub telemetry: SessionTelemetry,
}

impl Outcome {
    /// Prompt tokens per second of prefill, without those whose rows were there.
    pub fn prefill_tok_per_s(&self) -> Option<f64> {
        rate(self.prompt_tokens.saturating_sub(self.telemetry.prompt_kept), self.prefill_us?)
    }

    /// Tokens per second after the first.
    pub fn decode_tok_per_s(&self) -> Option<f64> {
        rate(self.token_ids.len().checked_sub(1).filter(|&n| n > 0)?, self.decode_us?)
    }

    /// BLAKE3 of the token ids, each as four little-endian bytes.
    pub fn token_hash(&self) -> [u8; 32] {
        let bytes: Vec<u8> = self.token_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        *blake3::hash(&bytes).as_bytes()
    }
}

fn rate(count: usize, us: u64) -> Option<f64> {
    (us > 0).then(|| count as f64 * 1e6 / us as f64)
}

/// A stream of text pieces. Dropping it cancels the answer on every node.
pub struct Generation {
    session: SessionId,
    commands: Sender<Command>,
    news: Receiver<SessionNews>,
    info: Arc<Info>,
    /// As long as it is held, the ring is not placed anew for a node that came back.
    busy: Option<Arc<()>>,
    detokenizer: Option<Detokenizer>,
    stop: Option<StopStrings>,
    /// When there was news last.
    heard: Instant,
    asked_us: u64,
    first_us: Option<u64>,
    last_us: u64,
    hasher: blake3::Hasher,
    logits_hash: bool,
    outcome: Outcome,
    done: bool,
}

/// A session that the compute thread has taken.
pub(crate) struct Answering {
    pub session: SessionId,
    pub commands: Sender<Command>,
    pub news: Receiver<SessionNews>,
    pub info: Arc<Info>,
    pub busy: Arc<()>,
}

/// What a wait for the next piece brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waited {
    Piece(Piece),
    /// The answer has ended; [`Generation::outcome`] says why.
    Ended,
    /// Nothing yet.
    Pending,
}

/// A token and the text that has become certain with it (often one word, sometimes nothing).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// `None` for text that was held back until the end.
    pub token: Option<u32>,
    pub text: String,
}

impl Generation {
    pub(crate) fn new(answering: Answering, request: Request, prompt_tokens: usize, asked_us: u64) -> Self {
        let Answering { session, commands, news, info, busy } = answering;
        let detokenizer = Some(Detokenizer::new(&info.model.tokenizer, true));
        let outcome = Outcome {
            text: String::new(),
            token_ids: Vec::new(),
            prompt_tokens,
            finish: Finish::Cancelled,
            ttft_us: None,
            prefill_us: None,
            decode_us: None,
            token_us: Percentiles::default(),
            logits_hash: None,
            telemetry: SessionTelemetry::default(),
        };
        Self {
            session,
            commands,
            news,
            info,
            busy: Some(busy),
            detokenizer,
            stop: Some(StopStrings::new(request.stop)),
            heard: Instant::now(),
            asked_us,
            first_us: None,
            last_us: asked_us,
            hasher: blake3::Hasher::new(),
            logits_hash: request.logits_hash,
            outcome,
            done: false,
        }
    }

    /// Ends the answer on every node; what was produced already still comes.
    pub fn cancel(&self) {
        let _ = self.commands.send(Command::Cancel(self.session));
    }

    /// A handle that cancels from another thread (Ctrl-C, a closed connection).
    pub fn canceller(&self) -> impl Fn() + Send + Sync + 'static {
        let (commands, session) = (self.commands.clone(), self.session);
        move || {
            let _ = commands.send(Command::Cancel(session));
        }
    }

    /// Waits for the next piece, `within` at most: for a caller who has to look at other things meanwhile.
    pub fn wait(&mut self, within: Duration) -> Waited {
        let until = Instant::now() + within;
        while !self.done {
            let silent = self.heard + ANSWER_SILENT;
            let news = self.news.recv_deadline(until.min(silent));
            if news.is_ok() {
                self.heard = Instant::now();
            }
            match news {
                Ok(SessionNews::Alive) => {}
                Ok(SessionNews::Token { token, logits_hash, at_us }) => {
                    // Tokens behind a stop text were computed, but are not part of the answer.
                    if self.stop.is_some() {
                        return Waited::Piece(self.token(token, logits_hash, at_us));
                    }
                }
                Ok(SessionNews::Finished { reason, telemetry }) => {
                    return self.end(reason, *telemetry).map_or(Waited::Ended, Waited::Piece);
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < silent => return Waited::Pending,
                Err(ended) => self.give_up(ended),
            }
        }
        Waited::Ended
    }

    /// The engine says nothing any more.
    fn give_up(&mut self, ended: RecvTimeoutError) {
        self.cancel();
        self.done = true;
        self.busy = None;
        let why = match ended {
            RecvTimeoutError::Timeout => {
                format!("no news of the answer for {} s; ask again", ANSWER_SILENT.as_secs())
            }
            RecvTimeoutError::Disconnected => "the engine was stopped".to_owned(),
        };
        self.outcome.finish = Finish::Error(self.info.fault().unwrap_or(why));
    }

    /// Reads what is left and gives the whole answer.
    pub fn finish(mut self) -> Outcome {
        while self.next().is_some() {}
        self.outcome.clone()
    }

    /// What is known so far; complete once the iterator has ended.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    fn token(&mut self, token: u32, logits_hash: Option<[u8; 32]>, at_us: u64) -> Piece {
        if self.first_us.is_some() {
            self.outcome.token_us.add(at_us.saturating_sub(self.last_us));
        }
        self.first_us.get_or_insert(at_us);
        self.last_us = at_us;
        self.outcome.token_ids.push(token);
        if let Some(hash) = logits_hash {
            self.hasher.update(&hash);
        }
        let text = self.detokenizer.as_mut().map(|detokenizer| detokenizer.push(token)).unwrap_or_default();
        let text = self.through_stop(&text);
        Piece { token: Some(token), text }
    }

    fn through_stop(&mut self, text: &str) -> String {
        let Some(stop) = &mut self.stop else { return String::new() };
        let (safe, hit) = stop.push(text);
        self.outcome.text.push_str(&safe);
        if hit.is_some() {
            self.stop = None;
            self.outcome.finish = Finish::Stop;
            self.cancel();
        }
        safe
    }

    fn end(&mut self, reason: FinishReason, telemetry: SessionTelemetry) -> Option<Piece> {
        self.done = true;
        self.busy = None;
        let mut rest = self.detokenizer.take().map(Detokenizer::finish).unwrap_or_default();
        rest = self.through_stop(&rest);
        let hit = self.stop.is_none();
        if let Some(stop) = self.stop.take() {
            let held = stop.finish();
            self.outcome.text.push_str(&held);
            rest.push_str(&held);
        }
        self.outcome.finish = match reason {
            _ if hit => Finish::Stop,
            FinishReason::Stop { .. } => Finish::Stop,
            FinishReason::Length | FinishReason::ContextFull => Finish::Length,
            FinishReason::Cancelled => Finish::Cancelled,
            FinishReason::Error(error) => Finish::Error(error.to_string()),
            _ => Finish::Error("the session ended for a reason this build does not know".into()),
        };
        let started = telemetry.started_us;
        self.outcome.ttft_us = self.first_us.map(|at| at.saturating_sub(self.asked_us));
        self.outcome.prefill_us = self.first_us.filter(|_| started > 0).map(|at| at.saturating_sub(started));
        self.outcome.decode_us = self.first_us.map(|at| self.last_us.saturating_sub(at));
        self.outcome.logits_hash = self.logits_hash.then(|| *self.hasher.finalize().as_bytes());
        self.outcome.telemetry = telemetry;
        (!rest.is_empty()).then_some(Piece { token: None, text: rest })
    }
}

impl Iterator for Generation {
    type Item = Piece;

    /// Waits for the next token. Ends after the last; [`Generation::outcome`] then says why.
    fn next(&mut self) -> Option<Piece> {
        loop {
            match self.wait(ANSWER_SILENT) {
                Waited::Piece(piece) => return Some(piece),
                Waited::Ended => return None,
                Waited::Pending => {}
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.done {
            self.cancel();
        }
    }
}
