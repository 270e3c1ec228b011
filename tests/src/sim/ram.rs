//! Simulated guest RAM: heap memory whose pages carry their write counter, with holes and a dirty log.
//!
//! A page of version `v` holds words that name the page, the place in the page and the version of the write that put
//! them there, at eight places spread over the page. A page copied while it was written is seen to be torn, a page put
//! in the wrong place is seen to be foreign, and an old copy over a newer one is seen to go backwards.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecopy::host::{Digest, OutOfBounds, Placer, Ram, TrackError, Tracker};
use pagecopy::limits::DIGEST_CHUNK;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use transport::{Access, RegionId, Regions};

use super::rng::{Rng, mix};
use super::sys::Heap;

/// Words of a page that carry its version.
pub(super) const SLOTS: u64 = 8;
/// All of these words of a page.
pub(super) type Words = [u64; 8];
/// Bits of a word below the version: the page's number and the slot.
const NAME_BITS: u32 = 20;

/// One RAMBlock.
#[derive(Debug)]
struct Block {
    spec: BlockSpec,
    heap: Heap,
    /// Number of its first page among the pages of all blocks.
    first: usize,
}

/// What the kernel and the checker know of a page.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// The RAM file holds it; otherwise it is a hole and reads as zero.
    populated: bool,
    /// Written since it was last protected, as the kernel's dirty tracking sees it.
    written: bool,
    /// Writes and punched holes so far.
    version: u64,
    /// The version of the last punched hole.
    punched: u64,
}

/// A guest's RAM. Pages are numbered through all blocks.
#[derive(Debug)]
pub(super) struct SimRam {
    blocks: Vec<Block>,
    /// Where each page is: its block, and its number in it.
    places: Vec<(usize, u64)>,
    pages: Mutex<Vec<Page>>,
    /// How often something was taken out, as the kernel tells who watches the RAM file.
    taken: AtomicU64,
}

impl SimRam {
    /// All holes.
    pub(super) fn new(specs: &[BlockSpec]) -> Arc<SimRam> {
        SimRam::over(specs, Heap::new)
    }

    /// A channel's buffer: its bytes mean nothing before they are copied into it.
    pub(super) fn buffer(specs: &[BlockSpec]) -> Arc<SimRam> {
        SimRam::over(specs, Heap::uncleared)
    }

    fn over(specs: &[BlockSpec], heap: fn(u64) -> Heap) -> Arc<SimRam> {
        let mut first = 0;
        let blocks = specs
            .iter()
            .map(|spec| {
                let block = Block {
                    spec: spec.clone(),
                    heap: heap(spec.size),
                    first,
                };
                first += usize::try_from(spec.pages()).unwrap_or(usize::MAX);
                block
            })
            .collect();
        let mut places = Vec::with_capacity(first);
        for (number, spec) in specs.iter().enumerate() {
            places.extend((0..spec.pages()).map(|index| (number, index)));
        }
        Arc::new(SimRam {
            blocks,
            places,
            pages: Mutex::new(vec![Page::default(); first]),
            taken: AtomicU64::new(0),
        })
    }

    /// Number of pages of all blocks.
    pub(super) fn pages(&self) -> usize {
        self.places.len()
    }

    /// How often something was taken out of it.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// The blocks.
    pub(super) fn specs(&self) -> Vec<BlockSpec> {
        self.blocks.iter().map(|block| block.spec.clone()).collect()
    }

    /// A write by the guest (or, not `seen`, by a device into a page pinned before): the slots in `mask` get a new
    /// version. The dirty log hears of it first if it is seen.
    pub(super) fn write(&self, page: usize, mask: u64, seen: bool) {
        let mut pages = self.lock();
        let state = &mut pages[page];
        state.version += 1;
        state.populated = true;
        state.written |= seen;
        let version = state.version;
        drop(pages);
        let (block, index) = self.place(page);
        for slot in (0..SLOTS).filter(|slot| mask & (1 << slot) != 0) {
            let offset = slot_offset(&block.spec, index, slot);
            block.heap.set_word(offset, word(version, page, slot));
        }
    }

    /// A device pins `page` to write it later: the kernel takes it as written now, and never again.
    pub(super) fn pin(&self, page: usize) {
        let mut pages = self.lock();
        pages[page].written = true;
        pages[page].populated = true;
    }

    /// The guest gives `page` back (balloon, free page reporting): it reads as zero. The dirty log does not hear of it.
    pub(super) fn punch(&self, page: usize) {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.clear_page(page);
    }

    fn clear_page(&self, page: usize) {
        let mut pages = self.lock();
        let state = &mut pages[page];
        state.version += 1;
        state.punched = state.version;
        state.populated = false;
        drop(pages);
        let (block, index) = self.place(page);
        block
            .heap
            .clear(index * block.spec.page_size, block.spec.page_size);
    }

    /// The guest stores zeroes all over `page`: populated, dirty, and yet zero.
    pub(super) fn write_zeroes(&self, page: usize) {
        self.clear_page(page);
        let mut pages = self.lock();
        pages[page].populated = true;
        pages[page].written = true;
    }

    /// Leaves old bytes in the RAM, as a QEMU that has run its firmware before does.
    pub(super) fn leave_garbage(&self, rng: &mut Rng) {
        for _ in 0..rng.below(8) {
            let page = rng.index(self.pages());
            let (block, index) = self.place(page);
            block.heap.set_word(
                index * block.spec.page_size + 8 * rng.below(512),
                rng.bits(),
            );
        }
    }

    /// The kernel forgets what was written: everything is protected.
    pub(super) fn protect_all(&self) {
        self.lock().iter_mut().for_each(|page| page.written = false);
    }

    /// Protects the pages of `runs` without reporting them. Only a planted mistake does so.
    pub(super) fn protect(&self, runs: &[Run]) {
        let mut pages = self.lock();
        for run in runs {
            let first = self.number(run.block, run.first);
            for page in first..first + usize::try_from(run.pages).unwrap_or(0) {
                pages[page].written = false;
            }
        }
    }

    /// Appends the runs that were written, and protects them again if `protect`.
    pub(super) fn take_written(&self, dirty: &mut Vec<Run>, protect: bool) {
        let mut pages = self.lock();
        self.runs(&mut pages, dirty, |page| {
            let written = page.written;
            page.written &= !protect;
            written
        });
    }

    /// Makes every block known to the peer as the region of its place in `order`.
    pub(super) fn register(&self, regions: &Regions, order: &[usize], access: Access) {
        for (id, index) in (0u32..).zip(order) {
            regions.register(RegionId(id), self.blocks[*index].heap.region(), access);
        }
    }

    /// Copies `len` bytes at `offset` of a block from the same place in `other`.
    pub(super) fn copy_from(&self, other: &SimRam, block: BlockId, offset: u64, len: u64) {
        let index = usize::from(block.0);
        self.blocks[index]
            .heap
            .copy_from(&other.blocks[index].heap, offset, len);
    }

    /// The digests of a block's chunks, as engines take them.
    pub(super) fn chunk_digests(&self, block: BlockId) -> Vec<[u8; 16]> {
        // Simulated RAM can always be read.
        let digests = self.digests(block).unwrap_or_default();
        digests.into_iter().map(|digest| digest.0).collect()
    }

    /// The digests of a chunk's pages, as an answer to an engine that asked for the chunk of `block`.
    pub(super) fn digests_in_chunk(&self, block: BlockId, chunk: u64) -> Vec<[u8; 16]> {
        let digests = self.page_digests(block, chunk);
        digests.into_iter().map(|digest| digest.0).collect()
    }

    /// A digest of the version words of all RAM: what the simulated device state remembers of the guest.
    pub(super) fn version_digest(&self, order: &[usize]) -> u64 {
        let mut digest = 0;
        for block in order.iter().map(|index| &self.blocks[*index]) {
            for index in 0..block.spec.pages() {
                for slot in 0..SLOTS {
                    digest = mix(digest ^ block.heap.word(slot_offset(&block.spec, index, slot)));
                }
            }
        }
        digest
    }

    /// The first page whose bytes differ from those of `other`, whose blocks are found through `order`: block, page.
    pub(super) fn first_difference(&self, other: &SimRam, order: &[usize]) -> Option<(usize, u64)> {
        self.blocks
            .iter()
            .zip(order)
            .enumerate()
            .find_map(|(number, (block, index))| {
                let offset = block.heap.first_difference(&other.blocks[*index].heap)?;
                Some((number, offset / block.spec.page_size))
            })
    }

    /// The version that each slot of each page shows, in the order of `order`'s blocks; 0 is zero. `Err`: a foreign word.
    pub(super) fn versions(&self, order: &[usize], versions: &mut Vec<u64>) -> Result<(), String> {
        versions.clear();
        for block in order.iter().map(|index| &self.blocks[*index]) {
            for index in 0..block.spec.pages() {
                for slot in 0..SLOTS {
                    let value = block.heap.word(slot_offset(&block.spec, index, slot));
                    let version = value >> NAME_BITS;
                    let page = versions.len() / 8;
                    if value != 0 && value != word(version, page, slot) {
                        return Err(format!(
                            "page {index} of {} holds a foreign word {value:#x}",
                            block.spec.name
                        ));
                    }
                    versions.push(version);
                }
            }
        }
        Ok(())
    }

    /// A page that shows zero where it showed one of the versions `seen` (by slot) that were written since its last hole
    /// was punched, and that version. `shown` are the versions that it shows now.
    pub(super) fn zero_by_mistake(&self, shown: &[u64], seen: &[u64]) -> Option<(usize, u64)> {
        let pages = self.lock();
        shown
            .iter()
            .zip(seen)
            .enumerate()
            .find(|(slot, (shown, seen))| **shown == 0 && **seen > pages[slot / 8].punched)
            .map(|(slot, (_, seen))| (slot / 8, *seen))
    }

    /// Number of the page `index` of `block`, among all.
    pub(super) fn number(&self, block: BlockId, index: u64) -> usize {
        self.blocks[usize::from(block.0)].first + usize::try_from(index).unwrap_or(usize::MAX)
    }

    /// A page's block and its number in it.
    pub(super) fn place_of(&self, page: usize) -> (usize, u64) {
        self.places[page]
    }

    /// Bytes of a page.
    pub(super) fn page_size(&self, page: usize) -> u64 {
        self.place(page).0.spec.page_size
    }

    /// The words of a page that carry its version.
    pub(super) fn words_of(&self, block: usize, index: u64) -> Words {
        let block = &self.blocks[block];
        std::array::from_fn(|slot| {
            block
                .heap
                .word(slot_offset(&block.spec, index, slot as u64))
        })
    }

    /// Writes them.
    pub(super) fn set_words_of(&self, block: usize, index: u64, words: &[u64]) {
        let block = &self.blocks[block];
        for (slot, word) in (0..).zip(words) {
            block
                .heap
                .set_word(slot_offset(&block.spec, index, slot), *word);
        }
    }

    /// Whether a page's bytes are those of the same page of a block of `other`.
    pub(super) fn same_page(
        &self,
        block: usize,
        other: &SimRam,
        theirs: usize,
        index: u64,
    ) -> bool {
        let (block, theirs) = (&self.blocks[block], &other.blocks[theirs]);
        let (start, len) = (index * block.spec.page_size, block.spec.page_size);
        block
            .heap
            .words(start, len)
            .eq(theirs.heap.words(start, len))
    }

    /// Calls `wanted` for every page and appends the runs for which it was true.
    fn runs(
        &self,
        pages: &mut [Page],
        runs: &mut Vec<Run>,
        mut wanted: impl FnMut(&mut Page) -> bool,
    ) {
        for (id, block) in (0u16..).zip(&self.blocks) {
            let mut open: Option<Run> = None;
            for index in 0..block.spec.pages() {
                let number = block.first + usize::try_from(index).unwrap_or(usize::MAX);
                match (wanted(&mut pages[number]), &mut open) {
                    (true, Some(run)) => run.pages += 1,
                    (true, none) => {
                        *none = Some(Run {
                            block: BlockId(id),
                            first: index,
                            pages: 1,
                        })
                    }
                    (false, open) => runs.extend(open.take()),
                }
            }
            runs.extend(open);
        }
    }

    fn place(&self, page: usize) -> (&Block, u64) {
        let (block, index) = self.places[page];
        (&self.blocks[block], index)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The word that version `version` of `page` has in `slot`.
fn word(version: u64, page: usize, slot: u64) -> u64 {
    (version << NAME_BITS) | ((page as u64) << 4) | slot
}

/// Where `slot` of page `index` is: each in its own eighth, never at the same place within it.
fn slot_offset(spec: &BlockSpec, index: u64, slot: u64) -> u64 {
    index * spec.page_size + slot * (spec.page_size / SLOTS) + 8 * slot
}

impl Ram for SimRam {
    fn populated(&self, runs: &mut Vec<Run>) -> io::Result<()> {
        let mut pages = self.lock();
        self.runs(&mut pages, runs, |page| page.populated);
        Ok(())
    }

    fn is_zero(&self, block: BlockId, offset: u64, len: u64) -> bool {
        self.blocks[usize::from(block.0)].heap.is_zero(offset, len)
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) {
        self.blocks[usize::from(block.0)]
            .heap
            .region()
            .copy_out(offset, into);
    }

    fn digests(&self, block: BlockId) -> io::Result<Vec<Digest>> {
        let block = &self.blocks[usize::from(block.0)];
        let chunks =
            (0..block.spec.size).step_by(usize::try_from(DIGEST_CHUNK).unwrap_or(usize::MAX));
        Ok(chunks
            .map(|start| {
                digest(
                    &block.heap,
                    start,
                    DIGEST_CHUNK.min(block.spec.size - start),
                )
            })
            .collect())
    }

    fn page_digests(&self, block: BlockId, chunk: u64) -> Vec<Digest> {
        let block = &self.blocks[usize::from(block.0)];
        let start = chunk * DIGEST_CHUNK;
        let end = (start + DIGEST_CHUNK).min(block.spec.size);
        let page = block.spec.page_size;
        (start / page..end / page)
            .map(|index| digest(&block.heap, index * page, page))
            .collect()
    }
}

impl Placer for SimRam {
    fn clear(&self) -> io::Result<()> {
        self.blocks
            .iter()
            .for_each(|block| block.heap.clear(0, block.spec.size));
        Ok(())
    }

    fn allocate(&self, _run: Run) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ram::read(self, block, offset, into);
        Ok(())
    }

    fn place(&self, block: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.blocks[usize::from(block.0)]
            .heap
            .region()
            .copy_in(offset, bytes);
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), OutOfBounds> {
        let block = self
            .blocks
            .get(usize::from(run.block.0))
            .ok_or(OutOfBounds(run))?;
        let end = run
            .first
            .checked_add(run.pages)
            .filter(|end| *end <= block.spec.pages());
        let end = end.ok_or(OutOfBounds(run))?;
        block.heap.clear(
            run.first * block.spec.page_size,
            (end - run.first) * block.spec.page_size,
        );
        Ok(())
    }
}

/// The destination's RAM by the source's numbers.
pub(super) struct InOrder<'a> {
    /// The RAM.
    pub(super) ram: &'a SimRam,
    /// For each block of the source, the index of ours.
    pub(super) order: &'a [usize],
}

impl InOrder<'_> {
    fn ours(&self, block: BlockId) -> BlockId {
        let index = self.order.get(usize::from(block.0)).copied();
        BlockId(
            index
                .and_then(|index| u16::try_from(index).ok())
                .unwrap_or(u16::MAX),
        )
    }

    fn run(&self, run: Run) -> Run {
        Run {
            block: self.ours(run.block),
            ..run
        }
    }
}

impl Placer for InOrder<'_> {
    fn clear(&self) -> io::Result<()> {
        self.ram.clear()
    }

    fn allocate(&self, run: Run) -> io::Result<()> {
        self.ram.allocate(self.run(run))
    }

    fn read(&self, block: BlockId, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Placer::read(self.ram, self.ours(block), offset, into)
    }

    fn place(&self, block: BlockId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Placer::place(self.ram, self.ours(block), offset, bytes)
    }

    fn zero(&self, run: Run) -> Result<(), OutOfBounds> {
        self.ram.zero(self.run(run))
    }
}

fn digest(heap: &Heap, start: u64, len: u64) -> Digest {
    let (mut low, mut high) = (1u64, 2u64);
    for word in heap.words(start, len) {
        low = low.rotate_left(5) ^ word;
        high = high.wrapping_add(low).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(low).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(high).to_le_bytes());
    Digest(bytes)
}

/// Dirty tracking of a [`SimRam`], as the kernel's asynchronous write protection does it.
pub(super) struct SimTracker {
    ram: Arc<SimRam>,
    armed: bool,
    /// A scan protects what it reports. Only a planted mistake sets it false.
    protect: bool,
}

impl SimTracker {
    /// Not armed.
    pub(super) fn new(ram: Arc<SimRam>, protect: bool) -> SimTracker {
        SimTracker {
            ram,
            armed: false,
            protect,
        }
    }

    /// Whether the guest is tracked.
    pub(super) fn armed(&self) -> bool {
        self.armed
    }
}

impl Tracker for SimTracker {
    fn arm(&mut self) -> Result<(), TrackError> {
        self.armed = true;
        self.ram.protect_all();
        Ok(())
    }

    fn scan(&mut self, dirty: &mut Vec<Run>) -> Result<(), TrackError> {
        if !self.armed {
            return Err(TrackError::Memory("the guest is not tracked".into()));
        }
        self.ram.take_written(dirty, self.protect);
        Ok(())
    }

    fn disarm(&mut self) {
        self.armed = false;
    }
}
