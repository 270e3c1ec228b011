//! The versions that were sent last: copies of pages, in a table of a set size.
//!
//! A page has one place in the table. Who was sent in this round or the one before keeps it, so that a guest that writes more
//! than there is room for does not make all of it useless.

use super::{Page, UNIT};
use crate::memory::BlockId;

/// A unit of a RAMBlock: its block, and its offset over [`UNIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The RAMBlock.
    pub block: BlockId,
    /// Number of the unit in it.
    pub unit: u64,
}

/// What was sent last of some pages. See the module `encoding` for the invariant.
#[derive(Debug)]
pub struct Versions {
    tags: Vec<Option<Tag>>,
    pages: Vec<u8>,
    kept: usize,
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    key: Key,
    round: u32,
}

impl Versions {
    /// Room for as many pages as fit `bytes`, their tags included; none when that is less than one. The system gives the
    /// memory when it is used first.
    pub fn new(bytes: u64) -> Versions {
        let each = UNIT + size_of::<Option<Tag>>();
        let places = usize::try_from(bytes).unwrap_or(usize::MAX) / each;
        Versions {
            tags: vec![None; places],
            pages: vec![0; places * UNIT],
            kept: 0,
        }
    }

    /// Whether there is room for any page.
    pub fn has_room(&self) -> bool {
        !self.tags.is_empty()
    }

    /// The version that the destination surely holds while `round` is sent, and the round in which it was sent: an earlier
    /// one.
    pub fn base(&self, key: Key, round: u32) -> Option<(&Page, u32)> {
        let place = self.place(key)?;
        let tag = self.tags[place].filter(|tag| tag.key == key && tag.round < round)?;
        let page = self.pages[place * UNIT..].first_chunk()?;
        Some((page, tag.round))
    }

    /// `page` is sent in `round` as exactly these bytes. Keeps it, unless its place is another's that was sent lately; then
    /// there is no version of it any more.
    pub fn sent(&mut self, key: Key, round: u32, page: &Page) -> bool {
        let Some(place) = self.place(key) else {
            return false;
        };
        match self.tags[place] {
            Some(tag) if tag.key != key && tag.round.saturating_add(1) >= round => return false,
            Some(_) => {}
            None => self.kept += 1,
        }
        self.tags[place] = Some(Tag { key, round });
        self.pages[place * UNIT..][..UNIT].copy_from_slice(page);
        true
    }

    /// The page goes in another way: nobody knows as which bytes, or as zero.
    pub fn forget(&mut self, key: Key) {
        if self.kept == 0 {
            return;
        }
        if let Some(place) = self.place(key)
            && self.tags[place].is_some_and(|tag| tag.key == key)
        {
            self.tags[place] = None;
            self.kept -= 1;
        }
    }

    /// How many pages are kept.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Neighbours have neighbouring places: what a guest writes often lies together, and then all of it fits.
    fn place(&self, key: Key) -> Option<usize> {
        let block = u64::from(key.block.0).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let place = block
            .wrapping_add(key.unit)
            .checked_rem(self.tags.len() as u64)?;
        usize::try_from(place).ok()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(unit: u64) -> Key {
        Key {
            block: BlockId(0),
            unit,
        }
    }

    /// What a page goes as.
    #[derive(Clone, Copy, Debug)]
    enum Way {
        Copy,
        Other,
    }

    proptest! {
        /// Against what the destination holds when a round begins: every base is the version sent last, and is there.
        #[test]
        fn a_base_is_what_the_destination_holds(
            rounds in prop::collection::vec(prop::collection::btree_map(0..40_u64, (any::<bool>(), any::<u8>()), 0..30), 1..8),
            places in 0..20_u64,
        ) {
            let mut versions = Versions::new(places * 5000);
            // By page: its bytes, or that nobody knows them.
            let mut held: BTreeMap<u64, Option<u8>> = BTreeMap::new();
            for (round, pages) in (0..).zip(rounds) {
                let mut lands = BTreeMap::new();
                for (unit, (copied, byte)) in pages {
                    if let Some((base, of)) = versions.base(key(unit), round) {
                        prop_assert!(of < round);
                        prop_assert_eq!(held.get(&unit).copied().flatten(), Some(base[0]));
                    }
                    match if copied { Way::Copy } else { Way::Other } {
                        Way::Copy => {
                            versions.sent(key(unit), round, &[byte; UNIT]);
                            prop_assert!(versions.base(key(unit), round).is_none(), "not before the barrier");
                            lands.insert(unit, Some(byte));
                        }
                        Way::Other => {
                            versions.forget(key(unit));
                            lands.insert(unit, None);
                        }
                    }
                }
                held.append(&mut lands);
                prop_assert!(versions.kept() as u64 <= places * 5000 / UNIT as u64);
            }
        }
    }

    #[test]
    fn who_was_sent_lately_keeps_the_place() {
        let mut versions = Versions::new(5000);
        assert!(versions.sent(key(1), 1, &[1; UNIT]));
        assert!(!versions.sent(key(2), 2, &[2; UNIT]));
        assert!(versions.base(key(1), 2).is_some() && versions.base(key(2), 3).is_none());
        assert!(versions.sent(key(2), 3, &[2; UNIT]));
        assert!(versions.base(key(1), 4).is_none());
        assert_eq!(
            versions
                .base(key(2), 4)
                .map(|(page, round)| (page[0], round)),
            Some((2, 3))
        );
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut versions = Versions::new(100);
        assert!(!versions.sent(key(1), 1, &[1; UNIT]));
        versions.forget(key(1));
        assert_eq!((versions.kept(), versions.base(key(1), 2)), (0, None));
    }
}
