//! Regions: memory that both peers have mapped, named by a small number that is the same on both sides.
//!
//! A region is guest memory: other threads and processes write it while we read it. It is therefore never handed out
//! as `&[u8]`; bytes go in and out by copies through raw pointers, or by the kernel (io_uring, verbs) straight from the
//! address. A torn page is harmless: its dirty bit is already set again.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, RwLock};

/// The number of a region, the same on both sides of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u32);

/// A contiguous piece of a region, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, from the start of the region.
    pub offset: u64,
    /// Length in bytes; never zero.
    pub len: u64,
}

/// What the peer may do to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The peer's writes may land in it.
    pub peer_writes: bool,
    /// The peer's reads may be answered from it.
    pub peer_reads: bool,
}

/// Mapped memory of this process that takes part in transfers. Cheap to clone; the mapping lives as long as any clone.
#[derive(Clone)]
pub struct Region {
    base: *mut u8,
    len: usize,
    /// Whatever keeps the mapping alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a `Region` is an address and a length. All access through it is by raw copies that assume concurrent writers.
unsafe impl Send for Region {}
// SAFETY: as above; no method gives out a reference into the memory.
unsafe impl Sync for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("base", &self.base)
            .field("len", &self.len)
            .finish()
    }
}

impl Region {
    /// A region over mapped memory.
    ///
    /// # Safety
    /// `base .. base + len` stays mapped readable and writable for as long as `owner` lives.
    pub unsafe fn new(base: *mut u8, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Region {
        Region {
            base,
            len,
            _owner: owner,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of `extent`, or `None` when it is empty or not wholly inside the region.
    pub fn address(&self, extent: Extent) -> Option<*mut u8> {
        let end = extent.offset.checked_add(extent.len)?;
        if extent.len == 0 || end > self.len() {
            return None;
        }
        let offset = usize::try_from(extent.offset).ok()?;
        Some(self.base.wrapping_add(offset))
    }
}

/// The regions of one migration, shared by all its channels. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    map: Arc<RwLock<BTreeMap<RegionId, (Region, Access)>>>,
}

impl Regions {
    /// No regions yet.
    pub fn new() -> Regions {
        Regions::default()
    }

    /// Makes `region` known as `id`. Replaces an earlier one of that name.
    pub fn register(&self, id: RegionId, region: Region, access: Access) {
        self.lock_write().insert(id, (region, access));
    }

    /// Forgets `id`: the peer's later writes and reads of it are refused.
    pub fn revoke(&self, id: RegionId) {
        self.lock_write().remove(&id);
    }

    /// Forgets every region.
    pub fn revoke_all(&self) {
        self.lock_write().clear();
    }

    /// The region called `id`, with what the peer may do to it. Called once per frame, never per page.
    pub fn get(&self, id: RegionId) -> Option<(Region, Access)> {
        self.map
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    fn lock_write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<RegionId, (Region, Access)>> {
        self.map
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
