//! Stop strings over a stream of text.

use std::mem;

/// Watches generated text for stop strings and lets through only text that cannot belong to one.
///
/// The answer ends where a stop string first becomes complete: among all occurrences the one that **ends** first
/// counts, and of those that end there the longest. Text before it is let through, the stop string and everything
/// after it is not. How the text was cut into pushes makes no difference.
///
/// A push costs time proportional to its bytes times the number of stop strings; at most the longest stop string's
/// bytes are held back.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<Matcher>,
    held: String,
    hit: Option<usize>,
}

/// One stop string as a Knuth-Morris-Pratt automaton over bytes.
#[derive(Debug, Clone)]
struct Matcher {
    /// Index in the list the caller gave.
    index: usize,
    stop: Vec<u8>,
    /// `fallback[n]`: the longest proper prefix that is also a suffix of the first `n + 1` bytes.
    fallback: Vec<usize>,
    /// Bytes of `stop` that the text so far ends with. Always less than its length.
    matched: usize,
}

impl StopStrings {
    /// Watches for any of `stops`. Empty strings are ignored: they would end every answer before it begins.
    pub fn new(stops: Vec<String>) -> StopStrings {
        let stops = stops.into_iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let stops = stops.map(|(index, stop)| Matcher::new(index, stop.into_bytes())).collect();
        StopStrings { stops, held: String::new(), hit: None }
    }

    /// Adds text; returns what may be shown now, and which stop string (its index in the list given to
    /// [`new`](Self::new)) has been hit. After a hit nothing is let through any more.
    pub fn push(&mut self, text: &str) -> (String, Option<usize>) {
        if self.hit.is_some() {
            return (String::new(), self.hit);
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (offset, &byte) in text.as_bytes().iter().enumerate() {
            let hits = self
                .stops
                .iter_mut()
                .filter_map(|stop| stop.step(byte).then_some((stop.stop.len(), stop.index)));
            // The longest, and of equal ones the first in the caller's list.
            let Some((len, index)) = hits.max_by_key(|&(len, index)| (len, usize::MAX - index)) else {
                continue;
            };
            self.hit = Some(index);
            let mut shown = mem::take(&mut self.held);
            // A stop string begins and ends at character boundaries, so this cut is at one.
            shown.truncate((before + offset + 1).saturating_sub(len));
            return (shown, self.hit);
        }
        let kept = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len().saturating_sub(kept));
        (mem::replace(&mut self.held, tail), None)
    }

    /// Ends the stream: returns the text that was held back, unless a stop string was hit.
    pub fn finish(self) -> String {
        self.held
    }
}

impl Matcher {
    fn new(index: usize, stop: Vec<u8>) -> Matcher {
        let mut fallback = Vec::with_capacity(stop.len());
        let mut matched = 0;
        for (at, &byte) in stop.iter().enumerate() {
            if at > 0 {
                matched = advance(&stop, &fallback, matched, byte);
            }
            fallback.push(matched);
        }
        Matcher { index, stop, fallback, matched: 0 }
    }

    /// Takes one byte; true when it completes the stop string.
    fn step(&mut self, byte: u8) -> bool {
        self.matched = advance(&self.stop, &self.fallback, self.matched, byte);
        let complete = self.matched == self.stop.len();
        if complete {
            self.matched = self.fallback.last().copied().unwrap_or(0);
        }
        complete
    }
}

/// The longest prefix of `stop` that the text ends with after `byte`, given the longest before it.
fn advance(stop: &[u8], fallback: &[usize], mut matched: usize, byte: u8) -> usize {
    loop {
        if stop.get(matched) == Some(&byte) {
            return matched + 1;
        }
        match matched.checked_sub(1).and_then(|last| fallback.get(last)) {
            Some(&shorter) => matched = shorter,
            None => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, by search over the whole text: what is shown, and which stop ended it.
    fn naive(text: &str, stops: &[String]) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending =
                |(_, stop): &(usize, &String)| !stop.is_empty() && text[..end].ends_with(stop.as_str());
            let hit = stops.iter().enumerate().filter(ending).max_by_key(|(i, s)| (s.len(), usize::MAX - i));
            if let Some((index, stop)) = hit {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    fn run(chunks: &[String], stops: &[String]) -> (String, Option<usize>) {
        let mut watch = StopStrings::new(stops.to_vec());
        let (mut shown, mut hit) = (String::new(), None);
        for chunk in chunks {
            let (text, now) = watch.push(chunk);
            shown.push_str(&text);
            hit = now;
        }
        shown.push_str(&watch.finish());
        (shown, hit)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn a_stop_string_across_three_pushes() {
        let stops = strings(&["\n\nUser:"]);
        assert_eq!(run(&strings(&["Hi.\n", "\nUs", "er: more"]), &stops), ("Hi.".to_owned(), Some(0)));
        assert_eq!(run(&strings(&["Hi.\n", "\nUs", "ed"]), &stops), ("Hi.\n\nUsed".to_owned(), None));
    }

    #[test]
    fn the_first_to_end_wins_then_the_longest() {
        assert_eq!(run(&strings(&["xabc"]), &strings(&["abc", "b"])), ("xa".to_owned(), Some(1)));
        assert_eq!(run(&strings(&["xabc"]), &strings(&["c", "bc", "bc"])), ("xa".to_owned(), Some(1)));
    }

    #[test]
    fn empty_stops_and_no_stops_let_everything_through_at_once() {
        let mut watch = StopStrings::new(strings(&["", "zz"]));
        assert_eq!(watch.push("abc"), ("abc".to_owned(), None));
        assert_eq!(watch.push("z"), (String::new(), None));
        assert_eq!(watch.push("zz"), (String::new(), Some(1)));
        assert_eq!(watch.push("more"), (String::new(), Some(1)));
        assert_eq!(watch.finish(), "");
    }

    proptest! {
        #[test]
        fn any_chunking_equals_a_search_over_the_whole(
            // A small alphabet, so that prefixes, overlaps and hits are common; one two-byte character.
            chunks in prop::collection::vec("[abé]{0,6}", 0..12),
            stops in prop::collection::vec("[abé]{0,5}", 0..4),
        ) {
            let whole = chunks.concat();
            prop_assert_eq!(run(&chunks, &stops), naive(&whole, &stops));
        }

        #[test]
        fn nothing_shown_belongs_to_a_stop_string_that_completes(
            chunks in prop::collection::vec("[ab]{0,4}", 0..12),
            stops in prop::collection::vec("[ab]{1,6}", 1..4),
        ) {
            let (allowed, _) = naive(&chunks.concat(), &stops);
            let mut watch = StopStrings::new(stops.clone());
            let (mut shown, mut seen, mut hit) = (String::new(), String::new(), false);
            for chunk in &chunks {
                let (text, now) = watch.push(chunk);
                shown.push_str(&text);
                seen.push_str(chunk);
                hit |= now.is_some();
                prop_assert!(allowed.starts_with(&shown));
                // Held back no longer than needed: what is held is the beginning of some stop string.
                if !hit {
                    let held = &seen[shown.len()..];
                    prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
                }
            }
        }
    }
}
