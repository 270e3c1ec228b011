//! Page-aligned heap memory as a transport [`Region`], with checked access to its words.
//!
//! A whole simulated run is on one thread, and every access here and in the `mem` transport is a raw copy, so nothing
//! ever holds a reference into the memory while somebody else writes it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::sync::Arc;

use transport::Region;

/// Alignment of the memory, and the granule in which lengths are given.
const ALIGN: usize = 4096;

/// Allocations that a thread keeps for its next run, of each size: a power of two.
const KEPT: usize = 12;

thread_local! {
    /// What earlier runs of this thread have left, by the power of two that is its size. A fresh allocation costs a page
    /// fault for each page, which is more than what a run does to it.
    static LEFT: RefCell<Vec<Vec<Allocation>>> = const { RefCell::new(Vec::new()) };
}

/// The allocation; given back to the thread's next run when the last region over it is gone.
struct Owner(Option<Allocation>);

impl Drop for Owner {
    fn drop(&mut self) {
        let Some(allocation) = self.0.take() else {
            return;
        };
        // A thread that ends has nothing left to keep it for.
        let _ = LEFT.try_with(|left| {
            let mut left = left.borrow_mut();
            let class = class(allocation.layout.size());
            if left.len() <= class {
                left.resize_with(class + 1, Vec::new);
            }
            if left[class].len() < KEPT {
                left[class].push(allocation);
            }
        });
    }
}

fn class(size: usize) -> usize {
    size.trailing_zeros() as usize
}

/// Memory; freed when it is dropped.
struct Allocation {
    base: *mut u8,
    layout: Layout,
}

impl Allocation {
    /// Zeroes, of a size that is a power of two.
    fn new(size: usize) -> Allocation {
        let layout = Layout::from_size_align(size, ALIGN)
            .unwrap_or_else(|_| panic!("{size} bytes is too much"));
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        Allocation { base, layout }
    }

    /// One that an earlier run has left, with whatever is in it; or a new one. At least `len` bytes.
    fn take(len: usize) -> Allocation {
        let size = len.next_power_of_two();
        let left = LEFT.with(|left| left.borrow_mut().get_mut(class(size))?.pop());
        left.unwrap_or_else(|| Allocation::new(size))
    }
}

// SAFETY: the allocation is only an address to free; it is owned once, by the `Owner` or the list that it is in.
unsafe impl Send for Allocation {}
// SAFETY: no method takes `&self`.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this layout, and the last owner is gone.
        unsafe { dealloc(self.base, self.layout) }
    }
}

/// One block of memory.
#[derive(Clone, Debug)]
pub(in crate::sim) struct Heap {
    region: Region,
    /// Of the region, which keeps it allocated.
    base: *mut u8,
    len: usize,
}

// SAFETY: as a `Region`: an address and a length; all access is by raw copies.
unsafe impl Send for Heap {}
// SAFETY: as above; no method gives out a reference into the memory.
unsafe impl Sync for Heap {}

impl Heap {
    /// `len` bytes of zeroes, a multiple of 4096 and not zero.
    pub(in crate::sim) fn new(len: u64) -> Heap {
        let heap = Heap::uncleared(len);
        heap.clear(0, len);
        heap
    }

    /// The same with any bytes.
    pub(in crate::sim) fn uncleared(len: u64) -> Heap {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        assert!(
            len > 0 && len.is_multiple_of(ALIGN),
            "a block is a number of whole pages"
        );
        let allocation = Allocation::take(len);
        let base = allocation.base;
        let owner = Arc::new(Owner(Some(allocation)));
        // SAFETY: `base .. base + len` is allocated for as long as `owner` lives.
        let region = unsafe { Region::new(base, len, owner) };
        Heap { region, base, len }
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
        self.words(offset, len).all(|word| word == 0)
    }

    /// The words of `len` bytes at `offset`, both multiples of eight.
    pub(in crate::sim) fn words(&self, offset: u64, len: u64) -> impl Iterator<Item = u64> + '_ {
        let first = self.address(offset, len).cast::<u64>();
        let count = usize::try_from(len / 8).unwrap_or(0);
        // SAFETY: `address` checked that all of the words are inside, and the base is aligned to a page.
        (0..count).map(move |word| unsafe { first.wrapping_add(word).read_volatile() })
    }

    /// The offset of the first word that differs from `other`'s, of the same length.
    pub(in crate::sim) fn first_difference(&self, other: &Heap) -> Option<u64> {
        assert_eq!(self.len, other.len, "blocks of one number have one size");
        let len = self.len as u64;
        self.words(0, len)
            .zip(other.words(0, len))
            .zip(0..)
            .find_map(|((ours, theirs), word)| (ours != theirs).then_some(word * 8))
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "usize has 64 bits on every machine that pagecopy runs on"
    )]
    #[inline]
    fn address(&self, offset: u64, len: u64) -> *mut u8 {
        let (start, bytes) = (offset as usize, len as usize);
        assert!(
            start.is_multiple_of(8) && bytes <= self.len && start <= self.len - bytes,
            "{len} bytes at {offset} are aligned and inside the block"
        );
        self.base.wrapping_add(start)
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
