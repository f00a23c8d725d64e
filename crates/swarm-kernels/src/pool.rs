//! Threads that wait for work without sleeping long, and never decide what the work is.
//!
//! A step of a small model has hundreds of short parallel parts, so handing one out must cost about a microsecond:
//! one atomic gate lets workers in and counts them, one atomic index hands out tasks. The caller waits only for workers
//! that came in: one that the system has put aside costs nothing, its share is done by the others. Workers spin briefly
//! between parts, then park. Which thread runs which task never shows in a result, because every task writes only its
//! own values.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Spins before a waiting worker parks: some tens of microseconds, longer than the gap between two parts of a step.
const SPINS: u32 = 20_000;

/// A fixed set of compute threads; the caller of [`Pool::run`] is one of them.
///
/// With one thread there is no other thread at all and `run` is a loop.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<std::thread::JoinHandle<()>>,
    /// One `run` at a time: a second caller waits here.
    turn: Mutex<()>,
}

struct Shared {
    /// Which run it is, how many workers are in it, and whether more may come in; see [`Gate`].
    gate: AtomicU64,
    task: AtomicUsize,
    tasks: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    work: std::cell::UnsafeCell<Option<Work>>,
    parked: Mutex<usize>,
    wake: Condvar,
}

/// The gate's number taken apart: bit 0 is "open", bits 1..16 count the workers inside, the rest is the run's number.
#[derive(Clone, Copy)]
struct Gate(u64);

impl Gate {
    const OPEN: u64 = 1;
    const ONE: u64 = 2;
    const RUN: u64 = 1 << 16;

    fn open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    fn inside(self) -> u64 {
        (self.0 % Self::RUN) / Self::ONE
    }

    fn run(self) -> u64 {
        self.0 / Self::RUN
    }
}

/// Most workers a gate can count.
const WORKERS_MAX: usize = 1 << 14;

/// The borrowed task function of the current run, its lifetime erased.
#[derive(Clone, Copy)]
struct Work(*const (dyn Fn(usize) + Sync));

// SAFETY: `work` is written only by the caller of `run` while the gate is closed and nobody is inside, and read only by
// workers that came in through the gate; everything else in `Shared` is Sync by itself.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside is only followed during a run, while the function it points to is borrowed by `run`.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts a pool of `threads` threads in all (at least one, the caller's).
    pub fn new(threads: usize) -> Self {
        Self::with_start(threads, |_| {})
    }

    /// As [`Pool::new`]; each started thread first calls `start` with its number, `1..threads` (to pin itself, say).
    pub fn with_start(threads: usize, start: impl Fn(usize) + Send + Sync + Clone + 'static) -> Self {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            task: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            work: std::cell::UnsafeCell::new(None),
            parked: Mutex::new(0),
            wake: Condvar::new(),
        });
        let spawn = |number: usize| {
            let (shared, start) = (shared.clone(), start.clone());
            let body = move || {
                start(number);
                shared.serve();
            };
            std::thread::Builder::new().name(format!("compute-{number}")).spawn(body)
        };
        // A thread that the system refuses only makes the pool smaller.
        let workers = (1..threads.clamp(1, WORKERS_MAX)).map_while(|number| spawn(number).ok()).collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, ..., `f(tasks - 1)`, each once, on all threads, and returns when all have returned.
    ///
    /// # Panics
    /// When a task panicked, after all have stopped.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(f);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let shared = &*self.shared;
        let f: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: only the lifetime changes. `run` does not return before the gate is closed and every worker that came
        // in has left, and nobody follows the pointer outside a run.
        let f_erased: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        let work = Work(f_erased);
        // SAFETY: we hold `turn`, and the last run ended with the gate closed and nobody inside.
        unsafe { *shared.work.get() = Some(work) };
        shared.task.store(0, Ordering::Relaxed);
        shared.tasks.store(tasks, Ordering::Relaxed);
        // Publishes all of the above to the workers that come in.
        let run = Gate(shared.gate.load(Ordering::Relaxed)).run().wrapping_add(1);
        shared.gate.store(run.wrapping_mul(Gate::RUN) | Gate::OPEN, Ordering::SeqCst);
        if *shared.lock_parked() > 0 {
            shared.wake.notify_all();
        }
        shared.take_tasks(f);
        // All tasks are taken; those not finished are in the hands of workers inside.
        shared.gate.fetch_and(!Gate::OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while Gate(shared.gate.load(Ordering::Acquire)).inside() != 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        drop(turn);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute task panicked");
    }

    /// Cuts `out` into chunks of `chunk` values (the last may be shorter) and calls `f(index, chunk)` for each, in
    /// parallel.
    pub fn run_chunks<T: Send>(&self, out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let chunk = chunk.max(1);
        let (start, len) = (SharedStart(out.as_mut_ptr()), out.len());
        self.run(len.div_ceil(chunk), |index| {
            let at = index * chunk;
            // SAFETY: `at < len` for every index of the run, the chunks do not overlap, each index is given out
            // once, and `out` stays mutably borrowed until `run` returns.
            let part = unsafe { std::slice::from_raw_parts_mut(start.at(at), chunk.min(len - at)) };
            f(index, part);
        });
    }
}

/// A pointer that the tasks of one run may share; each task goes to places of its own.
struct SharedStart<T>(*mut T);

// SAFETY: users write disjoint places only (see the two uses); T itself may move between threads.
unsafe impl<T: Send> Sync for SharedStart<T> {}

impl<T> SharedStart<T> {
    /// # Safety
    /// `at` lies inside the slice the pointer was made from.
    unsafe fn at(&self, at: usize) -> *mut T {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(at) }
    }
}

/// Output rows that several tasks fill column range by column range.
pub(crate) struct SharedRows {
    start: SharedStart<f32>,
    len: usize,
}

impl SharedRows {
    pub fn new(out: &mut [f32]) -> Self {
        Self { start: SharedStart(out.as_mut_ptr()), len: out.len() }
    }

    /// Copies `values` to `at..`.
    ///
    /// # Safety
    /// The slice this was made from is still mutably borrowed, and no other task touches `at..at + values.len()`.
    pub unsafe fn write(&self, at: usize, values: &[f32]) {
        assert!(at.checked_add(values.len()).is_some_and(|end| end <= self.len), "write outside the output");
        // SAFETY: inside the slice by the assert above, exclusive by the caller's promise.
        unsafe {
            match <&[f32; 8]>::try_from(values) {
                // What a tile gives: no call for 32 bytes.
                Ok(eight) => self.start.at(at).cast::<[f32; 8]>().write(*eight),
                Err(_) => std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.at(at), values.len()),
            }
        }
    }
}

impl Shared {
    fn lock_parked(&self) -> std::sync::MutexGuard<'_, usize> {
        self.parked.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take_tasks(&self, f: &(dyn Fn(usize) + Sync)) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loop {
                let task = self.task.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                f(task);
            }
        }));
        if caught.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }

    /// A worker's life: come in, take tasks, leave, repeat.
    fn serve(&self) {
        let mut last = 0;
        while let Some(run) = self.come_in(last) {
            last = run;
            // SAFETY: we are inside, so the cell was written before and is not written again before we leave.
            let work = unsafe { *self.work.get() };
            if let Some(Work(f)) = work {
                // SAFETY: the function outlives the run, which does not end before we leave.
                self.take_tasks(unsafe { &*f });
            }
            self.gate.fetch_sub(Gate::ONE, Ordering::Release);
        }
    }

    /// Comes in if a run other than `last` is open.
    fn try_come_in(&self, last: u64) -> Option<u64> {
        let mut gate = Gate(self.gate.load(Ordering::SeqCst));
        while gate.open() && gate.run() != last {
            let inside = gate.0 + Gate::ONE;
            match self.gate.compare_exchange_weak(gate.0, inside, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(gate.run()),
                Err(now) => gate = Gate(now),
            }
        }
        None
    }

    /// Waits for a run to come into; `None` when the pool is being dropped.
    fn come_in(&self, last: u64) -> Option<u64> {
        for _ in 0..SPINS {
            if let Some(run) = self.try_come_in(last) {
                return Some(run);
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        let mut parked = self.lock_parked();
        *parked += 1;
        let found = loop {
            // Looked at under the lock: `run` opens the gate first and takes the lock second, so either we see the
            // open gate here or it sees us parked. Dropping does the same with `stop`.
            if let Some(run) = self.try_come_in(last) {
                break Some(run);
            }
            if self.stop.load(Ordering::Relaxed) {
                break None;
            }
            parked = self.wake.wait(parked).unwrap_or_else(std::sync::PoisonError::into_inner);
        };
        *parked -= 1;
        found
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.shared.lock_parked());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let pool = Pool::new(3);
        for len in [0, 1, 5, 64, 65] {
            let mut out = vec![0usize; len];
            pool.run_chunks(&mut out, 8, |index, chunk| chunk.fill(index + 1));
            assert!(out.iter().enumerate().all(|(i, &v)| v == i / 8 + 1));
        }
    }

    #[test]
    fn a_panicking_task_is_reported_and_the_pool_lives() {
        let pool = Pool::new(2);
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.run(8, |i| assert!(i != 3))));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(8, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            // Long enough for the worker to give up spinning and park; the run must still complete either way.
            std::thread::sleep(std::time::Duration::from_millis(5));
            let sum = AtomicUsize::new(0);
            pool.run(4, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 6);
        }
    }
}
