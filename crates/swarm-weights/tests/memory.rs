//! Hostile headers must not make the process large. A process of its own, because what is looked at is
//! its peak memory; Linux only, because that is where it can be asked for.
#![cfg(target_os = "linux")]

use std::time::{Duration, Instant};

use swarm_weights::gguf::parse;
use swarm_weights::safetensors::SafetensorsHeader;

const GROWTH_BYTES_MAX: u64 = 4 << 20;

/// Peak resident memory in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// A GGUF header up to its counts, and whatever follows.
fn gguf(tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut out = [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes()].concat();
    rest.iter().for_each(|part| out.extend_from_slice(part));
    out
}

/// One key `k` of value type `kind`.
fn key(kind: u32, rest: &[u8]) -> Vec<u8> {
    [&1_u64.to_le_bytes()[..], b"k", &kind.to_le_bytes(), rest].concat()
}

fn array(element: u32, count: u64) -> Vec<u8> {
    key(9, &[&element.to_le_bytes()[..], &count.to_le_bytes()].concat())
}

/// Numbers at which readers have allocated, looped or wrapped.
const BIG: [u64; 8] =
    [1 << 20, 1_000_000_000, 1 << 31, 1 << 32, 1 << 40, 1 << 62, u64::MAX / 8 + 1, u64::MAX];

fn hostile() -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    let pad = vec![0; 160];
    for big in BIG {
        files.push(gguf(big, 0, &[&pad]));
        files.push(gguf(0, big, &[&pad]));
        files.push(gguf(0, 1, &[&big.to_le_bytes(), &pad]));
        files.push(gguf(0, 1, &[&key(8, &big.to_le_bytes()), &pad]));
        for element in 0..14 {
            files.push(gguf(0, 1, &[&array(element, big), &pad]));
        }
        for dims in [[big, 1], [1, big], [big, big]] {
            let [cols, rows] = dims.map(u64::to_le_bytes);
            let tensor =
                [&1_u64.to_le_bytes()[..], b"t", &2_u32.to_le_bytes(), &cols, &rows, &[0; 12]].concat();
            files.push(gguf(1, 0, &[&tensor, &pad]));
        }
    }
    // Arrays in arrays, as deep as the file allows.
    let deep = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat().repeat(100_000);
    files.push(gguf(0, 1, &[&key(9, &deep)]));
    files
}

/// Lists and nesting without end.
fn hostile_json() -> [String; 3] {
    let shape = "1,".repeat(1 << 20);
    let open = "[".repeat(1 << 20);
    [
        format!(r#"{{"a":{{"dtype":"F32","shape":[{shape}1],"data_offsets":[0,4]}}}}"#),
        format!(r#"{{"a":{{"dtype":"F32","shape":[],"x":{open}"#),
        format!(r#"{{"__metadata__":{open}"#),
    ]
}

#[test]
fn hostile_headers_cost_neither_memory_nor_time() {
    let (files, jsons) = (hostile(), hostile_json());
    let (before, start) = (peak(), Instant::now());
    for file in &files {
        // The file may pretend to be longer than what has been read of it so far.
        for file_len in [file.len() as u64, 1 << 34, u64::MAX] {
            let _ = parse(file, file_len);
        }
    }
    for json in &jsons {
        assert!(SafetensorsHeader::parse(json.as_bytes(), 1 << 34).is_err());
    }
    let grown = peak() - before;
    assert!(grown < GROWTH_BYTES_MAX, "{} hostile headers grew the process by {grown} bytes", files.len());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
