//! The one place of this crate with `unsafe` in it: guest RAM that the host half has mapped becomes a transport region, and
//! memory that is free goes back to the kernel.

use pagecopy::host::ram::MappedRam;
use pagecopy::memory::BlockId;
use transport::Region;

/// The transport region of a mapped RAMBlock, or `None` when there is no such block. Keeps the mapping alive.
pub fn region(ram: &MappedRam, block: BlockId) -> Option<Region> {
    let (base, len, owner) = ram.mapping(block)?;
    // SAFETY: `MappedRam::mapping` promises that `base .. base + len` stays mapped for as long as `owner` lives. A
    // source's mapping is read-only: its regions are registered without the peer's writes, and no `Read` is ever
    // submitted for them, so the transport only reads there.
    Some(unsafe { Region::new(base, len, owner) })
}

/// Gives the kernel the memory that this process has freed and the C library keeps: after a device state of a gibibyte, one
/// small allocation that lives on above it can hold all of it ([`malloc_trim(3)`]). Takes a moment; other C libraries than
/// GNU's keep next to nothing, and need none of it.
///
/// [`malloc_trim(3)`]: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
pub fn give_freed_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MIB: usize = 1 << 20;

    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size()
    }

    #[test]
    fn what_was_freed_between_small_allocations_goes_back() {
        // From here on the C library takes pieces of this size from its heap, as it does after a while in any daemon.
        drop(std::hint::black_box(vec![1_u8; 16 * MIB]));
        let mut live_on = Vec::new();
        let pieces: Vec<Vec<u8>> = (0..256)
            .map(|_| {
                let piece = vec![1; MIB];
                live_on.push(std::hint::black_box(vec![1_u8; 4000]));
                piece
            })
            .collect();
        drop(std::hint::black_box(pieces));
        let kept = resident();
        give_freed_memory_back();
        let left = resident();
        assert!(kept > left + 200 * MIB, "{kept} kept, {left} left");
        drop(live_on);
    }
}
