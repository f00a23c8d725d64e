//! This node's monotonic clock.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Time since the process first asked, monotonic. What `swarm-ring` is given as "now".
pub fn now() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// An instant of this process in microseconds, as [`now_us`] would have given it then. Zero for one before the first look
/// at this clock.
pub fn at_us(instant: Instant) -> u64 {
    let ago = instant.elapsed();
    u64::try_from(now().saturating_sub(ago).as_micros()).unwrap_or(u64::MAX)
}

/// The same in microseconds, as it travels on the wire.
pub fn now_us() -> u64 {
    u64::try_from(now().as_micros()).unwrap_or(u64::MAX)
}
