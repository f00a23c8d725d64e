//! Peers that were reached before: hints for when multicast is filtered.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::IdentityError;
use crate::files;
use crate::id::hex;

const FILE: &str = "peers.json";
const FILE_BYTES_MAX: u64 = 64 * 1024;
const PEERS_MAX: usize = 32;
/// Addresses of one machine: it moves between networks, and several nodes of it may run at a time.
const ADDRESSES_OF_ONE: usize = 4;

/// Addresses where each peer was last reached, newest first, at most 4 of one machine and 32 in all; and the port
/// where this machine listened last, so that others who remember it find it there. The file may be lost, damaged
/// or shared by several nodes: the last to write wins, and nothing depends on it.
#[derive(Debug, Clone)]
pub struct Remembered {
    path: PathBuf,
    peers: Vec<Peer>,
    own_port: Option<NonZeroU16>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct File {
    peers: Vec<Peer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_port: Option<NonZeroU16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Peer {
    address: SocketAddr,
    /// Seconds since 1970.
    #[serde(default)]
    reached_s: u64,
    /// The static key of the machine, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
}

impl Remembered {
    /// Reads `peers.json` in `state_dir`. No file, or one that cannot be read, is an empty list.
    #[must_use]
    pub fn load(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let File { peers, own_port } = read(&path).unwrap_or_else(|why| {
            tracing::warn!("ignoring {}: {why}", path.display());
            File::default()
        });
        Self { path, peers, own_port }
    }

    /// What to try, newest first.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.peers.iter().map(|peer| peer.address).collect()
    }

    /// Where this machine listened last.
    #[must_use]
    pub fn own_port(&self) -> Option<u16> {
        self.own_port.map(NonZeroU16::get)
    }

    /// Notes that this machine listens on `port`; writes the file only when that is news.
    ///
    /// # Errors
    /// As [`Remembered::note_reached`].
    pub fn note_own_port(&mut self, port: u16) -> Result<(), IdentityError> {
        let port = NonZeroU16::new(port);
        if port.is_none() || port == self.own_port {
            return Ok(());
        }
        self.own_port = port;
        self.save()
    }

    /// Notes that the machine with this static key answered at `address`, and writes the file in one step. Link-local
    /// IPv6 addresses are left out: they depend on the number of a network interface, which changes.
    ///
    /// # Errors
    /// [`IdentityError::Write`] and its kin; the list in memory is changed all the same.
    pub fn note_reached(&mut self, address: SocketAddr, key: &[u8; 32]) -> Result<(), IdentityError> {
        if matches!(address.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Ok(());
        }
        let reached_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let machine = Some(hex(key));
        self.peers.retain(|peer| peer.address != address);
        self.peers.insert(0, Peer { address, reached_s, machine: machine.clone() });
        let mut of_one = 0;
        self.peers.retain(|peer| {
            of_one += usize::from(peer.machine == machine);
            peer.machine != machine || of_one <= ADDRESSES_OF_ONE
        });
        self.peers.truncate(PEERS_MAX);
        self.save()
    }

    /// Forgets where the machine with this static key was.
    ///
    /// # Errors
    /// As [`Remembered::note_reached`].
    pub fn forget(&mut self, key: &[u8; 32]) -> Result<(), IdentityError> {
        let (before, machine) = (self.peers.len(), Some(hex(key)));
        self.peers.retain(|peer| peer.machine != machine);
        if self.peers.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> Result<(), IdentityError> {
        if let Some(dir) = self.path.parent() {
            files::create_private_dir(dir)?;
        }
        let file = File { peers: self.peers.clone(), own_port: self.own_port };
        let text = serde_json::to_string_pretty(&file)
            .map_err(|error| IdentityError::Write { path: self.path.clone(), source: error.into() })?;
        files::replace(&self.path, &text)
    }
}

fn read(path: &Path) -> Result<File, String> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(File::default()),
        file => file.map_err(|error| error.to_string())?,
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    let mut file: File = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    file.peers.truncate(PEERS_MAX);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_come_first_and_the_list_is_bounded() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("state");
        let mut remembered = Remembered::load(&dir);
        assert_eq!(remembered.addresses(), []);
        let address = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        for port in 1..=40 {
            remembered.note_reached(address(port), &[port as u8; 32]).unwrap();
        }
        remembered.note_reached(address(20), &[20; 32]).unwrap();
        remembered.note_reached("[fe80::1%3]:9".parse().unwrap(), &[9; 32]).unwrap();
        let loaded = Remembered::load(&dir).addresses();
        assert_eq!(loaded, remembered.addresses());
        assert_eq!(loaded.len(), PEERS_MAX);
        assert_eq!(loaded.get(..3), Some([address(20), address(40), address(39)].as_slice()));
        remembered.forget(&[20; 32]).unwrap();
        assert_eq!(Remembered::load(&dir).addresses().first(), Some(&address(40)));
    }

    #[test]
    fn a_machine_that_moves_does_not_crowd_out_the_others() {
        let home = tempfile::tempdir().unwrap();
        let mut remembered = Remembered::load(home.path());
        let address = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        remembered.note_reached(address(1), &[1; 32]).unwrap();
        for port in 100..140 {
            remembered.note_reached(address(port), &[2; 32]).unwrap();
        }
        assert_eq!(remembered.addresses(), [139, 138, 137, 136, 1].map(address));
        // An address belongs to who was there last.
        remembered.note_reached(address(1), &[2; 32]).unwrap();
        remembered.forget(&[1; 32]).unwrap();
        assert_eq!(Remembered::load(home.path()).addresses(), [1, 139, 138, 137].map(address));
    }

    #[test]
    fn the_own_port_stays_and_is_no_peer() {
        let home = tempfile::tempdir().unwrap();
        let mut remembered = Remembered::load(home.path());
        assert_eq!(remembered.own_port(), None);
        remembered.note_own_port(0).unwrap();
        assert!(!home.path().join(FILE).exists());
        remembered.note_own_port(4747).unwrap();
        remembered.note_reached(SocketAddr::from(([10, 0, 0, 1], 9)), &[1; 32]).unwrap();
        let loaded = Remembered::load(home.path());
        assert_eq!((loaded.own_port(), loaded.addresses().len()), (Some(4747), 1));
        std::fs::write(home.path().join(FILE), "{\"own_port\": 0}").unwrap();
        assert_eq!(Remembered::load(home.path()).own_port(), None);
    }

    #[test]
    fn a_damaged_file_is_an_empty_list() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(FILE);
        for text in ["", "{", "[]", "{\"peers\": 3}", "{\"peers\": [{\"address\": \"nowhere\"}]}", "\u{0}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(Remembered::load(home.path()).addresses(), [], "{text:?}");
        }
        std::fs::write(&path, "{\"peers\": [{\"address\": \"10.0.0.1:5\", \"later\": 1}], \"more\": {}}")
            .unwrap();
        assert_eq!(Remembered::load(home.path()).addresses().len(), 1);
    }
}
