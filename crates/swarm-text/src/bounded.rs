//! Runs a stranger's rules (regexes, merges, templates) where they can do no harm.
//!
//! Why a thread and not a check in a loop: the work happens inside libraries that cannot be interrupted (a regex
//! that backtracks, a merge table that explodes), so the only bound that holds for all of them is another thread's
//! clock. A thread that misses its deadline is left behind, because a thread cannot be ended from outside; callers
//! refuse the file afterwards, or bound the work by other means too. Starting one costs some 0.1 ms,
//! which is small beside encoding a prompt.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::TextError;
use crate::error::sentence;

/// For work whose recursion has limits of its own.
pub(crate) const STACK_BYTES: usize = 8 << 20;

/// Runs `work` on a thread of its own, with a stack of `stack` bytes, and waits at most `limit` for its value.
///
/// A stack that overflows cannot be contained, so `stack` must hold the deepest recursion that `work` can reach; it
/// is address space, and becomes memory only as far as it is used. `what` completes "did not ..." in errors. A
/// panic becomes an error (its text also goes to stderr, as the process's panic hook decides).
///
/// # Errors
/// [`TextError::Panicked`], [`TextError::TimedOut`], [`TextError::Thread`].
pub(crate) fn bounded<T, F>(
    what: &'static str,
    stack: usize,
    limit: Duration,
    work: F,
) -> Result<T, TextError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (sender, receiver) = sync_channel(1);
    thread::Builder::new()
        .name(format!("text: {what}"))
        .stack_size(stack)
        .spawn(move || {
            // The closure owns all it touches, so nothing half-changed is seen after a panic.
            let outcome = catch_unwind(AssertUnwindSafe(work));
            // The receiver is gone when the deadline has passed; then nobody wants the value.
            let _ = sender.send(outcome.map_err(|panic| panic_text(panic.as_ref())));
        })
        .map_err(|source| TextError::Thread { what, source })?;
    match receiver.recv_timeout(limit) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(why)) => Err(TextError::Panicked { what, why }),
        Err(RecvTimeoutError::Timeout) => Err(TextError::TimedOut { what, limit }),
        Err(RecvTimeoutError::Disconnected) => {
            Err(TextError::Panicked { what, why: "the thread ended".to_owned() })
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    sentence(text.unwrap_or("no reason given"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_value_a_panic_and_a_hang() {
        let limit = Duration::from_secs(30);
        assert_eq!(bounded("count", STACK_BYTES, limit, || 7).expect("a value"), 7);
        let panicked = bounded("count", STACK_BYTES, limit, || panic!("planted")).expect_err("a panic");
        assert!(matches!(&panicked, TextError::Panicked { why, .. } if why == "planted"), "{panicked}");
        // Waits for a message that comes only after the deadline was missed.
        let (release, wait) = channel::<()>();
        let late = bounded("count", STACK_BYTES, Duration::from_millis(20), move || wait.recv().is_ok());
        assert!(matches!(late, Err(TextError::TimedOut { .. })));
        release.send(()).expect("the thread is still there");
    }
}
