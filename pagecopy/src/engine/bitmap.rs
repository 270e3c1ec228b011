//! A bit for every page of the guest: which pages are dirty, held, hot.
//!
//! Sixty-four pages are one word, so that a scan or a merge of a guest of a tebibyte touches 4 million words. Taking runs
//! goes over clean words at one step each and remembers where it was: emptying a bitmap is one pass.

use crate::memory::{BlockId, BlockSpec, Run};

const WORD: u64 = u64::BITS as u64;

/// A bitmap over all pages of all RAMBlocks.
#[derive(Clone, Debug)]
pub struct Bitmap {
    blocks: Vec<Bits>,
}

/// The bits of one RAMBlock.
#[derive(Clone, Debug)]
struct Bits {
    words: Vec<u64>,
    pages: u64,
    page_size: u64,
    /// Bits that are set.
    count: u64,
    /// No word before this one has a bit set.
    first_word: usize,
}

/// A run outside the guest's RAMBlocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pages {} to {} of RAMBlock {} do not exist", .0.first, .0.first.saturating_add(.0.pages), .0.block.0)]
pub struct Outside(pub Run);

impl Bitmap {
    /// All clear.
    pub fn new(specs: &[BlockSpec]) -> Bitmap {
        Bitmap {
            blocks: specs.iter().map(Bits::new).collect(),
        }
    }

    /// Sets the pages of `run`.
    ///
    /// # Errors
    /// [`Outside`]: the bitmap is as before.
    pub fn insert(&mut self, run: Run) -> Result<(), Outside> {
        let bits = self
            .blocks
            .get_mut(usize::from(run.block.0))
            .ok_or(Outside(run))?;
        let end = run
            .first
            .checked_add(run.pages)
            .filter(|end| *end <= bits.pages);
        bits.insert(run.first, end.ok_or(Outside(run))?);
        Ok(())
    }

    /// Whether a page is set; a page that does not exist is not.
    pub fn contains(&self, block: BlockId, page: u64) -> bool {
        self.blocks
            .get(usize::from(block.0))
            .is_some_and(|bits| bits.contains(page))
    }

    /// Number of pages that are set.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|bits| bits.count).sum()
    }

    /// Bytes of the pages that are set.
    pub fn bytes(&self) -> u64 {
        self.blocks
            .iter()
            .map(|bits| bits.count * bits.page_size)
            .sum()
    }

    /// Whether no page is set.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(|bits| bits.count == 0)
    }

    /// Clears every page.
    pub fn clear(&mut self) {
        for bits in &mut self.blocks {
            bits.clear();
        }
    }

    /// Takes the lowest pages out: at most `max_runs` runs, all of one block, of at most `max_bytes` together (but at
    /// least one page). Appends nothing when the bitmap is empty.
    pub fn take(&mut self, max_runs: usize, max_bytes: u64, runs: &mut Vec<Run>) {
        let Some((index, bits)) = self
            .blocks
            .iter_mut()
            .enumerate()
            .find(|(_, b)| b.count > 0)
        else {
            return;
        };
        let block = BlockId(u16::try_from(index).unwrap_or(u16::MAX));
        let mut room = (max_bytes / bits.page_size).max(1);
        for _ in 0..max_runs {
            let Some((first, pages)) = bits.take_run(room) else {
                break;
            };
            runs.push(Run {
                block,
                first,
                pages,
            });
            room -= pages;
            if room == 0 {
                break;
            }
        }
    }

    /// Combines word by word: for each word of `self` and those of `others` at the same place, `combine` may change all.
    /// The bitmaps are of the same guest.
    pub fn zip<const N: usize>(
        &mut self,
        mut others: [&mut Bitmap; N],
        combine: impl Fn(&mut u64, [&mut u64; N]),
    ) {
        for (index, bits) in self.blocks.iter_mut().enumerate() {
            let mut rest = others.each_mut().map(|other| &mut other.blocks[index]);
            for word in 0..bits.words.len() {
                combine(
                    &mut bits.words[word],
                    rest.each_mut().map(|other| &mut other.words[word]),
                );
            }
            bits.recount();
            for other in rest {
                other.recount();
            }
        }
    }
}

impl Bits {
    fn new(spec: &BlockSpec) -> Bits {
        let pages = spec.pages();
        let words = usize::try_from(pages.div_ceil(WORD)).unwrap_or(usize::MAX);
        let page_size = spec.page_size;
        Bits {
            words: vec![0; words],
            pages,
            page_size,
            count: 0,
            first_word: words,
        }
    }

    fn clear(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
        }
        self.count = 0;
        self.first_word = self.words.len();
    }

    fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[word_of(page)] & (1 << (page % WORD)) != 0
    }

    fn insert(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        self.first_word = self.first_word.min(word_of(first));
        for word in word_of(first)..=word_of(end - 1) {
            let mask = mask(word, first, end);
            self.count += u64::from((mask & !self.words[word]).count_ones());
            self.words[word] |= mask;
        }
    }

    /// Takes the first run, at most `most` pages of it.
    fn take_run(&mut self, most: u64) -> Option<(u64, u64)> {
        if self.count == 0 {
            return None;
        }
        while self.words[self.first_word] == 0 {
            self.first_word += 1;
        }
        let bit = u64::from(self.words[self.first_word].trailing_zeros());
        let first = self.first_word as u64 * WORD + bit;
        let end = self.end_of_run(first, most);
        for word in self.first_word..=word_of(end - 1) {
            self.words[word] &= !mask(word, first, end);
        }
        self.count -= end - first;
        Some((first, end - first))
    }

    /// The page after the last of the run that starts at `first`, looking at no more than `most` pages.
    fn end_of_run(&self, first: u64, most: u64) -> u64 {
        let limit = first.saturating_add(most).min(self.pages);
        let mut page = first;
        while page < limit {
            let ones = u64::from((self.words[word_of(page)] >> (page % WORD)).trailing_ones());
            page += ones;
            let to_word_end = page.is_multiple_of(WORD) && ones > 0;
            if !to_word_end {
                break;
            }
        }
        page.min(limit)
    }

    fn recount(&mut self) {
        self.count = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        self.first_word = self
            .words
            .iter()
            .position(|word| *word != 0)
            .unwrap_or(self.words.len());
    }
}

/// The word that holds a page's bit. Pages are below `MAX_BLOCK_SIZE / MIN_PAGE_SIZE`, which fits.
fn word_of(page: u64) -> usize {
    usize::try_from(page / WORD).unwrap_or(usize::MAX)
}

/// The bits of `word` that stand for pages from `first` to before `end`.
fn mask(word: usize, first: u64, end: u64) -> u64 {
    let base = word as u64 * WORD;
    let low = first.saturating_sub(base).min(WORD);
    let high = end.saturating_sub(base).min(WORD);
    let below = |bit: u64| {
        if bit == WORD {
            u64::MAX
        } else {
            (1 << bit) - 1
        }
    };
    below(high) & !below(low)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: [u64; 2] = [200, 64];

    fn specs() -> Vec<BlockSpec> {
        PAGES
            .iter()
            .enumerate()
            .map(|(i, pages)| BlockSpec {
                name: format!("ram{i}"),
                size: pages * 4096,
                page_size: 4096,
            })
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16, u64, u64),
        Take(usize, u64),
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0u16..3, 0u64..210, 0u64..150).prop_map(|(b, f, n)| Step::Insert(b, f, n)),
            4 => (1usize..5, 1u64..100).prop_map(|(runs, pages)| Step::Take(runs, pages)),
            1 => Just(Step::Clear),
        ];
        proptest::collection::vec(step, 1..60)
    }

    /// What `take` must do, page by page.
    fn naive_take(model: &mut BTreeSet<(u16, u64)>, max_runs: usize, max_pages: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut taken = 0;
        while let Some(&(block, page)) = model.first() {
            let joins = runs.last().is_some_and(|r| r.end() == page);
            let other_block = runs.last().is_some_and(|r| r.block.0 != block);
            if other_block || taken == max_pages || (!joins && runs.len() == max_runs) {
                break;
            }
            model.pop_first();
            taken += 1;
            match runs.last_mut() {
                Some(run) if joins => run.pages += 1,
                _ => runs.push(Run {
                    block: BlockId(block),
                    first: page,
                    pages: 1,
                }),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(steps in steps()) {
            let mut bitmap = Bitmap::new(&specs());
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Insert(block, first, pages) => {
                        let run = Run { block: BlockId(block), first, pages };
                        let inside = PAGES.get(usize::from(block)).is_some_and(|n| first + pages <= *n);
                        prop_assert_eq!(bitmap.insert(run).is_ok(), inside);
                        if inside {
                            model.extend((first..first + pages).map(|page| (block, page)));
                        }
                    }
                    Step::Take(max_runs, max_pages) => {
                        let mut runs = Vec::new();
                        bitmap.take(max_runs, max_pages * 4096, &mut runs);
                        prop_assert_eq!(runs, naive_take(&mut model, max_runs, max_pages));
                    }
                    Step::Clear => {
                        bitmap.clear();
                        model.clear();
                    }
                }
                prop_assert_eq!(bitmap.pages(), model.len() as u64);
                prop_assert_eq!(bitmap.bytes(), model.len() as u64 * 4096);
                prop_assert_eq!(bitmap.is_empty(), model.is_empty());
                for (block, pages) in PAGES.iter().enumerate() {
                    for page in 0..*pages {
                        let block = block as u16;
                        prop_assert_eq!(bitmap.contains(BlockId(block), page), model.contains(&(block, page)));
                    }
                }
            }
        }
    }

    #[test]
    fn zip_combines_and_counts_anew() {
        let mut a = Bitmap::new(&specs());
        let mut b = a.clone();
        a.insert(Run {
            block: BlockId(0),
            first: 10,
            pages: 100,
        })
        .unwrap();
        b.insert(Run {
            block: BlockId(0),
            first: 50,
            pages: 100,
        })
        .unwrap();
        a.zip([&mut b], |a, [b]| (*a, *b) = (*a & *b, *a | *b));
        assert_eq!((a.pages(), b.pages()), (60, 140));
        let mut runs = Vec::new();
        a.take(8, u64::MAX, &mut runs);
        assert_eq!(
            runs,
            [Run {
                block: BlockId(0),
                first: 50,
                pages: 60
            }]
        );
    }

    #[test]
    fn a_page_larger_than_the_room_is_taken_alone() {
        let huge = [BlockSpec {
            name: "ram".into(),
            size: 8 << 20,
            page_size: 2 << 20,
        }];
        let mut bitmap = Bitmap::new(&huge);
        bitmap
            .insert(Run {
                block: BlockId(0),
                first: 0,
                pages: 4,
            })
            .unwrap();
        let mut runs = Vec::new();
        bitmap.take(8, 4096, &mut runs);
        assert_eq!(
            runs,
            [Run {
                block: BlockId(0),
                first: 0,
                pages: 1
            }]
        );
    }
}
