//! Measuring a link: a connection of its own, on which the other end answers every message with its first bytes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use swarm_link::{Connection, Identity, LinkError, LinkSettings, dial};
use swarm_ring::Percentiles;
use swarm_wire::{CONTROL_BYTES_MAX, Control, MeasuredLink, NextHop};

use crate::control;
use crate::deadlines::{LINK_BULK, LINK_DIAL, LINK_MEASURED};
use crate::profile::nanos;

/// Messages that measure the round trip, after some that warm up both ends.
const ROUND_TRIPS: usize = 15;
const WARM_UPS: usize = 3;
/// Bytes of a message that measures the round trip.
const SMALL_BYTES: usize = 64;
/// Bytes of a bulk message; several, so that the link's own window has opened.
const BULK_BYTES: usize = 128 * 1024;
const BULKS: usize = 6;
/// Bytes of an answer.
const ECHO_BYTES: usize = 8;
/// What a node answers in all; whoever wants more dials again.
const ECHOES_MAX: usize = 128;
/// Round trips of a thorough measurement.
const MANY_ROUND_TRIPS: usize = 100;

/// What a link was measured to be.
pub(crate) struct LinkTimes {
    pub round_trip_ns_p50: u64,
    pub round_trip_ns_p99: u64,
    /// From here to there.
    pub bytes_per_s: f64,
}

/// Round trips and bandwidth to whoever answers at `addresses`, more thoroughly than placement needs it.
pub(crate) fn time_link(identity: &Identity, addresses: &[SocketAddr]) -> Result<LinkTimes, LinkError> {
    let settings = LinkSettings { write_timeout: LINK_MEASURED, ..LinkSettings::default() };
    let mut link = dial(addresses, identity, &settings, LINK_DIAL)?;
    let times = round_trips(&mut link, MANY_ROUND_TRIPS)?;
    let mut bytes_per_s = 0;
    transfers(&mut link, &times, |speed| bytes_per_s = bytes_per_s.max(speed))?;
    let (p50, p99) = (times.p50().unwrap_or(0), times.p99().unwrap_or(0));
    Ok(LinkTimes { round_trip_ns_p50: p50, round_trip_ns_p99: p99, bytes_per_s: bytes_per_s as f64 })
}

/// Round trip and bandwidth to `target`. What could not be measured within the deadline is absent.
pub(crate) fn measure_link(identity: &Identity, target: &NextHop) -> MeasuredLink {
    let mut measured = MeasuredLink { node_id: target.node_id, round_trip_ns: None, bytes_per_s: None };
    if let Err(error) = measure(identity, &target.addresses, &mut measured) {
        tracing::debug!("the link to {} cannot be measured: {error}", target.node_id.short());
    }
    measured
}

fn measure(
    identity: &Identity,
    addresses: &[SocketAddr],
    measured: &mut MeasuredLink,
) -> Result<(), LinkError> {
    let settings = LinkSettings { write_timeout: LINK_MEASURED, ..LinkSettings::default() };
    let mut link = dial(addresses, identity, &settings, LINK_DIAL)?;
    if control::wire_id(link.peer.node) != measured.node_id {
        return Ok(());
    }
    let times = round_trips(&mut link, ROUND_TRIPS)?;
    measured.round_trip_ns = times.p50();
    transfers(&mut link, &times, |speed| measured.bytes_per_s = measured.bytes_per_s.max(Some(speed)))
}

/// Says what this link is for, and times small messages.
fn round_trips(link: &mut Connection, turns: usize) -> Result<Percentiles, LinkError> {
    let deadline = Instant::now() + LINK_MEASURED;
    limit(link)?;
    let (mut out, mut times) = (Vec::new(), Percentiles::default());
    // A message of two words is always valid.
    if Control::Probe.encode(&mut out).is_err() {
        return Ok(times);
    }
    link.sender.send(&[&out])?;
    for turn in 0..WARM_UPS + turns {
        let time = turn_around(link, &[0; SMALL_BYTES])?;
        if turn >= WARM_UPS {
            times.add(nanos(time));
        }
        if Instant::now() > deadline {
            break;
        }
    }
    Ok(times)
}

/// Bytes per second of each large message.
fn transfers(link: &mut Connection, times: &Percentiles, mut tell: impl FnMut(u64)) -> Result<(), LinkError> {
    let (bulk, started) = (vec![0; BULK_BYTES], Instant::now());
    for _ in 0..BULKS {
        let time = nanos(turn_around(link, &bulk)?);
        // What is left without the way there and back; never nothing.
        let transfer = time.saturating_sub(times.p50().unwrap_or(0)).max(time / 10).max(1);
        let speed = (BULK_BYTES as u128 * 1_000_000_000 / u128::from(transfer)) as u64;
        tell(speed.max(1));
        if started.elapsed() > LINK_BULK {
            break;
        }
    }
    Ok(())
}

fn limit(link: &mut Connection) -> Result<(), LinkError> {
    link.sender.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.receiver.set_message_bytes_max(CONTROL_BYTES_MAX);
    link.receiver.set_idle_timeout(Some(LINK_MEASURED))
}

fn turn_around(link: &mut Connection, message: &[u8]) -> Result<Duration, LinkError> {
    let started = Instant::now();
    link.sender.send(&[message])?;
    link.receiver.receive(&mut Vec::new())?;
    Ok(started.elapsed())
}

/// The other end: answers until the dialler leaves, is silent for too long, or has had enough answers.
pub(crate) fn serve_probe(mut link: Connection) {
    let mut message = Vec::new();
    if limit(&mut link).is_err() {
        return;
    }
    for _ in 0..ECHOES_MAX {
        if link.receiver.receive(&mut message).is_err() {
            return;
        }
        message.truncate(ECHO_BYTES);
        if link.sender.send(&[&message]).is_err() {
            return;
        }
    }
}
