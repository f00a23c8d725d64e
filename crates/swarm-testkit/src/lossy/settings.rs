//! What the relay does to the bytes, and the commands that change it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sim::Rng;

/// A direction of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From whoever dialled to the target.
    Up,
    /// Back.
    Down,
}

/// What a relay begins with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Every byte arrives this much later, in both directions.
    pub delay: Duration,
    /// Up to this much later still; bytes stay in order.
    pub jitter: Duration,
    /// Bytes per second and direction.
    pub rate: Option<u64>,
    /// Decides jitter and which bits are flipped.
    pub seed: u64,
}

/// Which connections carry nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Cut {
    #[default]
    None,
    All,
    /// The one of this number.
    One(u64),
}

impl Cut {
    pub fn holds(self, link: u64) -> bool {
        self == Self::All || self == Self::One(link)
    }
}

/// One direction's troubles.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane {
    pub cut: Cut,
    pub stalled_until: Option<Instant>,
    pub corrupt: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub settings: Settings,
    pub rng: Rng,
    /// The number of the newest connection that reached the target; the first is 1.
    pub newest: u64,
    lanes: [Lane; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Delay(Duration, Duration),
    Rate(Option<u64>),
    Stall(Duration, Option<Way>),
    Cut(Option<Way>),
    CutNewest(Option<Way>),
    Heal,
    Corrupt(u64, Option<Way>),
    Reset,
    Status,
}

impl State {
    pub fn new(settings: Settings) -> Self {
        Self { settings, rng: Rng::new(settings.seed), newest: 0, lanes: Default::default() }
    }

    pub fn lane(&mut self, way: Way) -> &mut Lane {
        let [up, down] = &mut self.lanes;
        if way == Way::Up { up } else { down }
    }

    fn lanes(&mut self, way: Option<Way>, mut change: impl FnMut(&mut Lane)) {
        for each in [Way::Up, Way::Down] {
            if way.is_none_or(|way| way == each) {
                change(self.lane(each));
            }
        }
    }

    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Delay(delay, jitter) => {
                self.settings.delay = delay;
                self.settings.jitter = jitter;
            }
            Change::Rate(rate) => self.settings.rate = rate,
            Change::Stall(time, way) => {
                let until = Instant::now() + time;
                self.lanes(way, |lane| lane.stalled_until = Some(until));
            }
            Change::Cut(way) => self.lanes(way, |lane| lane.cut = Cut::All),
            Change::CutNewest(way) => {
                let newest = Cut::One(self.newest);
                self.lanes(way, |lane| lane.cut = newest);
            }
            Change::Corrupt(count, way) => self.lanes(way, |lane| lane.corrupt = count),
            Change::Heal => self.lanes(None, |lane| *lane = Lane { bytes: lane.bytes, ..Lane::default() }),
            Change::Reset | Change::Status => {}
        }
    }

    pub fn status(&mut self, links: usize) -> String {
        let (up, down) = (self.lane(Way::Up).bytes, self.lane(Way::Down).bytes);
        format!("connections {links} up {up} down {down}")
    }
}

/// An hour: longer is a slip of the finger.
const TIME_MS_MAX: u64 = 3_600_000;

fn millis(word: &str) -> Result<Duration> {
    let ms: u64 = word.parse().with_context(|| format!("{word:?} is no number of milliseconds"))?;
    if ms > TIME_MS_MAX {
        bail!("{ms} ms is longer than {TIME_MS_MAX} ms");
    }
    Ok(Duration::from_millis(ms))
}

fn way(word: Option<&&str>) -> Result<Option<Way>> {
    match word {
        None | Some(&"both") => Ok(None),
        Some(&"up") => Ok(Some(Way::Up)),
        Some(&"down") => Ok(Some(Way::Down)),
        Some(other) => bail!("{other:?} is no direction: up, down or both"),
    }
}

impl Change {
    pub fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Ok(match words[..] {
            ["delay", delay] => Self::Delay(millis(delay)?, Duration::ZERO),
            ["delay", delay, jitter] => Self::Delay(millis(delay)?, millis(jitter)?),
            ["rate", "off"] => Self::Rate(None),
            ["rate", bytes] => match bytes.parse() {
                Ok(0) | Err(_) => bail!("{bytes:?} is no number of bytes per second"),
                Ok(bytes) => Self::Rate(Some(bytes)),
            },
            ["stall", time, ref rest @ ..] if rest.len() < 2 => {
                Self::Stall(millis(time)?, way(rest.first())?)
            }
            ["cut", side] => Self::Cut(way(Some(&side))?),
            ["cut", side, "newest"] => Self::CutNewest(way(Some(&side))?),
            ["heal"] => Self::Heal,
            ["corrupt", count, ref rest @ ..] if rest.len() < 2 => {
                let count = count.parse().with_context(|| format!("{count:?} is no count"))?;
                Self::Corrupt(count, way(rest.first())?)
            }
            ["reset"] => Self::Reset,
            ["status"] => Self::Status,
            _ => bail!("no such command: {line:?}\n{}", super::HELP),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_or_refused() {
        let ms = Duration::from_millis;
        let good = [
            ("delay 20", Change::Delay(ms(20), ms(0))),
            (" delay 20  5 ", Change::Delay(ms(20), ms(5))),
            ("rate 1000", Change::Rate(Some(1000))),
            ("rate off", Change::Rate(None)),
            ("stall 500", Change::Stall(ms(500), None)),
            ("stall 500 up", Change::Stall(ms(500), Some(Way::Up))),
            ("cut down", Change::Cut(Some(Way::Down))),
            ("cut both", Change::Cut(None)),
            ("cut up newest", Change::CutNewest(Some(Way::Up))),
            ("corrupt 3 down", Change::Corrupt(3, Some(Way::Down))),
            ("heal", Change::Heal),
        ];
        good.into_iter()
            .for_each(|(line, change)| assert_eq!(Change::parse(line).unwrap(), change, "{line}"));
        let bad = ["", "delay", "delay -1", "delay 99999999", "rate 0", "cut", "cut left", "cut up old"];
        for bad in bad.into_iter().chain(["stall 1 up down", "x"]) {
            assert!(Change::parse(bad).is_err(), "{bad}");
        }
    }
}
