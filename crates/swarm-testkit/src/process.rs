//! A child process whose output can be waited for, and that never outlives its test.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often conditions that nothing announces are looked at.
const POLL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds, looking every 5 ms.
///
/// # Errors
/// When it does not hold within `within`; the text names `what`.
pub fn wait_for(within: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + within;
    while !condition() {
        if Instant::now() >= deadline {
            bail!("waited {} ms in vain for {what}", within.as_millis());
        }
        thread::sleep(POLL);
    }
    Ok(())
}

#[derive(Default)]
struct Heard {
    /// `(from stdout, line)` in order of arrival.
    lines: Vec<(bool, String)>,
    /// Streams that still may bring lines.
    open: usize,
}

#[derive(Default)]
struct Ear {
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Ear {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(self: &Arc<Self>, stdout: bool, stream: impl Read + Send + 'static) {
        self.lock().open += 1;
        let ear = Arc::clone(self);
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(len) if len > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
                ear.lock().lines.push((stdout, text));
                ear.changed.notify_all();
                line.clear();
            }
            ear.lock().open -= 1;
            ear.changed.notify_all();
        });
    }
}

/// A running child with its output captured line by line. Killed on drop, with its whole
/// process group.
pub struct Proc {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    ear: Arc<Ear>,
    /// Lines before this one were given out by [`Proc::expect_line`].
    cursor: usize,
}

/// How a child ended and what it said.
#[derive(Clone, Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Debug for Proc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proc({}, pid {})", self.name, self.child.id())
    }
}

impl Proc {
    /// Starts `command` with piped stdin, stdout and stderr, in a process group of its own.
    pub fn spawn(command: &mut Command) -> Result<Proc> {
        let name = describe(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let mut child = command.spawn().with_context(|| format!("cannot start `{name}`"))?;
        let ear = Arc::new(Ear::default());
        if let Some(stdout) = child.stdout.take() {
            ear.listen(true, stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            ear.listen(false, stderr);
        }
        let stdin = child.stdin.take();
        Ok(Proc { name, child, stdin, ear, cursor: 0 })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line, of stdout or stderr, that `matches` accepts, and returns it.
    /// Lines before it are passed over; the following call goes on after it.
    ///
    /// # Errors
    /// When no such line comes within `within`, or the child closes its output first. The text
    /// holds everything the child said.
    pub fn expect_line(
        &mut self,
        within: Duration,
        what: &str,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + within;
        let mut heard = self.ear.lock();
        loop {
            while let Some((_, line)) = heard.lines.get(self.cursor) {
                self.cursor += 1;
                if matches(line) {
                    return Ok(line.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let closed = heard.open == 0;
            if closed || left.is_zero() {
                drop(heard);
                let why = if closed {
                    "closed its output".to_owned()
                } else {
                    format!("had {} ms", within.as_millis())
                };
                bail!("`{}` {why} and did not say {what}; it said:\n{}", self.name, self.output());
            }
            heard = self.ear.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// [`Proc::expect_line`] for a line that contains `text`.
    pub fn expect(&mut self, within: Duration, text: &str) -> Result<String> {
        self.expect_line(within, &format!("{text:?}"), |line| line.contains(text))
    }

    /// Everything said so far, both streams, in order of arrival.
    pub fn output(&self) -> String {
        self.ear.lock().lines.iter().map(|(_, line)| format!("{line}\n")).collect()
    }

    fn said(&self, stdout: bool) -> String {
        let heard = self.ear.lock();
        heard.lines.iter().filter(|(from, _)| *from == stdout).map(|(_, line)| format!("{line}\n")).collect()
    }

    /// What came on stdout so far.
    pub fn stdout(&self) -> String {
        self.said(true)
    }

    /// What came on stderr so far.
    pub fn stderr(&self) -> String {
        self.said(false)
    }

    /// Writes `line` and a newline to the child's stdin.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let Some(stdin) = self.stdin.as_mut() else { bail!("stdin of `{}` is closed", self.name) };
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("cannot write to `{}`", self.name))
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Whether the child has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the child to end by itself.
    ///
    /// # Errors
    /// When it still runs after `within`; it is left running. The text holds what it said.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "`{}` still runs after {} ms; it said:\n{}",
                    self.name,
                    within.as_millis(),
                    self.output()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Closes stdin, waits for the end and collects all output.
    ///
    /// # Errors
    /// As [`Proc::wait`]; the child is then killed.
    pub fn finish(mut self, within: Duration) -> Result<Finished> {
        self.close_stdin();
        let status = self.wait(within)?;
        // Grandchildren may hold the pipes; what the child itself said is there by then.
        drop(wait_for(Duration::from_secs(2), "the end of output", || self.ear.lock().open == 0));
        Ok(Finished { status, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// Sends a signal by name (`INT`, `TERM`, `STOP`, `CONT`) to the child alone.
    #[cfg(unix)]
    pub fn signal(&self, name: &str) -> Result<()> {
        send_signal(name, &self.child.id().to_string())
    }

    /// Ends the child and its process group at once, as a power cut would.
    pub fn kill(&mut self) {
        // A failure means that it has ended already, which is what was wanted.
        if self.is_running() {
            #[cfg(unix)]
            drop(send_signal("KILL", &format!("-{}", self.child.id())));
            drop(self.child.kill());
        }
        drop(self.child.wait());
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(unix)]
fn send_signal(name: &str, target: &str) -> Result<()> {
    // The shell's own kill: a small system may have no other.
    let script = "kill -s \"$1\" -- \"$2\"";
    let status =
        Command::new("sh").args(["-c", script, "sh", name, target]).stderr(Stdio::null()).status()?;
    if !status.success() {
        bail!("cannot send {name} to {target}: no such process");
    }
    Ok(())
}

fn describe(command: &Command) -> String {
    let program = command.get_program().to_string_lossy().into_owned();
    command.get_args().fold(program, |text, arg| text + " " + &arg.to_string_lossy())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Proc {
        Proc::spawn(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn lines_are_found_in_order_and_once() {
        let mut proc = shell("echo one; echo two; echo one; read line; echo got $line");
        proc.expect(SOON, "one").unwrap();
        proc.expect(SOON, "one").unwrap();
        proc.say("hello").unwrap();
        assert_eq!(proc.expect(SOON, "got").unwrap(), "got hello");
        assert!(proc.wait(SOON).unwrap().success());
    }

    #[test]
    fn a_missing_line_is_an_error_with_the_output() {
        let mut proc = shell("echo something else >&2; exit 3");
        let error = proc.expect(SOON, "wanted").unwrap_err().to_string();
        assert!(error.contains("something else") && error.contains("wanted"), "{error}");
        assert_eq!(proc.finish(SOON).unwrap().status.code(), Some(3));
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let mut proc = shell("sleep 60");
        assert!(proc.expect(Duration::from_millis(20), "wanted").is_err());
        assert!(proc.wait(Duration::from_millis(20)).is_err());
        assert!(wait_for(Duration::from_millis(20), "never", || false).is_err());
    }

    #[test]
    fn a_drop_takes_the_whole_process_group() {
        let mut proc = shell("sleep 60 & echo $!; wait");
        let grandchild = proc.expect_line(SOON, "a pid", |line| !line.is_empty()).unwrap();
        drop(proc);
        wait_for(SOON, "the grandchild to end", || send_signal("0", &grandchild).is_err()).unwrap();
    }

    #[test]
    fn streams_are_kept_apart() {
        let finished = shell("echo out; echo err >&2").finish(SOON).unwrap();
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
    }
}
