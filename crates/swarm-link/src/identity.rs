//! Who this node is, and which swarm it belongs to.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use snow::resolvers::{CryptoResolver, DefaultResolver};
use zeroize::Zeroizing;

use crate::connection::Closer;
use crate::error::IdentityError;
use crate::files::{self, FolderLock};
use crate::id::{InstanceId, NodeId};
use crate::members::{Gift, Key, Membership, Peer};
use crate::secret::{SwarmSecret, keyed_text, parse_keyed_text};

const SECRET_FILE: &str = "swarm.secret";
const KEY_FILE: &str = "node.key";
const MEMBERS_FILE: &str = "swarm.members";
const KEY_PREFIX: &str = "swarm-node-key-v1:";
/// Key and secret are one line of under 100 bytes.
const FILE_BYTES_MAX: u64 = 1024;
const MEMBERS_BYTES_MAX: u64 = 256 * 1024;

/// A static X25519 key, the swarm secret with the members known, and this process's random instance id. Cheap to
/// clone; a clone is the same node. Key and secret are wiped when the last clone is dropped.
///
/// Secret and members are looked up for every handshake, so what another process of this user changes (pairing,
/// forgetting, importing a secret) holds here without a restart.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    private_key: Zeroizing<[u8; 32]>,
    public_key: [u8; 32],
    instance: InstanceId,
    swarm: Arc<Swarm>,
}

/// What all nodes of one config folder share.
struct Swarm {
    /// `None`: kept in memory only.
    dir: Option<PathBuf>,
    state: RwLock<State>,
    /// The links that are up, to be closed when the machine at the other end is forgotten.
    links: Mutex<Vec<(Key, Closer)>>,
}

struct State {
    members: Membership,
    stamp: Stamp,
}

type Stamp = [Option<(SystemTime, u64)>; 2];

impl Identity {
    /// Reads the key, the secret and the members in `dir`, making the folder (0700) and the files (0600) if they
    /// are missing. Safe when several processes start at once: all end with the same key and secret.
    /// The instance id is new at every call, so one call per node.
    ///
    /// # Errors
    /// [`IdentityError`]: the folder or a file cannot be read or written, a file is readable by other
    /// users, or its content is not what this program wrote. A damaged file is never replaced by itself.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        files::create_private_dir(dir)?;
        let _lock = FolderLock::take(dir)?;
        let key_path = dir.join(KEY_FILE);
        let key_text = read_or_create(&key_path, || {
            let mut key = Zeroizing::new([0; 32]);
            getrandom::fill(key.as_mut()).map_err(IdentityError::Random)?;
            Ok(keyed_text(KEY_PREFIX, &key))
        })?;
        let private_key = parse_keyed_text(KEY_PREFIX, &key_text)
            .map(Zeroizing::new)
            .map_err(|_| IdentityError::DamagedKey { path: key_path })?;
        let state = load(dir)?;
        Self::assemble(private_key, Swarm::new(Some(dir.to_path_buf()), state))
    }

    /// Whether [`Identity::load_or_create`] was here before. Reads and makes nothing.
    #[must_use]
    pub fn is_made(dir: &Path) -> bool {
        dir.join(KEY_FILE).exists()
    }

    /// A node that leaves no trace on disk: a new key in the swarm of `secret`.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn ephemeral(secret: SwarmSecret) -> Result<Self, IdentityError> {
        let mut key = Zeroizing::new([0; 32]);
        getrandom::fill(key.as_mut()).map_err(IdentityError::Random)?;
        let state = State { members: Membership::new(secret, false), stamp: [None; 2] };
        Self::assemble(key, Swarm::new(None, state))
    }

    fn assemble(private_key: Zeroizing<[u8; 32]>, swarm: Arc<Swarm>) -> Result<Self, IdentityError> {
        let public_key = public_key(&private_key)?;
        let instance = InstanceId::random()?;
        Ok(Self(Arc::new(Inner { private_key, public_key, instance, swarm })))
    }

    /// The same key and secret as another process: what a second node of this user has.
    ///
    /// # Errors
    /// [`IdentityError::Random`] when the system gives no random bytes.
    pub fn another_instance(&self) -> Result<Self, IdentityError> {
        Self::assemble(self.0.private_key.clone(), self.0.swarm.clone())
    }

    /// The text to give to `swarm-os secret import` on another computer. Whoever has it is in the swarm.
    #[must_use]
    pub fn export_secret(&self) -> Zeroizing<String> {
        self.swarm().members.secret().to_text()
    }

    /// Notes that others may hold the secret from now on, so that a pairing does not replace it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn settle(&self) -> Result<(), IdentityError> {
        self.update(|members| {
            members.settled = true;
            Ok(())
        })
    }

    /// Nobody else has this node's secret yet: it was neither paired nor given away.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.refresh();
        !self.swarm().members.settled
    }

    /// The machines known, in the order in which they were met.
    #[must_use]
    pub fn peers(&self) -> Vec<Peer> {
        self.refresh();
        self.swarm().members.peers().to_vec()
    }

    /// Remembers the name of a machine that proved that it holds the secret.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn note_met(&self, key: &[u8; 32], name: &str) -> Result<(), IdentityError> {
        if key == self.public_key() || !self.swarm().members.clone().note(*key, name, false) {
            return Ok(());
        }
        self.update(|members| {
            members.settled = true;
            members.note(*key, name, false);
            Ok(())
        })
    }

    /// Forgets the machine of this name (or the start of its key as [`Peer::fingerprint`] gives it) and makes a new
    /// secret for the rest. Links to it end. [`crate::tell_member`] brings the new secret to one that is there.
    ///
    /// # Errors
    /// [`IdentityError::Forget`] when nobody or several are called so; a file that cannot be written.
    pub fn forget(&self, name: &str) -> Result<Peer, IdentityError> {
        let secret = SwarmSecret::random()?;
        self.update(|members| Ok(members.forget(name, secret)?))
    }

    pub(crate) fn pin(&self, key: &Key, name: &str) -> Result<(), IdentityError> {
        self.update(|members| {
            members.note(*key, name, true);
            Ok(())
        })
    }

    pub(crate) fn adopt(&self, gift: Gift, from: &Key, name: &str) -> Result<(), IdentityError> {
        self.update(|members| {
            members.adopt(gift, *from, name);
            Ok(())
        })
    }

    /// Takes a newer secret from a machine that may give one; whether it was taken.
    pub(crate) fn rotate(&self, gift: Gift, from: &Key) -> Result<bool, IdentityError> {
        let own = *self.public_key();
        self.update(|members| {
            let trusted = *from == own || members.is_paired(from);
            Ok(trusted && !gift.forgotten.contains(&own) && members.rotate(gift))
        })
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

    /// Keys of handshakes, the current one first, then those of secrets of the past.
    pub(crate) fn psks(&self) -> Vec<Zeroizing<[u8; 32]>> {
        self.swarm().members.secrets().map(SwarmSecret::psk).collect()
    }

    pub(crate) fn gift(&self) -> Gift {
        self.swarm().members.gift()
    }

    /// Whether this machine may be given a secret that it missed: the very same computer, or one that was paired.
    pub(crate) fn may_have_secrets(&self, key: &Key) -> bool {
        key == self.public_key() || self.swarm().members.is_paired(key)
    }

    pub(crate) fn is_forgotten(&self, key: &Key) -> bool {
        self.swarm().members.is_forgotten(key)
    }

    pub(crate) fn swarm_tag(&self) -> [u8; 16] {
        self.swarm().members.secret().tag()
    }

    /// Reads the files again if somebody wrote them. Files that cannot be read change nothing.
    pub(crate) fn refresh(&self) {
        let Some(dir) = &self.0.swarm.dir else { return };
        if stamp(dir) == self.swarm().stamp {
            return;
        }
        match FolderLock::take(dir).and_then(|_lock| load(dir)) {
            Ok(state) => self.put(state),
            Err(error) => tracing::warn!("the old swarm secret stays in use: {error}"),
        }
    }

    /// Closes the link when this machine is forgotten, which may be now.
    pub(crate) fn watch(&self, key: Key, closer: Closer) {
        let mut links = self.links();
        links.retain(|(_, closer)| closer.is_open());
        links.push((key, closer));
        drop(links);
        self.close_forgotten();
    }

    fn close_forgotten(&self) {
        let state = self.swarm();
        self.links().retain(|(key, closer)| {
            let out = state.members.is_forgotten(key);
            if out {
                closer.close();
            }
            !out
        });
    }

    /// Changes the members, over what other processes wrote meanwhile.
    fn update<T>(
        &self,
        change: impl FnOnce(&mut Membership) -> Result<T, IdentityError>,
    ) -> Result<T, IdentityError> {
        let Some(dir) = &self.0.swarm.dir else {
            let mut members = self.swarm().members.clone();
            let result = change(&mut members)?;
            self.put(State { members, stamp: [None; 2] });
            return Ok(result);
        };
        let lock = FolderLock::take(dir)?;
        let mut state = load(dir)?;
        let result = change(&mut state.members)?;
        save(dir, &state.members)?;
        state.stamp = stamp(dir);
        drop(lock);
        self.put(state);
        Ok(result)
    }

    fn put(&self, state: State) {
        *self.0.swarm.state.write().unwrap_or_else(PoisonError::into_inner) = state;
        self.close_forgotten();
    }

    fn swarm(&self) -> RwLockReadGuard<'_, State> {
        self.0.swarm.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> MutexGuard<'_, Vec<(Key, Closer)>> {
        self.0.swarm.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Swarm {
    fn new(dir: Option<PathBuf>, state: State) -> Arc<Self> {
        Arc::new(Self { dir, state: RwLock::new(state), links: Mutex::default() })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node_id().short()).finish_non_exhaustive()
    }
}

/// Makes `text` the swarm secret in `dir`. Members of another swarm that were known are so no more.
/// Returns where the old secret was kept, or `None` when there was none or it was the same.
///
/// # Errors
/// [`IdentityError::Text`] when `text` is not a secret (nothing is changed then), otherwise as
/// [`Identity::load_or_create`]. The file is replaced in one step: never half a secret, never none.
pub fn import_secret(dir: &Path, text: &str) -> Result<Option<PathBuf>, IdentityError> {
    let secret = SwarmSecret::parse(text)?;
    files::create_private_dir(dir)?;
    let _lock = FolderLock::take(dir)?;
    let path = dir.join(SECRET_FILE);
    // A damaged or open old file is replaced too: importing is how a user repairs it.
    let old = files::read_private(&path, FILE_BYTES_MAX).ok().flatten();
    if old.is_some_and(|old| SwarmSecret::parse(&old).is_ok_and(|old| old == secret)) {
        return Ok(None);
    }
    let backup = if path.exists() { Some(files::back_up(&path)?) } else { None };
    save(dir, &Membership::new(secret, true))?;
    Ok(backup)
}

/// What is wrong with who may read and write the files of secrets in `dir`, kept old ones too. Changes nothing.
#[must_use]
pub fn exposed_secrets(dir: &Path) -> Vec<IdentityError> {
    files::exposed(dir, &[SECRET_FILE, KEY_FILE, MEMBERS_FILE])
}

/// Leaves the swarm: a new secret and a new key, nobody known. Nodes that run have to be started again. Returns
/// where the old secret was kept, if there was one.
///
/// The key is new because the old one may be on the list of forgotten machines of others, who would refuse it for ever.
///
/// # Errors
/// A file that cannot be read or written.
pub fn leave_swarm(dir: &Path) -> Result<Option<PathBuf>, IdentityError> {
    files::create_private_dir(dir)?;
    let _lock = FolderLock::take(dir)?;
    let path = dir.join(SECRET_FILE);
    let backup = if path.exists() { Some(files::back_up(&path)?) } else { None };
    let mut key = Zeroizing::new([0; 32]);
    getrandom::fill(key.as_mut()).map_err(IdentityError::Random)?;
    save(dir, &Membership::new(SwarmSecret::random()?, false))?;
    files::replace(&dir.join(KEY_FILE), &line(&keyed_text(KEY_PREFIX, &key)))?;
    Ok(backup)
}

/// Reads secret and members, made if they are missing. The folder must be locked.
fn load(dir: &Path) -> Result<State, IdentityError> {
    let (secret_path, members_path) = (dir.join(SECRET_FILE), dir.join(MEMBERS_FILE));
    let secret = files::read_private(&secret_path, FILE_BYTES_MAX)?;
    let members = files::read_private(&members_path, MEMBERS_BYTES_MAX)?;
    let parse = |text: &str| {
        SwarmSecret::parse(text)
            .map_err(|source| IdentityError::DamagedSecret { path: secret_path.clone(), source })
    };
    let members = match (secret, members) {
        (None, _) => {
            let members = Membership::new(SwarmSecret::random()?, false);
            save(dir, &members)?;
            members
        }
        (Some(secret), None) => {
            // It may have been given away before members were written down.
            let members = Membership::new(parse(&secret)?, true);
            save(dir, &members)?;
            members
        }
        (Some(secret), Some(text)) => {
            let secret = parse(&secret)?;
            let members =
                Membership::parse(&text).ok_or(IdentityError::DamagedMembers { path: members_path })?;
            if *members.secret() == secret {
                members
            } else {
                // The members are written first: an older secret of theirs is the trace of a change that was
                // interrupted, another one was put there by hand.
                let of_theirs = members.secrets().any(|old| *old == secret);
                let members = if of_theirs { members } else { Membership::new(secret, true) };
                save(dir, &members)?;
                members
            }
        }
    };
    Ok(State { members, stamp: stamp(dir) })
}

/// The folder must be locked.
fn save(dir: &Path, members: &Membership) -> Result<(), IdentityError> {
    files::replace(&dir.join(MEMBERS_FILE), &members.to_text())?;
    files::replace(&dir.join(SECRET_FILE), &line(&members.secret().to_text()))
}

fn stamp(dir: &Path) -> Stamp {
    [files::stamp(&dir.join(SECRET_FILE)), files::stamp(&dir.join(MEMBERS_FILE))]
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

    #[cfg(unix)]
    #[test]
    fn secrets_that_others_may_read_are_listed_with_their_backups() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("config");
        assert!(exposed_secrets(&dir).is_empty());
        Identity::load_or_create(&dir).unwrap();
        leave_swarm(&dir).unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        std::fs::write(dir.join("notes.txt"), "mine").unwrap();
        assert!(exposed_secrets(&dir).is_empty());
        let backup = dir.join("swarm.secret.backup-1");
        for path in [&backup, &dir.join(KEY_FILE)] {
            set(path, 0o640);
        }
        set(&dir, 0o777);
        let found: Vec<String> = exposed_secrets(&dir).iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("chmod 700") && found[1].contains("node.key"), "{found:?}");
        assert!(found[2].contains("backup-1") && found[2].contains("mode 640"), "{found:?}");
    }

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
        assert_eq!(names.len(), 4, "left behind: {names:?}");
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
        for name in [SECRET_FILE, KEY_FILE, MEMBERS_FILE] {
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

    #[test]
    fn what_another_process_changes_holds_here_too() {
        let home = tempfile::tempdir().unwrap();
        let (here, there) = (home.path(), Identity::load_or_create(home.path()).unwrap());
        let other = Identity::load_or_create(here).unwrap();
        assert!(there.is_fresh());
        other.pin(&[7; 32], "den").unwrap();
        assert!(!there.is_fresh() && there.peers().len() == 1);
        let before = there.export_secret();
        assert_eq!(other.forget("den").unwrap().key, [7; 32]);
        assert!(there.peers().is_empty() && there.is_forgotten(&[7; 32]));
        assert_ne!(*before, *there.export_secret());
        assert_eq!(there.psks().len(), 2);
        // A secret put there by hand belongs to another swarm: nobody of the old one is known in it.
        let secret = SwarmSecret::random().unwrap();
        std::fs::write(here.join(SECRET_FILE), line(&secret.to_text())).unwrap();
        assert!(!there.is_fresh() && there.psks().len() == 1);
        assert_eq!(*there.export_secret(), *secret.to_text());
        let key = *there.public_key();
        assert!(leave_swarm(here).unwrap().is_some());
        let left = Identity::load_or_create(here).unwrap();
        assert!(left.is_fresh() && *left.public_key() != key);
    }

    #[test]
    fn an_interrupted_change_of_the_secret_is_finished() {
        let home = tempfile::tempdir().unwrap();
        let node = Identity::load_or_create(home.path()).unwrap();
        node.pin(&[7; 32], "den").unwrap();
        let old = line(&node.export_secret());
        node.forget("den").unwrap();
        std::fs::write(home.path().join(SECRET_FILE), old).unwrap();
        let again = Identity::load_or_create(home.path()).unwrap();
        assert_eq!(*again.export_secret(), *node.export_secret());
        assert!(again.is_forgotten(&[7; 32]));
        let members = home.path().join(MEMBERS_FILE);
        std::fs::write(&members, "{").unwrap();
        let error = Identity::load_or_create(home.path()).unwrap_err();
        assert!(matches!(error, IdentityError::DamagedMembers { .. }), "{error}");
    }
}
