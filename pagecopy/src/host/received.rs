//! Which pages of a guest have arrived: a bitmap in a file, which outlives the process that writes it.
//!
//! In post-copy this bitmap is the only truth. A page is placed in the RAM file, then marked here, and only then mapped
//! for the guest; so a page that the guest may have written since is always marked, and a successor of a killed daemon never
//! fetches it again. (A page that was placed and not marked is fetched once more: the guest has not seen it.)
//!
//! The file must outlive the process, not the host: nothing is ever synced.
//!
//! ```text
//!  0        8        12       16               32                        4096
//!  +--------+--------+--------+----------------+-------------------+-----+----------------------- - -
//!  |"PGCPRCVD"| 1    | blocks | id             | blocks × 16 bytes | 0   | words of block 0, 1, …
//!  +--------+--------+--------+----------------+-------------------+-----+----------------------- - -
//!    8        u32      u32      16 bytes         size, page size           bit 0 of word 0 is page 0
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::OutOfBounds;
use super::sys::words::SharedWords;
use crate::engine::MigrationId;
use crate::limits::MAX_BLOCKS;
use crate::memory::{BlockId, BlockSpec, Run};

const MAGIC: &[u8; 8] = b"PGCPRCVD";
const VERSION: u32 = 1;
const HEADER: usize = 4096;
/// Bytes before the blocks' sizes.
const FIXED: usize = 32;
/// Bytes of a block in the header.
const BLOCK: usize = 16;
/// Pages in a word.
const WORD: u64 = 64;

const _: () = assert!(FIXED + MAX_BLOCKS * BLOCK <= HEADER);

/// The bitmap. All methods may be called from several threads at once.
#[derive(Debug)]
pub struct Received {
    words: SharedWords,
    blocks: Vec<Bits>,
    /// Pages that are set.
    count: AtomicU64,
}

/// Where a block's bits are.
#[derive(Clone, Copy, Debug)]
struct Bits {
    /// Index of the first word.
    first: usize,
    pages: u64,
}

impl Received {
    /// Begins in an empty file, open to read and write, with nothing received.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn create(file: &File, id: MigrationId, specs: &[BlockSpec]) -> io::Result<Received> {
        let (blocks, words) = layout(specs)?;
        file.write_all_at(&header(id, specs)?, 0)?;
        let len = HEADER as u64 + words as u64 * 8;
        // All of it now: a store into a full file system would be a signal.
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len)?;
        Received::map(file, blocks, words)
    }

    /// Goes on with the file of a migration that was under way, open to read and write.
    ///
    /// # Errors
    /// `InvalidData`: it is not the file of this migration of this guest.
    pub fn open(file: &File, id: MigrationId, specs: &[BlockSpec]) -> io::Result<Received> {
        let (blocks, words) = layout(specs)?;
        let mut found = [0; HEADER];
        file.read_exact_at(&mut found, 0)?;
        let len = HEADER as u64 + words as u64 * 8;
        if found != header(id, specs)? || file.metadata()?.len() != len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the record of what was received is not about this migration of this guest",
            ));
        }
        Received::map(file, blocks, words)
    }

    fn map(file: &File, blocks: Vec<Bits>, words: usize) -> io::Result<Received> {
        let words = SharedWords::new(file, HEADER as u64, words)?;
        let set = (0..words.len()).map(|index| u64::from(words.get(index).count_ones()));
        let count = AtomicU64::new(set.sum());
        Ok(Received {
            words,
            blocks,
            count,
        })
    }

    /// Marks the pages of `run`, which are placed: from now on they are the guest's.
    ///
    /// # Errors
    /// The run is not inside its block; nothing is marked.
    pub fn insert(&self, run: Run) -> Result<(), OutOfBounds> {
        let bits = self.locate(run)?;
        let (mut page, end) = (run.first, run.first + run.pages);
        while page < end {
            let index = bits.first + usize::try_from(page / WORD).unwrap_or(usize::MAX);
            let (low, len) = (page % WORD, (end - page).min(WORD - page % WORD));
            let mask = u64::MAX >> (WORD - len) << low;
            let before = self.words.set(index, mask);
            let new = u64::from((mask & !before).count_ones());
            self.count.fetch_add(new, Ordering::Relaxed);
            page += len;
        }
        Ok(())
    }

    /// Whether a page has arrived; one that does not exist has not.
    pub fn contains(&self, block: BlockId, page: u64) -> bool {
        let run = Run {
            block,
            first: page,
            pages: 1,
        };
        self.locate(run).is_ok_and(|bits| {
            let index = bits.first + usize::try_from(page / WORD).unwrap_or(usize::MAX);
            self.words.get(index) >> (page % WORD) & 1 == 1
        })
    }

    /// How many pages have arrived.
    pub fn pages(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Appends the runs that have not arrived, in order.
    pub fn missing(&self, runs: &mut Vec<Run>) {
        for (number, bits) in (0..).zip(&self.blocks) {
            self.missing_of(*bits, BlockId(number), 0..bits.pages, runs);
        }
    }

    /// Appends what of `run` has not arrived, in order.
    ///
    /// # Errors
    /// The run is not inside its block.
    pub fn missing_within(&self, run: Run, runs: &mut Vec<Run>) -> Result<(), OutOfBounds> {
        let bits = self.locate(run)?;
        self.missing_of(bits, run.block, run.first..run.end(), runs);
        Ok(())
    }

    fn missing_of(&self, bits: Bits, block: BlockId, pages: Range<u64>, runs: &mut Vec<Run>) {
        let mut run: Option<Run> = None;
        let mut page = pages.start;
        while page < pages.end {
            let index = bits.first + usize::try_from(page / WORD).unwrap_or(usize::MAX);
            let rest = !self.words.get(index) >> (page % WORD);
            let left = (WORD - page % WORD).min(pages.end - page);
            // Pages alike from here on in this word.
            let is_missing = rest & 1 == 1;
            let alike = if is_missing {
                rest.trailing_ones()
            } else {
                rest.trailing_zeros()
            };
            let alike = u64::from(alike).min(left);
            match (&mut run, is_missing) {
                (Some(run), true) => run.pages += alike,
                (None, true) => {
                    run = Some(Run {
                        block,
                        first: page,
                        pages: alike,
                    });
                }
                (_, false) => runs.extend(run.take()),
            }
            page += alike;
        }
        runs.extend(run);
    }

    fn locate(&self, run: Run) -> Result<Bits, OutOfBounds> {
        let bits = self.blocks.get(usize::from(run.block.0));
        let inside = |bits: &&Bits| {
            run.pages != 0
                && run
                    .first
                    .checked_add(run.pages)
                    .is_some_and(|end| end <= bits.pages)
        };
        bits.filter(inside).copied().ok_or(OutOfBounds(run))
    }
}

/// Where each block's bits are, and how many words there are in all.
fn layout(specs: &[BlockSpec]) -> io::Result<(Vec<Bits>, usize)> {
    if specs.is_empty() || specs.len() > MAX_BLOCKS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut words = 0;
    let blocks = specs.iter().map(|spec| {
        let bits = Bits {
            first: words,
            pages: spec.pages(),
        };
        words += usize::try_from(bits.pages.div_ceil(WORD)).unwrap_or(usize::MAX);
        bits
    });
    Ok((blocks.collect(), words))
}

/// The file's first bytes.
fn header(id: MigrationId, specs: &[BlockSpec]) -> io::Result<[u8; HEADER]> {
    let count = u32::try_from(specs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut header = [0; HEADER];
    let sizes = specs
        .iter()
        .flat_map(|spec| [spec.size.to_le_bytes(), spec.page_size.to_le_bytes()])
        .flatten();
    let bytes = MAGIC
        .iter()
        .copied()
        .chain(VERSION.to_le_bytes())
        .chain(count.to_le_bytes())
        .chain(id.0)
        .chain(sizes);
    for (place, byte) in header.iter_mut().zip(bytes) {
        *place = byte;
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    /// A file that is removed on drop.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let name = format!("pagecopy-received-{}-{name}", std::process::id());
            Scratch(std::env::temp_dir().join(name))
        }

        fn create(&self) -> File {
            let mut options = File::options();
            options.read(true).write(true).create_new(true);
            options.open(&self.0).unwrap()
        }

        fn open(&self) -> File {
            let mut options = File::options();
            options.read(true).write(true).open(&self.0).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn specs(pages: &[u64]) -> Vec<BlockSpec> {
        let spec = |(number, pages): (usize, &u64)| BlockSpec {
            name: format!("ram{number}"),
            size: pages * 4096,
            page_size: 4096,
        };
        pages.iter().enumerate().map(spec).collect()
    }

    fn run(block: u16, first: u64, pages: u64) -> Run {
        Run {
            block: BlockId(block),
            first,
            pages,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against a set of pages, and again after the file was opened anew.
        #[test]
        fn like_a_set_of_pages(runs in prop::collection::vec((0..3_u16, 0..200_u64, 1..130_u64), 0..20)) {
            let specs = specs(&[200, 64, 65]);
            let scratch = Scratch::new("set");
            let received = Received::create(&scratch.create(), ID, &specs).unwrap();
            let mut set = BTreeSet::new();
            for (block, first, pages) in runs {
                let inside = first + pages <= specs[usize::from(block)].pages();
                prop_assert_eq!(received.insert(run(block, first, pages)).is_ok(), inside);
                if inside {
                    set.extend((first..first + pages).map(|page| (block, page)));
                }
            }
            drop(received);
            let received = Received::open(&scratch.open(), ID, &specs).unwrap();
            prop_assert_eq!(received.pages(), set.len() as u64);
            let mut missing = Vec::new();
            received.missing(&mut missing);
            let mut lacking = BTreeSet::new();
            for run in &missing {
                lacking.extend((run.first..run.end()).map(|page| (run.block.0, page)));
            }
            for (block, spec) in (0..).zip(&specs) {
                for page in 0..spec.pages() {
                    let here = set.contains(&(block, page));
                    prop_assert_eq!(received.contains(BlockId(block), page), here);
                    prop_assert_eq!(lacking.contains(&(block, page)), !here);
                }
                prop_assert!(!received.contains(BlockId(block), spec.pages()));
            }
            // As few runs as there can be: no two of them touch.
            prop_assert!(missing.windows(2).all(|two| two[0].block != two[1].block || two[0].end() < two[1].first));
            // Part by part the same.
            let mut parts = Vec::new();
            for (block, spec) in (0..).zip(&specs) {
                let pages = spec.pages();
                for first in (0..pages).step_by(37) {
                    let part = run(block, first, 37.min(pages - first));
                    received.missing_within(part, &mut parts).unwrap();
                }
            }
            let pages = |runs: &[Run]| -> Vec<_> {
                let pages = runs.iter().flat_map(|run| (run.first..run.end()).map(|page| (run.block, page)));
                pages.collect()
            };
            prop_assert_eq!(pages(&parts), pages(&missing));
            prop_assert!(received.missing_within(run(1, 60, 5), &mut parts).is_err());
            std::fs::remove_file(&scratch.0).unwrap();
        }
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        let scratch = Scratch::new("other");
        let guest = specs(&[100, 50]);
        drop(Received::create(&scratch.create(), ID, &guest).unwrap());
        let refused = |id, specs: &[BlockSpec]| {
            let error = Received::open(&scratch.open(), id, specs).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        };
        refused(MigrationId([8; 16]), &guest);
        refused(ID, &specs(&[100, 51]));
        refused(ID, &specs(&[100]));
        scratch.open().set_len(HEADER as u64 + 8).unwrap();
        refused(ID, &guest);
    }
}
