//! Who was seen on the local network. Pure: everything here was written by strangers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use crate::id::InstanceId;

/// The service type, as mDNS spells it.
pub(crate) const SERVICE: &str = "_swarm._tcp.local.";
/// Longest list of peers kept.
pub const PEERS_MAX: usize = 64;
/// Longest list of addresses kept for one peer.
const ADDRESSES_MAX: usize = 16;

/// A peer that announced itself. A hint: only the handshake proves anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFound {
    /// The random name of its process.
    pub instance: InstanceId,
    /// Where it says it listens, best first: IPv4, IPv6, scoped link-local IPv6, loopback. Never empty.
    pub addresses: Vec<SocketAddr>,
    /// The link version it says it speaks; compare with [`crate::PROTOCOL_VERSION`].
    pub version: u16,
}

/// One announcement as it came from the network.
pub(crate) struct Announcement<'a> {
    pub fullname: &'a str,
    pub id: Option<&'a str>,
    pub version: Option<&'a str>,
    pub port: u16,
    /// Each with the index of the interface it was heard on.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// What an announcement changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// New, or with other addresses than before.
    Changed(PeerFound),
    Known,
    Own,
    /// Not written as a node writes it.
    Malformed,
    /// The list is full.
    NoRoom,
}

pub(crate) struct Sightings {
    own: InstanceId,
    peers: BTreeMap<InstanceId, (PeerFound, u64)>,
    round: u64,
}

impl Sightings {
    pub(crate) fn new(own: InstanceId) -> Self {
        Self { own, peers: BTreeMap::new(), round: 0 }
    }

    pub(crate) fn see(&mut self, announcement: &Announcement<'_>) -> Seen {
        let Some(found) = read(announcement) else { return Seen::Malformed };
        if found.instance == self.own {
            return Seen::Own;
        }
        let full = self.peers.len() >= PEERS_MAX;
        match self.peers.get_mut(&found.instance) {
            Some((known, round)) => {
                *round = self.round;
                if *known == found {
                    return Seen::Known;
                }
                *known = found.clone();
            }
            None if full => return Seen::NoRoom,
            None => {
                self.peers.insert(found.instance, (found.clone(), self.round));
            }
        }
        Seen::Changed(found)
    }

    /// A goodbye, or an announcement that expired. Anyone can forge one, so it must never end a live link.
    pub(crate) fn lose(&mut self, fullname: &str) -> Option<InstanceId> {
        let instance = instance_of(fullname)?;
        self.peers.remove(&instance).map(|_| instance)
    }

    /// Discovery begins again and has forgotten everyone: those it does not see again are gone.
    pub(crate) fn begin_round(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    /// Removes the peers not seen since [`Sightings::begin_round`].
    pub(crate) fn end_round(&mut self) -> Vec<InstanceId> {
        let round = self.round;
        let gone = self.peers.iter().filter(|(_, (_, seen))| *seen != round).map(|(instance, _)| *instance);
        let gone: Vec<InstanceId> = gone.collect();
        for instance in &gone {
            self.peers.remove(instance);
        }
        gone
    }

    pub(crate) fn peers(&self) -> Vec<PeerFound> {
        self.peers.values().map(|(found, _)| found.clone()).collect()
    }
}

fn instance_of(fullname: &str) -> Option<InstanceId> {
    let (name, service) = fullname.split_once('.')?;
    // A name renamed after a conflict, or any other text, is not one that a node chose.
    if service.eq_ignore_ascii_case(SERVICE) { InstanceId::parse(name) } else { None }
}

fn read(announcement: &Announcement<'_>) -> Option<PeerFound> {
    let instance = instance_of(announcement.fullname)?;
    if InstanceId::parse(announcement.id?)? != instance || announcement.port == 0 {
        return None;
    }
    let version = announcement.version?;
    if version.len() > 5 || !version.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let version = version.parse().ok()?;
    let usable = |ip: &IpAddr| !ip.is_unspecified() && !ip.is_multicast();
    let mut addresses: Vec<SocketAddr> = announcement
        .addresses
        .iter()
        .filter(|(ip, _)| usable(ip))
        .map(|(ip, interface)| scoped(ip.to_canonical(), announcement.port, *interface))
        .collect();
    addresses.sort_by_key(|address| (rank(address.ip()), *address));
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    if addresses.is_empty() { None } else { Some(PeerFound { instance, addresses, version }) }
}

/// A link-local IPv6 address means nothing without the interface it was heard on.
fn scoped(ip: IpAddr, port: u16, interface: u32) -> SocketAddr {
    match ip {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => SocketAddrV6::new(v6, port, 0, interface).into(),
        ip => SocketAddr::new(ip, port),
    }
}

fn rank(ip: IpAddr) -> u8 {
    match ip {
        ip if ip.is_loopback() => 3,
        IpAddr::V4(_) => 0,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => 2,
        IpAddr::V6(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(number: u8) -> String {
        InstanceId::from_bytes([number; 16]).to_string()
    }

    fn announce(sightings: &mut Sightings, name: &str, id: &str, version: &str, addresses: &[&str]) -> Seen {
        sightings.see(&Announcement {
            fullname: &format!("{name}.{SERVICE}"),
            id: Some(id),
            version: Some(version),
            port: 4747,
            addresses: addresses.iter().map(|ip| (ip.parse().unwrap(), 3)).collect(),
        })
    }

    fn sightings() -> Sightings {
        Sightings::new(InstanceId::from_bytes([0; 16]))
    }

    #[test]
    fn addresses_are_scoped_and_ordered() {
        let mut seen = sightings();
        let all = ["127.0.0.1", "fe80::1", "2001:db8::1", "10.0.0.1", "0.0.0.0", "224.0.0.1", "10.0.0.1"];
        let Seen::Changed(found) = announce(&mut seen, &name(1), &name(1), "1", &all) else { panic!() };
        let text: Vec<String> = found.addresses.iter().map(SocketAddr::to_string).collect();
        assert_eq!(text, ["10.0.0.1:4747", "[2001:db8::1]:4747", "[fe80::1%3]:4747", "127.0.0.1:4747"]);
        assert_eq!(announce(&mut seen, &name(1), &name(1), "1", &all), Seen::Known);
        assert!(matches!(announce(&mut seen, &name(1), &name(1), "2", &all), Seen::Changed(_)));
    }

    #[test]
    fn only_what_a_node_writes_is_believed() {
        let mut seen = sightings();
        let good = name(0xab);
        assert_eq!(announce(&mut seen, &name(0), &name(0), "1", &["10.0.0.1"]), Seen::Own);
        let strange = [
            (format!("{good} (2)"), good.clone(), "1", "10.0.0.1"),
            (good.to_uppercase(), good.to_uppercase(), "1", "10.0.0.1"),
            ("\u{1b}[2J\u{7}".into(), good.clone(), "1", "10.0.0.1"),
            (good.clone(), name(2), "1", "10.0.0.1"),
            (good.clone(), good.clone(), "", "10.0.0.1"),
            (good.clone(), good.clone(), "+1", "10.0.0.1"),
            (good.clone(), good.clone(), "70000", "10.0.0.1"),
            (good.clone(), good.clone(), "1", "0.0.0.0"),
        ];
        for (name, id, version, address) in strange {
            assert_eq!(
                announce(&mut seen, &name, &id, version, &[address]),
                Seen::Malformed,
                "{name:?} {id:?}"
            );
        }
        assert_eq!(seen.peers(), []);
    }

    #[test]
    fn the_list_is_bounded_and_a_goodbye_makes_room() {
        let mut seen = sightings();
        for number in 1..=200u8 {
            announce(&mut seen, &name(number), &name(number), "1", &["10.0.0.1"]);
        }
        assert_eq!(seen.peers().len(), PEERS_MAX);
        assert_eq!(announce(&mut seen, &name(201), &name(201), "1", &["10.0.0.1"]), Seen::NoRoom);
        assert_eq!(seen.lose(&format!("{}.{SERVICE}", name(1))), Some(InstanceId::from_bytes([1; 16])));
        assert_eq!(seen.lose(&format!("{}.{SERVICE}", name(1))), None);
        assert!(matches!(announce(&mut seen, &name(201), &name(201), "1", &["10.0.0.1"]), Seen::Changed(_)));
    }

    #[test]
    fn who_is_not_seen_after_a_restart_is_gone() {
        let mut seen = sightings();
        for number in [1, 2, 3] {
            announce(&mut seen, &name(number), &name(number), "1", &["10.0.0.1"]);
        }
        seen.begin_round();
        assert_eq!(announce(&mut seen, &name(2), &name(2), "1", &["10.0.0.1"]), Seen::Known);
        assert_eq!(seen.end_round(), [InstanceId::from_bytes([1; 16]), InstanceId::from_bytes([3; 16])]);
        assert_eq!(seen.peers().len(), 1);
    }

    proptest! {
        #[test]
        fn any_announcement_is_read_or_counted(
            fullname in ".*", id in ".*", version in ".*", port: u16,
            addresses in prop::collection::vec((any::<IpAddr>(), any::<u32>()), 0..40),
        ) {
            let mut seen = sightings();
            for fullname in [fullname.clone(), format!("{fullname}.{SERVICE}"), format!("{}.{SERVICE}", name(9))] {
                for id in [id.clone(), name(9)] {
                    let announcement = Announcement {
                        fullname: &fullname, id: Some(&id), version: Some(&version), port, addresses: addresses.clone(),
                    };
                    if let Seen::Changed(found) = seen.see(&announcement) {
                        prop_assert!(!found.addresses.is_empty() && found.addresses.len() <= ADDRESSES_MAX);
                    }
                }
                seen.lose(&fullname);
            }
        }
    }
}
