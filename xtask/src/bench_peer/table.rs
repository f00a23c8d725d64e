//! Medians, ratios pair by pair, and the tables.

use serde_json::{Value, json};

use super::engines::Measured;

/// Both engines, one right after the other.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub ours: Measured,
    pub peer: Measured,
}

impl Pair {
    /// Whether others took more than a tenth of a core from either run.
    pub fn disturbed(&self) -> bool {
        [self.ours, self.peer].iter().any(|side| side.others_cores.is_some_and(|cores| cores > 0.1))
    }
}

/// All pairs of one model, thread count and number of sessions.
#[derive(Debug)]
pub struct Row {
    pub model: String,
    pub threads: usize,
    pub sessions: usize,
    pub prompt_tokens: usize,
    pub pairs: Vec<Pair>,
}

/// Medians of one quantity, and its ratio ours / peer pair by pair.
#[derive(Debug, PartialEq)]
pub struct Summary {
    pub ours: f64,
    pub peer: f64,
    pub ratio: f64,
    pub ratio_min: f64,
    pub ratio_max: f64,
}

impl Row {
    pub fn prefill(&self) -> Summary {
        self.summary(|side| side.prefill_tok_per_s)
    }

    pub fn decode(&self) -> Summary {
        self.summary(|side| side.decode_tok_per_s)
    }

    fn summary(&self, quantity: impl Fn(&Measured) -> f64) -> Summary {
        let ratios = || self.pairs.iter().map(|pair| quantity(&pair.ours) / quantity(&pair.peer));
        Summary {
            ours: median(self.pairs.iter().map(|pair| quantity(&pair.ours))),
            peer: median(self.pairs.iter().map(|pair| quantity(&pair.peer))),
            ratio: median(ratios()),
            ratio_min: ratios().fold(f64::INFINITY, f64::min),
            ratio_max: ratios().fold(0.0, f64::max),
        }
    }

    /// Median of our decode speed as a part of the read bandwidth.
    fn bandwidth_fraction(&self) -> f64 {
        median(self.pairs.iter().filter_map(|pair| pair.ours.bandwidth_fraction))
    }

    /// Pairs during which other processes were busy.
    pub fn disturbed(&self) -> usize {
        self.pairs.iter().filter(|pair| pair.disturbed()).count()
    }

    /// Largest peak memory of ours and of the peer.
    fn peak_rss_bytes(&self) -> (u64, u64) {
        let most = |side: fn(&Pair) -> &Measured| {
            self.pairs.iter().map(|pair| side(pair).peak_rss_bytes).max().unwrap_or(0)
        };
        (most(|pair| &pair.ours), most(|pair| &pair.peer))
    }

    pub fn json(&self) -> Value {
        let summary = |s: Summary| json!({"ours": s.ours, "peer": s.peer, "ratio": s.ratio, "ratio_range": [s.ratio_min, s.ratio_max]});
        let side = |m: &Measured| {
            json!({
                "prefill_tok_per_s": m.prefill_tok_per_s, "decode_tok_per_s": m.decode_tok_per_s,
                "peak_rss_bytes": m.peak_rss_bytes, "decode_bandwidth_fraction": m.bandwidth_fraction,
                "read_bandwidth_gb_s": m.read_bandwidth_gb_s, "others_cores": m.others_cores,
            })
        };
        let pairs = self.pairs.iter().map(|pair| json!({"ours": side(&pair.ours), "peer": side(&pair.peer)}));
        let (ours, peer) = self.peak_rss_bytes();
        json!({
            "model": self.model, "threads": self.threads, "sessions": self.sessions, "prompt_tokens": self.prompt_tokens,
            "prefill_tok_per_s": summary(self.prefill()), "decode_tok_per_s": summary(self.decode()),
            "decode_bandwidth_fraction": self.bandwidth_fraction(),
            "peak_rss_bytes": {"ours": ours, "peer": peer}, "disturbed_pairs": self.disturbed(), "pairs": pairs.collect::<Vec<_>>(),
        })
    }
}

/// The middle value, or the mean of the middle two; NaN of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (None, _) => f64::NAN,
        (Some(upper), 1) => *upper,
        (Some(upper), _) => (values[middle - 1] + upper) / 2.0,
    }
}

fn number(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "-".to_owned() }
}

fn ratio(summary: &Summary) -> String {
    let Summary { ratio, ratio_min, ratio_max, .. } = summary;
    format!("{} ({} to {})", number(*ratio, 2), number(*ratio_min, 2), number(*ratio_max, 2))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

/// Rows of cells as a Markdown table; numbers stand right, the first column left.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        out.push_str(&line(row));
        if index == 0 {
            let rule = row.iter().enumerate().map(|(column, _)| if column == 0 { "---" } else { "---:" });
            out.push_str(&line(&rule.map(String::from).collect::<Vec<_>>()));
        }
    }
    out
}

fn cells(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// One line per model and thread count.
pub fn details(rows: &[Row]) -> String {
    let mut table = vec![cells(&[
        "tok/s, medians",
        "threads",
        "sessions",
        "prefill, ours",
        "llama.cpp",
        "ratio",
        "decode, ours",
        "llama.cpp",
        "ratio",
        "of read bandwidth",
        "peak memory, ours",
        "llama.cpp",
        "disturbed pairs",
    ])];
    for row in rows {
        let (prefill, decode, (ours, peer)) = (row.prefill(), row.decode(), row.peak_rss_bytes());
        table.push(vec![
            row.model.clone(),
            row.threads.to_string(),
            row.sessions.to_string(),
            number(prefill.ours, 1),
            number(prefill.peer, 1),
            ratio(&prefill),
            number(decode.ours, 1),
            number(decode.peer, 1),
            ratio(&decode),
            // Of many sessions it says nothing about the batch.
            if row.sessions == 1 { number(row.bandwidth_fraction(), 2) } else { "-".to_owned() },
            megabytes(ours),
            megabytes(peer),
            format!("{} of {}", row.disturbed(), row.pairs.len()),
        ]);
    }
    markdown(&table)
}

/// Ratios only: one line per kind of step and thread count, one column per model.
pub fn ratios(rows: &[Row]) -> String {
    let mut models: Vec<&str> = Vec::new();
    let mut lines: Vec<(usize, usize)> = Vec::new();
    for row in rows {
        if !models.contains(&row.model.as_str()) {
            models.push(&row.model);
        }
        if !lines.contains(&(row.sessions, row.threads)) {
            lines.push((row.sessions, row.threads));
        }
    }
    lines.sort_unstable();
    let mut table = vec![cells(&["ours / llama.cpp"])];
    table[0].extend(models.iter().map(|model| (*model).to_owned()));
    let mut push = |name: String, (sessions, threads): (usize, usize), of: fn(&Row) -> Summary| {
        let mut line = vec![name];
        for model in &models {
            let row = rows
                .iter()
                .find(|row| row.model == *model && row.sessions == sessions && row.threads == threads);
            line.push(row.map_or_else(|| "-".to_owned(), |row| ratio(&of(row))));
        }
        table.push(line);
    };
    for &key @ (sessions, threads) in &lines {
        let threads = if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
        if sessions == 1 {
            push(format!("decode, {threads}"), key, Row::decode);
            push(format!("prefill, {threads}"), key, Row::prefill);
        } else {
            push(format!("decode of {sessions} sessions, total, {threads}"), key, Row::decode);
        }
    }
    markdown(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ours: (f64, f64), peer: (f64, f64)) -> Pair {
        let side = |(prefill, decode), rss| Measured {
            prefill_tok_per_s: prefill,
            decode_tok_per_s: decode,
            peak_rss_bytes: rss,
            bandwidth_fraction: Some(0.9),
            read_bandwidth_gb_s: Some(10.0),
            others_cores: Some(0.02),
        };
        Pair { ours: side(ours, 2_000_000), peer: side(peer, 3_000_000) }
    }

    fn row(model: &str, threads: usize, sessions: usize, pairs: Vec<Pair>) -> Row {
        Row { model: model.to_owned(), threads, sessions, prompt_tokens: 512, pairs }
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // A machine that slows down in the last pair: both engines, so the ratio stays.
        let pairs = vec![
            pair((20.0, 10.0), (10.0, 8.0)),
            pair((22.0, 9.0), (10.0, 10.0)),
            pair((4.0, 2.0), (2.0, 1.0)),
        ];
        let row = row("a", 1, 1, pairs);
        let want = Summary { ours: 20.0, peer: 10.0, ratio: 2.0, ratio_min: 2.0, ratio_max: 2.2 };
        assert_eq!(row.prefill(), want);
        let want = Summary { ours: 9.0, peer: 8.0, ratio: 1.25, ratio_min: 0.9, ratio_max: 2.0 };
        assert_eq!(row.decode(), want);
    }

    #[test]
    fn tables() {
        let one = |threads, sessions| row("f16", threads, sessions, vec![pair((20.0, 15.0), (10.0, 10.0))]);
        let rows = [one(1, 1), one(2, 8), row("smol", 1, 1, vec![pair((5.0, 5.0), (10.0, 4.0))])];
        let want = "\
| ours / llama.cpp | f16 | smol |
| --- | ---: | ---: |
| decode, 1 thread | 1.50 (1.50 to 1.50) | 1.25 (1.25 to 1.25) |
| prefill, 1 thread | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) |
| decode of 8 sessions, total, 2 threads | 1.50 (1.50 to 1.50) | - |
";
        assert_eq!(ratios(&rows), want);
        let details = details(&rows);
        let line = "| f16 | 1 | 1 | 20.0 | 10.0 | 2.00 (2.00 to 2.00) | 15.0 | 10.0 | 1.50 (1.50 to 1.50) | 0.90 | 2 MB | 3 MB | 0 of 1 |";
        assert_eq!(details.lines().nth(2), Some(line));
    }

    #[test]
    fn a_neighbour_in_either_run_disturbs_the_pair() {
        let mut busy = pair((1.0, 1.0), (1.0, 1.0));
        busy.peer.others_cores = Some(0.9);
        let mut unknown = busy;
        unknown.peer.others_cores = None;
        assert_eq!(row("a", 1, 1, vec![busy, unknown, busy]).disturbed(), 2);
    }

    #[test]
    fn json_keeps_every_pair() {
        let value = row("a", 2, 8, vec![pair((20.0, 15.0), (10.0, 10.0)); 3]).json();
        assert_eq!(value["pairs"].as_array().map(Vec::len), Some(3));
        assert_eq!(value["decode_tok_per_s"]["ratio"], 1.5);
        assert_eq!(value["peak_rss_bytes"]["peer"], 3_000_000);
    }
}
