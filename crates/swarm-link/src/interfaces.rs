//! The addresses of this computer, and which of its interfaces discovery uses.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use mdns_sd::{IfKind, ServiceDaemon};

/// One address of one network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface, as the system calls it.
    pub name: String,
    /// Its number, which scopes link-local IPv6 addresses; 0 where the system does not say.
    pub index: u32,
    /// One of its addresses.
    pub address: IpAddr,
}

/// The addresses of this computer, without loopback, in order of interface and address.
///
/// # Errors
/// What the system says when it does not tell.
pub fn interfaces() -> io::Result<Vec<InterfaceAddress>> {
    let mut found: Vec<InterfaceAddress> = if_addrs::get_if_addrs()?
        .into_iter()
        .filter(|interface| !interface.is_loopback())
        .map(|interface| InterfaceAddress {
            address: interface.ip(),
            index: interface.index.unwrap_or(0),
            name: interface.name,
        })
        .collect();
    found.sort_by(|a, b| (&a.name, a.address).cmp(&(&b.name, b.address)));
    Ok(found)
}

/// `ip` and `port` as they are bound: a link-local IPv6 address with the number of the interface among `here` that has it.
#[must_use]
pub fn own_address(ip: IpAddr, port: u16, here: &[InterfaceAddress]) -> SocketAddr {
    match ip {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            let index = here.iter().find(|found| found.address == ip).map_or(0, |found| found.index);
            SocketAddrV6::new(v6, port, 0, index).into()
        }
        ip => SocketAddr::new(ip, port),
    }
}

/// Where discovery speaks and listens, and what it announces. By default everywhere, and every address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only these interfaces, by name, now and when they come; none: all.
    pub interfaces: Vec<String>,
    /// Only this address and the interface that has it. One that stands for all addresses restricts nothing.
    pub address: Option<IpAddr>,
}

impl Scope {
    /// The one address that is announced.
    pub(crate) fn only_address(&self) -> Option<IpAddr> {
        self.address.filter(|address| !address.is_unspecified())
    }

    /// Tells the library. Without a restriction nothing is said.
    pub(crate) fn apply(&self, daemon: &ServiceDaemon) -> mdns_sd::Result<()> {
        let names = self.interfaces.iter().cloned().map(IfKind::Name);
        let kinds: Vec<IfKind> = names.chain(self.only_address().map(IfKind::Addr)).collect();
        if kinds.is_empty() {
            return Ok(());
        }
        daemon.disable_interface(IfKind::All)?;
        kinds.into_iter().try_for_each(|kind| daemon.enable_interface(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_addresses_get_their_scope_and_others_none() {
        let here = [("eth0", 2, "10.0.0.1"), ("wlan0", 7, "fe80::7"), ("eth0", 2, "fe80::2")].map(
            |(name, index, ip)| InterfaceAddress { name: name.into(), index, address: ip.parse().unwrap() },
        );
        for (ip, text) in [
            ("10.0.0.1", "10.0.0.1:9"),
            ("2001:db8::1", "[2001:db8::1]:9"),
            ("fe80::7", "[fe80::7%7]:9"),
            ("fe80::99", "[fe80::99]:9"),
        ] {
            assert_eq!(own_address(ip.parse().unwrap(), 9, &here).to_string(), text);
        }
    }

    #[test]
    fn this_computer_tells_its_addresses_without_loopback() {
        let here = interfaces().unwrap();
        assert!(here.iter().all(|found| !found.address.is_loopback() && !found.name.is_empty()), "{here:?}");
        assert!(here.is_sorted_by_key(|found| (found.name.clone(), found.address)));
    }
}
