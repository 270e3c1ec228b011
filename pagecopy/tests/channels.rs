//! Data channels that join and leave while both engines work, at any moment and with anything going wrong: no page is lost or comes
//! late, and one guest runs.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, dead_code)]

mod pair;

use std::time::Duration;

use pagecopy::engine::event::State;
use pagecopy::engine::source;
use pair::{Pair, Trouble};

const STEPS: u64 = 400_000;
/// Each test of this file has its part of the seeds.
const SEEDS: u64 = 2_500;

const TROUBLES: [Trouble; 7] = [
    Trouble::LinkCut,
    Trouble::CancelAtSource,
    Trouble::CancelAtDestination,
    Trouble::SourceCrashes { synced: false },
    Trouble::SourceCrashes { synced: true },
    Trouble::DestinationCrashes { synced: false },
    Trouble::DestinationCrashes { synced: true },
];

/// What was seen in all runs.
#[derive(Debug, Default)]
struct Seen {
    joined: u32,
    left: u32,
    refused: u32,
    completed: u32,
    failed: u32,
}

/// A slow link, a guest that writes, and channels that come and go by chance.
fn slow(seed: u64) -> Pair {
    let pages = 500 + usize::try_from(seed % 700).unwrap();
    let mut pair = Pair::growing(seed + 1, pages, |setup| {
        setup.direct_io = seed.is_multiple_of(3);
        if seed % 4 == 1 {
            setup.options.mode = source::Mode::Hybrid(source::After::Rounds(2));
        } else {
            setup.options.verify = seed.is_multiple_of(5);
        }
    });
    pair.byte_ns = 1000 + seed % 7 * 500;
    pair.write_every = Duration::from_millis(40);
    pair.writes_per_ms = usize::try_from(1 + seed % 3).unwrap();
    pair
}

fn run(seed: u64, seen: &mut Seen) {
    let mut pair = slow(seed);
    let troubled = !seed.is_multiple_of(3);
    if troubled {
        let step = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        for _ in 0..step % 1500 {
            if pair.ended() || !pair.step() {
                break;
            }
        }
        let trouble = TROUBLES[usize::try_from(seed / 3 % 7).unwrap()];
        if !pair.ended() {
            pair.trouble(trouble);
        }
    }
    pair.run(STEPS);
    let at = format!("seed {seed}: {:?} {:?}", pair.finished, pair.notices);
    assert!(pair.source_runs != pair.destination_runs, "{at}");
    let completed = pair.result().state == State::Completed;
    assert_eq!(completed, pair.destination_runs, "{at}");
    assert!(troubled || completed, "{at}");
    if completed && !pair.moved.armed {
        assert_eq!(pair.source_pages, pair.destination_pages, "{at}");
    }
    if completed && pair.moved.armed {
        assert_eq!(pair.moved.lacking.len(), 0, "{at}");
        for (page, content) in pair.source_pages.iter().enumerate() {
            let wanted = pair.moved.written.get(&page).unwrap_or(content);
            assert_eq!(pair.destination_pages[page], *wanted, "page {page}, {at}");
        }
    }
    let channels = &pair.channels;
    seen.joined += channels.joined;
    seen.left += channels.left;
    seen.refused += channels.refused;
    *(if completed {
        &mut seen.completed
    } else {
        &mut seen.failed
    }) += 1;
}

fn part(number: u64) {
    let mut seen = Seen::default();
    for seed in number * SEEDS..(number + 1) * SEEDS {
        run(seed, &mut seen);
    }
    println!("{seen:?}");
    // Each of it was seen, and often.
    assert!(
        seen.joined > 1000 && seen.left > 500 && seen.refused > 200,
        "{seen:?}"
    );
    assert!(seen.completed > 1000 && seen.failed > 100, "{seen:?}");
}

#[test]
fn channels_come_and_go_and_no_page_is_lost_seeds_0() {
    part(0);
}

#[test]
fn channels_come_and_go_and_no_page_is_lost_seeds_1() {
    part(1);
}

#[test]
fn channels_come_and_go_and_no_page_is_lost_seeds_2() {
    part(2);
}

#[test]
fn channels_come_and_go_and_no_page_is_lost_seeds_3() {
    part(3);
}
