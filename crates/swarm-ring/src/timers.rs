//! Every wait of the scheduler, in one table.

use crate::percentiles::Percentiles;

/// How long a lap may take before the ring counts as silent. Laps are measured by the scheduler
/// itself; until there is a measurement the first numbers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// No lap is overdue before this. Longer than a receipt may take, which says better who is to blame.
    pub lap_us_min: u64,
    /// A decode lap is overdue after this many times the measured 99th percentile, a prefill lap
    /// after this many times the measured 99th percentile per row.
    pub factor: u64,
    /// A lap before the first measurement: this...
    pub first_lap_us: u64,
    /// ...plus this for each row.
    pub first_row_us: u64,
    /// No lap may take longer than this, whatever was measured.
    pub lap_us_max: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            lap_us_min: 3_500_000,
            factor: 8,
            first_lap_us: 10_000_000,
            first_row_us: 500_000,
            lap_us_max: 120_000_000,
        }
    }
}

/// What a lap carries, as far as its deadline cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LapSize {
    pub(crate) rows: u64,
    pub(crate) prefill: bool,
}

/// Lap times measured so far, and the deadlines that follow from them.
#[derive(Clone, Debug, Default)]
pub(crate) struct LapClock {
    decode_us: Percentiles,
    prefill_row_us: Percentiles,
}

impl LapClock {
    pub(crate) fn add(&mut self, size: LapSize, lap_us: u64) {
        if size.prefill {
            self.prefill_row_us.add(lap_us.div_ceil(size.rows.max(1)));
        } else {
            self.decode_us.add(lap_us);
        }
    }

    pub(crate) fn allowance_us(&self, timers: &Timers, size: LapSize) -> u64 {
        let first = timers.first_lap_us.saturating_add(timers.first_row_us.saturating_mul(size.rows));
        let measured = if size.prefill {
            self.prefill_row_us.p99().map(|row| row.saturating_mul(size.rows))
        } else {
            self.decode_us.p99()
        };
        let allowance = match measured {
            Some(lap) => lap.saturating_mul(timers.factor).max(timers.lap_us_min),
            None => first,
        };
        allowance.min(timers.lap_us_max)
    }

    pub(crate) fn decode_us(&self) -> &Percentiles {
        &self.decode_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_follow_measurements() {
        let timers = Timers::default();
        let mut clock = LapClock::default();
        let decode = LapSize { rows: 1, prefill: false };
        let prefill = LapSize { rows: 64, prefill: true };
        assert_eq!(clock.allowance_us(&timers, decode), 10_500_000);
        assert_eq!(clock.allowance_us(&timers, prefill), 42_000_000);
        clock.add(decode, 30_000);
        assert_eq!(clock.allowance_us(&timers, decode), 3_500_000);
        clock.add(decode, 500_000);
        assert_eq!(clock.allowance_us(&timers, decode), 4_000_000);
        clock.add(prefill, 640_000);
        assert_eq!(clock.allowance_us(&timers, prefill), 5_120_000);
        clock.add(decode, u64::MAX);
        assert_eq!(clock.allowance_us(&timers, decode), timers.lap_us_max);
    }
}
