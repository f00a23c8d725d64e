//! How a command ends when it does not end well: one line for people, one number for scripts.

use std::fmt;
use std::io;

use swarm_link::LinkError;
use swarm_node::NodeError;
use swarm_ring::PlaceError;
use swarm_wire::Blame;

use crate::present::text;

/// Why a command ends early.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    kind: Kind,
    text: Option<String>,
}

/// What went wrong, for programs that want to know more than the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked for makes no sense, or not here.
    Usage,
    /// Nobody to share the layers with was found.
    NoWorker,
    /// Only workers of which this computer knows no secret were found.
    Unpaired,
    /// This node was lost, or the link to it.
    Lost { node: String },
    /// The model, or a part of it, is not to be had or cannot be used.
    Model,
    /// The layers do not fit.
    Memory,
    /// Anything else.
    Other,
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
        let kind = if code == Code::Usage { Kind::Usage } else { Kind::Other };
        Self { code, kind, text: Some(text.into()) }
    }

    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(Code::Usage, text)
    }

    /// Ends with `code` and says nothing, because all was said.
    pub fn silent(code: Code) -> Self {
        Self { code, kind: Kind::Other, text: None }
    }

    /// What went wrong.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// What scripts learn.
    pub fn code(&self) -> Code {
        self.code
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
    pub fn report(&self) -> u8 {
        if let Some(text) = &self.text {
            // Nobody to tell when standard error is closed.
            let _ =
                io::Write::write_all(&mut io::stderr(), format!("error: {}\n", text::line(text)).as_bytes());
        }
        self.code as u8
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
        if let NodeError::Resolve(_) | NodeError::NotLent { .. } = error {
            text.push_str("; `swarm-os models` lists those that are here, `cargo xtask fetch` in the project gets the default one");
        }
        Self { code, kind: kind(&error), text: Some(text) }
    }
}

fn kind(error: &NodeError) -> Kind {
    match error {
        NodeError::NoWorkers(_) => Kind::NoWorker,
        NodeError::Unpaired { .. } => Kind::Unpaired,
        NodeError::Lost { node, .. } | NodeError::Closed { node, .. } => Kind::Lost { node: node.clone() },
        NodeError::Broken { link, .. } => Kind::Lost { node: link.clone() },
        NodeError::Resolve(_)
        | NodeError::NotLent { .. }
        | NodeError::Weights(_)
        | NodeError::Fetch { .. }
        | NodeError::Text(_) => Kind::Model,
        NodeError::Load { .. } => Kind::Model,
        NodeError::Memory { .. } => Kind::Memory,
        NodeError::Place(place) => match **place {
            PlaceError::NodeTooSmall { .. }
            | PlaceError::NoHome { .. }
            | PlaceError::StageTooLarge { .. } => Kind::Memory,
            _ => Kind::Usage,
        },
        error if error.blame() == Blame::Caller => Kind::Usage,
        _ => Kind::Other,
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
