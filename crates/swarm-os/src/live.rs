//! How `status` learns what runs here: every process of this user that holds layers has a socket in the state
//! folder, private to the user, and says on it how it stands to whoever connects.
//!
//! A socket and not a port, so that neither other users nor web pages reach it. What is said is numbers and names,
//! never prompts or answers.

use std::path::PathBuf;

use serde_json::Value;

use crate::failure::Failure;
use crate::settings;

/// The folder of the sockets, within the state folder.
fn folder() -> Result<PathBuf, Failure> {
    Ok(settings::state_folder()?.join("run"))
}

#[cfg(unix)]
mod socket {
    use std::io::{Read, Write};
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use serde_json::Value;

    /// Longest wait for a process to say how it stands, and for whoever asked to take it.
    const TALK: Duration = Duration::from_secs(1);
    /// Nobody says more.
    const BYTES_MAX: u64 = 1 << 20;

    /// Sockets of this process so far. A Python process may hold several nodes.
    static SHOWN: AtomicU64 = AtomicU64::new(0);

    /// Removes the socket's file when dropped, and ends the thread that answers on it.
    pub struct Shown {
        path: PathBuf,
        ended: Arc<AtomicBool>,
    }

    impl Drop for Shown {
        fn drop(&mut self) {
            self.ended.store(true, Ordering::Relaxed);
            // Wakes the thread that waits for somebody to ask.
            let _ = UnixStream::connect(&self.path);
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub fn show(folder: &Path, snapshot: impl Fn() -> Value + Send + 'static) -> std::io::Result<Shown> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o700))?;
        let path = match SHOWN.fetch_add(1, Ordering::Relaxed) {
            0 => folder.join(format!("{}.sock", std::process::id())),
            number => folder.join(format!("{}-{number}.sock", std::process::id())),
        };
        // Left by a process of this number that was killed.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let answer = move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                if end.load(Ordering::Relaxed) {
                    return;
                }
                // Whoever asked may have gone again.
                let _ = stream.set_write_timeout(Some(TALK));
                let _ = writeln!(stream, "{}", snapshot());
            }
        };
        std::thread::Builder::new().name("status".into()).spawn(answer)?;
        Ok(Shown { path, ended })
    }

    pub fn look(folder: &Path) -> Vec<Value> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
            .iter()
            .filter(|path| path.extension().is_some_and(|kind| kind == "sock"))
            .filter_map(|p| ask(p))
            .collect()
    }

    fn ask(path: &Path) -> Option<Value> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                // Its process was killed.
                let _ = std::fs::remove_file(path);
                return None;
            }
            Err(_) => return None,
        };
        stream.set_read_timeout(Some(TALK)).ok()?;
        let mut text = String::new();
        stream.take(BYTES_MAX).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn what_is_shown_is_seen_by_this_user_until_it_ends() {
            let home = tempfile::tempdir().unwrap();
            let folder = home.path().join("run");
            assert!(look(&folder).is_empty());
            let shown = show(&folder, || serde_json::json!({"a": 1})).unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&folder), mode(&shown.path)), (0o700, 0o600));
            for _ in 0..2 {
                assert_eq!(look(&folder), [serde_json::json!({"a": 1})]);
            }
            // A socket whose process was killed is cleared away, other files are left alone.
            let (dead, other) = (folder.join("1.sock"), folder.join("note.txt"));
            drop(UnixListener::bind(&dead).unwrap());
            std::fs::write(&other, "mine").unwrap();
            assert_eq!(look(&folder).len(), 1);
            assert!(!dead.exists() && other.exists());
            // A process may hold several nodes.
            let second = show(&folder, || serde_json::json!({"a": 2})).unwrap();
            assert_eq!(look(&folder).len(), 2);
            drop(shown);
            assert_eq!(look(&folder), [serde_json::json!({"a": 2})]);
            drop(second);
            assert!(look(&folder).is_empty());
        }
    }
}

/// As long as this is held, `status` sees the process.
pub struct Shown {
    #[cfg(unix)]
    _socket: Option<socket::Shown>,
}

/// Shows this process: `role` and its number are added to what `snapshot` gives. Where that does not work, `status` does
/// not see it, and everything else goes on.
pub fn show(role: &'static str, snapshot: impl Fn() -> Value + Send + 'static) -> Shown {
    #[cfg(unix)]
    {
        let snapshot = move || {
            let mut object = serde_json::json!({"role": role, "process": std::process::id()});
            if let (Some(object), Value::Object(more)) = (object.as_object_mut(), snapshot()) {
                object.extend(more);
            }
            object
        };
        let shown = folder().map_err(|error| error.to_string()).and_then(|folder| {
            socket::show(&folder, snapshot).map_err(|error| format!("{}: {error}", folder.display()))
        });
        let _socket = shown.inspect_err(|why| tracing::info!("status cannot see this process: {why}")).ok();
        Shown { _socket }
    }
    #[cfg(not(unix))]
    {
        let _ = (role, snapshot);
        Shown {}
    }
}

/// What every process of this user says of itself.
///
/// # Errors
/// On systems without sockets in folders.
pub fn look() -> Result<Vec<Value>, Failure> {
    #[cfg(unix)]
    return Ok(socket::look(&folder()?));
    #[cfg(not(unix))]
    {
        folder()?;
        Err(Failure::usage("status is not available on this system; `chat` has /nodes and /stats"))
    }
}
