//! Peers that were reached before: hints for when multicast is filtered.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::IdentityError;
use crate::files;

const FILE: &str = "peers.json";
const FILE_BYTES_MAX: u64 = 64 * 1024;
const PEERS_MAX: usize = 32;

/// Addresses where a peer was last reached, newest first, at most 32. The file may be lost, damaged or
/// shared by several nodes: the last to write wins, and nothing depends on it.
#[derive(Debug, Clone)]
pub struct Remembered {
    path: PathBuf,
    peers: Vec<Peer>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct File {
    peers: Vec<Peer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Peer {
    address: SocketAddr,
    /// Seconds since 1970.
    #[serde(default)]
    reached_s: u64,
}

impl Remembered {
    /// Reads `peers.json` in `state_dir`. No file, or one that cannot be read, is an empty list.
    #[must_use]
    pub fn load(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let peers = read(&path).unwrap_or_else(|why| {
            tracing::warn!("ignoring {}: {why}", path.display());
            Vec::new()
        });
        Self { path, peers }
    }

    /// What to try, newest first.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.peers.iter().map(|peer| peer.address).collect()
    }

    /// Notes that a peer answered at `address`, and writes the file in one step. Link-local IPv6 addresses
    /// are left out: they depend on the number of a network interface, which changes.
    ///
    /// # Errors
    /// [`IdentityError::Write`] and its kin; the list in memory is changed all the same.
    pub fn note_reached(&mut self, address: SocketAddr) -> Result<(), IdentityError> {
        if matches!(address.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Ok(());
        }
        let reached_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.peers.retain(|peer| peer.address != address);
        self.peers.insert(0, Peer { address, reached_s });
        self.peers.truncate(PEERS_MAX);
        self.save()
    }

    /// Notes that nobody is at `address` any more.
    ///
    /// # Errors
    /// As [`Remembered::note_reached`].
    pub fn forget(&mut self, address: SocketAddr) -> Result<(), IdentityError> {
        let before = self.peers.len();
        self.peers.retain(|peer| peer.address != address);
        if self.peers.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> Result<(), IdentityError> {
        if let Some(dir) = self.path.parent() {
            files::create_private_dir(dir)?;
        }
        let file = File { peers: self.peers.clone() };
        let text = serde_json::to_string_pretty(&file)
            .map_err(|error| IdentityError::Write { path: self.path.clone(), source: error.into() })?;
        files::replace(&self.path, &text)
    }
}

fn read(path: &Path) -> Result<Vec<Peer>, String> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.map_err(|error| error.to_string())?,
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    let mut file: File = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    file.peers.truncate(PEERS_MAX);
    Ok(file.peers)
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
            remembered.note_reached(address(port)).unwrap();
        }
        remembered.note_reached(address(20)).unwrap();
        remembered.note_reached("[fe80::1%3]:9".parse().unwrap()).unwrap();
        let loaded = Remembered::load(&dir).addresses();
        assert_eq!(loaded, remembered.addresses());
        assert_eq!(loaded.len(), PEERS_MAX);
        assert_eq!(loaded.get(..3), Some([address(20), address(40), address(39)].as_slice()));
        remembered.forget(address(20)).unwrap();
        assert_eq!(Remembered::load(&dir).addresses().first(), Some(&address(40)));
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
