//! Memory that is free and has just been used: what both kinds of migrations allocate at the destination.
//!
//! In a virtual machine, free pages may have been given back to the host. The next use of such a page costs several times
//! as much as the page itself, and which run meets how many of them is chance.

/// Mebibytes that go beside the guest's content: page tables, sockets, QEMU's own.
const BESIDE_MIB: u64 = 256;

/// As much memory as a guest of so many mebibytes needs, touched. Dropped, it is what the kernel hands out next.
pub(crate) fn memory(mib: u64) -> Vec<u8> {
    let bytes = usize::try_from((mib + BESIDE_MIB) << 20).unwrap_or(0);
    std::hint::black_box(vec![1; bytes])
}
