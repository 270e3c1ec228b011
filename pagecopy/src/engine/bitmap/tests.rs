//! The bitmap against a plain set of pages.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// The first has three groups, the last of them short.
const PAGES: [u64; 2] = [2 * 64 * 64 + 200, 64];

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

/// What crosses the wire is what was there.
#[test]
fn a_bitmap_is_put_together_from_its_pieces() {
    let run = |block, first, pages| Run {
        block: BlockId(block),
        first,
        pages,
    };
    let mut bitmap = Bitmap::new(&specs());
    for run in [run(0, 3, 1), run(0, 63, 2), run(0, 8300, 90), run(1, 0, 64)] {
        bitmap.insert(run).unwrap();
    }
    for most in [1, 2, 3, 200] {
        let pieces = bitmap.pieces(most);
        assert!(pieces.iter().all(|(_, first, words)| {
            first % 64 == 0
                && words.len() <= most
                && words.first() != Some(&0)
                && words.last() != Some(&0)
        }));
        let mut other = Bitmap::new(&specs());
        for (block, first, words) in &pieces {
            other.insert_words(*block, *first, words).unwrap();
        }
        assert_eq!(other.pages(), bitmap.pages());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut copy = bitmap.clone();
        while !copy.is_empty() {
            copy.take(9, u64::MAX, &mut ours);
            other.take(9, u64::MAX, &mut theirs);
        }
        assert_eq!(ours, theirs);
    }
}

#[test]
fn words_outside_a_block_are_refused() {
    let mut bitmap = Bitmap::new(&specs());
    let mut insert =
        |block, first, words: &[u64]| bitmap.insert_words(BlockId(block), first, words);
    assert!(insert(2, 0, &[1]).is_err(), "no such block");
    assert!(insert(0, 1, &[1]).is_err(), "not at a word");
    assert!(insert(1, 64, &[1]).is_err(), "behind the end");
    assert!(insert(0, u64::MAX - 63, &[1]).is_err());
    // The last page is the eighth of its word; clear words behind it are nothing.
    let last = PAGES[0] / 64 * 64;
    assert!(insert(0, last, &[1 << (PAGES[0] - last)]).is_err());
    assert!(insert(0, last, &[1 << (PAGES[0] - last - 1), 0, 0]).is_ok());
    assert_eq!(bitmap.pages(), 1);
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u16, u64, u64),
    Take(usize, u64),
    /// Takes what is there of a run.
    TakeWithin(u16, u64, u64),
    /// Adds the pages of a run that are in a bitmap with every page of the second run.
    Common((u64, u64), (u64, u64)),
    /// Keeps every page that is in the other bitmap, which gets all.
    Zip(u64, u64),
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u16..3, 0u64..210, 0u64..150).prop_map(|(b, f, n)| Step::Insert(b, f, n)),
        2 => (0u16..1, 0u64..8500, 0u64..9000).prop_map(|(b, f, n)| Step::Insert(b, f, n)),
        2 => ((0u64..8500, 0u64..300), (0u64..8500, 0u64..300)).prop_map(|(a, b)| Step::Common(a, b)),
        2 => (0u64..8500, 0u64..400).prop_map(|(first, pages)| Step::Zip(first, pages)),
        4 => (1usize..5, 1u64..3000).prop_map(|(runs, pages)| Step::Take(runs, pages)),
        3 => (0u16..3, 0u64..8500, 0u64..500).prop_map(|(b, f, n)| Step::TakeWithin(b, f, n)),
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
                Step::TakeWithin(block, first, pages) => {
                    let mut runs = Vec::new();
                    bitmap.take_within(Run { block: BlockId(block), first, pages }, &mut runs);
                    let within = model.range((block, first)..(block, first + pages)).copied();
                    let expected: Vec<_> = within.collect();
                    let taken = runs.iter().flat_map(|run| (run.first..run.end()).map(|page| (run.block.0, page)));
                    prop_assert_eq!(taken.collect::<Vec<_>>(), &expected[..]);
                    prop_assert!(runs.windows(2).all(|two| two[0].end() < two[1].first));
                    for page in expected {
                        model.remove(&page);
                    }
                }
                Step::Common((first, pages), (other_first, other_pages)) => {
                    let mut other = Bitmap::new(&specs());
                    let run = |first, pages| Run { block: BlockId(0), first, pages };
                    let inside = other.insert(run(other_first, other_pages)).is_ok();
                    if bitmap.insert_common(run(first, pages), &other).is_ok() && inside {
                        let common = first.max(other_first)..(first + pages).min(other_first + other_pages);
                        model.extend(common.map(|page| (0, page)));
                    }
                }
                Step::Zip(first, pages) => {
                    let mut other = Bitmap::new(&specs());
                    if other.insert(Run { block: BlockId(0), first, pages }).is_ok() {
                        bitmap.zip([&mut other], |a, [b]| (*a, *b) = (*a & *b, *a | *b));
                        let kept = |page: &(u16, u64)| page.0 == 0 && (first..first + pages).contains(&page.1);
                        let before = model.len() as u64;
                        model.retain(kept);
                        prop_assert_eq!(other.pages(), before + pages - model.len() as u64);
                    }
                }
                Step::Clear => {
                    bitmap.clear();
                    model.clear();
                }
            }
            prop_assert_eq!(bitmap.pages(), model.len() as u64);
            prop_assert_eq!(bitmap.bytes(), model.len() as u64 * 4096);
            prop_assert_eq!(bitmap.is_empty(), model.is_empty());
        }
        for (block, pages) in PAGES.iter().enumerate() {
            for page in 0..*pages {
                let block = block as u16;
                prop_assert_eq!(bitmap.contains(BlockId(block), page), model.contains(&(block, page)));
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
