//! The registered memory of one migration: chunks of its regions, each registered once for a device and then used by all
//! channels over it.
//!
//! A chunk that only this side uses may be given back and registered again, the one that was used longest ago first; one
//! whose key the peer has is not, since nothing would tell the peer. When a region is closed, its chunks are taken back
//! from the device before the call returns: a key of the peer's is worth nothing from then on.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::channel::SubmitError;
use crate::error::Error;
use crate::rdma::sys::{Device, Pd, Registration};
use crate::region::{Access, Extent, Region, RegionId, Regions, Watcher};
use crate::stream::channel::check_extents;

/// What devices fetch on demand.
const PAGE: u64 = 4096;

/// How memory is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes that are registered at a time, a multiple of the page size.
    pub chunk: u64,
    /// Bytes that may be pinned at a time on all devices together; `None`: as many as the system allows. What a device
    /// fetches on demand does not count.
    pub pin_limit: Option<u64>,
    /// Whether a device that can fetch pages on demand is to do so, instead of their being pinned. Writes and reads must
    /// then be of whole pages of 4 KiB.
    pub on_demand: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            chunk: 64 << 20,
            pin_limit: None,
            on_demand: false,
        }
    }
}

/// A migration's regions with what is registered of them. Cheap to clone; all is taken back with the last clone.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Inner>);

struct Inner {
    regions: Regions,
    settings: Settings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    domains: BTreeMap<Device, Arc<Pd>>,
    chunks: BTreeMap<(Device, RegionId, u64), Chunk>,
    pinned: u64,
    /// Devices that turned out to pin.
    pinning: Vec<Device>,
    /// Counts closed regions: what was looked up before one may be gone.
    closed: u64,
    /// Counts uses.
    uses: u64,
}

/// A registered chunk.
struct Chunk {
    registration: Arc<Registration>,
    extent: Extent,
    used: u64,
    given: bool,
}

impl Chunk {
    fn pinned(&self) -> u64 {
        if self.registration.pinned {
            self.extent.len
        } else {
            0
        }
    }
}

/// A piece of registered memory, and where it is.
#[derive(Clone)]
pub(super) struct Piece {
    pub(super) registration: Arc<Registration>,
    pub(super) extent: Extent,
    /// Address of its first byte.
    pub(super) address: u64,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Watcher for Inner {
    fn closed(&self, id: Option<RegionId>) {
        let mut state = self.lock();
        state.closed += 1;
        let all = std::mem::take(&mut state.chunks);
        for (key, chunk) in all {
            if id.is_none_or(|id| id == key.1) {
                chunk.registration.close();
                state.pinned -= chunk.pinned();
            } else {
                state.chunks.insert(key, chunk);
            }
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    /// Nothing is registered yet.
    pub fn new(regions: &Regions, settings: Settings) -> Memory {
        let inner = Arc::new(Inner {
            regions: regions.clone(),
            settings,
            state: Mutex::default(),
        });
        let watcher: Arc<dyn Watcher> = inner.clone();
        regions.watch(Arc::downgrade(&watcher));
        Memory(inner)
    }

    /// The regions.
    pub fn regions(&self) -> &Regions {
        &self.0.regions
    }

    /// Bytes that are pinned now.
    pub fn pinned(&self) -> u64 {
        self.0.lock().pinned
    }

    /// Whether these may be written or read: within the region and the limits, and pages that are fetched on demand only as a
    /// whole. On other extents some devices lose bytes in silence (rdma_rxe of Linux 7.3 does).
    pub(super) fn check(&self, region: RegionId, extents: &[Extent]) -> Result<(), SubmitError> {
        check_extents(self.regions(), region, extents)?;
        let whole =
            |extent: &Extent| extent.offset.is_multiple_of(PAGE) && extent.len.is_multiple_of(PAGE);
        if self.0.settings.on_demand && !extents.iter().all(whole) {
            return Err(SubmitError::Invalid(
                "a part of a page, where pages are fetched on demand",
            ));
        }
        Ok(())
    }

    /// The protection domain of a device.
    pub(super) fn domain(&self, device: Device) -> Result<Arc<Pd>, Error> {
        let mut state = self.0.lock();
        if let Some(domain) = state.domains.get(&device) {
            return Ok(domain.clone());
        }
        let domain = Pd::new(device)?;
        state.domains.insert(device, domain.clone());
        Ok(domain)
    }

    /// Registers all of a region for `device`, on `threads` threads.
    pub(super) fn register_all(
        &self,
        device: Device,
        id: RegionId,
        threads: usize,
    ) -> Result<(), Error> {
        let (region, _) = self.0.regions.get(id).ok_or_else(unknown)?;
        let chunks = region.len().div_ceil(self.0.settings.chunk);
        let threads = threads.clamp(1, 64) as u64;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.min(chunks))
                .map(|first| {
                    scope.spawn(move || {
                        let mut index = first;
                        while index < chunks {
                            self.piece(device, id, index * self.0.settings.chunk, false)?;
                            index += threads;
                        }
                        Ok(())
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| {
                let ended = worker.join();
                ended.unwrap_or_else(|_| Err(Error::Misuse("a registration panicked".to_owned())))
            })
        })
    }

    /// A device is gone, and all that was registered with it.
    pub(super) fn forget(&self, device: Device) {
        let mut state = self.0.lock();
        state.closed += 1;
        state.domains.remove(&device);
        let all = std::mem::take(&mut state.chunks);
        for (key, chunk) in all {
            if key.0 == device {
                chunk.registration.close();
                state.pinned -= chunk.pinned();
            } else {
                state.chunks.insert(key, chunk);
            }
        }
    }

    /// The chunk that holds `offset`, registered. `given`: the peer gets its key.
    pub(super) fn piece(
        &self,
        device: Device,
        id: RegionId,
        offset: u64,
        given: bool,
    ) -> Result<Piece, Error> {
        let index = offset / self.0.settings.chunk;
        loop {
            let mut state = self.0.lock();
            state.uses += 1;
            let (uses, closed) = (state.uses, state.closed);
            let (region, access) = self.0.regions.get(id).ok_or_else(unknown)?;
            let start = index * self.0.settings.chunk;
            let extent = Extent {
                offset: start,
                len: self
                    .0
                    .settings
                    .chunk
                    .min(region.len().saturating_sub(start)),
            };
            let address = region.address(extent).ok_or_else(unknown)? as u64;
            if let Some(chunk) = state.chunks.get_mut(&(device, id, index)) {
                chunk.used = uses;
                chunk.given |= given;
                return Ok(Piece {
                    registration: chunk.registration.clone(),
                    extent,
                    address,
                });
            }
            drop(state);
            // Registering may take long, and others may register meanwhile.
            let registration = self.register(device, &region, extent, access)?;
            let mut state = self.0.lock();
            if state.closed != closed || state.chunks.contains_key(&(device, id, index)) {
                state.pinned -= if registration.pinned { extent.len } else { 0 };
                continue;
            }
            state.chunks.insert(
                (device, id, index),
                Chunk {
                    registration: Arc::new(registration),
                    extent,
                    used: uses,
                    given,
                },
            );
        }
    }

    /// Registers a chunk, on demand where that works, and else within the limit, where it is counted already.
    fn register(
        &self,
        device: Device,
        region: &Region,
        extent: Extent,
        access: Access,
    ) -> Result<Registration, Error> {
        let domain = self.domain(device)?;
        if self.0.settings.on_demand && !self.0.lock().pinning.contains(&device) {
            match Registration::new(&domain, region, extent, access, true) {
                Ok(registration) => return Ok(registration),
                Err(_) => self.0.lock().pinning.push(device),
            }
        }
        self.reserve(extent.len)?;
        let pinned = Registration::new(&domain, region, extent, access, false);
        pinned.map_err(|error| {
            let mut state = self.0.lock();
            state.pinned -= extent.len;
            pin_error(&error, state.pinned)
        })
    }

    /// Makes room within the limit for `len` bytes and counts them.
    fn reserve(&self, len: u64) -> Result<(), Error> {
        let mut state = self.0.lock();
        let limit = self.0.settings.pin_limit.unwrap_or(u64::MAX);
        while state.pinned.saturating_add(len) > limit {
            let idle = state
                .chunks
                .iter()
                .filter(|(_, chunk)| {
                    chunk.pinned() > 0
                        && !chunk.given
                        && Arc::strong_count(&chunk.registration) == 1
                })
                .min_by_key(|(_, chunk)| chunk.used)
                .map(|(key, _)| *key);
            let Some(chunk) = idle.and_then(|key| state.chunks.remove(&key)) else {
                return Err(Error::NoMemory(format!(
                    "{len} bytes more would have to be pinned for RDMA, {} are, and the limit is {limit}: \
                     raise the limit, or do without RDMA",
                    state.pinned
                )));
            };
            state.pinned -= chunk.pinned();
        }
        state.pinned += len;
        Ok(())
    }
}

/// Whether a device fetches pages on demand.
pub(super) fn fetches(device: Device) -> bool {
    let page = usize::try_from(PAGE)
        .ok()
        .and_then(|len| Region::anonymous(len).ok());
    let (Some(page), Ok(domain)) = (page, Pd::new(device)) else {
        return false;
    };
    let whole = Extent {
        offset: 0,
        len: PAGE,
    };
    let access = Access {
        peer_writes: true,
        peer_reads: true,
    };
    Registration::new(&domain, &page, whole, access, true).is_ok()
}

/// The region is not there, or is closed.
fn unknown() -> Error {
    Error::Misuse("a region that does not exist or is closed".to_owned())
}

/// What the system says to a registration, with what helps.
pub(super) fn pin_error(error: &std::io::Error, pinned: u64) -> Error {
    if error.raw_os_error() != Some(libc::ENOMEM) {
        return Error::io("registering memory with the RDMA device", error);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    let allowed = limit
        .current
        .map_or("no limit".to_owned(), |bytes| format!("{bytes} bytes"));
    Error::NoMemory(format!(
        "the system pins no more memory for RDMA: {pinned} bytes are pinned, RLIMIT_MEMLOCK is {allowed}; \
         `LimitMEMLOCK=infinity` in the daemon's unit raises it (`ulimit -l unlimited` in a shell)"
    ))
}
