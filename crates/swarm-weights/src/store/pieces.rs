//! Which bytes to ask for: arithmetic over ranges, without IO.

use std::ops::Range;

/// Longest stretch of a file that is hashed, checked and fetched anew as one.
pub const PIECE_BYTES: u64 = 256 << 10;

/// Gaps up to this long are read over rather than asked around.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// Bytes of gaps that all requests together may read for nothing, beside a share of what is wanted.
const WASTE_BYTES: u64 = 128 << 10;
/// That share: one part in so many.
const WASTE_PART: u64 = 256;
/// Longest request, but for one piece that is longer.
const JOB_BYTES: u64 = 16 << 20;

/// One request: `range` of a file, of which `pieces` are kept, each as one. They are in order and do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub range: Range<u64>,
    pub pieces: Vec<Range<u64>>,
}

/// The number of bytes in `ranges`.
pub fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().fold(0, |sum, range| sum.saturating_add(len(range)))
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// `ranges` in order, without what is empty; what overlaps an earlier one is cut off.
fn ordered(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> = ranges.iter().filter(|range| range.start < range.end).cloned().collect();
    sorted.sort_unstable_by_key(|range| (range.start, range.end));
    let mut end = 0;
    let mut out: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        let start = range.start.max(end);
        if start < range.end {
            out.push(start..range.end);
            end = range.end;
        }
    }
    out
}

/// What of `wanted` is not in `present`. In order; borders of `wanted` stay borders.
pub fn missing(wanted: &[Range<u64>], present: &[Range<u64>]) -> Vec<Range<u64>> {
    let present = ordered(present);
    let mut out = Vec::new();
    for want in ordered(wanted) {
        let first = present.partition_point(|have| have.end <= want.start);
        let mut at = want.start;
        for have in present.iter().skip(first).take_while(|have| have.start < want.end) {
            if at < have.start {
                out.push(at..have.start);
            }
            at = at.max(have.end);
        }
        if at < want.end {
            out.push(at..want.end);
        }
    }
    out
}

/// Cuts each range into pieces, counted from its start, so that every node cuts a tensor alike.
pub fn cut(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = at.saturating_add(PIECE_BYTES).min(range.end);
            out.push(at..end);
            at = end;
        }
    }
    out
}

/// The requests that bring `wanted`: few, none too long, and with little that is not wanted.
pub fn jobs(wanted: &[Range<u64>]) -> Vec<Job> {
    let pieces = cut(&ordered(wanted));
    let mut waste_left = WASTE_BYTES.saturating_add(bytes(&pieces) / WASTE_PART);
    let mut jobs: Vec<Job> = Vec::new();
    for piece in pieces {
        if let Some(job) = jobs.last_mut() {
            let gap = piece.start.saturating_sub(job.range.end);
            let fits = piece.end.saturating_sub(job.range.start) <= JOB_BYTES;
            if fits && gap <= GAP_BYTES_MAX.min(waste_left) {
                waste_left -= gap;
                job.range.end = piece.end;
                job.pieces.push(piece);
                continue;
            }
        }
        jobs.push(Job { range: piece.clone(), pieces: vec![piece] });
    }
    jobs
}

/// `pieces`, which are in order, as requests of up to `run_bytes` and without a gap that is worth a request of its own.
pub fn runs(pieces: &[Range<u64>], run_bytes: u64) -> Vec<Job> {
    let mut runs: Vec<Job> = Vec::new();
    for piece in pieces {
        if let Some(run) = runs.last_mut() {
            let fits = piece.end.saturating_sub(run.range.start) <= run_bytes;
            if fits && piece.start.saturating_sub(run.range.end) <= GAP_BYTES_MAX {
                run.range.end = piece.end;
                run.pieces.push(piece.clone());
                continue;
            }
        }
        runs.push(Job { range: piece.clone(), pieces: vec![piece.clone()] });
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(longest: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
        let range = (0..3 * longest, 0..longest).prop_map(|(start, len)| start..start + len);
        proptest::collection::vec(range, 0..12)
    }

    fn holds(ranges: &[Range<u64>], at: u64) -> bool {
        ranges.iter().any(|range| range.contains(&at))
    }

    proptest! {
        #[test]
        fn what_is_missing_is_wanted_and_not_there(wanted in ranges(20), present in ranges(20)) {
            let missing = missing(&wanted, &present);
            for at in 0..80 {
                let is_missing = holds(&wanted, at) && !holds(&present, at);
                prop_assert_eq!(missing.iter().filter(|range| range.contains(&at)).count(), usize::from(is_missing));
            }
        }

        #[test]
        fn jobs_bring_every_byte_once_and_little_else(wanted in ranges(40 << 20)) {
            let (jobs, want) = (jobs(&wanted), bytes(&ordered(&wanted)));
            let pieces: Vec<_> = jobs.iter().flat_map(|job| job.pieces.clone()).collect();
            prop_assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start));
            prop_assert!(pieces.iter().all(|piece| piece.start < piece.end && len(piece) <= PIECE_BYTES));
            prop_assert_eq!(bytes(&pieces), want);
            prop_assert!(missing(&wanted, &pieces).is_empty());
            prop_assert!(jobs.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
            for job in &jobs {
                prop_assert!(len(&job.range) <= JOB_BYTES);
                prop_assert_eq!(job.range.start, job.pieces[0].start);
                prop_assert_eq!(job.range.end, job.pieces.last().unwrap().end);
            }
            let asked: Vec<_> = jobs.iter().map(|job| job.range.clone()).collect();
            prop_assert!(bytes(&asked) <= want + want / WASTE_PART + WASTE_BYTES);
        }

        #[test]
        fn runs_are_all_pieces_in_order(wanted in ranges(1 << 20), run_bytes in 1_u64..4 << 20) {
            let pieces = cut(&ordered(&wanted));
            let runs = runs(&pieces, run_bytes);
            prop_assert_eq!(runs.iter().flat_map(|run| run.pieces.clone()).collect::<Vec<_>>(), pieces);
            for run in &runs {
                prop_assert!(len(&run.range) <= run_bytes || run.pieces.len() == 1);
                prop_assert_eq!(run.range.start, run.pieces[0].start);
                prop_assert_eq!(run.range.end, run.pieces.last().unwrap().end);
            }
        }

        #[test]
        fn close_ranges_come_in_one_request(lens in proptest::collection::vec(1_u64..5000, 2..20), gap in 0_u64..1000) {
            let mut at = 7;
            let mut wanted = Vec::new();
            for len in lens {
                wanted.push(at..at + len);
                at += len + gap;
            }
            prop_assert_eq!(jobs(&wanted).len(), 1);
        }
    }

    #[test]
    fn the_ends_of_numbers_are_no_trouble() {
        let range = |start, end| Range { start, end };
        let wanted = [range(u64::MAX - 5, u64::MAX), range(3, 3), range(9, 2)];
        assert_eq!(jobs(&wanted).len(), 1);
        assert_eq!(missing(&wanted, &[range(0, u64::MAX)]), []);
        assert!(jobs(&[]).is_empty());
    }
}
