//! Fetching: several requests at once, each piece kept as soon as it is whole.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::file::{StoredFile, Writer};
use super::pieces::{self, Job};
use super::{StoreError, supply};
use crate::hub::HubError;

/// Longest time between two words of progress, also when nothing comes.
const NEWS: Duration = Duration::from_millis(250);

/// Shortest and longest request for another node. Several are under way at a time.
const RUN_BYTES_MIN: u64 = 512 << 10;
const RUN_BYTES_MAX: u64 = 2 << 20;

/// Where bytes are fetched from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchSource {
    #[default]
    Hub,
    /// Other nodes.
    Peer,
}

/// How far fetching has come. Each source is counted on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchProgress {
    pub bytes_done: u64,
    /// What was missing when it began.
    pub bytes_total: u64,
    pub from: FetchSource,
}

/// How fetching is watched and called off.
pub struct FetchControl<'a> {
    pub progress: &'a mut dyn FnMut(FetchProgress),
    pub abort: &'a AtomicBool,
}

/// Fetches what is missing of `wanted`, in each of the files, all of one folder. What came stays, whatever the end.
pub(crate) fn all(
    files: &[(&StoredFile, Vec<Range<u64>>)],
    control: &mut FetchControl<'_>,
) -> Result<(), StoreError> {
    let Some((first, _)) = files.iter().find(|(file, wanted)| !file.missing(wanted).is_empty()) else {
        return Ok(());
    };
    if first.folder.client.settings().offline && first.folder.suppliers().is_empty() {
        // Nobody may be asked: to wait for whoever writes here would only make a look take as long as a download.
        let what = first.remote.label();
        let nobody = || HubError::Offline { what: what.clone() };
        return Err(match first.folder.has_hub() {
            true => StoreError::Fetch { file: what.clone(), source: nobody() },
            false => StoreError::NotSupplied { file: what, bytes: missing_bytes(files) },
        });
    }
    let connections = first.folder.client.settings().connections.max(1);
    let bytes_total = missing_bytes(files);
    let waiting = FetchProgress { bytes_done: 0, bytes_total, from: FetchSource::Hub };
    let _writing = first.folder.write_lock(control.abort, &mut || (control.progress)(waiting))?;
    let mut writers = Vec::new();
    for (file, wanted) in files {
        writers.push((file.writer()?, wanted)); // which takes note of what others fetched meanwhile
    }
    let suppliers = first.folder.suppliers();
    // First those of whom only some may be taken: the coordinator has enough to do.
    for supplier in &suppliers {
        if let Some(units) = supplier.units() {
            supply::units_from_supplier(&**supplier, units, &writers, control)?;
        }
    }
    let suppliers: Vec<_> = suppliers.into_iter().filter(|supplier| supplier.units().is_none()).collect();
    for supplier in &suppliers {
        supply::from_supplier(&**supplier, &writers, false, control)?;
    }
    let hub = if first.folder.has_hub() {
        from_hub(first, &writers, connections, !suppliers.is_empty(), control)
    } else {
        Ok(())
    };
    if hub.as_ref().is_err_and(|error| !error.is_unreachable()) {
        return hub;
    }
    // A node that can reach the Hub fetches for one that cannot.
    for supplier in &suppliers {
        supply::from_supplier(&**supplier, &writers, true, control)?;
    }
    let left: u64 =
        writers.iter().map(|(writer, wanted)| pieces::bytes(&writer.stored.missing(wanted))).sum();
    match hub {
        _ if left == 0 => Ok(()),
        Ok(()) => Err(StoreError::NotSupplied { file: first.remote.path.clone(), bytes: left }),
        error => error,
    }
}

fn missing_bytes(files: &[(&StoredFile, Vec<Range<u64>>)]) -> u64 {
    files.iter().map(|(file, wanted)| pieces::bytes(&file.missing(wanted))).sum()
}

/// Fetches from the Hub what is missing. With `others` to turn to, a Hub that does not answer is asked once.
fn from_hub(
    first: &StoredFile,
    writers: &[(Writer<'_>, &Vec<Range<u64>>)],
    connections: usize,
    others: bool,
    control: &mut FetchControl<'_>,
) -> Result<(), StoreError> {
    let mut work: Vec<(&Writer<'_>, Job)> = Vec::new();
    let mut bytes_total = 0_u64;
    for (writer, wanted) in writers {
        let missing = writer.stored.missing(wanted);
        bytes_total = bytes_total.saturating_add(pieces::bytes(&missing));
        work.extend(pieces::jobs(&missing).into_iter().map(|job| (writer, job)));
    }
    if work.is_empty() {
        return Ok(());
    }
    if others {
        let file = first.remote.label();
        first.folder.client.knock(&first.remote).map_err(|source| StoreError::Fetch { file, source })?;
    }
    let fetch = Fetch { bytes_total, done: AtomicU64::new(0), stop: AtomicBool::new(false) };
    fetch.run(work, connections, control)
}

/// Brings `wanted` pieces of a file to `each` and keeps nothing; false from `each` ends it. From the Hub, and with
/// `lenders`, where that cannot be reached, from those who lend this node the model.
pub(crate) fn through(
    file: &StoredFile,
    wanted: &[Range<u64>],
    lenders: bool,
    each: &mut dyn FnMut(&Range<u64>, &[u8]) -> bool,
) -> Result<(), StoreError> {
    let mut passed = 0;
    let came = from_hub_through(file, wanted, &mut |range, bytes| {
        passed += 1;
        each(range, bytes)
    });
    let lost = came.as_ref().is_err_and(StoreError::is_unreachable);
    match wanted.get(passed..) {
        Some(rest) if lenders && lost => {
            supply::through(&file.folder.suppliers(), file, rest, each).unwrap_or(came)
        }
        _ => came,
    }
}

fn from_hub_through(
    file: &StoredFile,
    wanted: &[Range<u64>],
    each: &mut dyn FnMut(&Range<u64>, &[u8]) -> bool,
) -> Result<(), StoreError> {
    if !file.folder.has_hub() {
        return Err(StoreError::NoHub { file: file.remote.path.clone() });
    }
    let client = &file.folder.client;
    // Whoever asked has others to turn to, and does not wait for each piece anew.
    let lost = |source| StoreError::Fetch { file: file.remote.label(), source };
    client.hope(&file.remote).map_err(lost)?;
    let connections = client.settings().connections.max(1);
    let run_bytes = (pieces::bytes(wanted) / connections as u64).clamp(RUN_BYTES_MIN, RUN_BYTES_MAX);
    let stop = AtomicBool::new(false);
    // What is under way at a time is held in memory, since it is passed on in order.
    for wave in pieces::runs(wanted, run_bytes).chunks(connections) {
        std::thread::scope(|scope| {
            let start = |run: &'_ Job| {
                let ((sink, came), run, stop) = (channel(), run.clone(), &stop);
                let work = move || {
                    let outcome = run_through(file, &run, stop, &sink);
                    // The other end has gone when it wants no more.
                    outcome.err().map(|error| sink.send(Err(error)))
                };
                // Another node's question is no reason to panic when the system has no thread left.
                let spawned =
                    std::thread::Builder::new().name("through".to_owned()).spawn_scoped(scope, work);
                spawned.map(|_| came)
            };
            // Collected, so that all are under way before the first is waited for.
            let parts: Result<Vec<_>, std::io::Error> = wave.iter().map(start).collect();
            let no_thread = |error| StoreError::io("begin to fetch", Path::new(&file.remote.path), 0, error);
            let passed = parts.map_err(no_thread).and_then(|parts| {
                parts.into_iter().flatten().try_for_each(|piece| {
                    let (range, bytes) = piece?;
                    if each(&range, &bytes) { Ok(()) } else { Err(StoreError::Aborted) }
                })
            });
            passed.inspect_err(|_| stop.store(true, Ordering::Relaxed))
        })?;
    }
    Ok(())
}

/// A piece that was fetched for another node.
type Passed = (Range<u64>, Vec<u8>);

/// One request, whose pieces go to `sink` as they are whole.
fn run_through(
    file: &StoredFile,
    run: &Job,
    stop: &AtomicBool,
    sink: &Sender<Result<Passed, StoreError>>,
) -> Result<(), StoreError> {
    let end = run.range.end.min(file.remote.size.unwrap_or(u64::MAX));
    let mut keep = |range: &Range<u64>, bytes: &[u8]| {
        let sent = sink.send(Ok((range.clone(), bytes.to_vec())));
        sent.map_err(|_| StoreError::Aborted)
    };
    let mut keeper =
        Keeper { keep: &mut keep, pieces: run.pieces.iter().cloned(), piece: 0..0, bytes: Vec::new() };
    let came = file.folder.client.range(
        &file.remote,
        run.range.start..end,
        &mut |offset, bytes| keeper.take(offset, bytes).map(drop).map_err(|_| HubError::Aborted),
        stop,
    );
    match came {
        Ok(()) => Ok(()),
        Err(HubError::Aborted) => Err(StoreError::Aborted),
        Err(source) => Err(StoreError::Fetch { file: file.remote.label(), source }),
    }
}

/// Fetches one range, for somebody who reads it now.
pub(crate) fn now(file: &StoredFile, wanted: &[Range<u64>]) -> Result<(), StoreError> {
    let mut control = FetchControl { progress: &mut |_| {}, abort: &AtomicBool::new(false) };
    all(&[(file, wanted.to_vec())], &mut control)
}

struct Fetch {
    bytes_total: u64,
    done: AtomicU64,
    stop: AtomicBool,
}

impl Fetch {
    fn run(
        &self,
        work: Vec<(&Writer<'_>, Job)>,
        connections: usize,
        control: &mut FetchControl<'_>,
    ) -> Result<(), StoreError> {
        let threads = connections.min(work.len());
        let queue = Mutex::new(work.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let (ends, ended) = channel();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let ends = ends.clone();
                scope.spawn(move || {
                    let mut outcome = Ok(());
                    while let Some((writer, job)) = next().filter(|_| outcome.is_ok()) {
                        outcome = self.job(writer, &job);
                        if outcome.is_err() {
                            self.stop.store(true, Ordering::Relaxed);
                        }
                    }
                    let _gone = ends.send(outcome); // the receiver outlives the scope's threads
                });
            }
            drop(ends);
            let mut failed: Option<StoreError> = None;
            loop {
                (control.progress)(self.progress());
                if control.abort.load(Ordering::Relaxed) {
                    self.stop.store(true, Ordering::Relaxed);
                }
                match ended.recv_timeout(NEWS) {
                    // What stopped the others is the cause, not that they were stopped.
                    Ok(Err(error)) if !matches!(failed, Some(ref first) if !matches!(first, StoreError::Aborted)) =>
                    {
                        failed = Some(error);
                    }
                    Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            (control.progress)(self.progress());
            let left = self.bytes_total.saturating_sub(self.done.load(Ordering::Relaxed));
            failed.map_or(Ok(()), |error| Err(error.needing(left)))
        })
    }

    fn progress(&self) -> FetchProgress {
        let bytes_done = self.done.load(Ordering::Relaxed).min(self.bytes_total);
        FetchProgress { bytes_done, bytes_total: self.bytes_total, from: FetchSource::Hub }
    }

    fn job(&self, writer: &Writer<'_>, job: &Job) -> Result<(), StoreError> {
        let file = &writer.stored.remote;
        let mut keep = |range: &Range<u64>, bytes: &[u8]| writer.put(range.start, bytes);
        let mut keeper =
            Keeper { keep: &mut keep, pieces: job.pieces.iter().cloned(), piece: 0..0, bytes: Vec::new() };
        let mut failed = None;
        let came = writer.stored.folder.client.range(
            file,
            job.range.clone(),
            &mut |offset, bytes| {
                let kept = keeper.take(offset, bytes).map_err(|error| {
                    failed = Some(error);
                    HubError::Aborted
                })?;
                self.done.fetch_add(kept, Ordering::Relaxed);
                Ok(())
            },
            &self.stop,
        );
        match (failed, came) {
            (Some(error), _) => Err(error),
            (None, Ok(())) => Ok(()),
            (None, Err(HubError::Aborted)) => Err(StoreError::Aborted),
            (None, Err(source)) => Err(StoreError::Fetch { file: file.label(), source }),
        }
    }
}

/// Takes a whole piece.
type Keep<'a> = dyn FnMut(&Range<u64>, &[u8]) -> Result<(), StoreError> + 'a;

/// Sorts bytes that come in order into pieces, and drops what lies between them.
struct Keeper<'a, I> {
    keep: &'a mut Keep<'a>,
    pieces: I,
    /// The piece in the making.
    piece: Range<u64>,
    bytes: Vec<u8>,
}

impl<I: Iterator<Item = Range<u64>>> Keeper<'_, I> {
    /// Returns how many of the bytes were wanted.
    fn take(&mut self, offset: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let (mut at, mut rest, mut kept) = (offset, bytes, 0);
        while !rest.is_empty() {
            if self.piece.is_empty() {
                let Some(next) = self.pieces.next() else { return Ok(kept) };
                self.piece = next;
            }
            let skip =
                usize::try_from(self.piece.start.saturating_sub(at)).unwrap_or(usize::MAX).min(rest.len());
            at = at.saturating_add(skip as u64);
            rest = rest.get(skip..).unwrap_or_default();
            let want =
                usize::try_from(self.piece.end.saturating_sub(at)).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(want);
            self.bytes.extend_from_slice(part);
            at = at.saturating_add(want as u64);
            rest = after;
            kept += want as u64;
            if self.bytes.len() as u64 == self.piece.end - self.piece.start {
                (self.keep)(&self.piece, &self.bytes)?;
                self.bytes.clear();
                self.piece = 0..0;
            }
        }
        Ok(kept)
    }
}
