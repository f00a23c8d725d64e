//! Where another node's clock stands.

use std::collections::VecDeque;

use swarm_wire::TIME_US_MAX;

/// Estimates `remote clock - local clock` from ping and pong times. Keeps the last samples and
/// believes the one with the shortest round trip: its error is at most half of that trip.
///
/// Method: the clock filter of NTP, RFC 5905 section 10.
#[derive(Clone, Debug)]
pub struct ClockOffset {
    window: usize,
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    round_trip_us: u64,
    offset_us: i64,
}

impl Default for ClockOffset {
    /// Keeps 16 samples: 4 s of heartbeats.
    fn default() -> Self {
        Self::new(16)
    }
}

impl ClockOffset {
    /// Keeps the last `window` samples (at least 1).
    pub fn new(window: usize) -> Self {
        Self { window: window.max(1), samples: VecDeque::new() }
    }

    /// Adds one exchange: sent and received on the local clock, `remote_us` on the other node's.
    /// Gives the round trip, or `None` for an exchange that cannot have happened, which is
    /// ignored.
    pub fn add(&mut self, sent_us: u64, remote_us: u64, received_us: u64) -> Option<u64> {
        let round_trip_us = received_us.checked_sub(sent_us)?;
        if received_us > TIME_US_MAX || remote_us > TIME_US_MAX {
            return None;
        }
        let middle_us = sent_us + round_trip_us / 2;
        // Both are at most 2^53, so neither the casts nor the difference can wrap.
        let offset_us = remote_us as i64 - middle_us as i64;
        if self.samples.len() == self.window {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample { round_trip_us, offset_us });
        Some(round_trip_us)
    }

    fn best(&self) -> Option<Sample> {
        self.samples.iter().min_by_key(|sample| sample.round_trip_us).copied()
    }

    /// `remote - local` in microseconds; `None` before the first sample.
    pub fn offset_us(&self) -> Option<i64> {
        self.best().map(|sample| sample.offset_us)
    }

    /// The estimate is off by at most this much; `None` before the first sample.
    pub fn error_us_max(&self) -> Option<u64> {
        self.best().map(|sample| sample.round_trip_us.div_ceil(2))
    }

    /// The shortest round trip in the window.
    pub fn round_trip_us(&self) -> Option<u64> {
        self.best().map(|sample| sample.round_trip_us)
    }

    /// Forgets all samples: the other process restarted, and its clock with it.
    pub fn reset(&mut self) {
        self.samples.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_error_is_at_most_half_of_the_shortest_trip(
            skew in -1_000_000_000i64..1_000_000_000,
            trips in proptest::collection::vec((0u64..5000, 0u64..5000), 1..30),
        ) {
            let mut clock = ClockOffset::default();
            let mut now = 2_000_000_000u64;
            for (there, back) in trips {
                let remote = (now + there).checked_add_signed(skew).unwrap();
                prop_assert_eq!(clock.add(now, remote, now + there + back), Some(there + back));
                now += 250_000;
            }
            let error = (clock.offset_us().unwrap() - skew).unsigned_abs();
            prop_assert!(error <= clock.error_us_max().unwrap());
        }

        #[test]
        fn any_numbers(sent in any::<u64>(), remote in any::<u64>(), received in any::<u64>()) {
            let mut clock = ClockOffset::new(0);
            let taken = clock.add(sent, remote, received);
            prop_assert_eq!(taken.is_some(), clock.offset_us().is_some());
        }
    }

    #[test]
    fn old_samples_leave_the_window() {
        let mut clock = ClockOffset::new(2);
        clock.add(0, 1000, 0);
        clock.add(100, 5150, 200);
        clock.add(300, 5400, 500);
        assert_eq!(clock.offset_us(), Some(5000));
        assert_eq!(clock.add(10, 0, 9), None);
        clock.reset();
        assert_eq!(clock.offset_us(), None);
    }
}
