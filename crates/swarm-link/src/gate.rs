//! Who may begin a handshake, and when. Pure: addresses and times in, decisions out.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Handshakes in progress, over all addresses and from one.
pub(crate) const PENDING_MAX: usize = 32;
pub(crate) const PENDING_PER_ADDRESS_MAX: usize = 8;
/// The wait after a first failed handshake; it doubles with each further one.
const DELAY_FIRST: Duration = Duration::from_millis(100);
/// A third of the handshake deadline, so that an honest node behind a guilty address still gets in.
const DELAY_MAX: Duration = Duration::from_secs(1);
const FORGIVEN_AFTER: Duration = Duration::from_secs(30);
const OFFENDERS_MAX: usize = 256;

/// How an admitted handshake ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Authenticated,
    /// Wrong secret or broken bytes. Costs the address a delay.
    Failed,
    /// Nothing was proved either way: silence, hanging up, making room for another.
    Unfinished,
}

/// Keeps the handshakes in progress, each with a `T` that can end it.
///
/// When there is no room the oldest handshake goes, not the newcomer: an honest one takes milliseconds, so
/// the oldest is the one most likely to be there only to take up room.
pub(crate) struct Gate<T> {
    pending: VecDeque<Pending<T>>,
    offenders: HashMap<IpAddr, Offences>,
    next_ticket: u64,
}

struct Pending<T> {
    ticket: u64,
    address: IpAddr,
    handle: T,
}

struct Offences {
    count: u32,
    last: Instant,
}

pub(crate) struct Admission<T> {
    pub ticket: u64,
    /// Wait this long before answering.
    pub delay: Duration,
    /// The handshake that made room.
    pub evicted: Option<T>,
}

impl<T> Gate<T> {
    pub(crate) fn new() -> Self {
        Self { pending: VecDeque::new(), offenders: HashMap::new(), next_ticket: 0 }
    }

    pub(crate) fn admit(&mut self, address: IpAddr, now: Instant, handle: T) -> Admission<T> {
        let address = neighbourhood(address);
        let same = self.pending.iter().filter(|pending| pending.address == address).count();
        let victim = if same >= PENDING_PER_ADDRESS_MAX {
            self.pending.iter().position(|pending| pending.address == address)
        } else if self.pending.len() >= PENDING_MAX {
            Some(0)
        } else {
            None
        };
        let evicted = victim.and_then(|index| self.pending.remove(index)).map(|pending| pending.handle);
        let ticket = self.next_ticket;
        self.next_ticket = self.next_ticket.wrapping_add(1);
        self.pending.push_back(Pending { ticket, address, handle });
        Admission { ticket, delay: self.delay(address, now), evicted }
    }

    /// Frees the place of `ticket`, which may have been evicted already.
    pub(crate) fn leave(&mut self, ticket: u64, address: IpAddr, outcome: Outcome, now: Instant) {
        self.pending.retain(|pending| pending.ticket != ticket);
        let address = neighbourhood(address);
        match outcome {
            Outcome::Unfinished => {}
            Outcome::Authenticated => {
                self.offenders.remove(&address);
            }
            Outcome::Failed => self.blame(address, now),
        }
    }

    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Empties the gate.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.pending.drain(..).map(|pending| pending.handle)
    }

    fn delay(&self, address: IpAddr, now: Instant) -> Duration {
        let Some(offences) = self.offenders.get(&address) else { return Duration::ZERO };
        if now.saturating_duration_since(offences.last) >= FORGIVEN_AFTER {
            return Duration::ZERO;
        }
        let doublings = offences.count.saturating_sub(1).min(16);
        DELAY_FIRST.saturating_mul(1 << doublings).min(DELAY_MAX)
    }

    fn blame(&mut self, address: IpAddr, now: Instant) {
        self.offenders.retain(|_, offences| now.saturating_duration_since(offences.last) < FORGIVEN_AFTER);
        if self.offenders.len() >= OFFENDERS_MAX && !self.offenders.contains_key(&address) {
            let oldest =
                self.offenders.iter().min_by_key(|(_, offences)| offences.last).map(|(address, _)| *address);
            if let Some(oldest) = oldest {
                self.offenders.remove(&oldest);
            }
        }
        let offences = self.offenders.entry(address).or_insert(Offences { count: 0, last: now });
        offences.count = offences.count.saturating_add(1);
        offences.last = now;
    }
}

/// What counts as one address: IPv4 however it is written, and the /64 that one IPv6 host owns. All
/// link-local hosts share a prefix, so those count one by one.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_unicast_link_local() && !v6.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn silent_strangers_make_room_for_a_newcomer() {
        let (mut gate, now) = (Gate::new(), Instant::now());
        for silent in 0..100 {
            gate.admit(ip(1), now, silent);
        }
        assert_eq!(gate.pending(), PENDING_PER_ADDRESS_MAX);
        let admission = gate.admit(ip(1), now, 100);
        assert_eq!(admission.evicted, Some(92));
        assert!(gate.admit(ip(2), now, 101).evicted.is_none());
    }

    #[test]
    fn failures_cost_time_and_are_forgiven() {
        let (mut gate, now) = (Gate::new(), Instant::now());
        let mut delays = Vec::new();
        for _ in 0..6 {
            let admission = gate.admit(ip(1), now, ());
            delays.push(admission.delay.as_millis());
            gate.leave(admission.ticket, ip(1), Outcome::Failed, now);
        }
        assert_eq!(delays, [0, 100, 200, 400, 800, 1000]);
        assert_eq!(gate.admit(ip(2), now, ()).delay, Duration::ZERO);
        assert_eq!(gate.admit(ip(1), now + FORGIVEN_AFTER, ()).delay, Duration::ZERO);
        let admission = gate.admit(ip(1), now, ());
        gate.leave(admission.ticket, ip(1), Outcome::Authenticated, now);
        assert_eq!(gate.admit(ip(1), now, ()).delay, Duration::ZERO);
    }

    #[test]
    fn one_host_is_one_address() {
        let same = |a: &str, b: &str| neighbourhood(a.parse().unwrap()) == neighbourhood(b.parse().unwrap());
        assert!(same("10.0.0.1", "::ffff:10.0.0.1"));
        assert!(same("2001:db8::1", "2001:db8::2"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(!same("fe80::1", "fe80::2"));
    }

    proptest! {
        #[test]
        fn no_schedule_passes_the_caps(steps in prop::collection::vec((0u8..6, 0u8..4, 0u64..40), 0..300)) {
            let start = Instant::now();
            let (mut gate, mut now, mut tickets) = (Gate::new(), start, Vec::new());
            for (host, kind, seconds) in steps {
                now += Duration::from_secs(seconds);
                let outcome = [Outcome::Authenticated, Outcome::Failed, Outcome::Unfinished].get(usize::from(kind));
                match (outcome, tickets.pop()) {
                    (Some(outcome), Some((ticket, address))) => gate.leave(ticket, address, *outcome, now),
                    _ => {
                        let admission = gate.admit(ip(host), now, ());
                        prop_assert!(admission.delay <= DELAY_MAX);
                        tickets.push((admission.ticket, ip(host)));
                    }
                }
                prop_assert!(gate.pending() <= PENDING_MAX);
                for host in 0..6 {
                    let same = gate.pending.iter().filter(|pending| pending.address == ip(host)).count();
                    prop_assert!(same <= PENDING_PER_ADDRESS_MAX);
                }
            }
        }

        #[test]
        fn the_list_of_offenders_is_bounded(hosts in prop::collection::vec(any::<u32>(), 0..600)) {
            let (mut gate, now) = (Gate::new(), Instant::now());
            for host in hosts {
                let address = IpAddr::from(host.to_be_bytes());
                let admission = gate.admit(address, now, ());
                gate.leave(admission.ticket, address, Outcome::Failed, now);
                prop_assert!(gate.offenders.len() <= OFFENDERS_MAX);
            }
        }
    }
}
