//! What happens while an engine starts, on standard error: bars where there is a terminal, lines for what people
//! must know.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use swarm_node::{EngineEvent, LoadSource, SearchEvent};

use super::text;

/// A bar of bytes.
pub fn bytes_bar(total: u64, label: String) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(label);
    bar
}

/// Where bytes come from, after a node's name.
pub fn source(from: LoadSource) -> &'static str {
    match from {
        LoadSource::Disk => "",
        LoadSource::Hub => " from the Hub",
        LoadSource::Peer => " from other nodes",
    }
}

/// Shows the events of a starting engine.
pub struct Progress {
    bars: MultiProgress,
    /// By node and source: one line each, and the next source takes the line of the one before.
    nodes: RefCell<BTreeMap<usize, (LoadSource, ProgressBar)>>,
    names: RefCell<Vec<String>>,
    /// Tell of the search, too.
    search: bool,
}

impl Progress {
    /// With lines about the search for workers (`search`), or without: workers of one's own are no news.
    pub fn new(search: bool) -> Self {
        Self { bars: MultiProgress::new(), nodes: RefCell::default(), names: RefCell::default(), search }
    }

    pub fn event(&self, event: EngineEvent) {
        match event {
            EngineEvent::Search(event) => self.search(&event),
            EngineEvent::Placed(placement) => {
                let label = |stage: &swarm_ring::PlacedStage| {
                    format!("{} layers {}..{}", text::line(&stage.name), stage.layers.start, stage.layers.end)
                };
                *self.names.borrow_mut() = placement.stages.iter().map(label).collect();
            }
            EngineEvent::Loading { node, bytes_done, bytes_total, from } => {
                let mut nodes = self.nodes.borrow_mut();
                if let Some((before, bar)) = nodes.get(&node)
                    && *before != from
                {
                    bar.finish_and_clear();
                    nodes.remove(&node);
                }
                let (_, bar) = nodes.entry(node).or_insert_with(|| {
                    let label = self.names.borrow().get(node).cloned().unwrap_or_default();
                    (from, self.bars.add(bytes_bar(bytes_total, format!("{label}{}", source(from)))))
                });
                bar.set_length(bytes_total);
                bar.set_position(bytes_done);
            }
        }
    }

    fn search(&self, event: &SearchEvent) {
        match event {
            SearchEvent::Searching { within } if self.search && std::io::stderr().is_terminal() => {
                text::note(&format!("looking for workers, {} s at most", within.as_secs()));
            }
            SearchEvent::Found { name, address } if self.search => {
                text::note(&format!("found {name} at {address}"));
            }
            SearchEvent::Unusable { address, why } => {
                text::note(&format!("cannot use {address}: {why}"));
            }
            SearchEvent::DiscoveryUnavailable { why } if self.search => {
                text::note(&format!("no discovery on this network: {why}; use --peer HOST:PORT"));
            }
            _ => {}
        }
    }

    /// Removes the bars.
    pub fn clear(&self) {
        for (_, bar) in std::mem::take(&mut *self.nodes.borrow_mut()).values() {
            bar.finish_and_clear();
        }
        // A terminal that cannot be cleared shows bars a little longer.
        let _ = self.bars.clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
