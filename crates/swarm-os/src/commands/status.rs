//! `swarm-os status`: what this user's processes on this computer are doing.

use serde_json::{Value, json};

use crate::args::StatusArgs;
use crate::failure::Failure;
use crate::live;
use crate::present::text;

/// Columns of [`rows`] that are right-aligned.
pub const RIGHT: &[usize] = &[2, 3, 4, 5, 6, 7, 8];

pub fn status(args: &StatusArgs) -> Result<(), Failure> {
    let processes = live::look()?;
    if args.json {
        return Ok(text::say(&json!({ "processes": processes }).to_string())?);
    }
    if processes.is_empty() {
        return Ok(text::say(
            "nothing of swarm-os runs here; `swarm-os worker` or `swarm-os chat` starts it",
        )?);
    }
    let words: Vec<String> = processes.iter().map(words).collect();
    Ok(text::say(&words.join("\n\n"))?)
}

/// One process for people.
pub fn words(process: &Value) -> String {
    let table = text::table(&rows(process), RIGHT);
    if table.is_empty() { headline(process) } else { format!("{}\n{table}", headline(process)) }
}

/// Who it is and what it does, in a line.
pub fn headline(process: &Value) -> String {
    let id = &process["process"];
    if process["role"] == "worker" {
        let name = line(&process["name"]);
        let what = match &process["stage"] {
            Value::Null => {
                let kept = process["kept_bytes"].as_u64().filter(|&kept| kept > 0);
                let kept = kept.map(|kept| format!(", keeps {} of weights", text::bytes(kept)));
                format!("waits, offers {}{}", bytes(&process["memory_bytes"]), kept.unwrap_or_default())
            }
            stage => format!(
                "serves layers {}, {}, {} rows in {} frames, {} of KV rows",
                layers(stage),
                sessions(stage),
                stage["tokens"],
                stage["frames"],
                bytes(&stage["kv_bytes"])
            ),
        };
        return format!("worker {name} (process {id}, port {}): {what}{}", process["port"], refused(process));
    }
    let state = match &process["fault"] {
        Value::Null => {
            format!("{}, {}", sessions(process), number(&process["tok_per_s"], 1, " tok/s"))
        }
        fault => format!("down: {}", line(fault)),
    };
    let lap = format!(
        "lap {} (p99 {})",
        number(&process["lap_ms_p50"], 2, " ms"),
        number(&process["lap_ms_p99"], 2, "")
    );
    format!(
        "coordinator of {} (process {id}): {state}, {} tokens, {lap}{}",
        line(&process["model"]),
        process["tokens"],
        refused(process)
    )
}

fn sessions(of: &Value) -> String {
    let count = &of["sessions"];
    format!("{count} session{}", if *count == 1 { "" } else { "s" })
}

/// Links that were closed because of what came on them, where there were any.
fn refused(process: &Value) -> String {
    let codes = process["links_refused"].as_object();
    let codes: Vec<String> =
        codes.into_iter().flatten().map(|(code, count)| format!("{count} {}", text::line(code))).collect();
    if codes.is_empty() { String::new() } else { format!(", links refused: {}", codes.join(", ")) }
}

/// The nodes of a coordinator's ring, with a heading; nothing for a worker.
pub fn rows(process: &Value) -> Vec<Vec<String>> {
    let Some(nodes) = process["nodes"].as_array() else { return Vec::new() };
    let heading = ["node", "state", "layers", "memory", "KV rows", "compute", "hop", "p99", "round trip"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for node in nodes {
        rows.push(vec![
            line(&node["name"]),
            line(&node["state"]),
            layers(node),
            bytes(&node["memory_bytes"]),
            bytes(&node["kv_bytes"]),
            number(&node["compute_ms_p50"], 2, " ms"),
            number(&node["hop_ms_p50"], 2, " ms"),
            number(&node["hop_ms_p99"], 2, " ms"),
            number(&node["round_trip_ms"], 2, " ms"),
        ]);
    }
    rows
}

fn line(value: &Value) -> String {
    text::line(value.as_str().unwrap_or("-"))
}

fn layers(value: &Value) -> String {
    format!("{}..{}", value["layers"][0], value["layers"][1])
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), text::bytes)
}

fn number(value: &Value, digits: usize, unit: &str) -> String {
    text::number(value.as_f64(), digits, unit)
}
