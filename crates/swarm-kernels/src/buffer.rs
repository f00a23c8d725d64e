//! Memory for weights: aligned, zeroed, and in huge pages where the system gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::sync::Arc;

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
    /// A piece of a mapping, which goes when its last piece does.
    #[cfg(target_os = "linux")]
    Mapped(#[allow(dead_code, reason = "held, not read")] Arc<Mapping>),
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
            Memory::Mapped(_) => {}
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
        Some(Arc::new(Self { base, mapped, start, len }))
    }

    /// The bytes from `at` on. Pieces of one mapping must not overlap.
    fn piece(self: Arc<Self>, at: usize, len: usize) -> Buffer {
        assert!(at <= self.len && len <= self.len - at, "a piece outside its mapping");
        // SAFETY: `at` is inside the mapping, by the assert.
        let start = unsafe { self.start.add(at) };
        Buffer { start, len, memory: Memory::Mapped(self) }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this base and length; the last piece is gone.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

/// Gives the matrices of a stage their memory side by side, so that huge pages are shared and not one of them is begun
/// for the end of a matrix. Memory goes back to the system in chunks, each when the last matrix in it is dropped.
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
