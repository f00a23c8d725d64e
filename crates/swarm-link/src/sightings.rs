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
/// Services that may go by one instance id. mDNS renames the second of two that collide, and only the handshake
/// can tell which of them is which.
const NAMES_MAX: u8 = 4;

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
    /// New, in the place of one that was not seen since discovery began again.
    Replaced(PeerFound, InstanceId),
    Known,
    Own,
    /// Not written as a node writes it.
    Malformed,
    /// The list is full.
    NoRoom,
}

/// What a goodbye, or an announcement that expired, changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    Peer(InstanceId),
    /// One of several services of the peer: these are left.
    Name(PeerFound),
}

pub(crate) struct Sightings {
    own: InstanceId,
    /// Each service by its instance and its number among those that go by it, and the round in which it was seen.
    services: BTreeMap<(InstanceId, u8), (PeerFound, u64)>,
    round: u64,
}

impl Sightings {
    pub(crate) fn new(own: InstanceId) -> Self {
        Self { own, services: BTreeMap::new(), round: 0 }
    }

    pub(crate) fn see(&mut self, announcement: &Announcement<'_>) -> Seen {
        let Some((number, found)) = read(announcement) else { return Seen::Malformed };
        let instance = found.instance;
        if instance == self.own {
            return Seen::Own;
        }
        if let Some((known, round)) = self.services.get_mut(&(instance, number)) {
            *round = self.round;
            if *known == found {
                return Seen::Known;
            }
            *known = found;
        } else {
            let gone = match self.room_for(instance) {
                Ok(gone) => gone,
                Err(NoRoom) => return Seen::NoRoom,
            };
            self.services.insert((instance, number), (found.clone(), self.round));
            if let Some(gone) = gone {
                return Seen::Replaced(found, gone);
            }
        }
        self.peer(instance).map_or(Seen::Known, Seen::Changed)
    }

    /// Makes room for `instance`: who was there before discovery began again, and was not seen since, has to go.
    fn room_for(&mut self, instance: InstanceId) -> Result<Option<InstanceId>, NoRoom> {
        let instances = self.instances();
        if instances.len() < PEERS_MAX || instances.contains(&instance) {
            return Ok(None);
        }
        let Some(gone) = instances.into_iter().find(|known| !self.is_fresh(*known)) else {
            return Err(NoRoom);
        };
        self.services.retain(|(known, _), _| *known != gone);
        Ok(Some(gone))
    }

    /// A goodbye, or an announcement that expired. Anyone can forge one, so it must never end a live link.
    pub(crate) fn lose(&mut self, fullname: &str) -> Option<Gone> {
        let (instance, number) = instance_of(fullname)?;
        self.services.remove(&(instance, number))?;
        Some(self.peer(instance).map_or(Gone::Peer(instance), Gone::Name))
    }

    /// Discovery begins again and has forgotten everyone: those it does not see again are gone.
    pub(crate) fn begin_round(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    /// Removes the peers not seen since [`Sightings::begin_round`].
    pub(crate) fn end_round(&mut self) -> Vec<InstanceId> {
        let mut gone = self.instances();
        gone.retain(|instance| !self.is_fresh(*instance));
        let round = self.round;
        self.services.retain(|_, (_, seen)| *seen == round);
        gone
    }

    /// The services that go by `instance`, as mDNS spells them.
    pub(crate) fn fullnames(&self, instance: InstanceId) -> Vec<String> {
        let numbers = self.of(instance).map(|(number, _)| number);
        numbers.map(|number| fullname(instance, number)).collect()
    }

    pub(crate) fn peers(&self) -> Vec<PeerFound> {
        self.instances().into_iter().filter_map(|instance| self.peer(instance)).collect()
    }

    fn instances(&self) -> Vec<InstanceId> {
        let mut instances: Vec<InstanceId> = self.services.keys().map(|(instance, _)| *instance).collect();
        instances.dedup();
        instances
    }

    fn of(&self, instance: InstanceId) -> impl Iterator<Item = (u8, &(PeerFound, u64))> {
        let range = (instance, 0)..=(instance, u8::MAX);
        self.services.range(range).map(|((_, number), service)| (*number, service))
    }

    fn is_fresh(&self, instance: InstanceId) -> bool {
        self.of(instance).any(|(_, (_, round))| *round == self.round)
    }

    /// All services of `instance` as one peer. Each has its share of the addresses: a service that was announced in
    /// the name of another cannot crowd that one out.
    fn peer(&self, instance: InstanceId) -> Option<PeerFound> {
        let services: Vec<&PeerFound> = self.of(instance).map(|(_, (found, _))| found).collect();
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for turn in 0..ADDRESSES_MAX {
            for address in services.iter().filter_map(|found| found.addresses.get(turn)) {
                if addresses.len() < ADDRESSES_MAX && !addresses.contains(address) {
                    addresses.push(*address);
                }
            }
        }
        addresses.sort_by_key(best_first);
        let version = services.first()?.version;
        Some(PeerFound { instance, addresses, version })
    }
}

struct NoRoom;

/// The service of `instance` with this number, as mDNS spells it.
pub(crate) fn fullname(instance: InstanceId, number: u8) -> String {
    if number <= 1 { format!("{instance}.{SERVICE}") } else { format!("{instance} ({number}).{SERVICE}") }
}

/// The instance that a service goes by, and its number: 1, or what mDNS put behind the name of one that collided.
fn instance_of(fullname: &str) -> Option<(InstanceId, u8)> {
    let (name, service) = fullname.split_once('.')?;
    if !service.eq_ignore_ascii_case(SERVICE) {
        return None;
    }
    let (name, number) = match name.split_once(" (") {
        None => (name, 1),
        Some((name, number)) => match number.strip_suffix(')')?.as_bytes() {
            &[digit @ b'2'..=b'9'] if digit - b'0' <= NAMES_MAX => (name, digit - b'0'),
            _ => return None,
        },
    };
    Some((InstanceId::parse(name)?, number))
}

fn read(announcement: &Announcement<'_>) -> Option<(u8, PeerFound)> {
    let (instance, number) = instance_of(announcement.fullname)?;
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
    addresses.sort_by_key(best_first);
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    if addresses.is_empty() { None } else { Some((number, PeerFound { instance, addresses, version })) }
}

fn best_first(address: &SocketAddr) -> (u8, SocketAddr) {
    (rank(address.ip()), *address)
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
            (format!("{good} (1)"), good.clone(), "1", "10.0.0.1"),
            (format!("{good} (5)"), good.clone(), "1", "10.0.0.1"),
            (format!("{good} (22)"), good.clone(), "1", "10.0.0.1"),
            (format!("{good} (2"), good.clone(), "1", "10.0.0.1"),
            (format!("{good}(2)"), good.clone(), "1", "10.0.0.1"),
            (format!("{good} (2) (3)"), good.clone(), "1", "10.0.0.1"),
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
        let gone = Gone::Peer(InstanceId::from_bytes([1; 16]));
        assert_eq!(seen.lose(&format!("{}.{SERVICE}", name(1))), Some(gone));
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

    #[test]
    fn services_of_one_name_are_one_peer_and_none_crowds_out_another() {
        let mut seen = sightings();
        let (good, second) = (name(7), format!("{} (2)", name(7)));
        announce(&mut seen, &good, &good, "1", &["10.0.0.1", "fe80::1"]);
        let many: Vec<String> = (1..=40).map(|number| format!("10.9.0.{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let Seen::Changed(found) = announce(&mut seen, &second, &good, "1", &many) else { panic!() };
        assert_eq!(found.addresses.len(), ADDRESSES_MAX);
        for mine in ["10.0.0.1:4747", "[fe80::1%3]:4747", "10.9.0.1:4747"] {
            assert!(found.addresses.contains(&mine.parse().unwrap()), "{mine} {found:?}");
        }
        assert_eq!(seen.peers(), [found]);
        let instance = InstanceId::from_bytes([7; 16]);
        assert_eq!(seen.fullnames(instance), [fullname(instance, 1), format!("{second}.{SERVICE}")]);
        // The same address twice is one address.
        announce(&mut seen, &second, &good, "1", &["10.0.0.1", "10.0.0.2"]);
        let Some(Gone::Name(left)) = seen.lose(&format!("{good}.{SERVICE}")) else { panic!() };
        assert_eq!(left.addresses, ["10.0.0.1:4747".parse().unwrap(), "10.0.0.2:4747".parse().unwrap()]);
        assert_eq!(seen.lose(&format!("{second}.{SERVICE}")), Some(Gone::Peer(instance)));
        // One that goes by our own name, or was renamed itself, is no peer.
        assert_eq!(announce(&mut seen, &format!("{} (3)", name(0)), &name(0), "1", &["10.0.0.9"]), Seen::Own);
    }

    #[test]
    fn who_is_seen_again_takes_the_place_of_who_is_not() {
        let mut seen = sightings();
        for number in 1..=PEERS_MAX as u8 {
            announce(&mut seen, &name(number), &name(number), "1", &["10.0.0.1"]);
        }
        seen.begin_round();
        announce(&mut seen, &name(1), &name(1), "1", &["10.0.0.1"]);
        let late = announce(&mut seen, &name(200), &name(200), "1", &["10.0.0.1"]);
        let Seen::Replaced(found, gone) = late else { panic!("{late:?}") };
        assert_eq!(
            (found.instance, gone),
            (InstanceId::from_bytes([200; 16]), InstanceId::from_bytes([2; 16]))
        );
        assert_eq!(seen.end_round().len(), PEERS_MAX - 2);
        assert_eq!(seen.peers().len(), 2);
    }

    proptest! {
        #[test]
        fn whatever_is_announced_the_list_is_bounded_and_each_peer_is_in_it_once(
            steps in prop::collection::vec((0..90u8, 0..7u8, prop::collection::vec(any::<IpAddr>(), 0..20), 0..12u8), 0..200),
        ) {
            let mut seen = sightings();
            for (number, copy, addresses, what) in steps {
                let id = name(number);
                let label = if copy == 0 { id.clone() } else { format!("{id} ({copy})") };
                let fullname = format!("{label}.{SERVICE}");
                match what {
                    0 => drop(seen.lose(&fullname)),
                    1 => seen.begin_round(),
                    2 => drop(seen.end_round()),
                    _ => drop(seen.see(&Announcement {
                        fullname: &fullname, id: Some(&id), version: Some("1"), port: 9,
                        addresses: addresses.into_iter().map(|ip| (ip, 1)).collect(),
                    })),
                }
                let peers = seen.peers();
                prop_assert!(peers.len() <= PEERS_MAX);
                for (index, peer) in peers.iter().enumerate() {
                    prop_assert!(!peer.addresses.is_empty() && peer.addresses.len() <= ADDRESSES_MAX);
                    let mut once = peer.addresses.clone();
                    once.sort();
                    once.dedup();
                    prop_assert_eq!(once.len(), peer.addresses.len());
                    prop_assert!(peers.iter().skip(index + 1).all(|other| other.instance != peer.instance));
                    prop_assert!(seen.fullnames(peer.instance).len() <= usize::from(NAMES_MAX));
                }
            }
        }

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
