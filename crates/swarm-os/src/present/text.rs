//! Text for people: escaped, aligned, with units.

use std::io::{self, IsTerminal, Write};

use swarm_ring::{Placement, SpeedSource};

/// One line of a stranger's text: what could steer a terminal or break the line is spelled out.
pub fn line(text: &str) -> String {
    swarm_node::printable(text)
}

/// A model's text for a terminal: as it is, except for control characters other than newline and tab.
pub fn harmless(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, char| {
        match char {
            '\n' | '\t' => out.push(char),
            char if char.is_control() => out.extend(char.escape_default()),
            char => out.push(char),
        }
        out
    })
}

/// Standard output for an answer, as it comes.
pub struct AnswerOut {
    terminal: bool,
}

impl AnswerOut {
    pub fn stdout() -> Self {
        Self { terminal: io::stdout().is_terminal() }
    }

    /// Writes a piece at once.
    pub fn piece(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.terminal {
            out.write_all(harmless(text).as_bytes())?;
        } else {
            out.write_all(text.as_bytes())?;
        }
        out.flush()
    }
}

/// Writes `text` and a newline to standard output.
pub fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// A line of news on standard error, from anywhere. Nobody to tell when it is closed.
pub fn note(text: &str) {
    let _ = io::stderr().write_all(format!("{}\n", line(text)).as_bytes());
}

/// Rows in aligned columns, two spaces apart, no spaces at the ends. Columns named in `right` are right-aligned.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let mut widths = vec![0; rows.iter().map(Vec::len).max().unwrap_or(0)];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut lines = Vec::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        lines.push(cells.collect::<Vec<_>>().join("  ").trim_end().to_owned());
    }
    lines.join("\n")
}

/// A number with `digits` decimals and its unit, or `-` when it is not known.
pub fn number(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

/// Microseconds as milliseconds.
pub fn ms(us: Option<u64>) -> Option<f64> {
    us.map(|us| us as f64 / 1e3)
}

/// Bytes for people.
pub fn bytes(bytes: u64) -> String {
    swarm_node::bytes_text(bytes)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Which layers are where. `names` are the nodes' names, safe to print.
pub fn placement(placement: &Placement, names: &[String]) -> String {
    let mut rows = vec![["node", "layers", "weights", "memory", "predicted"].map(String::from).to_vec()];
    for (index, stage) in placement.stages.iter().enumerate() {
        rows.push(vec![
            line(names.get(index).unwrap_or(&stage.name)),
            format!("{}..{}", stage.layers.start, stage.layers.end),
            bytes(stage.weight_bytes),
            bytes(stage.memory_bytes),
            format!("{:.2} ms ({})", stage.predicted_ms, source(stage.source)),
        ]);
    }
    table(&rows, &[2, 3, 4])
}

/// How a node's speed is known.
pub fn source(source: SpeedSource) -> &'static str {
    match source {
        SpeedSource::Assumed => "assumed",
        SpeedSource::Probe => "probed",
        SpeedSource::Layers => "measured",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(line("a\u{1b}[2J\nb\u{9b}é"), "a\\u{1b}[2J\\nb\\u{9b}é");
        assert_eq!(harmless("a\u{1b}[2J\n\tb\r\u{7}"), "a\\u{1b}[2J\n\tb\\r\\u{7}");
    }

    #[test]
    fn columns_are_aligned() {
        let rows = vec![vec!["a".into(), "10".into()], vec!["long".into(), "2".into()]];
        assert_eq!(table(&rows, &[1]), "a     10\nlong   2");
        assert_eq!(table(&[], &[]), "");
    }

    #[test]
    fn an_unknown_number_is_a_dash() {
        assert_eq!(number(None, 1, " ms"), "-");
        assert_eq!(number(Some(1.25), 1, " ms"), "1.2 ms");
    }
}
