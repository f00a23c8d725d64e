//! When the next frame is due: decode laps follow each other like a clock, and a core that is awake when the frame comes
//! takes it some tens of microseconds sooner than one that has to be woken.

use std::time::{Duration, Instant};

/// How long before and after the expected moment to watch: this part of the time between two frames, and at most
/// [`WATCH_MAX`]. It bounds what watching costs: an eighth of a core while a stage waits.
const WATCH_PART: u32 = 16;
const WATCH_MAX: Duration = Duration::from_millis(1);

/// Frames further apart than this are not laps that follow each other.
const GAP_MAX: Duration = Duration::from_secs(1);

/// Frames that are not watched for after one was in vain: on a busy computer, who does not sleep is put behind others.
const REST: u32 = 32;

/// The times between frames.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    last: Option<Instant>,
    resting: u32,
    /// The last gap and the one before.
    gaps: [Option<Duration>; 2],
}

impl Pace {
    /// Notes a frame.
    pub fn came(&mut self, at: Instant) {
        let gap = self.last.map(|last| at.saturating_duration_since(last)).filter(|gap| *gap <= GAP_MAX);
        self.gaps = [gap, self.gaps[0]];
        self.last = Some(at);
        self.resting = self.resting.saturating_sub(1);
    }

    /// Notes whether watching was worth it.
    pub fn watched(&mut self, well: bool) {
        if !well {
            self.resting = REST;
        }
    }

    /// From when until when the next frame is to be watched for; `None` while two gaps do not agree, or watching
    /// was in vain lately.
    pub fn due(&self) -> Option<(Instant, Instant)> {
        let [Some(gap), Some(before)] = self.gaps else { return None };
        let margin = (gap / WATCH_PART).min(WATCH_MAX);
        if self.resting > 0 || gap.abs_diff(before) > 2 * margin {
            return None;
        }
        let at = self.last? + gap;
        Some((at - margin, at + margin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_at_a_steady_pace_are_watched_for() {
        let start = Instant::now();
        let at = |us: u64| start + Duration::from_micros(us);
        let mut pace = Pace::default();
        for us in [0, 8_000] {
            pace.came(at(us));
            assert_eq!(pace.due(), None);
        }
        pace.came(at(16_160));
        // A sixteenth of 8.16 ms on either side.
        assert_eq!(pace.due(), Some((at(23_810), at(24_830))));
        // A prompt chunk between them, and a pause: not before two gaps agree again.
        for us in [18_000, 26_000, 5_000_000, 5_008_000] {
            pace.came(at(us));
            assert_eq!(pace.due(), None, "{us}");
        }
        pace.came(at(5_016_000));
        assert!(pace.due().is_some());
        pace.watched(true);
        assert!(pace.due().is_some());
        pace.watched(false);
        for lap in 1..=u64::from(REST) {
            assert_eq!(pace.due(), None);
            pace.came(at(5_016_000 + lap * 8_000));
        }
        assert!(pace.due().is_some());
        // Slow laps are watched for a millisecond, not for an eighth of their time.
        for us in [6_000_000, 6_084_000, 6_168_000] {
            pace.came(at(us));
        }
        assert_eq!(pace.due(), Some((at(6_251_000), at(6_253_000))));
    }
}
