//! Measures how fast this computer reads memory, with the weights' own page size: the limit decode is held against.

use crate::buffer::Buffer;
use crate::pool::{Pool, SharedRows};

/// A buffer that is read from end to end.
pub struct ReadProbe {
    buffer: Buffer,
}

/// Asks for what comes after `words` where the matmul does so: the limit is what memory gives to a reader as good as that.
fn ask_ahead(words: &[u8; 128]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(distance) = crate::ahead::ahead(1) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in 0..2 {
            let at = words.as_ptr().wrapping_add(distance + 64 * line);
            // SAFETY: a prefetch never faults, also beyond the end, and every x86-64 CPU has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = words;
}

/// Bytes one task reads.
const CHUNK: usize = 1 << 20;

impl ReadProbe {
    /// Allocates and touches `words * 8` bytes.
    pub fn new(words: usize) -> Self {
        let mut buffer = Buffer::zeroed((words * 8).next_multiple_of(CHUNK));
        buffer.bytes_mut().iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        Self { buffer }
    }

    /// Reads everything once, on all threads of the pool; the result only keeps the reads from being left out.
    pub fn read(&self, pool: &Pool) -> f32 {
        let bytes = self.buffer.bytes();
        let mut sums = vec![0.0f32; bytes.len().div_ceil(CHUNK)];
        let shared = SharedRows::new(&mut sums);
        pool.run(bytes.len().div_ceil(CHUNK), |task| {
            let mut lanes = [0u64; 16];
            for words in bytes[task * CHUNK..].chunks(CHUNK).next().unwrap_or(&[]).as_chunks::<128>().0 {
                ask_ahead(words);
                for (lane, word) in lanes.iter_mut().zip(words.as_chunks::<8>().0) {
                    *lane ^= u64::from_ne_bytes(*word);
                }
            }
            let sum = lanes.iter().fold(0, |a, b| a ^ b);
            // SAFETY: each task writes its own place, and `sums` outlives the run.
            unsafe { shared.write(task, &[sum as f32]) };
        });
        sums.iter().sum()
    }
}
