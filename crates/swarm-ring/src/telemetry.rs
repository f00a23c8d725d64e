//! Where a lap's time went. The parts sum to the lap.

use std::collections::VecDeque;

use swarm_wire::StageTime;

use crate::percentiles::{Percentiles, SAMPLES, middle};

/// What one stage did in one lap, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageLap {
    /// The hop to this stage: from the sender's write to the first bytes being here. Zero on the
    /// coordinator.
    pub wire_us: u64,
    /// From the first bytes of the frame to all of it being here, decrypted. On the coordinator that is the answer of
    /// the lap.
    pub receive_us: u64,
    /// From the last byte to the start of the forward.
    pub queue_us: u64,
    /// The forward.
    pub compute_us: u64,
    /// From the end of the forward to the write.
    pub serialize_us: u64,
    /// Bytes of the frame that came over the hop.
    pub bytes_in: u64,
}

/// When the answer of a lap was here, on the coordinator's clock. Alone, both are the end of the forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Its first bytes.
    pub arriving_us: u64,
    /// All of it, decrypted.
    pub received_us: u64,
}

/// One lap taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LapTimes {
    /// From the coordinator's decision to the tokens' arrival.
    pub lap_us: u64,
    /// One per stage, coordinator first.
    pub stages: Vec<StageLap>,
    /// The way of the tokens from the tail to the coordinator. Zero when the coordinator is the
    /// tail.
    pub return_us: u64,
    /// `lap_us` minus all parts. Zero unless a node's clock ran at another rate or a node stated
    /// times that cannot be.
    pub unexplained_us: i64,
    /// Every clock offset was known. Otherwise the time on the links was shared out equally.
    pub hops_measured: bool,
}

impl LapTimes {
    /// Takes a trail apart. `offsets_us[i]` is `clock of stage i - coordinator's clock` (stage 0
    /// is the coordinator: its entry is not read), `arrival` when the tokens were here.
    ///
    /// Times within a node are differences of one clock and are taken as they are. What is left
    /// of the lap was spent on the links, and is shared among them by the clock offsets.
    /// Reuses `self`'s memory.
    pub fn read(&mut self, trail: &[StageTime], offsets_us: &[Option<i64>], arrival: Arrival) {
        let start_us = trail.first().map_or(arrival.received_us, |first| first.received_us);
        self.lap_us = arrival.received_us.saturating_sub(start_us);
        self.stages.clear();
        let mut left_us = self.lap_us;
        for (stage, time) in trail.iter().enumerate() {
            // A stated time is never believed beyond the lap it is part of.
            let mut part = |from: u64, to: u64| {
                let part = to.saturating_sub(from).min(left_us);
                left_us -= part;
                part
            };
            self.stages.push(StageLap {
                wire_us: 0,
                receive_us: match stage {
                    0 => part(arrival.arriving_us, arrival.received_us),
                    _ => part(time.arriving_us, time.received_us),
                },
                queue_us: part(time.received_us, time.started_us),
                compute_us: part(time.started_us, time.finished_us),
                serialize_us: part(time.finished_us, time.sent_us),
                bytes_in: time.bytes_in,
            });
        }
        self.share_links(trail, offsets_us, arrival.arriving_us, left_us);
        self.unexplained_us = signed(self.lap_us) - signed(self.parts_us());
    }

    fn share_links(
        &mut self,
        trail: &[StageTime],
        offsets_us: &[Option<i64>],
        arriving_us: u64,
        left_us: u64,
    ) {
        self.return_us = 0;
        self.hops_measured = true;
        let hops = trail.len();
        if hops <= 1 {
            // No link: what is left was spent between the forward and this call, on one clock.
            self.return_us = left_us;
            return;
        }
        let local = |stage: usize, time_us: u64| {
            let offset = if stage == 0 { Some(0) } else { offsets_us.get(stage).copied().flatten() };
            offset.map(|offset| signed(time_us).saturating_sub(offset))
        };
        let estimate = |hop: usize| {
            let sent = local(hop - 1, trail.get(hop - 1)?.sent_us)?;
            let arriving = match trail.get(hop) {
                Some(time) => local(hop, time.arriving_us)?,
                None => signed(arriving_us),
            };
            Some(arriving.saturating_sub(sent).max(0).unsigned_abs())
        };
        let estimates: Option<Vec<u64>> = (1..=hops).map(estimate).collect();
        self.hops_measured = estimates.is_some();
        // Clamped estimates may sum to more or less than what is left: share in proportion.
        let estimates = estimates.filter(|parts| parts.iter().any(|&part| part > 0));
        let weights = estimates.unwrap_or_else(|| vec![1; hops]);
        let sum: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
        let (mut taken, mut before) = (0u64, 0u128);
        for (hop, &weight) in weights.iter().enumerate() {
            before += u128::from(weight);
            let upto = u64::try_from(u128::from(left_us) * before / sum.max(1)).unwrap_or(left_us);
            let share = upto.saturating_sub(taken);
            taken = upto;
            match self.stages.get_mut(hop + 1) {
                Some(stage) => stage.wire_us = share,
                None => self.return_us = share,
            }
        }
    }

    /// The sum of all parts.
    pub fn parts_us(&self) -> u64 {
        let stage = |stage: &StageLap| {
            [stage.wire_us, stage.receive_us, stage.queue_us, stage.compute_us, stage.serialize_us]
                .into_iter()
                .fold(0u64, u64::saturating_add)
        };
        self.stages.iter().map(stage).fold(self.return_us, u64::saturating_add)
    }

    /// The sum of the forwards.
    pub fn compute_us(&self) -> u64 {
        self.stages.iter().fold(0, |sum, stage| sum.saturating_add(stage.compute_us))
    }
}

fn signed(us: u64) -> i64 {
    i64::try_from(us).unwrap_or(i64::MAX)
}

/// Percentiles of one stage over many laps.
#[derive(Clone, Debug, Default)]
pub struct StageTelemetry {
    /// The hop to the stage, up to the first bytes.
    pub wire_us: Percentiles,
    /// The rest of the frame, and decryption.
    pub receive_us: Percentiles,
    /// The whole hop: both of the above.
    pub hop_us: Percentiles,
    /// Waiting for the compute thread.
    pub queue_us: Percentiles,
    /// The forward.
    pub compute_us: Percentiles,
    /// Encoding.
    pub serialize_us: Percentiles,
    /// Bytes over the hop, in total.
    pub bytes_in: u64,
}

/// Percentiles over many laps. Keep one for decode and one for prefill: mixed, they say nothing.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    /// Whole laps.
    pub lap_us: Percentiles,
    /// Sum of the forwards of a lap.
    pub compute_us: Percentiles,
    /// What a lap took beyond its forwards: links, queues, encoding.
    pub overhead_us: Percentiles,
    /// The way back of the tokens.
    pub return_us: Percentiles,
    /// One per stage, coordinator first.
    pub stages: Vec<StageTelemetry>,
    recent: VecDeque<LapTimes>,
}

/// The parts of a stage in a typical lap, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TypicalStage {
    /// The hop to the stage, up to the first bytes.
    pub wire_us: f64,
    /// The rest of the frame, and decryption.
    pub receive_us: f64,
    /// Waiting for the compute thread.
    pub queue_us: f64,
    /// The forward.
    pub compute_us: f64,
    /// Encoding.
    pub serialize_us: f64,
}

/// A typical lap: means over the middle half of the last laps, by length. Its parts sum to it, as those of every lap
/// do; medians of parts do not where now this part is slow and now that one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TypicalLap {
    /// The whole lap.
    pub lap_us: f64,
    /// One per stage, coordinator first.
    pub stages: Vec<TypicalStage>,
    /// The way back of the tokens.
    pub return_us: f64,
}

impl Telemetry {
    /// The lap that stands for the last 512; `None` before the first. Sorts them: for reports, not for every lap.
    pub fn typical(&self) -> Option<TypicalLap> {
        let mut laps: Vec<&LapTimes> = self.recent.iter().collect();
        laps.sort_by_key(|lap| lap.lap_us);
        let laps = laps.get(middle(laps.len())).filter(|laps| !laps.is_empty())?;
        let share = 1.0 / laps.len() as f64;
        let mut typical =
            TypicalLap { stages: vec![TypicalStage::default(); self.stages.len()], ..TypicalLap::default() };
        for lap in laps {
            typical.lap_us += lap.lap_us as f64 * share;
            typical.return_us += lap.return_us as f64 * share;
            for (mean, stage) in typical.stages.iter_mut().zip(&lap.stages) {
                mean.wire_us += stage.wire_us as f64 * share;
                mean.receive_us += stage.receive_us as f64 * share;
                mean.queue_us += stage.queue_us as f64 * share;
                mean.compute_us += stage.compute_us as f64 * share;
                mean.serialize_us += stage.serialize_us as f64 * share;
            }
        }
        Some(typical)
    }

    /// Adds a lap. A lap with another number of stages starts the stages anew: it belongs to
    /// another placement.
    pub fn add(&mut self, lap: &LapTimes) {
        if self.stages.len() != lap.stages.len() {
            self.stages = vec![StageTelemetry::default(); lap.stages.len()];
            self.recent.clear();
        }
        // The oldest one's memory is the newest one's.
        let mut kept =
            if self.recent.len() == SAMPLES { self.recent.pop_front() } else { None }.unwrap_or_default();
        kept.clone_from(lap);
        self.recent.push_back(kept);
        self.lap_us.add(lap.lap_us);
        self.compute_us.add(lap.compute_us());
        self.overhead_us.add(lap.lap_us.saturating_sub(lap.compute_us()));
        self.return_us.add(lap.return_us);
        for (total, stage) in self.stages.iter_mut().zip(&lap.stages) {
            total.wire_us.add(stage.wire_us);
            total.receive_us.add(stage.receive_us);
            total.hop_us.add(stage.wire_us.saturating_add(stage.receive_us));
            total.queue_us.add(stage.queue_us);
            total.compute_us.add(stage.compute_us);
            total.serialize_us.add(stage.serialize_us);
            total.bytes_in = total.bytes_in.saturating_add(stage.bytes_in);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn any_time() -> impl Strategy<Value = StageTime> {
        let value = || prop_oneof![0u64..1000, 0..=1u64 << 53, any::<u64>()];
        (value(), value(), value(), value(), value()).prop_map(
            |(arriving_us, received_us, started_us, finished_us, sent_us)| StageTime {
                arriving_us,
                received_us,
                started_us,
                finished_us,
                sent_us,
                bytes_in: 1,
            },
        )
    }

    proptest! {
        #[test]
        fn any_trail_sums_up(
            trail in vec(any_time(), 0..6),
            offsets in vec(any::<Option<i64>>(), 0..6),
            arriving_us in any::<u64>(),
            received_us in any::<u64>(),
        ) {
            let mut lap = LapTimes::default();
            lap.read(&trail, &offsets, Arrival { arriving_us, received_us });
            prop_assert!(lap.parts_us() <= lap.lap_us);
            prop_assert_eq!(lap.stages.len(), trail.len());
            Telemetry::default().add(&lap);
        }

        /// An honest lap, clocks with any skew, offsets known exactly: every part is found.
        #[test]
        fn an_honest_lap_is_taken_apart_exactly(
            parts in vec([0u64..500, 0u64..500, 0u64..500, 1u64..9000, 0u64..500], 2..6),
            skews in vec(-1_000_000i64..1_000_000, 6),
            back in 0u64..500,
            last in 0u64..500,
        ) {
            let mut now = 10_000_000u64;
            let mut trail = Vec::new();
            let mut wanted = Vec::new();
            let mut offsets = vec![None];
            for (stage, &[wire, receive, queue, compute, serialize]) in parts.iter().enumerate() {
                let (wire, receive) = if stage == 0 { (0, 0) } else { (wire, receive) };
                let skew = if stage == 0 { 0 } else { skews[stage] };
                if stage > 0 {
                    offsets.push(Some(skew));
                }
                let at = |us: u64| us.checked_add_signed(skew).unwrap();
                let received = now + wire + receive;
                trail.push(StageTime {
                    arriving_us: at(now + wire),
                    received_us: at(received),
                    started_us: at(received + queue),
                    finished_us: at(received + queue + compute),
                    sent_us: at(received + queue + compute + serialize),
                    bytes_in: 3,
                });
                now = received + queue + compute + serialize;
                // The coordinator receives the answer.
                let receive_us = if stage == 0 { last } else { receive };
                let (wire_us, queue_us, compute_us, serialize_us) = (wire, queue, compute, serialize);
                wanted.push(StageLap { wire_us, receive_us, queue_us, compute_us, serialize_us, bytes_in: 3 });
            }
            let mut lap = LapTimes::default();
            let arrival = Arrival { arriving_us: now + back, received_us: now + back + last };
            lap.read(&trail, &offsets, arrival);
            prop_assert_eq!(lap.lap_us, now + back + last - 10_000_000);
            prop_assert_eq!(lap.return_us, back);
            prop_assert_eq!(&lap.stages, &wanted);
            prop_assert_eq!(lap.unexplained_us, 0);
            prop_assert!(lap.hops_measured);
            // Unknown offsets: still the whole lap, shared equally.
            lap.read(&trail, &[], arrival);
            prop_assert_eq!(lap.unexplained_us, 0);
            prop_assert!(!lap.hops_measured);
        }
    }

    #[test]
    fn a_typical_lap_is_the_sum_of_its_parts_though_their_medians_are_not() {
        let mut telemetry = Telemetry::default();
        assert_eq!(telemetry.typical(), None);
        // Every lap takes 1200 us, and another one of its four parts is slow each time.
        for lap in 0..1000usize {
            let part = |slow: usize| if lap % 4 == slow { 900 } else { 100 };
            let stage = |parts: [usize; 2]| StageLap {
                queue_us: part(parts[0]),
                compute_us: part(parts[1]),
                ..StageLap::default()
            };
            let stages = vec![stage([0, 1]), stage([2, 3])];
            telemetry.add(&LapTimes { lap_us: 1200, stages, ..LapTimes::default() });
        }
        // And one that stands for nothing.
        telemetry.add(&LapTimes {
            lap_us: 1 << 40,
            stages: vec![StageLap::default(); 2],
            ..LapTimes::default()
        });
        let medians: u64 =
            telemetry.stages.iter().filter_map(|it| Some(it.queue_us.p50()? + it.compute_us.p50()?)).sum();
        assert_eq!(medians, 400);
        let typical = telemetry.typical().unwrap();
        let parts: f64 = typical.stages.iter().map(|it| it.queue_us + it.compute_us).sum();
        assert!((typical.lap_us - 1200.0).abs() < 1e-6 && (parts - 1200.0).abs() < 1e-6, "{typical:?}");
        // Another placement: its laps alone count.
        telemetry.add(&LapTimes { lap_us: 7, stages: vec![StageLap::default(); 3], ..LapTimes::default() });
        assert_eq!(telemetry.typical().unwrap().lap_us, 7.0);
    }

    #[test]
    fn a_small_clock_error_moves_time_between_hops_only() {
        let time = |received_us, started_us, finished_us, sent_us| StageTime {
            arriving_us: received_us,
            received_us,
            started_us,
            finished_us,
            sent_us,
            bytes_in: 9,
        };
        // The hop took 10 us, the way back 10 us; the offset is 30 us wrong.
        let trail = [time(1000, 1000, 2000, 2000), time(2010, 2020, 3020, 3030)];
        let mut lap = LapTimes::default();
        lap.read(&trail, &[None, Some(30)], Arrival { arriving_us: 3040, received_us: 3040 });
        assert_eq!(lap.lap_us, 2040);
        assert_eq!(lap.unexplained_us, 0);
        assert_eq!(lap.stages[1].wire_us + lap.return_us, 20);
        assert_eq!(lap.stages[1].compute_us, 1000);
    }
}
