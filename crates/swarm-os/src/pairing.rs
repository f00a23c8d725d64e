//! What a command asks a person before it starts: the code of workers that are not paired with this computer, and
//! leave to fetch a lot.

use std::io::{BufRead, IsTerminal, Write};

use swarm_link::{Identity, PairCode, PairError};
use swarm_node::pairing::{Addresses, pair_with_any};
use swarm_node::{EngineConfig, NodeError};

use crate::commands::pair::pair_failure;
use crate::failure::Failure;
use crate::present::{pairing, text};

/// Wrong codes that a person may type before the command ends: as many as a code has.
const TRIES: usize = 3;

/// Who is at hand while something starts.
#[derive(Clone, Copy)]
pub struct Company<'a> {
    /// Somebody at the terminal may be asked.
    person: bool,
    /// Hears what is not an error.
    note: &'a dyn Fn(&str),
}

impl Company<'static> {
    /// Of a command: a person where there is a terminal.
    pub fn of_command() -> Self {
        Self { person: std::io::stdin().is_terminal(), note: &text::note }
    }
}

impl<'a> Company<'a> {
    /// Of a program, which nobody asks.
    pub fn of_program(note: &'a dyn Fn(&str)) -> Self {
        Self { person: false, note }
    }
}

/// Calls `start` again after every pairing, until it needs none. Codes come from `--join`, or from a person.
pub fn meanwhile<T>(
    company: Company<'_>,
    config: &mut EngineConfig,
    identity: &Identity,
    join: Option<&PairCode>,
    start: impl Fn(&EngineConfig) -> Result<T, NodeError>,
) -> Result<T, Failure> {
    config.search.pairing = true;
    let mut typed = join.cloned();
    loop {
        let showing = match start(config) {
            Err(NodeError::Unpaired { showing }) => showing,
            Err(error @ NodeError::MuchToFetch { .. }) => {
                agree(company, &error)?;
                config.fetch_bytes_max = None;
                continue;
            }
            other => return Ok(other?),
        };
        let required = config.search.at_least > 0;
        let met = match typed.take() {
            Some(code) => Some(pair_with_any(&showing, identity, &code, &config.name).map_err(pair_failure)?),
            None if company.person => ask(&showing, identity, &config.name, required)?,
            None if required => return Err(NodeError::Unpaired { showing }.into()),
            None => {
                (company.note)(&NodeError::Unpaired { showing }.to_string());
                None
            }
        };
        match met {
            Some(paired) => (company.note)(&pairing::paired(&paired.name, paired.joined)),
            // Alone, then.
            None => config.search.pairing = false,
        }
    }
}

/// Asks a person whether so much may be fetched; without one it may not.
fn agree(company: Company<'_>, error: &NodeError) -> Result<(), Failure> {
    let refused = || Failure::usage(format!("{error}; say --yes to fetch it"));
    if !company.person {
        return Err(refused());
    }
    let _ = write!(std::io::stderr(), "{}\nfetch it? [y/N] ", text::line(&error.to_string()));
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes") { Ok(()) } else { Err(refused()) }
}

/// Asks a person for the code; `None`: goes on without.
fn ask(
    showing: &[Addresses],
    identity: &Identity,
    name: &str,
    required: bool,
) -> Result<Option<swarm_link::Paired>, Failure> {
    let count = showing.len();
    text::note(&format!(
        "{count} worker{} not paired with this computer yet; each shows a code",
        if count == 1 { " is" } else { "s are" }
    ));
    let without = if required { "" } else { ", or Enter to go on without" };
    let mut tries = 0;
    loop {
        let _ = write!(std::io::stderr(), "the code on its screen{without}: ");
        let _ = std::io::stderr().flush();
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line)?;
        if line.trim().is_empty() {
            if read == 0 || !required {
                return if required {
                    Err(NodeError::Unpaired { showing: showing.to_vec() }.into())
                } else {
                    Ok(None)
                };
            }
            continue;
        }
        let code = match PairCode::parse(&line) {
            Ok(code) => code,
            Err(error) => {
                text::note(&error.to_string());
                continue;
            }
        };
        tries += 1;
        match pair_with_any(showing, identity, &code, name) {
            Ok(paired) => return Ok(Some(paired)),
            Err(error @ (PairError::WrongCode { .. } | PairError::Closed { .. })) if tries < TRIES => {
                text::note(&error.to_string());
            }
            Err(error) => return Err(pair_failure(error)),
        }
    }
}
