//! A bit for every page of the guest: which pages are dirty, held, hot.
//!
//! Sixty-four pages are one word, and sixty-four words (16 MiB of small pages) one *group*. A summary says which groups may
//! have a bit set; merging and taking look only at those, so that a scan that finds little costs little even for a guest
//! of a tebibyte, and one that finds everything goes over 4 million words once.

use std::ops::Range;

use crate::memory::{BlockId, BlockSpec, Run};

/// Pages in a word.
const WORD: u64 = u64::BITS as u64;
/// Words in a group.
const GROUP: usize = 64;

/// A bitmap over all pages of all RAMBlocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    blocks: Vec<Bits>,
}

/// The bits of one RAMBlock.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    words: Vec<u64>,
    /// One bit a group: clear when no bit of the group is set. (Set does not mean that one is.)
    groups: Vec<u64>,
    /// No word of `groups` before this one has a bit set.
    first: usize,
    pages: u64,
    page_size: u64,
    /// Bits that are set.
    count: u64,
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

    /// Sets those pages of `run` that are set in `other`, a bitmap of the same guest.
    ///
    /// # Errors
    /// [`Outside`]: the bitmap is as before.
    pub fn insert_common(&mut self, run: Run, other: &Bitmap) -> Result<(), Outside> {
        let index = usize::from(run.block.0);
        let bits = self.blocks.get_mut(index).ok_or(Outside(run))?;
        let end = run
            .first
            .checked_add(run.pages)
            .filter(|end| *end <= bits.pages);
        bits.insert_common(run.first, end.ok_or(Outside(run))?, &other.blocks[index]);
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

    /// Takes those pages out that `run` has, and appends them as runs. What of `run` is not inside the guest counts as
    /// clear.
    pub fn take_within(&mut self, run: Run, runs: &mut Vec<Run>) {
        let Some(bits) = self.blocks.get_mut(usize::from(run.block.0)) else {
            return;
        };
        let end = run.first.saturating_add(run.pages).min(bits.pages);
        let mut from = run.first;
        while let Some((first, pages)) = bits.take_between(from, end) {
            runs.push(Run {
                block: run.block,
                first,
                pages,
            });
            from = first + pages;
        }
    }

    /// Sets the pages whose bits are set in `words`; bit 0 of the first is page `first`, a multiple of 64.
    ///
    /// # Errors
    /// [`Outside`]: `first` is none, or a bit is outside the block; the bitmap is as before.
    pub fn insert_words(
        &mut self,
        block: BlockId,
        first: u64,
        words: &[u64],
    ) -> Result<(), Outside> {
        let outside = Outside(Run {
            block,
            first,
            pages: words.len() as u64 * WORD,
        });
        let bits = self.blocks.get_mut(usize::from(block.0)).ok_or(outside)?;
        let used = words
            .iter()
            .rposition(|word| *word != 0)
            .map_or(0, |last| last + 1);
        let words = &words[..used];
        let Some(last) = words.last() else {
            return Ok(());
        };
        let pages = (used as u64) * WORD - u64::from(last.leading_zeros());
        let inside = first
            .checked_add(pages)
            .is_some_and(|end| end <= bits.pages);
        if !inside || !first.is_multiple_of(WORD) {
            return Err(outside);
        }
        for (word, new) in (word_of(first)..).zip(words) {
            bits.merge(word, *new);
        }
        Ok(())
    }

    /// Everything that is set, in pieces of at most `most` words: what [`insert_words`](Self::insert_words) takes.
    pub fn pieces(&self, most: usize) -> Vec<(BlockId, u64, Vec<u64>)> {
        let mut pieces = Vec::new();
        for (block, bits) in (0..).map(BlockId).zip(&self.blocks) {
            let mut from = 0;
            while let Some(first) = bits.next_word(from) {
                let end = (first + most).min(bits.words.len());
                let piece = &bits.words[first..end];
                let used = piece
                    .iter()
                    .rposition(|word| *word != 0)
                    .map_or(0, |last| last + 1);
                pieces.push((block, first as u64 * WORD, piece[..used].to_vec()));
                from = end;
            }
        }
        pieces
    }

    /// Combines word by word: for each word of `self` and those of `others` at the same place, `combine` may change all.
    /// It must leave words that are all zero as they are: groups without a bit are not looked at. The bitmaps are of the
    /// same guest.
    pub fn zip<const N: usize>(
        &mut self,
        mut others: [&mut Bitmap; N],
        combine: impl Fn(&mut u64, [&mut u64; N]),
    ) {
        for (index, bits) in self.blocks.iter_mut().enumerate() {
            bits.zip(
                others.each_mut().map(|other| &mut other.blocks[index]),
                &combine,
            );
        }
    }
}

impl Bits {
    fn new(spec: &BlockSpec) -> Bits {
        let pages = spec.pages();
        let words = usize::try_from(pages.div_ceil(WORD)).unwrap_or(usize::MAX);
        let groups = vec![0; words.div_ceil(GROUP * GROUP)];
        let first = groups.len();
        Bits {
            words: vec![0; words],
            groups,
            first,
            pages,
            page_size: spec.page_size,
            count: 0,
        }
    }

    fn clear(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
        }
        self.groups.fill(0);
        self.first = self.groups.len();
        self.count = 0;
    }

    fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[word_of(page)] & (1 << (page % WORD)) != 0
    }

    fn insert(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        for word in word_of(first)..=word_of(end - 1) {
            let mask = mask(word, first, end);
            self.count += u64::from((mask & !self.words[word]).count_ones());
            self.words[word] |= mask;
        }
        for group in word_of(first) / GROUP..=word_of(end - 1) / GROUP {
            self.groups[group / GROUP] |= 1 << (group % GROUP);
        }
        self.first = self.first.min(word_of(first) / GROUP / GROUP);
    }

    fn merge(&mut self, word: usize, new: u64) {
        let new = new & !self.words[word];
        if new != 0 {
            let group = word / GROUP;
            self.words[word] |= new;
            self.count += u64::from(new.count_ones());
            self.groups[group / GROUP] |= 1 << (group % GROUP);
            self.first = self.first.min(group / GROUP);
        }
    }

    /// The first word from `from` on that is not clear.
    fn next_word(&self, from: usize) -> Option<usize> {
        let mut word = from;
        while word < self.words.len() {
            let group = word / GROUP;
            if self.groups[group / GROUP] & 1 << (group % GROUP) == 0 {
                word = (group + 1) * GROUP;
            } else if self.words[word] == 0 {
                word += 1;
            } else {
                return Some(word);
            }
        }
        None
    }

    fn insert_common(&mut self, first: u64, end: u64, other: &Bits) {
        if first >= end {
            return;
        }
        let mut word = word_of(first);
        while word <= word_of(end - 1) {
            let group = word / GROUP;
            if other.groups[group / GROUP] & 1 << (group % GROUP) == 0 {
                word = (group + 1) * GROUP;
                continue;
            }
            self.merge(word, other.words[word] & mask(word, first, end));
            word += 1;
        }
    }

    /// Takes the first run, at most `most` pages of it.
    fn take_run(&mut self, most: u64) -> Option<(u64, u64)> {
        let word = self.first_word()?;
        let first = word as u64 * WORD + u64::from(self.words[word].trailing_zeros());
        let end = self.end_of_run(first, most);
        for word in word..=word_of(end - 1) {
            self.words[word] &= !mask(word, first, end);
        }
        self.count -= end - first;
        Some((first, end - first))
    }

    /// Takes the first run between `first` and `end`, a page that exists or the one behind the last.
    fn take_between(&mut self, first: u64, end: u64) -> Option<(u64, u64)> {
        if first >= end {
            return None;
        }
        let set = (word_of(first)..=word_of(end - 1)).find_map(|word| {
            let bits = self.words[word] & mask(word, first, end);
            (bits != 0).then(|| word as u64 * WORD + u64::from(bits.trailing_zeros()))
        })?;
        let after = self.end_of_run(set, end - set);
        for word in word_of(set)..=word_of(after - 1) {
            self.words[word] &= !mask(word, set, after);
        }
        self.count -= after - set;
        Some((set, after - set))
    }

    /// The first word with a bit set. Groups that turn out to be empty are struck off.
    fn first_word(&mut self) -> Option<usize> {
        if self.count == 0 {
            return None;
        }
        loop {
            let groups = *self.groups.get(self.first)?;
            if groups == 0 {
                self.first += 1;
                continue;
            }
            let group = self.first * GROUP + groups.trailing_zeros() as usize;
            let words = self.words_of(group);
            if let Some(at) = self.words[words.clone()].iter().position(|word| *word != 0) {
                return Some(words.start + at);
            }
            self.groups[self.first] &= groups - 1;
        }
    }

    /// The words of a group; the last one may be short.
    fn words_of(&self, group: usize) -> Range<usize> {
        group * GROUP..((group + 1) * GROUP).min(self.words.len())
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

    /// See [`Bitmap::zip`].
    fn zip<const N: usize>(
        &mut self,
        mut others: [&mut Bits; N],
        combine: &impl Fn(&mut u64, [&mut u64; N]),
    ) {
        for index in 0..self.groups.len() {
            let mut left = others
                .iter()
                .fold(self.groups[index], |left, other| left | other.groups[index]);
            while left != 0 {
                let group = index * GROUP + left.trailing_zeros() as usize;
                left &= left - 1;
                self.zip_group(&mut others, group, combine);
            }
        }
        self.first = 0;
        for other in others {
            other.first = 0;
        }
    }

    fn zip_group<const N: usize>(
        &mut self,
        others: &mut [&mut Bits; N],
        group: usize,
        combine: &impl Fn(&mut u64, [&mut u64; N]),
    ) {
        let range = self.words_of(group);
        self.count -= self.ones(&range);
        for other in others.iter_mut() {
            other.count -= other.ones(&range);
        }
        let words = &mut self.words[range.clone()];
        let mut rest = others
            .each_mut()
            .map(|other| &mut other.words[range.clone()]);
        for (at, word) in words.iter_mut().enumerate() {
            combine(word, rest.each_mut().map(|other| &mut other[at]));
        }
        self.settle(group, &range);
        for other in others.iter_mut() {
            other.settle(group, &range);
        }
    }

    fn ones(&self, range: &Range<usize>) -> u64 {
        self.words[range.clone()]
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Counts a group that was combined, and says in the summary whether it has a bit set.
    fn settle(&mut self, group: usize, range: &Range<usize>) {
        let ones = self.ones(range);
        self.count += ones;
        let bit = 1 << (group % GROUP);
        if ones > 0 {
            self.groups[group / GROUP] |= bit;
        } else {
            self.groups[group / GROUP] &= !bit;
        }
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
mod tests;
