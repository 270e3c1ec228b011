//! Regions: memory that both peers have mapped, named by a small number that is the same on both sides.
//!
//! A region is guest memory: other threads and processes write it while we read it. It is therefore never handed out
//! as `&[u8]`; bytes go in and out by copies through raw pointers, or by the kernel (io_uring, verbs, a write to the file that is
//! mapped) straight from the address. A torn page is harmless: its dirty bit is already set again.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex, RwLock, Weak};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::backing::Backing;
use crate::stream::pipe::Outlet;

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
    /// Where what arrives is written to instead, if there is such a file.
    backing: Option<Arc<Backing>>,
    /// Where what leaves is taken from instead, if there is such a file.
    outlet: Option<Arc<Outlet>>,
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
            backing: None,
            outlet: None,
        }
    }

    /// The same, with what arrives over a socket written to `file` where that is cheaper than by the mapping. The first bytes of
    /// the file are those of the region, and it takes writes, as one on tmpfs does and one on hugetlbfs does not.
    #[must_use]
    pub fn backed_by(self, file: Arc<File>) -> Region {
        Region {
            backing: Some(Arc::new(Backing::new(file))),
            ..self
        }
    }

    /// The same, with what leaves over a socket in long pieces taken from `file` without being copied, where that can be done.
    /// The first bytes of the file are those of the region.
    #[must_use]
    pub fn sent_from(self, file: Arc<File>) -> Region {
        Region {
            outlet: Some(Arc::new(Outlet::new(file))),
            ..self
        }
    }

    /// The file to take pages from, where there is one.
    pub(crate) fn outlet(&self) -> Option<&Outlet> {
        self.outlet.as_deref()
    }

    /// The file to write to, where there is one.
    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.backing.as_deref()
    }

    /// A region over fresh anonymous memory, all zeroes, which is given back with the last clone. For tests and
    /// simulations; guest memory is mapped by its owner.
    ///
    /// # Errors
    /// The system's, when there is no memory or `len` is zero.
    pub fn anonymous(len: usize) -> std::io::Result<Region> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so the new mapping replaces none.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        let owner = Arc::new(Mapped { base, len });
        // SAFETY: `owner` unmaps the memory when it is dropped, not before.
        Ok(unsafe { Region::new(base.cast(), len, owner) })
    }

    /// A region over a fresh file without a name, all holes, which it is sent from and written to as a guest's RAM is. For tests
    /// and benchmarks.
    ///
    /// # Errors
    /// The system's, when there is no memory or `len` is zero.
    pub fn memfd(len: usize) -> std::io::Result<Region> {
        let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let at = std::ptr::null_mut();
        // SAFETY: the kernel chooses the address, so the new mapping replaces none.
        let base = unsafe { mmap(at, len, access, MapFlags::SHARED, &file, 0) }?;
        let owner = Arc::new(Mapped { base, len });
        let file = Arc::new(file);
        // SAFETY: `owner` unmaps the memory when it is dropped, not before.
        let region = unsafe { Region::new(base.cast(), len, owner) };
        Ok(region.sent_from(Arc::clone(&file)).backed_by(file))
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

    /// Copies bytes out, starting at `offset`. Meant for tests and the in-process network: where the mapped file is full,
    /// touching it from here raises `SIGBUS`, whereas the socket back ends leave all copying to the kernel.
    ///
    /// # Panics
    /// When the range is not inside the region.
    pub fn copy_out(&self, offset: u64, to: &mut [u8]) {
        if !to.is_empty() {
            let from = self
                .address(Extent {
                    offset,
                    len: to.len() as u64,
                })
                .expect("a range inside the region");
            // SAFETY: `address` has checked the range, which stays mapped; `to` is ours alone. Bytes that others write
            // meanwhile come out old or new.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
        }
    }

    /// Copies bytes in, starting at `offset`. As [`copy_out`](Self::copy_out).
    ///
    /// # Panics
    /// When the range is not inside the region.
    pub fn copy_in(&self, offset: u64, from: &[u8]) {
        if !from.is_empty() {
            let to = self
                .address(Extent {
                    offset,
                    len: from.len() as u64,
                })
                .expect("a range inside the region");
            // SAFETY: as in `copy_out`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
        }
    }
}

/// Memory of a region's own that is unmapped in the end.
struct Mapped {
    base: *mut c_void,
    len: usize,
}

// SAFETY: an address and a length; only `drop` uses them.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Region::anonymous` or `Region::memfd`, and the last region over it is gone.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// Told when a region is closed to the peer, before the call that closes it returns.
pub trait Watcher: fmt::Debug + Send + Sync {
    /// The region of that name is closed or replaced; `None`: all are.
    fn closed(&self, id: Option<RegionId>);
}

#[derive(Debug, Default)]
struct Map {
    own: BTreeMap<RegionId, (Region, Access)>,
    /// Those of another connection, instead.
    of: Option<Regions>,
}

/// The regions of one migration, shared by all its channels. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    map: Arc<RwLock<Map>>,
    watchers: Arc<Mutex<Vec<Weak<dyn Watcher>>>>,
}

impl Regions {
    /// No regions yet.
    pub fn new() -> Regions {
        Regions::default()
    }

    /// Makes `region` known as `id`. Replaces an earlier one of that name.
    pub fn register(&self, id: RegionId, region: Region, access: Access) {
        let earlier = self.lock_write().own.insert(id, (region, access));
        if earlier.is_some() {
            self.tell(Some(id));
        }
    }

    /// Forgets `id`: the peer's later writes and reads of it are refused.
    pub fn revoke(&self, id: RegionId) {
        self.lock_write().own.remove(&id);
        self.tell(Some(id));
    }

    /// Forgets every region.
    pub fn revoke_all(&self) {
        self.lock_write().own.clear();
        self.tell(None);
    }

    /// From now on these are the regions of `other`, for channels of another connection that take part in the same transfers. `other`
    /// must not follow these.
    pub fn follow(&self, other: &Regions) {
        self.lock_write().of = Some(other.clone());
        self.tell(None);
    }

    /// Has `watcher` told of every region that is closed from now on, for as long as it lives.
    pub fn watch(&self, watcher: Weak<dyn Watcher>) {
        let mut watchers = self.lock_watchers();
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(watcher);
    }

    fn tell(&self, id: Option<RegionId>) {
        // They may take long, and may ask for regions.
        let watchers = self.lock_watchers().clone();
        for watcher in watchers.iter().filter_map(Weak::upgrade) {
            watcher.closed(id);
        }
    }

    fn lock_watchers(&self) -> std::sync::MutexGuard<'_, Vec<Weak<dyn Watcher>>> {
        self.watchers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The region called `id`, with what the peer may do to it. Called once per frame, never per page.
    pub fn get(&self, id: RegionId) -> Option<(Region, Access)> {
        let map = self
            .map
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match &map.of {
            Some(other) => other.get(id),
            None => map.own.get(&id).cloned(),
        }
    }

    fn lock_write(&self) -> std::sync::RwLockWriteGuard<'_, Map> {
        self.map
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
