//! Percentiles over the most recent samples, kept exactly.

use std::collections::VecDeque;

/// The most recent samples of one quantity, in order of size. Adding one costs a search and a
/// shift of at most `capacity` numbers.
#[derive(Clone, Debug)]
pub struct Percentiles {
    capacity: usize,
    recent: VecDeque<u64>,
    sorted: Vec<u64>,
    count: u64,
}

impl Percentiles {
    /// Keeps at most `capacity` samples (at least 1).
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), recent: VecDeque::new(), sorted: Vec::new(), count: 0 }
    }

    /// Adds a sample; the oldest one leaves when there are too many.
    pub fn add(&mut self, value: u64) {
        if self.recent.len() == self.capacity
            && let Some(oldest) = self.recent.pop_front()
            && let Ok(at) = self.sorted.binary_search(&oldest)
        {
            self.sorted.remove(at);
        }
        self.recent.push_back(value);
        let at = self.sorted.partition_point(|&other| other < value);
        self.sorted.insert(at, value);
        self.count = self.count.saturating_add(1);
    }

    /// The nearest-rank percentile, `percent` in `0..=100`; `None` without samples.
    pub fn at(&self, percent: u32) -> Option<u64> {
        let rank = (self.sorted.len() * percent.min(100) as usize).div_ceil(100);
        self.sorted.get(rank.saturating_sub(1)).copied()
    }

    /// The median.
    pub fn p50(&self) -> Option<u64> {
        self.at(50)
    }

    /// The 99th percentile.
    pub fn p99(&self) -> Option<u64> {
        self.at(99)
    }

    /// The mean of the middle half of the samples: as deaf to outliers as the median, and two quantities that differ
    /// by a third one differ so in this number as well, as long as they rise and fall together.
    pub fn middle_mean(&self) -> Option<f64> {
        let middle = self.sorted.get(middle(self.sorted.len()))?;
        (!middle.is_empty())
            .then(|| middle.iter().map(|&value| value as f64).sum::<f64>() / middle.len() as f64)
    }

    /// How many samples were ever added.
    pub fn count(&self) -> u64 {
        self.count
    }
}

impl Default for Percentiles {
    /// Keeps 512 samples.
    fn default() -> Self {
        Self::new(SAMPLES)
    }
}

/// Samples that are kept where nobody says how many.
pub(crate) const SAMPLES: usize = 512;

/// The places of the middle half of `count` sorted samples; never empty unless there are none.
pub(crate) fn middle(count: usize) -> std::ops::Range<usize> {
    let quarter = count / 4;
    quarter..count.saturating_sub(quarter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_a_sort_of_the_last_samples(
            capacity in 1usize..20,
            values in proptest::collection::vec(0u64..50, 0..60),
            percent in 0u32..=100,
        ) {
            let mut kept = Percentiles::new(capacity);
            values.iter().for_each(|&value| kept.add(value));
            let mut last = values[values.len().saturating_sub(capacity)..].to_vec();
            last.sort_unstable();
            let rank = (last.len() as f64 * f64::from(percent) / 100.0).ceil().max(1.0) as usize;
            prop_assert_eq!(kept.at(percent), last.get(rank - 1).copied());
            prop_assert_eq!(kept.count(), values.len() as u64);
            let inner = &last[middle(last.len())];
            let mean = inner.iter().sum::<u64>() as f64 / inner.len() as f64;
            prop_assert_eq!(kept.middle_mean(), (!last.is_empty()).then_some(mean));
            prop_assert!(inner.len() * 2 >= last.len());
        }
    }
}
