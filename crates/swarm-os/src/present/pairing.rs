//! Pairing for people and programs.

use serde_json::{Value, json};
use swarm_link::{PairCode, PairingEvent};

use super::text::line;

/// A code to be read across a room.
pub fn code_box(code: &PairCode) -> String {
    let spaced: Vec<String> = code.to_string().chars().map(String::from).collect();
    let spaced = spaced.join(" ");
    let edge = "-".repeat(spaced.len() + 6);
    format!(
        "+{edge}+\n|   {spaced}   |\n+{edge}+\npairing code {code}: type it on the other machine, where `swarm-os chat` asks for it"
    )
}

/// Both machines are in one swarm.
pub fn paired(name: &str, joined: bool) -> String {
    let how = if joined { "; this machine has joined its swarm" } else { "" };
    format!("paired with {}{how}", line(name))
}

/// An event in one line or, for a code, several.
pub fn words(event: &PairingEvent) -> String {
    match event {
        PairingEvent::Code(code) => code_box(code),
        PairingEvent::WrongCode { address, tries_left: 0, rest } => format!(
            "{address} typed a wrong code for the third time: that code is dead, and nobody can pair for {} s",
            rest.as_secs()
        ),
        PairingEvent::WrongCode { address, tries_left, .. } => {
            format!("{address} typed a wrong code; tries left: {tries_left}")
        }
        PairingEvent::Paired { name } => paired(name, false),
        PairingEvent::TwoSwarms { name } => format!(
            "{} knew the code, but both machines have a swarm of their own; on the one that should move, run `swarm-os forget --all`",
            line(name)
        ),
        _ => "something happened that this version cannot name".to_owned(),
    }
}

/// An event as JSON.
pub fn object(event: &PairingEvent) -> Value {
    match event {
        PairingEvent::Code(code) => json!({"event": "pairing_code", "code": code.to_string()}),
        PairingEvent::WrongCode { address, tries_left, rest } => json!({"event": "wrong_code",
            "address": address.to_string(), "tries_left": tries_left, "rest_s": rest.as_secs()}),
        PairingEvent::Paired { name } => json!({"event": "paired", "name": name}),
        PairingEvent::TwoSwarms { name } => json!({"event": "two_swarms", "name": name}),
        _ => json!({"event": "unknown"}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_from_afar_and_copied_from_near() {
        let shown = code_box(&PairCode::parse("12345678").unwrap());
        assert!(shown.contains("|   1 2 3 4 - 5 6 7 8   |") && shown.contains("1234-5678"), "{shown}");
        let widths: Vec<usize> = shown.lines().take(3).map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{shown}");
    }
}
