//! Whether a member of the ring still answers.

/// How a member stands, by its pings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// It answers.
    Alive,
    /// It left [`Heartbeat::SUSPECT_PINGS`] pings without an answer: 1 s.
    Suspect,
    /// It left [`Heartbeat::DEAD_PINGS`] pings without an answer: 3 s. It is given up.
    Dead,
}

/// Counts the pings a member has left without an answer. Pings and not time, so that a node that was stopped itself
/// does not take the others for dead when it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    unanswered: u32,
}

impl Heartbeat {
    /// Time between two pings, in microseconds.
    pub const PING_EVERY_US: u64 = 250_000;
    /// Unanswered pings of a suspect.
    pub const SUSPECT_PINGS: u32 = 4;
    /// Unanswered pings of the dead.
    pub const DEAD_PINGS: u32 = 12;

    /// It is time for the next ping: how the member stands before it is sent.
    pub fn ping(&mut self) -> Health {
        let health = Self::after(self.unanswered);
        self.unanswered = self.unanswered.saturating_add(1);
        health
    }

    /// An answer came, to whichever ping.
    pub fn pong(&mut self) {
        self.unanswered = 0;
    }

    /// How the member stands between two pings: the last one may still be answered.
    pub fn health(&self) -> Health {
        Self::after(self.unanswered.saturating_sub(1))
    }

    fn after(unanswered: u32) -> Health {
        match unanswered {
            Self::DEAD_PINGS.. => Health::Dead,
            Self::SUSPECT_PINGS.. => Health::Suspect,
            _ => Health::Alive,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_makes_a_suspect_then_a_dead_member() {
        let mut heartbeat = Heartbeat::default();
        let seen: Vec<Health> = (0..13).map(|_| heartbeat.ping()).collect();
        assert!(seen[..4].iter().all(|&health| health == Health::Alive), "{seen:?}");
        assert!(seen[4..12].iter().all(|&health| health == Health::Suspect), "{seen:?}");
        assert_eq!(seen[12], Health::Dead);
        let mut late = Heartbeat::default();
        let between: Vec<Health> = (0..6).map(|_| (late.ping(), late.health()).1).collect();
        assert_eq!(between[..4], [Health::Alive; 4]);
        assert_eq!(between[4], Health::Suspect);
        heartbeat.pong();
        assert_eq!(heartbeat.health(), Health::Alive);
        heartbeat.unanswered = u32::MAX;
        assert_eq!(heartbeat.ping(), Health::Dead);
    }
}
