//! Ctrl-C: what it means right now.

use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::failure::{Code, Failure};

type Action = Box<dyn Fn() + Send>;

/// What Ctrl-C does; nothing set: the process ends.
static ACTION: Mutex<Option<(Action, Repeat)>> = Mutex::new(None);

/// What a second Ctrl-C does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// The same again.
    Same,
    /// The process ends.
    End,
}

fn lock() -> MutexGuard<'static, Option<(Action, Repeat)>> {
    ACTION.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes Ctrl-C over, once per process.
pub fn install() -> Result<(), Failure> {
    let handler = || {
        let mut action = lock();
        match &*action {
            None => process::exit(Code::Interrupted as i32),
            Some((act, Repeat::Same)) => act(),
            Some((act, Repeat::End)) => {
                act();
                *action = None;
            }
        }
    };
    ctrlc::set_handler(handler)
        .map_err(|error| Failure::new(Code::Failed, format!("Ctrl-C cannot be taken over: {error}")))
}

/// While this lives, Ctrl-C does `act`.
#[must_use]
pub struct During(());

pub fn during(repeat: Repeat, act: impl Fn() + Send + 'static) -> During {
    *lock() = Some((Box::new(act), repeat));
    During(())
}

impl Drop for During {
    fn drop(&mut self) {
        *lock() = None;
    }
}
