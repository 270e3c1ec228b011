//! The one place of this crate with `unsafe` in it: guest RAM that the host half has mapped becomes a transport region.

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
