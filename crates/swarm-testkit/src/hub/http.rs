//! As much of HTTP/1.1 as the test Hub speaks.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

/// Longest request line or header.
const LINE_BYTES_MAX: usize = 64 << 10;
const PIECE_BYTES: usize = 4 << 10;

/// A request without a body.
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// The next request of a connection; nothing at its end.
    pub fn read(input: &mut impl BufRead) -> io::Result<Option<Self>> {
        let Some(first) = line(input)? else { return Ok(None) };
        let mut words = first.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pair = |part: &str| part.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        let mut headers = BTreeMap::new();
        while let Some(text) = line(input)?.filter(|text| !text.is_empty()) {
            if let Some((name, value)) = text.split_once(':') {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            }
        }
        let query = query.split('&').filter_map(pair).collect();
        Ok(Some(Self { method: method.to_owned(), path: path.to_owned(), query, headers }))
    }

    /// `Range: bytes=a-b`, end exclusive.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (start, end) = self.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let end = if end.is_empty() { u64::MAX } else { end.parse::<u64>().ok()?.saturating_add(1) };
        Some((start.parse().ok()?, end))
    }

    pub fn token(&self) -> Option<String> {
        Some(self.headers.get("authorization")?.strip_prefix("Bearer ")?.to_owned())
    }
}

fn line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    let read = io::Read::take(input, LINE_BYTES_MAX as u64).read_until(b'\n', &mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned();
    Ok((read > 0).then_some(text))
}

/// How a body is sent.
#[derive(Clone, Copy, Default)]
pub struct Manner {
    /// The connection ends after so many bytes.
    pub cut: Option<u64>,
    /// A pause after each piece.
    pub pause: Option<Duration>,
    /// A pause after so many bytes.
    pub stall: Option<(u64, Duration)>,
}

/// Sends an answer. `count` is told how many bytes of the body are out, before each piece: who hears the last byte may
/// look at once. True when the connection goes on.
pub fn answer(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(String, String)],
    body: &[u8],
    manner: Manner,
    count: &dyn Fn(u64),
) -> io::Result<bool> {
    let mut head = format!("HTTP/1.1 {status} {}\r\nContent-Length: {}\r\n", reason(status), body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let mut sent = 0;
    for piece in body.chunks(if manner.pause.is_some() { PIECE_BYTES } else { PIECE_BYTES * 16 }) {
        let left = manner.cut.map_or(u64::MAX, |cut| cut - sent);
        let piece = &piece[..piece.len().min(left as usize)];
        count(sent + piece.len() as u64);
        stream.write_all(piece)?;
        if let Some((at, pause)) = manner.stall
            && (sent..sent + piece.len() as u64).contains(&at)
        {
            thread::sleep(pause);
        }
        sent += piece.len() as u64;
        if manner.cut == Some(sent) {
            return Ok(false);
        }
        manner.pause.into_iter().for_each(thread::sleep);
    }
    Ok(true)
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        302 => "Found",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        416 => "Range Not Satisfiable",
        429 => "Too Many Requests",
        _ => "Status",
    }
}
