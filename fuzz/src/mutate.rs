//! Changes to an input that keep it close to sound.

use serde_json::{Map, Number, Value};
use swarm_testkit::sim::Rng;

use crate::targets::Shape;

/// No input grows beyond this.
pub const INPUT_BYTES_MAX: usize = 64 << 10;

/// Numbers at the edges of something.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 53,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// One to four changes.
pub fn mutate(rng: &mut Rng, shape: Shape, words: &[&str], input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..rng.within(1, 4) {
        bytes = match shape {
            Shape::Json if rng.chance(800) => json(rng, words, &bytes).unwrap_or(bytes),
            _ => {
                change(rng, words, &mut bytes, other);
                bytes
            }
        };
        bytes.truncate(INPUT_BYTES_MAX);
    }
    bytes
}

fn change(rng: &mut Rng, words: &[&str], bytes: &mut Vec<u8>, other: &[u8]) {
    let at = rng.index(bytes.len());
    match rng.below(10) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
        1 => put(bytes, at, &[rng.draw() as u8]),
        2 | 3 => number(rng, bytes),
        4 => drop(bytes.drain(at..at + rng.index(bytes.len() - at + 1).min(64))),
        5 => {
            let part = span(rng, bytes);
            insert(bytes, at, &part);
        }
        6 => bytes.truncate(at),
        7 => {
            let part = span(rng, other);
            insert(bytes, at, &part);
        }
        8 if !words.is_empty() => insert(bytes, at, words[rng.index(words.len())].as_bytes()),
        _ => {
            let word: Vec<u8> = (0..rng.within(1, 8)).map(|_| rng.draw() as u8).collect();
            insert(bytes, at, &word);
        }
    }
}

/// A part of at most 256 bytes.
fn span(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    let at = rng.index(bytes.len());
    let len = rng.index((bytes.len() - at).min(256) + 1);
    bytes.get(at..at + len).unwrap_or_default().to_vec()
}

fn insert(bytes: &mut Vec<u8>, at: usize, part: &[u8]) {
    let at = at.min(bytes.len());
    bytes.splice(at..at, part.iter().copied());
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes.iter_mut().skip(at).zip(part).for_each(|(to, from)| *to = *from);
}

/// A little-endian number becomes an edge, or moves by little.
fn number(rng: &mut Rng, bytes: &mut [u8]) {
    let width = 1usize << rng.below(4);
    let places = bytes.len() / width;
    // Formats align their numbers more often than not.
    let at = if rng.chance(700) { rng.index(places) * width } else { rng.index(bytes.len()) };
    let Some(place) = bytes.get(at..at + width) else { return };
    let mut wide = [0; 8];
    put(&mut wide, 0, place);
    let value = if rng.chance(500) {
        EDGES[rng.index(EDGES.len())]
    } else {
        u64::from_le_bytes(wide).wrapping_add(rng.within(0, 4)).wrapping_sub(2)
    };
    put(bytes, at, &value.to_le_bytes()[..width]);
}

/// One value of a JSON text becomes another. `None` when it is no JSON.
fn json(rng: &mut Rng, words: &[&str], bytes: &[u8]) -> Option<Vec<u8>> {
    let mut root: Value = serde_json::from_slice(bytes).ok()?;
    let pick = rng.index(count(&root));
    if rng.chance(80) {
        // A key twice, which no tree can hold.
        let text = root.to_string();
        let at = text.find('{')? + 1;
        let key = words.get(rng.index(words.len())).copied().unwrap_or("kind");
        return Some(format!("{}\"{key}\":{},{}", &text[..at], odd(rng, words), &text[at..]).into_bytes());
    }
    let node = nth(&mut root, &mut { pick })?;
    twist(rng, words, node);
    Some(root.to_string().into_bytes())
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

fn nth<'v>(value: &'v mut Value, left: &mut usize) -> Option<&'v mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, left)),
        Value::Object(map) => map.values_mut().find_map(|item| nth(item, left)),
        _ => None,
    }
}

fn twist(rng: &mut Rng, words: &[&str], node: &mut Value) {
    match (rng.below(6), &mut *node) {
        (0 | 1, Value::Object(map)) if !map.is_empty() => {
            let key = map.keys().nth(rng.index(map.len())).cloned().unwrap_or_default();
            let value = map.remove(&key).unwrap_or_default();
            // Gone, or under another name.
            if rng.chance(500) {
                map.insert(word(rng, words), value);
            }
        }
        (0 | 1, Value::Array(items)) if !items.is_empty() => {
            let at = rng.index(items.len());
            let item = items.remove(at);
            (0..rng.within(0, 3)).for_each(|_| items.push(item.clone()));
        }
        (2, Value::Object(map)) => {
            let (key, value) = (word(rng, words), odd(rng, words));
            map.insert(key, value);
        }
        (2, Value::Array(items)) => items.push(odd(rng, words)),
        (3, Value::String(text)) => text.push_str(&word(rng, words)),
        (3, Value::Number(number)) => {
            let near = number.as_i64().map(|n| n.wrapping_add(rng.within(0, 2) as i64 - 1));
            *node = near.map_or_else(|| odd(rng, words), Value::from);
        }
        (4, inner) => {
            let inner = inner.take();
            let deep = rng.within(1, 60);
            *node = (0..deep).fold(inner, |value, _| Value::Array(vec![value]));
        }
        _ => *node = odd(rng, words),
    }
}

fn word(rng: &mut Rng, words: &[&str]) -> String {
    match rng.below(4) {
        0 => "\u{1b}[31m\0\u{202e}".to_owned(),
        1 => "\u{10ffff}é ".repeat(rng.index(40)),
        _ => words.get(rng.index(words.len())).copied().unwrap_or_default().to_owned(),
    }
}

fn odd(rng: &mut Rng, words: &[&str]) -> Value {
    match rng.below(8) {
        0 => Value::Null,
        1 => Value::Bool(rng.chance(500)),
        2 => Value::from(EDGES[rng.index(EDGES.len())]),
        3 => Value::from(-(rng.below(300) as i64)),
        4 => Number::from_f64([1e308, -1.5, 1e-320, 0.1][rng.index(4)]).map_or(Value::Null, Value::Number),
        5 => Value::Array(Vec::new()),
        6 => Value::Object(Map::new()),
        _ => Value::String(word(rng, words)),
    }
}
