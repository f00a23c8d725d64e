//! Who this node is, and which swarm it belongs to.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snow::resolvers::{CryptoResolver, DefaultResolver};
use zeroize::Zeroizing;

use crate::error::IdentityError;
use crate::files;
use crate::id::{InstanceId, NodeId};
use crate::secret::{SwarmSecret, keyed_text, parse_keyed_text};

const SECRET_FILE: &str = "swarm.secret";
const KEY_FILE: &str = "node.key";
const KEY_PREFIX: &str = "swarm-node-key-v1:";
/// Both files are one line of under 100 bytes.
const FILE_BYTES_MAX: u64 = 1024;

/// A static X25519 key, the swarm secret, and this process's random instance id. Cheap to clone; a clone
/// is the same node. Key and secret are wiped when the last clone is dropped.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    private_key: Zeroizing<[u8; 32]>,
    public_key: [u8; 32],
    secret: SwarmSecret,
    instance: InstanceId,
}

impl Identity {
    /// Reads the key and the secret in `dir`, making the folder (0700) and the files (0600) if they are
    /// missing. Safe when several processes start at once: all end with the same key and secret.
    /// The instance id is new at every call, so one call per node.
    ///
    /// # Errors
    /// [`IdentityError`]: the folder or a file cannot be read or written, a file is readable by other
    /// users, or its content is not what this program wrote. A damaged file is never replaced by itself.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        files::create_private_dir(dir)?;
        let key_path = dir.join(KEY_FILE);
        let key_text = read_or_create(&key_path, || {
            let mut key = Zeroizing::new([0; 32]);
            getrandom::fill(key.as_mut()).map_err(IdentityError::Random)?;
            Ok(keyed_text(KEY_PREFIX, &key))
        })?;
        let private_key = parse_keyed_text(KEY_PREFIX, &key_text)
            .map(Zeroizing::new)
            .map_err(|_| IdentityError::DamagedKey { path: key_path })?;
        let secret_path = dir.join(SECRET_FILE);
        let secret_text = read_or_create(&secret_path, || Ok(SwarmSecret::random()?.to_text()))?;
        let secret = SwarmSecret::parse(&secret_text)
            .map_err(|source| IdentityError::DamagedSecret { path: secret_path, source })?;
        Self::assemble(private_key, secret)
    }

    /// A node that leaves no trace on disk: a new key in the swarm of `secret`.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn ephemeral(secret: SwarmSecret) -> Result<Self, IdentityError> {
        let mut key = Zeroizing::new([0; 32]);
        getrandom::fill(key.as_mut()).map_err(IdentityError::Random)?;
        Self::assemble(key, secret)
    }

    fn assemble(private_key: Zeroizing<[u8; 32]>, secret: SwarmSecret) -> Result<Self, IdentityError> {
        let public_key = public_key(&private_key)?;
        let instance = InstanceId::random()?;
        Ok(Self(Arc::new(Inner { private_key, public_key, secret, instance })))
    }

    /// The same key and secret as another process: what a second node of this user has.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn another_instance(&self) -> Result<Self, IdentityError> {
        Self::assemble(self.0.private_key.clone(), self.0.secret.clone())
    }

    /// The text to give to `swarm-os secret import` on another computer. Whoever has it is in the swarm.
    #[must_use]
    pub fn export_secret(&self) -> Zeroizing<String> {
        self.0.secret.to_text()
    }

    /// The X25519 public key. Shared by all nodes that use one config folder.
    #[must_use]
    pub fn public_key(&self) -> &[u8; 32] {
        &self.0.public_key
    }

    /// This process's random name.
    #[must_use]
    pub fn instance(&self) -> InstanceId {
        self.0.instance
    }

    /// The name peers know this node by once a link is up.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId::of(&self.0.public_key, self.0.instance)
    }

    pub(crate) fn private_key(&self) -> &[u8; 32] {
        &self.0.private_key
    }

    pub(crate) fn psk(&self) -> Zeroizing<[u8; 32]> {
        self.0.secret.psk()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node_id().short()).finish_non_exhaustive()
    }
}

/// Makes `text` the swarm secret in `dir`. Nodes that run already keep the old one until they restart.
/// Returns where the old secret was kept, or `None` when there was none or it was the same.
///
/// # Errors
/// [`IdentityError::Text`] when `text` is not a secret (nothing is changed then), otherwise as
/// [`Identity::load_or_create`]. The file is replaced in one step: never half a secret, never none.
pub fn import_secret(dir: &Path, text: &str) -> Result<Option<PathBuf>, IdentityError> {
    let secret = SwarmSecret::parse(text)?;
    files::create_private_dir(dir)?;
    let path = dir.join(SECRET_FILE);
    let text = line(&secret.to_text());
    if files::create_new(&path, &text)? {
        return Ok(None);
    }
    // A damaged or open old file is replaced too: importing is how a user repairs it.
    let old = files::read_private(&path, FILE_BYTES_MAX).ok().flatten();
    if old.is_some_and(|old| SwarmSecret::parse(&old).is_ok_and(|old| old == secret)) {
        return Ok(None);
    }
    let backup = files::back_up(&path)?;
    files::replace(&path, &text)?;
    Ok(Some(backup))
}

fn read_or_create(
    path: &Path,
    make: impl FnOnce() -> Result<Zeroizing<String>, IdentityError>,
) -> Result<Zeroizing<String>, IdentityError> {
    if let Some(text) = files::read_private(path, FILE_BYTES_MAX)? {
        return Ok(text);
    }
    let text = line(&make()?);
    if files::create_new(path, &text)? {
        return Ok(text);
    }
    files::read_private(path, FILE_BYTES_MAX)?.ok_or_else(|| IdentityError::Read {
        path: path.to_path_buf(),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

fn line(text: &str) -> Zeroizing<String> {
    let mut line = Zeroizing::new(String::with_capacity(text.len() + 1));
    line.push_str(text);
    line.push('\n');
    line
}

fn public_key(private_key: &[u8; 32]) -> Result<[u8; 32], IdentityError> {
    let mut dh =
        DefaultResolver.resolve_dh(&snow::params::DHChoice::Curve25519).ok_or(IdentityError::Crypto)?;
    dh.set(private_key);
    dh.pubkey().try_into().map_err(|_| IdentityError::Crypto)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::fs;

    #[test]
    fn many_first_starts_at_once_agree() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("a/b");
        let identities: Vec<Identity> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..16).map(|_| scope.spawn(|| Identity::load_or_create(&dir).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let keys: HashSet<_> = identities.iter().map(|identity| *identity.public_key()).collect();
        let secrets: HashSet<_> =
            identities.iter().map(|identity| identity.export_secret().to_string()).collect();
        let instances: HashSet<_> = identities.iter().map(Identity::instance).collect();
        assert_eq!((keys.len(), secrets.len(), instances.len()), (1, 1, 16));
        let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "left behind: {names:?}");
    }

    #[cfg(unix)]
    #[test]
    fn files_are_private_and_open_ones_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("swarm-os");
        Identity::load_or_create(&dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for name in [SECRET_FILE, KEY_FILE] {
            let path = dir.join(name);
            assert_eq!(mode(&path), 0o600);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
            let error = Identity::load_or_create(&dir).unwrap_err();
            assert!(matches!(error, IdentityError::OpenSecret { mode: 0o640, .. }), "{error}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Identity::load_or_create(&dir), Err(IdentityError::OpenFolder { .. })));
    }

    #[test]
    fn a_secret_travels_and_the_old_one_is_kept() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = Identity::load_or_create(one.path()).unwrap();
        let second = Identity::load_or_create(two.path()).unwrap();
        assert_ne!(*first.export_secret(), *second.export_secret());
        let backup = import_secret(two.path(), &first.export_secret()).unwrap().unwrap();
        assert_eq!(fs::read_to_string(&backup).unwrap().trim(), second.export_secret().as_str());
        let joined = Identity::load_or_create(two.path()).unwrap();
        assert_eq!(*joined.export_secret(), *first.export_secret());
        assert_eq!(joined.public_key(), second.public_key());
        assert_eq!(import_secret(two.path(), &first.export_secret()).unwrap(), None);
        let third = import_secret(two.path(), &second.export_secret()).unwrap().unwrap();
        assert_ne!(third, backup);
    }

    #[test]
    fn importing_into_an_empty_folder_and_importing_nonsense() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("new");
        let secret = SwarmSecret::random().unwrap();
        assert!(matches!(import_secret(&dir, "swarm-secret-v1:12"), Err(IdentityError::Text(_))));
        assert!(!dir.exists());
        assert_eq!(import_secret(&dir, &secret.to_text()).unwrap(), None);
        assert_eq!(*Identity::load_or_create(&dir).unwrap().export_secret(), *secret.to_text());
    }

    #[test]
    fn damaged_files_are_named_and_kept() {
        let home = tempfile::tempdir().unwrap();
        Identity::load_or_create(home.path()).unwrap();
        let path = home.path().join(SECRET_FILE);
        let mut text = fs::read_to_string(&path).unwrap();
        text.truncate(40);
        fs::write(&path, &text).unwrap();
        let error = Identity::load_or_create(home.path()).unwrap_err();
        assert!(matches!(error, IdentityError::DamagedSecret { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert!(import_secret(home.path(), &SwarmSecret::random().unwrap().to_text()).unwrap().is_some());
        fs::write(home.path().join(KEY_FILE), [0xff, 0xfe]).unwrap();
        assert!(Identity::load_or_create(home.path()).is_err());
    }

    #[test]
    fn the_public_key_is_the_one_the_handshake_will_show() {
        // RFC 7748, section 5.2: one round with scalar 9 on the base point 9.
        let mut nine = [0; 32];
        nine[0] = 9;
        let want = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079";
        assert_eq!(public_key(&nine).unwrap(), crate::id::parse_hex(want).unwrap());
    }
}
