//! `swarm-os pair`: shows a code, or takes the one that another machine shows.

use std::time::{Duration, Instant};

use serde_json::json;
use swarm_link::{PairError, PairingEvent};
use swarm_node::pairing::{PairingStand, find_showing, next_event, pair_with_any};

use crate::args::PairArgs;
use crate::failure::{Code, Failure};
use crate::present::pairing::{self, code_box};
use crate::present::text;
use crate::settings;

/// How long a code is shown when nothing else is said.
const SHOW: Duration = Duration::from_secs(600);
/// How long to look for a machine that shows one.
const LOOK: Duration = Duration::from_secs(30);

pub fn pair(args: &PairArgs) -> Result<(), Failure> {
    let (_, identity) = settings::identity()?;
    let name = args.name.clone().unwrap_or_else(swarm_node::machine::host_name);
    let wait = args.wait.map(|secs| Duration::from_secs(u64::from(secs)));
    match args.code.as_ref().or(args.join.as_ref()) {
        Some(code) => join(args, &identity, &name, code, wait.unwrap_or(LOOK)),
        None if !args.peer.is_empty() => {
            Err(Failure::usage("--peer says where a code is shown; say that code, too: `swarm-os pair CODE`"))
        }
        None => show(args, &identity, &name, wait.unwrap_or(SHOW)),
    }
}

/// Types the code of another machine.
fn join(
    args: &PairArgs,
    identity: &swarm_link::Identity,
    name: &str,
    code: &str,
    wait: Duration,
) -> Result<(), Failure> {
    let code = settings::pair_code("CODE", code)?;
    let peers = args.peer.iter().map(|peer| settings::peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
    let showing = find_showing(identity, &peers, peers.is_empty(), wait)?;
    if showing.is_empty() {
        return Err(Failure::new(
            Code::Ring,
            format!(
                "no machine that shows a code was found within {} s; run `swarm-os pair` there, check that both are on \
                 the same network, and where multicast is blocked use --peer HOST:PORT",
                wait.as_secs()
            ),
        ));
    }
    let paired = pair_with_any(&showing, identity, &code, name).map_err(pair_failure)?;
    if args.json {
        let event = json!({"event": "paired", "name": paired.name, "joined": paired.joined});
        return Ok(text::say(&event.to_string())?);
    }
    Ok(text::say(&pairing::paired(&paired.name, paired.joined))?)
}

/// Shows codes until a machine has paired.
fn show(args: &PairArgs, identity: &swarm_link::Identity, name: &str, wait: Duration) -> Result<(), Failure> {
    let stand = PairingStand::open(identity, name, args.port)?;
    let until = Instant::now() + wait;
    if !args.json {
        text::note(&format!(
            "waits on port {} for {} s; on the other machine: `swarm-os chat`, or `swarm-os pair CODE`",
            stand.port(),
            wait.as_secs()
        ));
    }
    while let Some(event) = next_event(&stand, until) {
        if args.json {
            let mut object = pairing::object(&event);
            object["port"] = stand.port().into();
            text::say(&object.to_string())?;
        } else if let PairingEvent::Code(code) = &event {
            text::say(&code_box(code))?;
        } else {
            text::say(&pairing::words(&event))?;
        }
        if let PairingEvent::Paired { .. } = event {
            return Ok(());
        }
    }
    Err(Failure::new(Code::Ring, format!("no machine paired within {} s", wait.as_secs())))
}

/// A pairing that failed, as a command ends.
pub fn pair_failure(error: PairError) -> Failure {
    match error {
        PairError::Identity(error) => error.into(),
        PairError::Link(error) => swarm_node::NodeError::from(error).into(),
        error @ PairError::TwoSwarms { .. } => Failure::usage(error.to_string()),
        error => Failure::new(Code::Ring, error.to_string()),
    }
}
