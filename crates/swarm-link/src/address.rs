//! Addresses as people type them.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;

/// Why a `host:port` leads nowhere. Texts quote what was typed, escaped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerAddressError {
    /// No colon, or nothing behind it.
    #[error("{0:?} has no port; write host:port, for example 192.168.1.20:4747")]
    NoPort(String),
    /// The port is not a number from 1 to 65535.
    #[error("{0:?} does not end in a port from 1 to 65535")]
    BadPort(String),
    /// No host before the colon.
    #[error("{0:?} has no host; write host:port, for example 192.168.1.20:4747")]
    NoHost(String),
    /// An IPv6 address without brackets, where the port cannot be told from the address.
    #[error("{0:?} looks like an IPv6 address; write it in brackets: [address]:port")]
    Brackets(String),
    /// The name does not lead to an address.
    #[error("cannot find the address of {host:?}; check the spelling, or use its IP address")]
    Unknown {
        /// The name.
        host: String,
        /// What the resolver said.
        #[source]
        source: std::io::Error,
    },
    /// The name leads to no address at all.
    #[error("{0:?} has no address")]
    NoAddress(String),
    /// The resolver is too slow.
    #[error("no answer for the name {host:?} within {waited_ms} ms; use its IP address")]
    Slow {
        /// The name.
        host: String,
        /// The deadline.
        waited_ms: u64,
    },
}

/// Splits `host:port` or `[ipv6]:port` without looking anything up.
fn split(text: &str) -> Result<(&str, u16), PeerAddressError> {
    let text = text.trim();
    if text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) {
        return Err(PeerAddressError::Brackets(text.into()));
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(|| PeerAddressError::NoPort(text.into()))?;
    if port.is_empty() || port.ends_with(']') {
        return Err(PeerAddressError::NoPort(text.into()));
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port > 0);
    let port = port.ok_or_else(|| PeerAddressError::BadPort(text.into()))?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match bare.unwrap_or(host) {
        "" => Err(PeerAddressError::NoHost(text.into())),
        host if bare.is_none() && host.contains(':') => Err(PeerAddressError::Brackets(text.into())),
        host => Ok((host, port)),
    }
}

/// The addresses behind what a user gave as `--peer`: `192.168.1.20:4747`, `[fe80::1%eth0]:4747` or
/// `name:4747`. Looks names up, for at most `timeout`.
///
/// # Errors
/// [`PeerAddressError`], each saying what to write instead.
pub fn parse_peer(text: &str, timeout: Duration) -> Result<Vec<SocketAddr>, PeerAddressError> {
    let (host, port) = split(text)?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let host = host.to_string();
    let (sink, answer) = bounded(1);
    let name = host.clone();
    // The system's resolver has no deadline of its own; the thread ends when it gives up.
    let look_up = move || {
        let found = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        let _ = sink.send(found);
    };
    if let Err(source) = thread::Builder::new().name("resolve".into()).spawn(look_up) {
        return Err(PeerAddressError::Unknown { host, source });
    }
    match answer.recv_timeout(timeout) {
        Ok(Ok(addresses)) if addresses.is_empty() => Err(PeerAddressError::NoAddress(host)),
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(source)) => Err(PeerAddressError::Unknown { host, source }),
        Err(_) => Err(PeerAddressError::Slow { host, waited_ms: crate::connection::millis(timeout) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Vec<SocketAddr>, PeerAddressError> {
        parse_peer(text, Duration::from_secs(5))
    }

    #[test]
    fn addresses_and_local_names_are_found() {
        assert_eq!(parse(" 192.168.1.20:4747 ").unwrap(), ["192.168.1.20:4747".parse().unwrap()]);
        assert_eq!(parse("[::1]:80").unwrap(), ["[::1]:80".parse().unwrap()]);
        let local = parse("localhost:4747").unwrap();
        assert!(!local.is_empty() && local.iter().all(|address| address.ip().is_loopback()));
    }

    #[test]
    fn mistakes_are_named() {
        for text in ["", "host", "192.168.1.20", "host:", "[::1]"] {
            assert!(matches!(parse(text), Err(PeerAddressError::NoPort(_))), "{text}");
        }
        for text in ["host:0", "host:65536", "host:+80", "host:http", "host:-1"] {
            assert!(matches!(parse(text), Err(PeerAddressError::BadPort(_))), "{text}");
        }
        for text in [":80", "[]:80"] {
            assert!(matches!(parse(text), Err(PeerAddressError::NoHost(_))), "{text}");
        }
        for text in ["fe80::1", "::1", "fe80::1%eth0:4747"] {
            assert!(matches!(parse(text), Err(PeerAddressError::Brackets(_))), "{text}");
        }
        assert!(matches!(parse("no such name.invalid:1"), Err(PeerAddressError::Unknown { .. })));
    }

    proptest! {
        #[test]
        fn any_text_is_split_or_refused(text in ".*") {
            let _ = split(&text);
        }
    }
}
