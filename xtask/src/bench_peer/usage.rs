//! What other processes did to a measurement. Engines whose threads spin at barriers lose most
//! of their speed, not a part of it, when one core is taken from them, so a ratio from a busy
//! machine means nothing.

use std::fs;

/// Processor time so far, in ticks of the kernel's accounting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// All cores: busy, and busy or idle.
    busy: u64,
    total: u64,
    cores: u64,
    /// This process and the children it has waited for, with theirs.
    own: u64,
}

impl Usage {
    /// `None` where there is no /proc.
    pub fn now() -> Option<Usage> {
        let (all, own) =
            (fs::read_to_string("/proc/stat").ok()?, fs::read_to_string("/proc/self/stat").ok()?);
        Usage::parse(&all, &own)
    }

    fn parse(all: &str, own: &str) -> Option<Usage> {
        // user nice system idle iowait irq softirq steal; what follows is in user and nice already.
        let times = all.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let times: Vec<u64> = times.split_whitespace().take(8).filter_map(|time| time.parse().ok()).collect();
        let &[user, nice, system, idle, iowait, irq, softirq, steal] = times.as_slice() else { return None };
        let busy = user + nice + system + irq + softirq + steal;
        let core = |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| !rest.starts_with(' '));
        let cores = all.lines().filter(core).count() as u64;
        // `pid (name) state ...`, and the name may hold anything; utime is the 12th word after it.
        let words = own.rsplit_once(')')?.1.split_whitespace().skip(11).take(4);
        let own: Vec<u64> = words.filter_map(|time| time.parse().ok()).collect();
        (own.len() == 4).then(|| Usage { busy, total: busy + idle + iowait, cores, own: own.iter().sum() })
    }

    /// Cores that others kept busy on average since `before`.
    pub fn others_since(&self, before: &Usage) -> Option<f64> {
        let total = self.total.checked_sub(before.total).filter(|&total| total > 0)?;
        let busy = self.busy.saturating_sub(before.busy);
        let others = busy.saturating_sub(self.own.saturating_sub(before.own));
        Some(others as f64 / total as f64 * self.cores as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(user: u64, idle: u64) -> String {
        format!(
            "cpu  {user} 0 50 {idle} 0 0 0 0 0 0\ncpu0 1 0 0 1 0 0 0 0 0 0\ncpu1 1 0 0 1 0 0 0 0 0 0\nintr 5\n"
        )
    }

    fn own(children: u64) -> String {
        format!("7 (a (b) c) S 1 7 7 0 -1 0 1 2 3 4 10 5 {children} 5 20 0 1 0 9\n")
    }

    #[test]
    fn what_is_not_ours_is_the_others() {
        let before = Usage::parse(&stat(100, 1000), &own(0)).unwrap();
        assert_eq!(before, Usage { busy: 150, total: 1150, cores: 2, own: 20 });
        // Of 200 ticks on two cores 150 were busy, 100 of them ours.
        let after = Usage::parse(&stat(250, 1050), &own(100)).unwrap();
        assert_eq!(after.others_since(&before), Some(0.5));
        let alone = Usage::parse(&stat(250, 1050), &own(150)).unwrap();
        assert_eq!(alone.others_since(&before), Some(0.0));
        assert_eq!(before.others_since(&before), None);
    }

    #[test]
    fn what_is_no_stat_file_gives_nothing() {
        assert_eq!(Usage::parse("", &own(0)), None);
        assert_eq!(Usage::parse("cpu  1 2 3\n", &own(0)), None);
        assert_eq!(Usage::parse(&stat(1, 1), "7 (x"), None);
    }
}
