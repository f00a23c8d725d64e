//! First meetings over a socket, and bringing a new secret to machines that are there.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::code::PairCode;
use crate::connection::{Failure, Timed, ask_news, bring_news, is_timeout};
use crate::desk::{PairingDesk, PairingEvent};
use crate::dial::first_stream;
use crate::error::{IdentityError, LinkError};
use crate::identity::Identity;
use crate::members::OLD_SECRETS_MAX;
use crate::noise::{HandshakeFailure, Purpose, Suite, preamble_of};
use crate::pairing::{Card, Met, Shower, Typist, Verdict};

/// From the first byte to the last of a pairing.
const PAIRING_TIMEOUT: Duration = Duration::from_secs(3);

/// Why two machines were not paired.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PairError {
    /// The other side hung up on the code.
    #[error(
        "{address} did not take the code; read it again from its screen: after three wrong ones it shows a new one"
    )]
    WrongCode {
        /// The other end.
        address: SocketAddr,
    },
    /// Nobody may pair there now.
    #[error(
        "{address} does not pair now; run `swarm-os pair` there, and after three wrong codes wait until it shows a new one"
    )]
    Closed {
        /// The other end.
        address: SocketAddr,
    },
    /// The codes fit, but neither may change its swarm.
    #[error(
        "{name:?} and this machine each have a swarm with other machines; on the one that should move, run `swarm-os forget --all`, then pair again"
    )]
    TwoSwarms {
        /// What the other machine is called.
        name: String,
    },
    /// The network, or something that is no node.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// This machine's files cannot be written.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// The machine that was paired with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paired {
    /// What it is called: a stranger's text.
    pub name: String,
    /// Where it was reached.
    pub address: SocketAddr,
    /// This machine has the other's secret now. Otherwise it is the other way round, or they had the same.
    pub joined: bool,
}

/// Whether the node at the first of `addresses` that answers shows a code now.
///
/// # Errors
/// As [`crate::dial`], for nodes that cannot be reached or are none.
pub fn shows_code(addresses: &[SocketAddr], timeout: Duration) -> Result<bool, LinkError> {
    let deadline = Instant::now() + timeout;
    let (stream, address) = first_stream(addresses, deadline)?;
    let what = (Purpose::Pair, Suite::preferred());
    let mut timed = Timed { stream: &stream, deadline: deadline.min(Instant::now() + PAIRING_TIMEOUT) };
    let asked = timed.write(&preamble_of(what.0, what.1)).and_then(|()| timed.expect_preamble(what));
    match asked {
        Ok(()) => Ok(true),
        Err(Failure::Io(error)) if !is_timeout(&error) => Ok(false),
        Err(failure) => Err(failure.explain(address, PAIRING_TIMEOUT)),
    }
}

/// Pairs with the node at the first of `addresses` that answers, by the code that it shows. `name` is what this
/// machine is called. Costs the other side one of the tries of its code.
///
/// # Errors
/// [`PairError`]. Nothing has changed here then, except that the other side may have taken this machine's secret when
/// the very last message was lost; pairing again is safe.
pub fn pair(
    addresses: &[SocketAddr],
    identity: &Identity,
    code: &PairCode,
    name: &str,
    timeout: Duration,
) -> Result<Paired, PairError> {
    identity.refresh();
    let (stream, address) = first_stream(addresses, Instant::now() + timeout)?;
    let mut timed = Timed { stream: &stream, deadline: Instant::now() + PAIRING_TIMEOUT };
    let explain = |failure: Failure| PairError::Link(failure.explain(address, PAIRING_TIMEOUT));
    let suite = Suite::preferred();
    let own = Card::of(identity, name);
    let began = timed
        .write(&preamble_of(Purpose::Pair, suite))
        .and_then(|()| timed.expect_preamble((Purpose::Pair, suite)));
    match began {
        Err(Failure::Io(error)) if !is_timeout(&error) => return Err(PairError::Closed { address }),
        other => other.map_err(explain)?,
    }
    let mut shower = [0; 33];
    timed.read(&mut shower).map_err(explain)?;
    let (typist, opening) =
        Typist::open(identity, suite, code, &shower).map_err(|failure| explain(failure.into()))?;
    timed.write(&opening).map_err(explain)?;
    let mut answer = [0; 193];
    match timed.read(&mut answer) {
        Err(Failure::Io(error)) if !is_timeout(&error) => return Err(PairError::WrongCode { address }),
        other => other.map_err(explain)?,
    }
    let (met, closing) = typist.close(identity, &own, &answer).map_err(|failure| match failure {
        HandshakeFailure::Refused => PairError::WrongCode { address },
        failure => explain(failure.into()),
    })?;
    timed.write(&closing).map_err(explain)?;
    let joined = exchange(&mut timed, identity, &met, true).map_err(|failure| match failure {
        Failure::Us(error) => PairError::Identity(error),
        failure => explain(failure),
    })?;
    let name = met.card.name;
    match joined {
        Some(joined) => Ok(Paired { name, address, joined }),
        None => Err(PairError::TwoSwarms { name }),
    }
}

/// The side that shows the code, from behind the preamble. Whether the other side knew the code.
pub(crate) fn show(
    timed: &mut Timed<'_>,
    identity: &Identity,
    desk: &PairingDesk,
    suite: Suite,
    address: SocketAddr,
) -> Result<bool, Failure> {
    let (number, code) = desk.enter(Instant::now()).ok_or(HandshakeFailure::Refused)?;
    let (shower, message) = Shower::start(suite, &code)?;
    timed.write(&[preamble_of(Purpose::Pair, suite).as_slice(), &message].concat())?;
    let mut opening = [0; 81];
    match timed.read(&mut opening) {
        // Somebody only asked whether a code is shown.
        Err(Failure::Io(error)) if !is_timeout(&error) => return Ok(false),
        other => other?,
    }
    if !desk.spend(number) {
        return Err(HandshakeFailure::Refused.into());
    }
    let own = Card::of(identity, desk.name());
    let (waiting, answer) = shower.answer(identity, &own, &opening).map_err(|failure| {
        desk.wrong(number, address, Instant::now());
        match failure {
            HandshakeFailure::Refused => Failure::WrongCode,
            failure => failure.into(),
        }
    })?;
    desk.right(number);
    let finish = || {
        timed.write(&answer)?;
        let mut closing = [0; 161];
        timed.read(&mut closing)?;
        let met = waiting.close(identity, &own, &closing)?;
        let joined = exchange(timed, identity, &met, false)?;
        Ok((met.card.name, joined.is_some()))
    };
    let finished = finish();
    if let Ok((name, paired)) = &finished {
        let name = name.clone();
        desk.tell(if *paired { PairingEvent::Paired { name } } else { PairingEvent::TwoSwarms { name } });
    }
    desk.tell(PairingEvent::Code(desk.code()));
    finished.map(|_| true)
}

/// Hands the secret over in the direction that both found. Whether this side took one; `None`: neither may change.
///
/// Who takes the secret writes it down before it says so, and who gives it pins the other after hearing that: a link
/// that breaks in between leaves at worst a machine that is in the swarm and is not listed yet.
fn exchange(
    timed: &mut Timed<'_>,
    identity: &Identity,
    met: &Met,
    typist: bool,
) -> Result<Option<bool>, Failure> {
    let (gives, takes) = match met.verdict {
        Verdict::TypistGives => (typist, !typist),
        Verdict::ShowerGives => (!typist, typist),
        Verdict::Same | Verdict::TwoSwarms => (false, false),
    };
    let gift = gives.then(|| identity.gift());
    let sealed = met.seal_gift(gift.as_ref())?;
    if !typist {
        timed.write(&sealed)?;
    }
    let mut theirs = [0; 1082];
    timed.read(&mut theirs)?;
    match met.open_gift(&theirs)? {
        Some(gift) if takes => {
            identity.adopt(gift, &met.peer_key, &met.card.name).map_err(Failure::Us)?;
        }
        None if !takes => {}
        // Both saw the same two cards: another decision is a broken peer.
        _ => return Err(HandshakeFailure::Refused.into()),
    }
    if typist {
        timed.write(&sealed)?;
        let mut done = [0; 16];
        timed.read(&mut done)?;
        met.open_done(&done)?;
    }
    if met.verdict != Verdict::TwoSwarms {
        identity.pin(&met.peer_key, &met.card.name).map_err(Failure::Us)?;
    }
    if !typist {
        timed.write(&met.seal_done()?)?;
    }
    Ok((met.verdict != Verdict::TwoSwarms).then_some(takes))
}

/// Brings the current secret to the member at the first of `addresses` that answers, if it has an older one and was
/// paired with this machine. Returns the key of the machine that took it.
///
/// # Errors
/// [`LinkError`] when nobody answers there, or nobody who may be told.
pub fn tell_member(
    addresses: &[SocketAddr],
    identity: &Identity,
    timeout: Duration,
) -> Result<Option<[u8; 32]>, LinkError> {
    identity.refresh();
    let deadline = Instant::now() + timeout;
    // The newest of the old ones first: a machine that missed one change is more likely than one that missed two.
    for age in 1..identity.psks().len() {
        let (stream, address) = first_stream(addresses, deadline)?;
        let by = deadline.min(Instant::now() + PAIRING_TIMEOUT);
        if let Some(key) = unless_refused(bring_news(&stream, identity, age, by), address)? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// Asks the member at `address` for the secret that this machine may have missed; whether it was taken over.
pub(crate) fn ask_member(
    address: SocketAddr,
    identity: &Identity,
    deadline: Instant,
) -> Result<bool, LinkError> {
    for age in 1..=OLD_SECRETS_MAX as u8 {
        let (stream, address) = first_stream(&[address], deadline)?;
        let by = deadline.min(Instant::now() + PAIRING_TIMEOUT);
        if unless_refused(ask_news(&stream, identity, age, by), address)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `None`: the other side has another secret than the one tried, or does not trust this machine.
fn unless_refused<T>(result: Result<T, Failure>, address: SocketAddr) -> Result<Option<T>, LinkError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Failure::Noise(HandshakeFailure::Refused) | Failure::RefusedByPeer) => Ok(None),
        Err(Failure::Io(error)) if !is_timeout(&error) => Ok(None),
        Err(failure) => Err(failure.explain(address, PAIRING_TIMEOUT)),
    }
}
