//! Memory for weights: aligned, zeroed, and in huge pages where the system gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

const LINE: usize = 64;
#[cfg(target_os = "linux")]
const HUGE: usize = 2 << 20;

/// A zeroed byte buffer aligned to a cache line, or to 2 MiB when it is large, so that it can live in huge pages.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

enum Memory {
    Heap(Layout),
    /// A piece of a mapping, which goes when its last piece does; whole pages of it go before.
    #[cfg(target_os = "linux")]
    Mapped(Arc<Mapping>),
}

// SAFETY: the buffer owns its memory alone; access follows the usual borrow of `Buffer`.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is read only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Allocates `len` zero bytes. Aborts when memory is exhausted, as `Vec` does: callers check the budget first.
    pub fn zeroed(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if len >= HUGE
            && let Some(mapping) = Mapping::new(len)
        {
            return mapping.piece(0, len);
        }
        let layout =
            Layout::from_size_align(len.max(1), LINE).expect("a buffer longer than half the address space");
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, len, memory: Memory::Heap(layout) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is valid for `len` initialised (zeroed) bytes as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.memory {
            // SAFETY: allocated in `zeroed` with this very layout.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), *layout) },
            #[cfg(target_os = "linux")]
            Memory::Mapped(mapping) => mapping.release(self.start, self.len),
        }
    }
}

/// An anonymous mapping of our own that asks for huge pages.
#[cfg(target_os = "linux")]
struct Mapping {
    base: NonNull<libc::c_void>,
    /// Longer than `len`, for the alignment.
    mapped: usize,
    /// Aligned to a huge page.
    start: NonNull<u8>,
    len: usize,
    /// What dropped pieces covered: ranges in order that do not touch.
    dropped: Mutex<Vec<Range<usize>>>,
}

// SAFETY: the mapping is memory that only its pieces touch, and they do not overlap.
#[cfg(target_os = "linux")]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[cfg(target_os = "linux")]
unsafe impl Sync for Mapping {}

#[cfg(target_os = "linux")]
impl Mapping {
    /// Room for `len` zero bytes; huge pages are asked for before anything touches it.
    fn new(len: usize) -> Option<Arc<Self>> {
        let len = len.checked_next_multiple_of(HUGE)?;
        let mapped = len.checked_add(HUGE)?;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base)?;
        let skip = base.as_ptr().align_offset(HUGE);
        // SAFETY: `skip < HUGE`, and the mapping is HUGE longer than `len`.
        let start = unsafe { base.cast::<u8>().add(skip) };
        // SAFETY: the range lies inside our mapping; advice does not change contents. A refusal only costs speed.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Some(Arc::new(Self { base, mapped, start, len, dropped: Mutex::default() }))
    }

    /// The bytes from `at` on. Pieces of one mapping must not overlap.
    fn piece(self: Arc<Self>, at: usize, len: usize) -> Buffer {
        assert!(at <= self.len && len <= self.len - at, "a piece outside its mapping");
        // SAFETY: `at` is inside the mapping, by the assert.
        let start = unsafe { self.start.add(at) };
        Buffer { start, len, memory: Memory::Mapped(self) }
    }

    /// Gives the memory of a piece that is dropped back to the system, as far as whole huge pages belong to dropped pieces
    /// only: smaller parts would break huge pages that their neighbours still live in.
    fn release(&self, start: NonNull<u8>, len: usize) {
        let at = start.addr().get() - self.start.addr().get();
        // Pieces begin at cache lines; what lies between two is nobody's.
        let gone = at..(at + len).next_multiple_of(LINE).min(self.len);
        if gone.is_empty() {
            return;
        }
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = join(&mut dropped, gone);
        let pages = whole.start.next_multiple_of(HUGE)..whole.end / HUGE * HUGE;
        if pages.is_empty() {
            return;
        }
        // SAFETY: `pages` lies inside the mapping, because all pieces do. It belongs to dropped pieces only, each of which
        // was handed out once, so nobody reads or writes it again. A refusal only costs memory.
        unsafe {
            let from = self.start.add(pages.start);
            libc::madvise(from.as_ptr().cast(), pages.len(), libc::MADV_DONTNEED);
        }
    }
}

/// Adds a range to `ranges`, which are in order and do not touch; gives the one that it is part of then.
#[cfg(target_os = "linux")]
fn join(ranges: &mut Vec<Range<usize>>, new: Range<usize>) -> Range<usize> {
    let first = ranges.partition_point(|range| range.end < new.start);
    let end = ranges.partition_point(|range| range.start <= new.end);
    let mut joined = new;
    for range in ranges.drain(first..end.max(first)) {
        joined = joined.start.min(range.start)..joined.end.max(range.end);
    }
    ranges.insert(first, joined.clone());
    joined
}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this base and length; the last piece is gone.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

/// Gives the matrices of a stage their memory side by side, so that huge pages are shared and not one of them is begun
/// for the end of a matrix. Memory goes back to the system when matrices are dropped, in whole huge pages.
#[derive(Default)]
pub struct Arena {
    /// The chunk being filled, and how far it is.
    #[cfg(target_os = "linux")]
    chunk: Option<(Arc<Mapping>, usize)>,
}

impl Arena {
    /// Only address space until it is touched; what is left of a chunk's last huge page is the price.
    #[cfg(target_os = "linux")]
    const CHUNK: usize = 128 << 20;

    /// `len` zero bytes, aligned to a cache line.
    pub(crate) fn zeroed(&mut self, len: usize) -> Buffer {
        #[cfg(target_os = "linux")]
        if len >= Self::SMALL
            && let Some(buffer) = self.in_chunk(len)
        {
            return buffer;
        }
        Buffer::zeroed(len)
    }

    /// Shorter buffers are the heap's: a small model is not to take 2 MiB pages.
    #[cfg(target_os = "linux")]
    const SMALL: usize = 64 << 10;

    #[cfg(target_os = "linux")]
    fn in_chunk(&mut self, len: usize) -> Option<Buffer> {
        let taken = len.checked_next_multiple_of(LINE)?;
        let fits = |(mapping, at): &(Arc<Mapping>, usize)| mapping.len - at >= taken;
        let (mapping, at) = match self.chunk.take().filter(fits) {
            Some(chunk) => chunk,
            None => (Mapping::new(taken.max(Self::CHUNK))?, 0),
        };
        self.chunk = Some((mapping.clone(), at + taken));
        Some(mapping.piece(at, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of this process in memory.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn dropped_pieces_give_their_memory_back_one_by_one() {
        const MIB: usize = 1 << 20;
        let mut arena = Arena::default();
        let mut buffers: Vec<Buffer> = (0..60).map(|_| arena.zeroed(3 * MIB)).collect();
        buffers.iter_mut().for_each(|buffer| buffer.bytes_mut().fill(7));
        let full = resident();
        // Every other one: a huge page that a neighbour needs stays.
        let mut odd = 0;
        buffers.retain(|_| (odd += 1, odd % 2 == 0).1);
        assert!(buffers.iter().all(|buffer| buffer.bytes().iter().all(|&byte| byte == 7)));
        for left in (0..30).rev() {
            drop(buffers.pop());
            if left % 10 == 0 {
                let now = resident();
                // Other tests of this process take and give memory, too: a third of what was given back may be theirs.
                assert!(full - now > (30 - left) * 3 * MIB * 2 / 3, "{full} -> {now} with {left} left");
            }
            assert!(buffers.iter().all(|buffer| buffer.bytes().ends_with(&[7])));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn ranges_join() {
        let mut ranges = Vec::new();
        for (new, want) in [(10..20, 10..20), (30..40, 30..40), (0..5, 0..5), (5..10, 0..20), (20..30, 0..40)]
        {
            assert_eq!(join(&mut ranges, new), want);
        }
        assert_eq!(ranges, vec![0..40]);
    }

    #[test]
    fn pieces_of_an_arena_are_zero_aligned_and_apart() {
        let mut arena = Arena::default();
        let lengths = [0, 1, 100, 65_536, 100_001, 3 << 20, 127 << 20, 5 << 20, 200 << 20, 65_536];
        let mut buffers: Vec<Buffer> = lengths.iter().map(|&len| arena.zeroed(len)).collect();
        drop(arena);
        for (index, buffer) in buffers.iter_mut().enumerate() {
            let bytes = buffer.bytes_mut();
            assert_eq!(bytes.len(), lengths[index]);
            assert!(bytes.as_ptr().addr().is_multiple_of(64));
            // First and last bytes are enough to notice a neighbour.
            for at in [0, bytes.len().saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    assert!(*byte == 0 || *byte == index as u8 + 1);
                    *byte = index as u8 + 1;
                }
            }
        }
        buffers.remove(6); // its neighbours in the chunk stay
        let marks = |buffer: &Buffer| buffer.bytes().first().copied();
        let marked: Vec<_> = buffers.iter().filter_map(marks).collect();
        assert_eq!(marked, [2, 3, 4, 5, 6, 8, 9, 10]);
    }
}
