//! Python's methods on strings, lists and dictionaries.
//!
//! The engine charges fuel for what a method returns, after it was made. Methods whose result can be far larger than
//! what they are given are charged here first, so that a template cannot exhaust memory in one call.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match method {
            "replace" => charge_replace(state, text, args)?,
            "split" | "splitlines" => charge_split(state, text, args)?,
            "join" => return join(state, text, args),
            // Field widths may ask for any size, and no known template formats this way.
            "format" => {
                return Err(Error::new(ErrorKind::UnknownMethod, "str.format is not offered to templates"));
            }
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

/// One fuel for each 64 bytes, as the engine counts.
fn charge_bytes(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 64)
}

fn charge_replace(state: &State, text: &str, args: &[Value]) -> Result<(), Error> {
    let (Some(old), Some(new)) = (args.first().and_then(Value::as_str), args.get(1).and_then(Value::as_str))
    else {
        return Ok(()); // wrong arguments: the method itself says so
    };
    let matches = text.matches(old).count();
    charge_bytes(state, text.len().saturating_add(matches.saturating_mul(new.len())))
}

/// Each part becomes a value of its own, which may be far larger than the part.
fn charge_split(state: &State, text: &str, args: &[Value]) -> Result<(), Error> {
    let parts = match args.first().and_then(Value::as_str) {
        Some(separator) => text.matches(separator).count(),
        None => text.matches(char::is_whitespace).count(),
    };
    charge_bytes(state, text.len().saturating_add(parts.saturating_mul(32)))
}

/// `separator.join(items)`: charged item by item, because a repeated list has more items than bytes of memory.
fn join(state: &State, separator: &str, args: &[Value]) -> Result<Value, Error> {
    let [items] = args else {
        return Err(Error::new(ErrorKind::InvalidOperation, "join takes one argument"));
    };
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        if index > 0 {
            joined.push_str(separator);
        }
        let Some(text) = item.as_str() else {
            let kind = item.kind();
            let kind = if kind == ValueKind::Invalid { "an error".to_owned() } else { kind.to_string() };
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("join wants strings, item {index} is {kind}"),
            ));
        };
        state.consume_fuel(1)?;
        charge_bytes(state, separator.len().saturating_add(text.len()))?;
        joined.push_str(text);
    }
    Ok(Value::from(joined))
}
