//! Splits a batch into what goes as bytes and what goes as a run of zeroes.

use crate::memory::{BlockId, BlockSpec, Piece, Run};

/// A batch after the zero test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Extents that go as they are: block, offset and length in bytes. Neighbours are merged.
    pub raw: Vec<(BlockId, u64, u64)>,
    /// Runs that are zero. Neighbours are merged.
    pub zero: Vec<Run>,
}

impl Split {
    /// Bytes that go as they are.
    pub fn raw_bytes(&self) -> u64 {
        self.raw.iter().map(|(_, _, len)| len).sum()
    }

    /// Bytes that are zero.
    pub fn zero_bytes(&self, specs: &[BlockSpec]) -> u64 {
        self.zero_pieces(specs).map(|(_, piece)| piece.len).sum()
    }

    /// The same, in bytes: where they are.
    pub fn zero_pieces(&self, specs: &[BlockSpec]) -> impl Iterator<Item = (BlockId, Piece)> {
        self.zero.iter().filter_map(|run| {
            let page_size = specs.get(usize::from(run.block.0))?.page_size;
            let piece = Piece {
                offset: run.first * page_size,
                len: run.pages * page_size,
            };
            Some((run.block, piece))
        })
    }
}

/// Tests every page of `runs` with `is_zero(block, offset, len)` and sorts it. The grain is the block's page.
///
/// A guest may write a page right after its test: then its dirty bit is set again, and a later round sends it again.
/// Runs of blocks that are not in `specs` are left out; the engine makes none.
pub fn split(
    runs: &[Run],
    specs: &[BlockSpec],
    is_zero: impl Fn(BlockId, u64, u64) -> bool,
) -> Split {
    let mut split = Split::default();
    for run in runs {
        let Some(spec) = specs.get(usize::from(run.block.0)) else {
            continue;
        };
        for page in run.first..run.end() {
            if is_zero(run.block, page * spec.page_size, spec.page_size) {
                push_zero(&mut split.zero, run.block, page);
            } else {
                push_raw(
                    &mut split.raw,
                    run.block,
                    page * spec.page_size,
                    spec.page_size,
                );
            }
        }
    }
    split
}

fn push_zero(zero: &mut Vec<Run>, block: BlockId, page: u64) {
    match zero.last_mut() {
        Some(last) if last.block == block && last.end() == page => last.pages += 1,
        _ => zero.push(Run {
            block,
            first: page,
            pages: 1,
        }),
    }
}

fn push_raw(raw: &mut Vec<(BlockId, u64, u64)>, block: BlockId, offset: u64, len: u64) {
    match raw.last_mut() {
        Some((b, o, l)) if *b == block && *o + *l == offset => *l += len,
        _ => raw.push((block, offset, len)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn spec(page_size: u64) -> BlockSpec {
        BlockSpec {
            name: "ram".into(),
            size: 512 * page_size,
            page_size,
        }
    }

    #[test]
    fn neighbours_are_merged_and_kinds_kept_apart() {
        let run = Run {
            block: BlockId(0),
            first: 2,
            pages: 6,
        };
        let split = split(&[run], &[spec(4096)], |_, offset, _| {
            (4..6).contains(&(offset / 4096))
        });
        assert_eq!(
            split.raw,
            [
                (BlockId(0), 2 * 4096, 2 * 4096),
                (BlockId(0), 6 * 4096, 2 * 4096)
            ]
        );
        assert_eq!(
            split.zero,
            [Run {
                block: BlockId(0),
                first: 4,
                pages: 2
            }]
        );
        assert_eq!(
            (split.raw_bytes(), split.zero_bytes(&[spec(4096)])),
            (4 * 4096, 2 * 4096)
        );
    }

    proptest! {
        #[test]
        fn every_page_goes_exactly_once(pages in proptest::collection::vec(any::<Option<bool>>(), 1..512)) {
            let specs = [spec(4096)];
            // `None`: not in the batch; `Some(true)`: zero.
            let runs: Vec<Run> = (0..pages.len() as u64)
                .filter(|page| pages[usize::try_from(*page).unwrap()].is_some())
                .map(|first| Run { block: BlockId(0), first, pages: 1 })
                .collect();
            let zero = |_: BlockId, offset: u64, _: u64| pages[usize::try_from(offset / 4096).unwrap()] == Some(true);
            let split = split(&runs, &specs, zero);
            let mut seen = vec![None; pages.len()];
            for (_, offset, len) in &split.raw {
                for page in offset / 4096..(offset + len) / 4096 {
                    prop_assert_eq!(seen[usize::try_from(page).unwrap()].replace(false), None);
                }
            }
            for run in &split.zero {
                for page in run.first..run.end() {
                    prop_assert_eq!(seen[usize::try_from(page).unwrap()].replace(true), None);
                }
            }
            prop_assert_eq!(seen, pages);
        }
    }
}
