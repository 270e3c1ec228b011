//! The machine's side: what the engines decide about, done to real memory.
//!
//! Four traits, each with one real implementation here and one simulated one in the workspace's tests. All of them
//! speak in runs of pages of numbered RAMBlocks; the numbers are the engine's.
//!
//! - [`process`]: what `/proc` tells of a QEMU before anything is touched.
//! - [`features`]: what the kernel has of what is needed.
//! - [`attach`]: gets a userfaultfd that acts on QEMU's memory.
//! - [`track`]: implements [`Tracker`] with it.
//! - [`ram`]: implements [`Ram`] and [`Placer`] over mappings of the same files.
//! - [`encode`], [`decode`]: pages on their way, compressed or as deltas.
//! - [`pager`]: implements [`Pager`], which lets a guest run on RAM that has not all arrived, and [`received`] remembers
//!   what has.
//! - [`throttle`]: keeps the threads that write from running for a share of their time.

pub mod attach;
pub mod decode;
pub mod encode;
pub mod features;
pub mod pager;
pub mod process;
pub mod ram;
pub mod received;
pub mod throttle;
pub mod track;

mod seek;
mod sys;
mod threads;

use std::io;
use std::time::Duration;

use crate::memory::{BlockId, Run};

/// Finds out what a running guest has written since it was last asked. The source's side.
pub trait Tracker: Send {
    /// Starts tracking: from its return on, every write by the guest, QEMU or the kernel for them is reported.
    ///
    /// # Errors
    /// Says which privilege or kernel feature is missing, or what else holds the memory.
    fn arm(&mut self) -> Result<(), TrackError>;

    /// Appends the runs written since they were last reported (or since `arm`), in address order for each block, and
    /// protects exactly those again, atomically: a write is reported by this scan or by the next, never by none.
    ///
    /// # Errors
    /// The guest can no longer be tracked (its QEMU is gone, its memory map changed). The migration must fail.
    fn scan(&mut self, dirty: &mut Vec<Run>) -> Result<(), TrackError>;

    /// Ends tracking and leaves nothing behind. Also done on drop.
    fn disarm(&mut self);
}

/// A guest's RAM as this process has it mapped. Both sides.
pub trait Ram: Send + Sync {
    /// Appends the runs that the RAM file really holds (`SEEK_DATA`), in order; what is left out reads as zero.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn populated(&self, runs: &mut Vec<Run>) -> io::Result<()>;

    /// Whether `len` bytes (a multiple of 4096) at `offset` of `block` are zero now.
    fn is_zero(&self, block: BlockId, offset: u64, len: u64) -> bool;

    /// Copies the bytes at `offset` of `block` out. What is written meanwhile comes out old or new.
    ///
    /// # Panics
    /// They are not inside the block.
    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]);

    /// Digests of every [`DIGEST_CHUNK`](crate::limits::DIGEST_CHUNK) of a block that nobody writes; holes count as
    /// zero. In parallel.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn digests(&self, block: BlockId) -> io::Result<Vec<Digest>>;

    /// Digests of every page of chunk `chunk` of a block.
    fn page_digests(&self, block: BlockId, chunk: u64) -> Vec<Digest>;
}

/// Puts pages into the destination's RAM in the ways in which the transport does not.
pub trait Placer: Send + Sync {
    /// Makes all RAM read as zero, by punching out what is there, or by zeroing it in place where it is to stay allocated. Before
    /// anything is registered or sent.
    ///
    /// # Errors
    /// The file refuses.
    fn clear(&self) -> io::Result<()>;

    /// Allocates the pages of `run` ahead of their bytes (contents do not change). May run beside the transfer.
    ///
    /// # Errors
    /// `StorageFull` or `OutOfMemory` when the memory is not there.
    fn allocate(&self, run: Run) -> io::Result<()>;

    /// Copies the bytes at `offset` of `block` out, which this side alone writes.
    ///
    /// # Errors
    /// They are not inside the block, or the file cannot be read.
    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Puts whole units of 4 KiB at `offset` of `block`, and allocates them if need be.
    ///
    /// # Errors
    /// They are not inside the block; `StorageFull` or `OutOfMemory` when the memory is not there.
    fn place(&self, block: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `run` read as zero; does not touch pages that already do.
    ///
    /// # Errors
    /// The run is not inside its block: the peer's fault.
    fn zero(&self, run: Run) -> Result<(), OutOfBounds>;
}

/// Lets a guest run on RAM that has not all arrived: whoever touches a page that is not mapped waits. The destination's
/// side of post-copy.
pub trait Pager: Send + Sync {
    /// Appends faults that wait and were not told before; waits up to `limit` for the first.
    ///
    /// # Errors
    /// `Gone`, and what else keeps faults from being read.
    fn faults(&self, faults: &mut Vec<DemandFault>, limit: Duration) -> Result<(), PagerError>;

    /// Maps pages whose bytes are in the file, and lets those go on who wait for them. Pages that are mapped already are
    /// passed over, and so is what is not this pager's.
    ///
    /// # Errors
    /// `NotInFile` when the file lacks a page of the run: those before it are mapped.
    fn map(&self, run: Run) -> Result<(), PagerError>;

    /// The honest end for pages that can never be fetched: a touch is a memory error, never zeroes. Pages that are mapped
    /// stay as they are.
    ///
    /// # Errors
    /// `Gone`.
    fn poison(&self, run: Run) -> Result<(), PagerError>;
}

/// A page that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DemandFault {
    /// The RAMBlock.
    pub block: BlockId,
    /// Index of the page.
    pub page: u64,
    /// The thread that waits, by its id in its own pid namespace.
    pub thread: u32,
    /// The file has the page already: it only has to be mapped.
    pub present: bool,
}

/// Why a guest's page faults cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// QEMU cannot be attached to.
    #[error(transparent)]
    Attach(#[from] TrackError),
    /// The kernel lacks something.
    #[error("this kernel cannot serve the guest's page faults: {0}")]
    Kernel(String),
    /// QEMU went away.
    #[error("QEMU (process {0}) is gone")]
    Gone(i32),
    /// The descriptor that a pager left inside QEMU is not there.
    #[error(
        "QEMU (process {pid}) has no userfaultfd of the number {descriptor}; its memory is served by nobody"
    )]
    NotThere {
        /// The process.
        pid: i32,
        /// The number.
        descriptor: i32,
    },
    /// A page that was to be mapped is not in the file.
    #[error("the RAM file lacks a page of pages {} to {} of block {}", .0.first, .0.end(), .0.block.0)]
    NotInFile(Run),
    /// Anything else the system said.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
}

/// A digest of memory, to compare two guests' RAM that both stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 16]);

/// A run that is not inside its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pages {} to {} of block {} are outside it", .0.first, .0.end(), .0.block.0)]
pub struct OutOfBounds(pub Run);

/// How the stop of one QEMU thread went, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachFigures {
    /// How long the thread stood still.
    pub stopped: Duration,
}

/// Why a guest cannot be tracked. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel lacks something: which, and since when it exists.
    #[error("this kernel cannot track the guest: {0}")]
    Kernel(String),
    /// A privilege is missing.
    #[error("not permitted to attach to QEMU: {0}")]
    Permission(String),
    /// Another userfaultfd, tracer or tool holds the guest.
    #[error("something else holds the guest's memory: {0}")]
    Busy(String),
    /// QEMU went away.
    #[error("QEMU (process {0}) is gone")]
    Gone(i32),
    /// The memory is not as it was or not as it must be.
    #[error("the guest's memory cannot be tracked: {0}")]
    Memory(String),
    /// Anything else the system said.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
}
