//! How a command ends when it does not end well: one line for people, one number for scripts.

use std::fmt;
use std::io;
use std::process::ExitCode;

use swarm_link::LinkError;
use swarm_node::NodeError;
use swarm_wire::Blame;

use crate::present::text;

/// Why a command ends early.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    text: Option<String>,
}

/// What scripts learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Not a failure: who read the output has gone, and does not want more.
    Done = 0,
    /// An answer ended in an error, verify found a difference, or this computer cannot go on.
    Failed = 1,
    /// What was typed, or a file that it names, cannot be used.
    Usage = 2,
    /// No worker, or the ring was lost.
    Ring = 3,
    /// Ctrl-C.
    Interrupted = 130,
}

impl Failure {
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: Some(text.into()) }
    }

    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(Code::Usage, text)
    }

    /// Ends with `code` and says nothing, because all was said.
    pub fn silent(code: Code) -> Self {
        Self { code, text: None }
    }

    /// What was asked cannot be done, but something else can.
    pub fn is_usage(&self) -> bool {
        self.code == Code::Usage
    }

    /// Nobody listens any more, or the user wants to leave: not even a console goes on.
    pub fn is_final(&self) -> bool {
        matches!(self.code, Code::Done | Code::Interrupted)
    }

    /// Prints the error line, if there is one, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        if let Some(text) = &self.text {
            // Nobody to tell when standard error is closed.
            let _ =
                io::Write::write_all(&mut io::stderr(), format!("error: {}\n", text::line(text)).as_bytes());
        }
        ExitCode::from(self.code as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text.as_deref().unwrap_or_default())
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        let code = match &error {
            NodeError::Link(link)
                if matches!(**link, LinkError::PortInUse { .. } | LinkError::Bind { .. }) =>
            {
                Code::Usage
            }
            error => match error.blame() {
                Blame::Caller => Code::Usage,
                Blame::Link | Blame::Peer => Code::Ring,
                Blame::Us => Code::Failed,
            },
        };
        let mut text = error.chain();
        if let NodeError::Resolve(_) = error {
            text.push_str("; `swarm-os models` lists those that are here, `cargo xtask fetch` in the project gets the default one");
        }
        Self::new(code, text)
    }
}

impl From<swarm_link::IdentityError> for Failure {
    fn from(error: swarm_link::IdentityError) -> Self {
        match error {
            // What somebody typed, not what this node holds.
            swarm_link::IdentityError::Text(wrong) => Self::usage(wrong.to_string()),
            swarm_link::IdentityError::Forget(wrong) => Self::usage(wrong.to_string()),
            error => NodeError::from(error).into(),
        }
    }
}

/// Output that cannot be written. A reader that has gone (`| head`) is no error.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::silent(Code::Done);
        }
        Self::new(Code::Failed, format!("standard output cannot be written: {error}"))
    }
}
