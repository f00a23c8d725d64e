//! Asking everybody in the room one question, each on a connection of its own that ends with the answer.
//!
//! Such a question is none of a coordinator: nobody is made a member of a ring for it, and a worker that serves one is
//! not disturbed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use swarm_link::{
    Connection, Discovery, DiscoveryEvent, Identity, InstanceId, LinkError, LinkSettings, PeerInfo,
    Remembered, Scope, dial, shows_code,
};
use swarm_wire::{CONTROL_BYTES_MAX, CloseCode, Control};

use crate::deadlines::WELCOME;
use crate::error::{NodeError, chain, printable};
use crate::pairing::Addresses;
use crate::worker::spawn;

/// Nodes that are dialled for one question; a network may announce anything.
const ASKED_MAX: usize = 64;

/// Whom to ask, and for how long.
#[derive(Clone)]
pub struct Around<'a> {
    /// Who asks.
    pub identity: &'a Identity,
    /// Nodes that were named by their addresses.
    pub named: &'a [Addresses],
    /// Ask on the local network as well.
    pub discover: bool,
    /// The network interfaces to look on, by name; all of them by default.
    pub interfaces: &'a [String],
    /// Where addresses are kept at which nodes were reached before; those are asked as well.
    pub state_dir: Option<&'a Path>,
    /// How long to look for nodes.
    pub within: Duration,
    /// How long those who were found may take to answer, from the beginning.
    pub answers_within: Duration,
}

/// Somebody who was asked.
pub(crate) struct Asked<T> {
    /// Where.
    pub addresses: Addresses,
    /// Who answered, if anybody proved to be a member.
    pub peer: Option<PeerInfo>,
    /// Its address was typed.
    pub named: bool,
    pub answer: Result<T, NodeError>,
}

/// What [`ask_around`] is told after each answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// There may be others.
    More,
    /// Those that come within so long still count.
    Little(Duration),
    /// Who is being asked still counts, and nobody else.
    Pending,
}

#[derive(Clone)]
struct Target {
    addresses: Addresses,
    instance: Option<InstanceId>,
    named: bool,
    remembered: bool,
}

/// Puts a question to everybody who is found, side by side. Comes back when the later of both waits is over, whatever
/// others do; a named node that has not answered by then is among the answers, with an error.
pub(crate) fn ask_around<T: Send + 'static>(
    around: &Around<'_>,
    ask: impl Fn(Connection) -> Result<T, NodeError> + Send + Sync + 'static,
    mut heard: impl FnMut(&[Asked<T>]) -> Patience,
) -> Vec<Asked<T>> {
    let looks = Instant::now() + around.within;
    let deadline = Instant::now() + around.within.max(around.answers_within);
    let mut round = Round {
        identity: around.identity.clone(),
        ask: Arc::new(ask),
        answers: unbounded(),
        tried: Vec::new(),
        pending: Vec::new(),
        asked: Vec::new(),
    };
    let target =
        |addresses: Addresses, named| Target { addresses, instance: None, named, remembered: !named };
    around.named.iter().for_each(|addresses| round.go(target(addresses.clone(), true)));
    let remembered = around.state_dir.map(|dir| Remembered::load(dir).addresses()).unwrap_or_default();
    remembered.into_iter().for_each(|address| round.go(target(vec![address], false)));
    let scope = Scope { interfaces: around.interfaces.to_vec(), address: None };
    // A network without multicast is no error: those with a known address are asked all the same.
    let discovery =
        around.discover.then(|| Discovery::start_in(around.identity.instance(), scope).ok()).flatten();
    let silent = crossbeam_channel::never();
    let sightings = discovery.as_ref().map_or(&silent, Discovery::events);
    let answers = round.answers.1.clone();
    let (mut until, mut is_open) = (deadline, discovery.is_some());
    loop {
        let now = Instant::now();
        is_open = is_open && now < looks;
        if now >= until || !is_open && round.pending.is_empty() {
            break;
        }
        let next = if is_open { until.min(looks) } else { until };
        crossbeam_channel::select! {
            recv(sightings) -> event => match event {
                Ok(DiscoveryEvent::Found(peer)) if is_open => round.go(Target {
                    addresses: peer.addresses,
                    instance: Some(peer.instance),
                    named: false,
                    remembered: false,
                }),
                Ok(_) => {}
                Err(_) => is_open = false,
            },
            recv(answers) -> answer => if let Ok((number, peer, answer)) = answer {
                round.take(number, peer, answer);
                match heard(&round.asked) {
                    Patience::More => {}
                    Patience::Little(while_others) => until = until.min(Instant::now() + while_others),
                    Patience::Pending => is_open = false,
                }
            },
            default(next.saturating_duration_since(now)) => {}
        }
    }
    round.end(around.within.max(around.answers_within))
}

type Answer<T> = (usize, Option<PeerInfo>, Result<T, NodeError>);
type Question<T> = dyn Fn(Connection) -> Result<T, NodeError> + Send + Sync;

struct Round<T> {
    identity: Identity,
    ask: Arc<Question<T>>,
    answers: (Sender<Answer<T>>, Receiver<Answer<T>>),
    tried: Vec<Target>,
    /// Numbers of those who were not heard yet.
    pending: Vec<usize>,
    asked: Vec<Asked<T>>,
}

impl<T: Send + 'static> Round<T> {
    /// Asks on a thread of its own, once for each list of addresses.
    fn go(&mut self, target: Target) {
        let known = |other: &Target| {
            other.addresses == target.addresses
                || target.instance.is_some() && target.instance == other.instance
        };
        let number = self.tried.len();
        if target.addresses.is_empty() || number >= ASKED_MAX || self.tried.iter().any(known) {
            return;
        }
        let (identity, ask, sink) = (self.identity.clone(), self.ask.clone(), self.answers.0.clone());
        let addresses = target.addresses.clone();
        let body = move || {
            let answer = match approach(&addresses, &identity) {
                Ok(link) => (number, Some(link.peer), ask(link)),
                Err(error) => (number, None, Err(error)),
            };
            // Whoever asked may have stopped waiting.
            let _ = sink.send(answer);
        };
        if spawn("ask", body).is_ok() {
            self.tried.push(target);
            self.pending.push(number);
        }
    }

    fn take(&mut self, number: usize, peer: Option<PeerInfo>, answer: Result<T, NodeError>) {
        self.pending.retain(|pending| *pending != number);
        let Some(target) = self.tried.get(number) else { return };
        let is_own = peer.is_some_and(|peer| peer.static_key == *self.identity.public_key());
        // This node itself, another of this computer, or an address of old that nobody listens at any more: no news.
        let no_news = match &answer {
            Err(NodeError::Link(error)) => {
                matches!(**error, LinkError::OwnAddress { .. })
                    || matches!(**error, LinkError::Unreachable { .. }) && target.remembered
            }
            _ => is_own && !target.named,
        };
        if no_news {
            return;
        }
        let asked = Asked { addresses: target.addresses.clone(), peer, named: target.named, answer };
        let same = |other: &&mut Asked<T>| {
            peer.is_some() && other.peer.map(|peer| peer.node) == peer.map(|peer| peer.node)
        };
        match self.asked.iter_mut().find(same) {
            // The same node at another address.
            Some(known) => {
                known.named |= asked.named;
                if known.answer.is_err() && asked.answer.is_ok() {
                    *known = asked;
                }
            }
            None => self.asked.push(asked),
        }
    }

    /// Those who were named and not heard are among the answers.
    fn end(mut self, within: Duration) -> Vec<Asked<T>> {
        for target in self.pending.iter().filter_map(|&number| self.tried.get(number)) {
            if !target.remembered {
                let node = address_text(&target.addresses);
                let what = format!("did not answer within {:.0} s", within.as_secs_f32());
                self.asked.push(Asked {
                    addresses: target.addresses.clone(),
                    peer: None,
                    named: target.named,
                    answer: Err(NodeError::Lost { node, what }),
                });
            }
        }
        self.asked
    }
}

/// The first of a node's addresses, for people.
pub(crate) fn address_text(addresses: &[SocketAddr]) -> String {
    addresses.first().map(ToString::to_string).unwrap_or_default()
}

fn approach(addresses: &[SocketAddr], identity: &Identity) -> Result<Connection, NodeError> {
    let settings = LinkSettings { write_timeout: WELCOME, ..LinkSettings::default() };
    match dial(addresses, identity, &settings, WELCOME) {
        Err(LinkError::Refused { address }) if shows_code(&[address], WELCOME).unwrap_or(false) => {
            Err(NodeError::Unpaired { showing: vec![addresses.to_vec()] })
        }
        other => Ok(other?),
    }
}

/// Sends the first message of a connection and waits for its answer, `within` at most, however slowly it comes. A refusal is
/// an error.
pub(crate) fn first_answer(
    link: &mut Connection,
    question: &Control,
    within: Duration,
) -> Result<Control, NodeError> {
    let node = link.peer.address.to_string();
    let bad = |what: String, code| NodeError::BadPeer { node: node.clone(), what, code };
    let mut message = Vec::new();
    question.encode(&mut message).map_err(|error| NodeError::Request(chain(&error)))?;
    link.sender.send(&[&message])?;
    link.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.receiver.set_idle_timeout(Some(within))?;
    // That begins anew with each byte, so another thread looks at the whole.
    let ((here, gone), closer) = (bounded::<()>(0), link.closer.clone());
    spawn("answer", move || {
        if gone.recv_timeout(within) == Err(RecvTimeoutError::Timeout) {
            closer.close();
        }
    })?;
    link.receiver.receive(&mut message)?;
    drop(here);
    match Control::decode(&message).map_err(|error| bad(chain(&error), CloseCode::Malformed))? {
        Control::Refused(refused) => {
            let reason = printable(&refused.reason);
            Err(NodeError::Refused { node, blame: refused.blame, reason })
        }
        answer => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_link::{Listener, SwarmSecret};

    fn listener(identity: &Identity) -> (Listener, Addresses) {
        let address = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind_to(address, identity, &LinkSettings::default()).unwrap();
        let address = SocketAddr::new(address.ip(), listener.port());
        (listener, vec![address])
    }

    #[test]
    fn everybody_is_asked_once_and_the_silent_are_named_in_time() {
        let secret = SwarmSecret::random().unwrap();
        let identity = Identity::ephemeral(secret.clone()).unwrap();
        let there = Identity::ephemeral(secret).unwrap();
        let (answering, place) = listener(&there);
        // It shakes hands and says nothing more.
        let (_silent, nobody) = listener(&there.another_instance().unwrap());
        let connections = answering.connections().clone();
        std::thread::spawn(move || {
            for mut link in connections {
                let _ = link.receiver.receive(&mut Vec::new());
                let mut out = Vec::new();
                Control::Bye.encode(&mut out).unwrap();
                let _ = link.sender.send(&[&out]);
            }
        });
        let named = [place.clone(), nobody.clone(), place.clone()];
        let around = Around {
            identity: &identity,
            named: &named,
            discover: false,
            interfaces: &[],
            state_dir: None,
            within: Duration::from_secs(1),
            answers_within: Duration::from_secs(1),
        };
        let began = Instant::now();
        let ask = |mut link: Connection| first_answer(&mut link, &Control::List, Duration::from_secs(30));
        let mut asked = ask_around(&around, ask, |_| Patience::More);
        assert!(began.elapsed() < Duration::from_secs(5));
        asked.sort_by_key(|asked| asked.answer.is_err());
        let [first, second] = &asked[..] else { panic!("{} answers", asked.len()) };
        assert!(matches!(first.answer, Ok(Control::Bye)) && first.addresses == place);
        assert!(matches!(&second.answer, Err(NodeError::Lost { what, .. }) if what.contains("1 s")));
        assert_eq!(second.addresses, nobody);
        // Who has heard enough does not wait for the others.
        let ask = |mut link: Connection| first_answer(&mut link, &Control::List, Duration::from_secs(30));
        let around = Around { within: Duration::from_secs(30), ..around };
        let asked = ask_around(&around, ask, |_| Patience::Little(Duration::ZERO));
        assert!(began.elapsed() < Duration::from_secs(10) && asked.iter().any(|asked| asked.answer.is_ok()));
    }
}
