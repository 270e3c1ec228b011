//! A guest's RAM files, mapped into this process: listed, tested, digested, cleared, allocated, zeroed.
//!
//! The mapping is of the same file that QEMU has mapped. What is read through it is what the guest has there; reading a hole
//! through it would allocate the hole, so holes are looked up and never touched.

mod digest;
mod in_place;
mod populated;
mod taken;

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

pub use self::taken::Taken;
use super::seek::next_data;
use super::sys::map::SharedMap;
use super::{Digest, OutOfBounds, Placer, Ram};
use crate::limits::{MAX_PAGE_SIZE, MIN_PAGE_SIZE};
use crate::memory::{BlockId, BlockSpec, Run};

/// Bytes that one step of `allocate` takes: a failure is noticed soon, and others get a turn.
const ALLOCATE_STEP: u64 = 16 << 20;
/// Bytes that one step of `zero` looks at.
const ZERO_STEP: usize = 64 << 10;

static ZERO_PAGE: [u8; page_bytes()] = [0; page_bytes()];

const _: () = assert!(ALLOCATE_STEP.is_multiple_of(MAX_PAGE_SIZE));
const _: () = assert!((ZERO_STEP as u64).is_multiple_of(MIN_PAGE_SIZE));

/// A guest's RAM files, mapped into this process. Cheap to clone; the memory stays mapped as long as any clone lives.
#[derive(Clone, Debug)]
pub struct MappedRam {
    blocks: Arc<[MappedBlock]>,
    /// Blocks whose memory stays allocated when they are cleared.
    kept: Arc<[BlockId]>,
}

/// One RAM file.
#[derive(Debug)]
struct MappedBlock {
    spec: BlockSpec,
    file: Arc<File>,
    map: Arc<SharedMap>,
}

/// Address and length of a block's mapping, and what keeps it mapped.
pub type RawMapping = (*mut u8, usize, Arc<dyn Any + Send + Sync>);

impl MappedRam {
    /// Maps RAM files that are open for reading and writing, such as QEMU's own
    /// ([`RamMapping`](super::process::RamMapping)); entry `i` becomes `BlockId(i)`. A destination needs a `writable`
    /// mapping; a source has no use for it.
    ///
    /// # Errors
    /// Which block, and what is wrong with its file.
    pub fn map(
        blocks: impl IntoIterator<Item = (BlockSpec, Arc<File>)>,
        writable: bool,
    ) -> io::Result<MappedRam> {
        let map = |(spec, file): (BlockSpec, Arc<File>)| {
            let name = spec.name.clone();
            map_block(spec, file, writable).map_err(|error| about(&format!("of {name}"), &error))
        };
        let blocks = blocks.into_iter().map(map).collect::<io::Result<_>>()?;
        Ok(Self::of(blocks))
    }

    /// Opens RAM files by name and maps them, see [`map`](Self::map).
    ///
    /// # Errors
    /// Which file, and what is wrong with it.
    pub fn open(blocks: &[(BlockSpec, PathBuf)], writable: bool) -> io::Result<MappedRam> {
        let map = |(spec, path): &(BlockSpec, PathBuf)| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            file.and_then(|file| map_block(spec.clone(), Arc::new(file), writable))
                .map_err(|error| about(&path.display().to_string(), &error))
        };
        let blocks = blocks.iter().map(map).collect::<io::Result<_>>()?;
        Ok(Self::of(blocks))
    }

    fn of(blocks: Arc<[MappedBlock]>) -> MappedRam {
        let kept = Arc::default();
        MappedRam { blocks, kept }
    }

    /// The same where the memory of these blocks stays allocated when they are cleared: whoever started QEMU wants it so.
    #[must_use]
    pub fn keeping(self, kept: impl IntoIterator<Item = BlockId>) -> MappedRam {
        let kept = kept.into_iter().collect();
        MappedRam { kept, ..self }
    }

    /// What a block must be like.
    pub fn spec(&self, block: BlockId) -> Option<&BlockSpec> {
        self.block(block).map(|block| &block.spec)
    }

    /// Address and length of a block's mapping, and what keeps it mapped: as long as that (or a clone of it) lives, the
    /// memory is mapped readable, and writable if it was opened so.
    pub fn mapping(&self, block: BlockId) -> Option<RawMapping> {
        let map = &self.block(block)?.map;
        Some((
            map.base(),
            map.len(),
            Arc::clone(map) as Arc<dyn Any + Send + Sync>,
        ))
    }

    /// The file behind a block, where it was opened to be written and takes writes: hugetlbfs does not.
    pub fn written_to(&self, block: BlockId) -> Option<Arc<File>> {
        let block = self.block(block)?;
        let takes_writes = block.map.is_writable() && !block.is_huge();
        takes_writes.then(|| Arc::clone(&block.file))
    }

    /// The file behind a block, where its pages can be given to a pipe: those of hugetlbfs cannot.
    pub fn spliced_from(&self, block: BlockId) -> Option<Arc<File>> {
        let block = self.block(block)?;
        (!block.is_huge()).then(|| Arc::clone(&block.file))
    }

    fn block(&self, block: BlockId) -> Option<&MappedBlock> {
        self.blocks.get(usize::from(block.0))
    }

    /// Every block with its number.
    fn numbered(&self) -> impl Iterator<Item = (BlockId, &MappedBlock)> {
        (0..).map(BlockId).zip(self.blocks.iter())
    }

    /// The block, if it has `len` bytes at `offset`.
    fn whole(&self, block: BlockId, offset: u64, len: usize) -> io::Result<&MappedBlock> {
        let inside = |block: &&MappedBlock| {
            offset
                .checked_add(len as u64)
                .is_some_and(|end| end <= block.spec.size)
        };
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside the RAMBlock");
        self.block(block).filter(inside).ok_or_else(outside)
    }

    /// The block and the bytes of a run that is inside it.
    fn locate(&self, run: Run) -> Result<(&MappedBlock, Range<u64>), OutOfBounds> {
        let block = self.block(run.block).ok_or(OutOfBounds(run))?;
        let end = run.first.checked_add(run.pages).ok_or(OutOfBounds(run))?;
        if run.pages == 0 || end > block.spec.pages() {
            return Err(OutOfBounds(run));
        }
        let page = block.spec.page_size;
        Ok((block, run.first * page..end * page))
    }
}

fn about(file: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("RAM file {file}: {error}"))
}

/// Maps one RAM file.
fn map_block(spec: BlockSpec, file: Arc<File>, writable: bool) -> io::Result<MappedBlock> {
    let data = file.metadata()?;
    if !data.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
    }
    let whole = spec.size != 0
        && (MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&spec.page_size)
        && spec.size.is_multiple_of(spec.page_size);
    if !whole || data.len() != spec.size {
        let text = format!(
            "it has {} bytes where block {} has {} in pages of {}",
            data.len(),
            spec.name,
            spec.size,
            spec.page_size
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let len = usize::try_from(spec.size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let map = Arc::new(SharedMap::new(file.as_fd(), len, writable)?);
    Ok(MappedBlock { spec, file, map })
}

impl MappedBlock {
    /// Whether the file is on hugetlbfs.
    fn is_huge(&self) -> bool {
        self.spec.page_size > MIN_PAGE_SIZE
    }

    /// Zeroes what is not zero in `range`. The file is read rather than the mapping, since reading a hole of the mapping
    /// would allocate it; what is not zero is there, and can be written without a fault that fails.
    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        if !self.is_huge()
            && next_data(&self.file, range.start)?.is_none_or(|data| data >= range.end)
        {
            return Ok(());
        }
        let mut buffer = [0; ZERO_STEP];
        let mut start = range.start;
        while start < range.end {
            let step = usize::try_from(range.end - start)
                .unwrap_or(ZERO_STEP)
                .min(ZERO_STEP);
            let bytes = &mut buffer[..step];
            self.file.read_exact_at(bytes, start)?;
            for (index, page) in bytes.chunks(page_bytes()).enumerate() {
                if page != &ZERO_PAGE[..page.len()] {
                    let at = as_usize(start) + index * page_bytes();
                    self.map.fill_zero(at..at + page.len());
                }
            }
            start += step as u64;
        }
        Ok(())
    }

    /// Allocates `range`: `fallocate` for a clean refusal when there is no room (a store into a full tmpfs would be a
    /// SIGBUS), then a fault per page here and now, which also clears it.
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(ALLOCATE_STEP);
            retry(|| rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, start, len))?;
            match self
                .map
                .populate_write(as_usize(start)..as_usize(start + len))
            {
                Ok(()) => {}
                // Before Linux 5.14: the pages are there, only not cleared and mapped ahead.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                // What a store would have met: no memory for the page or its page table.
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Err(io::Error::new(
                        io::ErrorKind::OutOfMemory,
                        "no memory for the guest's pages",
                    ));
                }
                Err(error) => return Err(error),
            }
            start += len;
        }
        Ok(())
    }

    /// Punches everything out.
    fn clear(&self) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry(|| rustix::fs::fallocate(&self.file, flags, 0, self.spec.size))
    }
}

/// Bytes of the smallest page, as a length.
const fn page_bytes() -> usize {
    4096
}

const _: () = assert!(page_bytes() as u64 == MIN_PAGE_SIZE);

/// An offset inside a mapping: its length is a `usize`, so the offset is one, too.
fn as_usize(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Calls again what a signal has interrupted.
fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

impl Ram for MappedRam {
    fn populated(&self, runs: &mut Vec<Run>) -> io::Result<()> {
        for (id, block) in self.numbered() {
            let page = block.spec.page_size;
            block.populated(|data| {
                // Data on tmpfs begins and ends at pages; a page of which a part is data counts whole.
                let first = data.start / page;
                runs.push(Run {
                    block: id,
                    first,
                    pages: data.end.div_ceil(page) - first,
                });
            })?;
        }
        Ok(())
    }

    fn is_zero(&self, block: BlockId, offset: u64, len: u64) -> bool {
        let Some(block) = self.block(block) else {
            return false;
        };
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= block.spec.size);
        inside && block.map.is_zero(as_usize(offset)..as_usize(offset + len))
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) {
        if let Some(block) = self.block(block) {
            block.map.copy_out(as_usize(offset), into);
        }
    }

    fn digests(&self, block: BlockId) -> io::Result<Vec<Digest>> {
        self.block(block)
            .map_or_else(|| Ok(Vec::new()), digest::chunks)
    }

    fn page_digests(&self, block: BlockId, chunk: u64) -> Vec<Digest> {
        self.block(block)
            .map_or_else(Vec::new, |block| digest::pages(block, chunk))
    }
}

impl Placer for MappedRam {
    fn clear(&self) -> io::Result<()> {
        self.numbered()
            .try_for_each(|(id, block)| match self.kept.contains(&id) {
                true => block.clear_in_place(),
                false => block.clear(),
            })
    }

    fn allocate(&self, run: Run) -> io::Result<()> {
        let (block, range) = self
            .locate(run)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        block.allocate(range)
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let block = self.whole(block, offset, into.len())?;
        // Not through the mapping: reading a hole there would allocate it.
        block.file.read_exact_at(into, offset)
    }

    fn place(&self, block: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let block = self.whole(block, offset, bytes.len())?;
        if !block.is_huge() {
            // By the kernel: where there is no room for a page, a store would be a SIGBUS.
            return block.file.write_all_at(bytes, offset);
        }
        // hugetlbfs has no write: the pages are made to be there first.
        let (page, end) = (block.spec.page_size, offset + bytes.len() as u64);
        let first = offset / page * page;
        let len = end.next_multiple_of(page) - first;
        retry(|| rustix::fs::fallocate(&block.file, FallocateFlags::KEEP_SIZE, first, len))?;
        block.map.copy_in(as_usize(offset), bytes);
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), OutOfBounds> {
        let (block, range) = self.locate(run)?;
        if block.zero(range.clone()).is_err() {
            // The file cannot be read, which a file in memory always can. The mapping still can be written.
            block
                .map
                .fill_zero(as_usize(range.start)..as_usize(range.end));
        }
        Ok(())
    }
}
