//! Placement in plain words.

use std::fmt;
use std::ops::Range;

use crate::place::{Costs, narrow};

/// A byte count as people write it: powers of ten, one decimal.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} bytes", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.1} GB", bytes / 1e9),
        }
    }
}

/// A stranger's name, escaped so that it cannot steer a terminal.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Why a node got these layers.
pub(crate) fn reason(costs: &Costs<'_>, node: usize, layers: &Range<usize>) -> String {
    let total = costs.model.layer_bytes.len();
    let all: u128 = costs.speeds.iter().map(|speed| speed.bytes_per_s).sum();
    let need = costs.memory(node, layers);
    let offered = costs.memory_offered(node);
    let mut words = format!("{} of {total} layers", layers.len());
    if let Some(speed) = costs.speeds.get(node) {
        let share = speed.bytes_per_s as f64 * 100.0 / all.max(1) as f64;
        let how = if speed.measured { "measured" } else { "assumed from its cores" };
        words += &format!(
            "; reads {:.1} GB/s ({how}), {share:.0} % of the ring's speed",
            speed.bytes_per_s as f64 / 1e9
        );
    }
    words += &format!("; needs {} of {}", Bytes(narrow(need)), Bytes(narrow(offered)));
    let before = layers.start.checked_sub(1).map(|start| start..layers.end);
    let after = (layers.end < total).then(|| layers.start..layers.end + 1);
    let mut more = [before, after].into_iter().flatten().peekable();
    if more.peek().is_some() && more.all(|more| costs.memory(node, &more) > offered) {
        words += ", and has no room for another layer";
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_and_names() {
        assert_eq!(Bytes(999).to_string(), "999 bytes");
        assert_eq!(Bytes(1_500).to_string(), "1.5 kB");
        assert_eq!(Bytes(2_000_000).to_string(), "2.0 MB");
        assert_eq!(Bytes(u64::MAX).to_string(), "18446744073.7 GB");
        assert_eq!(Quoted("a\u{1b}[2Jb").to_string(), "\"a\\u{1b}[2Jb\"");
    }
}
