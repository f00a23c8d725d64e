//! Memory for weights: aligned, zeroed, and in huge pages where the system gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

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
    /// Our own mapping: where it begins and how long it is (longer than the buffer, for the alignment).
    #[cfg(target_os = "linux")]
    Mapped {
        base: NonNull<libc::c_void>,
        len: usize,
    },
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
            && let Some(buffer) = Self::mapped(len)
        {
            return buffer;
        }
        let layout =
            Layout::from_size_align(len.max(1), LINE).expect("a buffer longer than half the address space");
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, len, memory: Memory::Heap(layout) }
    }

    /// An anonymous mapping that asks for huge pages before anything touches it.
    #[cfg(target_os = "linux")]
    fn mapped(len: usize) -> Option<Self> {
        let total = len.checked_next_multiple_of(HUGE)?.checked_add(HUGE)?;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                total,
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
        // SAFETY: `skip < HUGE`, and the mapping is at least HUGE longer than the buffer.
        let start = unsafe { base.cast::<u8>().add(skip) };
        // SAFETY: the range lies inside our mapping; advice does not change contents. A refusal only costs speed.
        unsafe { libc::madvise(start.as_ptr().cast(), len.next_multiple_of(HUGE), libc::MADV_HUGEPAGE) };
        Some(Self { start, len, memory: Memory::Mapped { base, len: total } })
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
        match self.memory {
            // SAFETY: allocated in `zeroed` with this very layout.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(target_os = "linux")]
            Memory::Mapped { base, len } => {
                // SAFETY: mapped in `mapped` with this base and length, and nobody else holds it.
                unsafe { libc::munmap(base.as_ptr(), len) };
            }
        }
    }
}
