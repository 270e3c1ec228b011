//! Page-aligned heap memory as a transport [`Region`], with checked access to its words.
//!
//! A whole simulated run is on one thread, and every access here and in the `mem` transport is a raw copy, so nothing
//! ever holds a reference into the memory while somebody else writes it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::Arc;

use transport::{Extent, Region};

/// Alignment of the memory, and the granule in which lengths are given.
const ALIGN: usize = 4096;

/// The allocation; freed when the last region over it is gone.
struct Allocation {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: the allocation is only an address to free; it is owned once, by the `Arc` around it.
unsafe impl Send for Allocation {}
// SAFETY: no method takes `&self`.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this layout, and the last owner is gone.
        unsafe { dealloc(self.base, self.layout) }
    }
}

/// One block of memory, all zero at first.
#[derive(Clone, Debug)]
pub(in crate::sim) struct Heap {
    region: Region,
}

impl Heap {
    /// `len` bytes, a multiple of 4096 and not zero.
    pub(in crate::sim) fn new(len: u64) -> Heap {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        assert!(
            len > 0 && len.is_multiple_of(ALIGN),
            "a block is a number of whole pages"
        );
        let layout = Layout::from_size_align(len, ALIGN)
            .unwrap_or_else(|_| panic!("{len} bytes is too much"));
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        let owner = Arc::new(Allocation { base, layout });
        // SAFETY: `base .. base + len` is allocated for as long as `owner` lives.
        let region = unsafe { Region::new(base, len, owner) };
        Heap { region }
    }

    /// The memory as the transport knows it.
    pub(in crate::sim) fn region(&self) -> Region {
        self.region.clone()
    }

    /// The eight bytes at `offset`, which is a multiple of eight.
    pub(in crate::sim) fn word(&self, offset: u64) -> u64 {
        // SAFETY: `address` checked that the eight bytes are inside, and the base is aligned to a page.
        unsafe { self.address(offset, 8).cast::<u64>().read_volatile() }
    }

    /// Writes the eight bytes at `offset`, which is a multiple of eight.
    pub(in crate::sim) fn set_word(&self, offset: u64, word: u64) {
        // SAFETY: as in `word`.
        unsafe { self.address(offset, 8).cast::<u64>().write_volatile(word) }
    }

    /// Makes `len` bytes at `offset` zero.
    pub(in crate::sim) fn clear(&self, offset: u64, len: u64) {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: `address` checked that all of the bytes are inside.
        unsafe { self.address(offset, len).write_bytes(0, bytes) }
    }

    /// Copies `len` bytes at `offset` from the same place in `other`.
    pub(in crate::sim) fn copy_from(&self, other: &Heap, offset: u64, len: u64) {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let (from, to) = (other.address(offset, len), self.address(offset, len));
        // SAFETY: `address` checked that all of the bytes are inside on both sides; two heaps do not overlap, and a
        // heap copied onto itself is copied in place, which `copy` allows.
        unsafe { to.copy_from(from, bytes) }
    }

    /// Whether `len` bytes at `offset`, both multiples of eight, are zero.
    pub(in crate::sim) fn is_zero(&self, offset: u64, len: u64) -> bool {
        (offset..offset + len)
            .step_by(8)
            .all(|word| self.word(word) == 0)
    }

    /// The offset of the first word that differs from `other`'s, of the same length.
    pub(in crate::sim) fn first_difference(&self, other: &Heap) -> Option<u64> {
        assert_eq!(
            self.region.len(),
            other.region.len(),
            "blocks of one number have one size"
        );
        (0..self.region.len())
            .step_by(8)
            .find(|offset| self.word(*offset) != other.word(*offset))
    }

    fn address(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset.is_multiple_of(8), "words are aligned");
        self.region
            .address(Extent { offset, len })
            .unwrap_or_else(|| panic!("{len} bytes at {offset} are outside the block"))
    }
}

#[cfg(test)]
mod tests {
    use super::Heap;

    #[test]
    fn words_come_back_and_differences_are_found() {
        let (one, other) = (Heap::new(8192), Heap::new(8192));
        assert_eq!(one.first_difference(&other), None);
        one.set_word(4104, 7);
        assert_eq!(one.word(4104), 7);
        assert_eq!(one.first_difference(&other), Some(4104));
        assert!(!one.is_zero(4096, 4096));
        other.copy_from(&one, 4096, 4096);
        assert_eq!(one.first_difference(&other), None);
        one.clear(4096, 4096);
        assert!(one.is_zero(0, 8192));
    }
}
