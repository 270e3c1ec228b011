//! Dirty tracking of a running QEMU from outside, by asynchronous write-protection (Linux 6.7 and later).
//!
//! [`attach`](super::attach) gets a userfaultfd that acts on QEMU's memory; the RAM is registered with it for
//! write-protection, and `PAGEMAP_SCAN` reports what was written and protects it again in one step. A write to a protected
//! page costs the writer one fault that the kernel settles alone.
//!
//! # What the kernel reports (measured on Linux 6.18)
//!
//! - tmpfs: a page-table entry that is empty and carries no marker counts as *written*, whether its page table exists or
//!   not. So pages that QEMU has never touched, or whose entries were reclaimed or dropped while dirty, are reported: that is
//!   the safe way round. Protecting them puts a marker into the entry, which survives reclaim.
//! - hugetlbfs: an empty entry is not reported. The kernel never reclaims huge pages, so an entry empties only when QEMU
//!   itself discards the page; the file then has a hole there, and holes are compared at the end.
//! - tmpfs with transparent huge pages (`huge=always`): a write to a huge page is reported with its 511 neighbours.
//! - A marker needs a page table: protecting 8 GiB of nothing took 10 ms, 16 MiB of page tables in QEMU, and 4 to 6 ms for
//!   every later scan. Large holes of the file are therefore left alone (`scan`): arming the same guest takes
//!   well under a millisecond, and a page that the guest later fills is found because it was never protected.
//!
//! # What it cannot see
//!
//! Writes to pages pinned before they were protected (direct I/O in flight), through other mappings of the file (vhost-user
//! processes), and by devices (VFIO). The engine and the preflight deal with those.

mod scan;

use std::fs::File;
use std::io;
use std::ops::Range;

use self::scan::Scanner;
use super::attach::{Uffd, attach};
use super::process::{self, Process};
use super::sys::pagemap::{Pagemap, push_merged};
use super::sys::uffd;
use super::{AttachFigures, TrackError, Tracker, threads};
use crate::limits::MIN_PAGE_SIZE;
use crate::memory::{BlockId, Run};

/// Bytes that one thread scans at least, where a block is shared out among several.
const SCAN_SHARE: u64 = 4 << 30;
/// Ranges are unregistered in pieces of so many bytes: the kernel holds off QEMU's page faults meanwhile (12 ms for 1 GiB,
/// which it takes in any case).
const UNREGISTER_PIECE: u64 = 16 << 20;

/// A RAMBlock as QEMU has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedBlock {
    /// The engine's number of it.
    pub block: BlockId,
    /// First address in QEMU.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

impl TrackedBlock {
    fn range(&self) -> Range<u64> {
        self.address..self.address + self.len
    }
}

/// Tracks the writes to a running QEMU's RAM.
#[derive(Debug)]
pub struct UffdTracker {
    process: Process,
    blocks: Vec<TrackedBlock>,
    armed: Option<Armed>,
    figures: Option<AttachFigures>,
}

/// What there is while tracking.
#[derive(Debug)]
struct Armed {
    uffd: Uffd,
    pagemap: Pagemap,
    /// For each block: its file, where holes can be asked for, and the identity of its mapping.
    files: Vec<BlockFile>,
}

/// The file behind a block.
#[derive(Debug)]
struct BlockFile {
    /// Device and inode number, as QEMU has them mapped.
    identity: (u64, u64),
    /// Open when it is on tmpfs and can be asked for holes.
    holes: Option<File>,
}

impl UffdTracker {
    /// A tracker of these blocks of process `pid`; nothing is touched before [`arm`](Tracker::arm).
    ///
    /// # Errors
    /// `Gone`; `Memory` when a block is empty or not made of whole pages.
    pub fn new(pid: i32, blocks: Vec<TrackedBlock>) -> Result<UffdTracker, TrackError> {
        for block in &blocks {
            let page = block.page_size;
            let whole = page >= MIN_PAGE_SIZE
                && page.is_power_of_two()
                && block.len != 0
                && (block.address | block.len).is_multiple_of(page)
                && block.address.checked_add(block.len).is_some();
            if !whole {
                return Err(TrackError::Memory(format!(
                    "block {} ({} bytes at {:#x}) is not made of whole pages of {page} bytes",
                    block.block.0, block.len, block.address
                )));
            }
        }
        Ok(UffdTracker {
            process: Process::open(pid)?,
            blocks,
            armed: None,
            figures: None,
        })
    }

    /// How the attach of the last `arm` went.
    pub fn attach_figures(&self) -> Option<AttachFigures> {
        self.figures
    }

    /// Prepares everything but the protection itself.
    fn register(&mut self) -> Result<Armed, TrackError> {
        let pid = self.process.pid();
        let files = self.block_files()?;
        let pagemap = Pagemap::open(pid)
            .map_err(|error| process::proc_error(pid, "opening QEMU's page table", error))?;
        let (uffd, figures) = attach(pid)?;
        self.figures = Some(figures);
        let features = uffd::FEATURE_WP_ASYNC
            | uffd::FEATURE_WP_UNPOPULATED
            | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
        uffd.enable(features).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TrackError::Kernel(format!(
                "it lacks asynchronous write-protection, which came with Linux 6.7 (this is {}, on x86-64 with \
                 CONFIG_PTE_MARKER_UFFD_WP)",
                std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim()
            )),
            _ => TrackError::System { what: "asking the userfaultfd for its features", source: error },
        })?;
        for block in &self.blocks {
            uffd.register(&block.range(), uffd::MODE_WP)
                .map_err(|error| self.not_registered(error))?;
        }
        Ok(Armed {
            uffd,
            pagemap,
            files,
        })
    }

    /// Why a range was refused.
    fn not_registered(&self, error: io::Error) -> TrackError {
        let pid = self.process.pid();
        match error.raw_os_error() {
            Some(libc::EBUSY) => TrackError::Busy(format!(
                "another userfaultfd is registered on it (QEMU itself has {} open); it is being migrated, snapshotted in the \
                 background, or tracked by another tool: end that first",
                process::userfaultfds(pid).unwrap_or(0)
            )),
            Some(libc::ESRCH) => TrackError::Gone(pid),
            Some(libc::EINVAL | libc::EPERM) => TrackError::Memory(
                "the kernel cannot write-protect it; the RAM file must be on tmpfs or hugetlbfs, shared, and writable by QEMU"
                    .into(),
            ),
            _ => TrackError::System { what: "registering guest memory", source: error },
        }
    }

    /// The files of all blocks, by what QEMU has mapped at their addresses.
    fn block_files(&self) -> Result<Vec<BlockFile>, TrackError> {
        let pid = self.process.pid();
        let mappings = process::maps(pid)
            .map_err(|error| process::proc_error(pid, "reading QEMU's memory map", error))?;
        let open = process::descriptors(pid)
            .map_err(|error| process::proc_error(pid, "looking at what QEMU has open", error))?;
        let find = |block: &TrackedBlock| {
            let mapping = mappings
                .iter()
                .find(|mapping| mapping.addresses.contains(&block.address));
            let Some(mapping) = mapping else {
                return Err(self.moved(block));
            };
            let identity = (mapping.device, mapping.inode);
            // Without the file (QEMU has closed it) holes are tracked like everything else.
            let whole = block.page_size == MIN_PAGE_SIZE
                && mapping.addresses.start == block.address
                && mapping.offset == 0;
            let holes = whole
                .then(|| process::take_file(&self.process, &open, &mapping.name, identity).ok())
                .flatten()
                .flatten();
            Ok(BlockFile { identity, holes })
        };
        self.blocks.iter().map(find).collect()
    }

    /// QEMU must still have the same files at the same addresses: what it unmaps is not tracked, and says nothing of it.
    fn check_map(&self, armed: &Armed) -> Result<(), TrackError> {
        let pid = self.process.pid();
        let mappings = process::maps(pid)
            .map_err(|error| process::proc_error(pid, "reading QEMU's memory map", error))?;
        for (block, file) in self.blocks.iter().zip(&armed.files) {
            let mut expected = block.address;
            for mapping in &mappings {
                if (mapping.device, mapping.inode) == file.identity
                    && mapping.addresses.contains(&expected)
                {
                    expected = mapping.addresses.end;
                }
            }
            if expected < block.range().end {
                return Err(self.moved(block));
            }
        }
        Ok(())
    }

    fn moved(&self, block: &TrackedBlock) -> TrackError {
        if !self.process.is_alive() {
            return TrackError::Gone(self.process.pid());
        }
        TrackError::Memory(format!(
            "QEMU has no longer mapped block {} at {:#x}; memory must not be plugged or unplugged during a migration",
            block.block.0, block.address
        ))
    }

    /// Scans every block; appends what was written.
    fn scan_blocks(&self, armed: &Armed, dirty: &mut Vec<Run>) -> Result<(), TrackError> {
        for (block, file) in self.blocks.iter().zip(&armed.files) {
            let scanner = Scanner::new(&armed.pagemap, block.address, file.holes.as_ref());
            let written = scan_shared_out(&scanner, block.range())
                .map_err(|source| self.not_scanned(block, source))?;
            let page = block.page_size;
            dirty.extend(written.into_iter().map(|extent| Run {
                block: block.block,
                first: (extent.start - block.address) / page,
                pages: (extent.end - extent.start) / page,
            }));
        }
        // The page table of a process that has ended is empty, and so is what it reports.
        if !self.process.is_alive() {
            return Err(TrackError::Gone(self.process.pid()));
        }
        self.check_map(armed)
    }

    fn not_scanned(&self, block: &TrackedBlock, source: io::Error) -> TrackError {
        if !self.process.is_alive() {
            return TrackError::Gone(self.process.pid());
        }
        match source.raw_os_error() {
            Some(libc::EPERM) => self.moved(block),
            Some(libc::ENOTTY) => {
                TrackError::Kernel("it lacks PAGEMAP_SCAN, which came with Linux 6.7".into())
            }
            _ => TrackError::System {
                what: "scanning QEMU's page table",
                source,
            },
        }
    }
}

/// Scans a range, by several threads where it is large. In address order.
fn scan_shared_out(scanner: &Scanner<'_>, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let shares = usize::try_from((range.end - range.start) / SCAN_SHARE).unwrap_or(usize::MAX);
    let shares = shares.clamp(1, threads::cores());
    if shares == 1 {
        return scanner.scan(range);
    }
    let share = ((range.end - range.start) / shares as u64).next_multiple_of(scan::CHUNK);
    let pieces = threads::on_each(shares, |index| {
        let start = range.end.min(range.start + index as u64 * share);
        let end = range.end.min(start + share);
        scanner.scan(start..end)
    });
    let mut all = Vec::new();
    for piece in pieces {
        for extent in piece? {
            push_merged(&mut all, extent);
        }
    }
    Ok(all)
}

impl Tracker for UffdTracker {
    fn arm(&mut self) -> Result<(), TrackError> {
        self.disarm();
        let armed = self.register()?;
        // What was written before is of no interest: the engine takes everything that the file holds as dirty.
        let protected = self.scan_blocks(&armed, &mut Vec::new());
        self.armed = Some(armed);
        if protected.is_err() {
            self.disarm();
        }
        protected
    }

    fn scan(&mut self, dirty: &mut Vec<Run>) -> Result<(), TrackError> {
        let Some(armed) = &self.armed else {
            return Err(TrackError::Memory(
                "tracking was not armed, or was ended".into(),
            ));
        };
        self.scan_blocks(armed, dirty)
    }

    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else {
            return;
        };
        for block in &self.blocks {
            // Errors mean that QEMU or its mapping is gone, and the protection with it; or closing the descriptor ends it.
            for piece in pieces(block.range(), UNREGISTER_PIECE) {
                let _ = armed.uffd.unregister(&piece);
            }
        }
    }
}

impl Drop for UffdTracker {
    fn drop(&mut self) {
        self.disarm();
    }
}

/// `range` in pieces of at most `len`.
fn pieces(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    (0..)
        .map(move |index| range.start + index * len)
        .take_while(move |start| *start < end)
        .map(move |start| start..end.min(start + len))
}
