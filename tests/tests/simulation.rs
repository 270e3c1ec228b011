//! Thousands of simulated migrations, each decided by its seed, with the checker of `tests::sim` always on.
//!
//! `PAGECOPY_SEEDS=n` runs about `n` seeds instead of the default. A seed that breaks an invariant is printed with the reason
//! and the end of its trace; `PAGECOPY_SEED=n cargo test -p tests --test simulation THEME -- --nocapture` replays it with
//! the whole trace.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use pagecopy::engine::Fault;
use pagecopy::engine::event::State;
use tests::sim::{Mistake, Outcome, Side, Theme, run, run_traced};

/// Seeds of all themes together, unless `PAGECOPY_SEEDS` says otherwise.
const SEEDS: u64 = 3_000;
/// Themes that share them.
const THEMES: u64 = 5;
/// Lines of the trace that are printed for a seed that fails.
const LAST_LINES: usize = 50;
/// Within so many seeds every planted mistake must be found.
const SEEDS_FOR_A_MISTAKE: u64 = 3_000;

/// Ends of migrations, counted.
type Ends = BTreeMap<(String, Option<Side>), u64>;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number"))
    })
}

/// Prints why a seed failed.
fn explain(theme: Theme, seed: u64, what: &str) {
    let outcome = run_traced(theme, seed, None);
    let first = outcome.trace.len().saturating_sub(LAST_LINES);
    println!(
        "{theme:?}, seed {seed}: {what}\n{}",
        outcome.trace[first..].join("\n")
    );
    println!(
        "replay: PAGECOPY_SEED={seed} cargo test -p tests --test simulation {theme:?} -- --nocapture\n"
    );
}

/// What is wrong with the end of a run, if anything is.
fn broken(theme: Theme, outcome: &Outcome) -> Option<String> {
    if let Some(violation) = &outcome.violation {
        return Some(violation.what.clone());
    }
    let failure = outcome.failure.as_ref()?;
    match theme {
        Theme::Quiet if failure.fault != Fault::Guest => {
            Some(format!("nothing went wrong, and yet: {failure:?}"))
        }
        _ if failure.what.contains("differ") => Some(format!("the RAMs differ: {failure:?}")),
        _ => None,
    }
}

/// Runs the theme's share of the seeds.
fn run_theme(theme: Theme) -> Ends {
    if let Some(seed) = number("PAGECOPY_SEED") {
        let outcome = run_traced(theme, seed, None);
        println!("{}", outcome.trace.join("\n"));
        println!(
            "{theme:?}, seed {seed}: {:?}, the guest runs at {:?}",
            outcome.state, outcome.guest
        );
        assert_eq!(broken(theme, &outcome), None, "{theme:?}, seed {seed}");
        return Ends::new();
    }
    let seeds = number("PAGECOPY_SEEDS").unwrap_or(SEEDS).div_ceil(THEMES);
    let mut ends = Ends::new();
    let mut failed = Vec::new();
    for seed in 0..seeds {
        let outcome = run(theme, seed, None);
        *ends
            .entry((format!("{:?}", outcome.state), outcome.guest))
            .or_default() += 1;
        if let Some(what) = broken(theme, &outcome) {
            if failed.is_empty() {
                explain(theme, seed, &what);
            }
            failed.push(seed);
        }
    }
    println!("{theme:?}, {seeds} seeds: {ends:?}");
    assert!(
        failed.is_empty(),
        "{theme:?}: {} of {seeds} seeds failed: {failed:?}",
        failed.len()
    );
    ends
}

/// That a theme is not empty: at least `least` in a thousand migrations ended so.
fn assert_share(ends: &Ends, state: State, guest: Option<Side>, least: u64) {
    let all: u64 = ends.values().sum();
    let count = ends
        .get(&(format!("{state:?}"), guest))
        .copied()
        .unwrap_or(0);
    assert!(
        all == 0 || count * 1000 >= least * all,
        "{state:?} with the guest at {guest:?}: only {count} of {all}"
    );
}

#[test]
fn quiet() {
    let ends = run_theme(Theme::Quiet);
    assert_share(&ends, State::Completed, Some(Side::Destination), 700);
    assert_share(&ends, State::Failed, Some(Side::Source), 5);
}

#[test]
fn faults() {
    let ends = run_theme(Theme::Faults);
    assert_share(&ends, State::Completed, Some(Side::Destination), 200);
    assert_share(&ends, State::Failed, Some(Side::Source), 200);
    assert_share(&ends, State::Cancelled, Some(Side::Source), 20);
}

#[test]
fn crashes() {
    let ends = run_theme(Theme::Crashes);
    assert_share(&ends, State::Completed, Some(Side::Destination), 150);
    assert_share(&ends, State::Failed, Some(Side::Source), 200);
}

#[test]
fn direct_io() {
    let ends = run_theme(Theme::DirectIo);
    assert_share(&ends, State::Completed, Some(Side::Destination), 400);
}

#[test]
fn verify() {
    let ends = run_theme(Theme::Verify);
    assert_share(&ends, State::Completed, Some(Side::Destination), 400);
}

/// Doubt is where a guest could run twice or nowhere: many runs must go through it, and it must end both ways.
#[test]
fn doubt_ends_both_ways() {
    let mut ends = BTreeMap::new();
    for seed in 0..300 {
        let outcome = run(Theme::Crashes, seed, None);
        if outcome.doubted {
            *ends.entry(format!("{:?}", outcome.state)).or_insert(0) += 1;
        }
    }
    for state in ["Completed", "Failed"] {
        assert!(
            ends.get(state).is_some_and(|count| *count >= 5),
            "of 300 runs, in doubt and then {state}: {ends:?}"
        );
    }
}

/// Seeds that once failed, each with its story.
const KEPT: &[(Theme, u64, &str)] = &[
    (
        Theme::Quiet,
        39,
        "With --verify the digests were ordered together with the last scan. They were ready before it, went out ahead of \
         Stopped, and the destination refused them as out of place.",
    ),
    (
        Theme::Quiet,
        119,
        "Populate came on the control channel after the barriers of round 0 had come on all data channels, and the \
         destination refused it as out of place.",
    ),
];

#[test]
fn kept_seeds() {
    for (theme, seed, story) in KEPT {
        let outcome = run(*theme, *seed, None);
        if let Some(what) = broken(*theme, &outcome) {
            explain(*theme, *seed, &what);
            panic!("{theme:?}, seed {seed} fails again: {what}. Its story: {story}");
        }
    }
}

#[test]
fn a_seed_decides_everything() {
    for theme in [
        Theme::Quiet,
        Theme::Faults,
        Theme::Crashes,
        Theme::DirectIo,
        Theme::Verify,
    ] {
        for seed in 0..5 {
            let (one, other) = (run_traced(theme, seed, None), run_traced(theme, seed, None));
            assert!(one.trace.len() > 5, "{theme:?}, seed {seed} has a trace");
            assert_eq!(one.trace, other.trace, "{theme:?}, seed {seed}");
        }
    }
}

/// The checker finds a planted mistake.
fn finds(mistake: Mistake, theme: Theme) {
    let found = (0..SEEDS_FOR_A_MISTAKE)
        .find_map(|seed| Some((seed, run(theme, seed, Some(mistake)).violation?)));
    let (seed, violation) = found.unwrap_or_else(|| panic!("{mistake:?} was not found"));
    println!("{mistake:?} was found with seed {seed}: {}", violation.what);
}

#[test]
fn finds_a_dirty_bit_cleared_after_reading() {
    finds(Mistake::ClearAfterRead, Theme::Quiet);
}

#[test]
fn finds_a_barrier_that_overtakes_writes() {
    finds(Mistake::EarlyBarrier, Theme::Quiet);
}

#[test]
fn finds_a_zero_run_placed_late() {
    finds(Mistake::LateZero, Theme::Quiet);
}

#[test]
fn finds_disk_reads_that_were_not_waited_for() {
    finds(Mistake::NoDrain, Theme::DirectIo);
}

#[test]
fn finds_pages_that_did_not_age() {
    finds(Mistake::NoAgeing, Theme::DirectIo);
}

#[test]
fn finds_a_guest_run_without_the_record() {
    finds(Mistake::NoCommittedRecord, Theme::Crashes);
}

#[test]
fn finds_a_commit_without_the_record() {
    finds(Mistake::NoCommitIntentRecord, Theme::Crashes);
}

#[test]
fn finds_a_page_that_was_not_sent() {
    finds(Mistake::DroppedPage, Theme::Quiet);
}

#[test]
fn finds_ram_that_was_not_cleared() {
    finds(Mistake::NoClear, Theme::Quiet);
}

#[test]
fn finds_a_write_that_comes_too_late() {
    finds(Mistake::LateWrite, Theme::Quiet);
}

#[test]
fn finds_holes_that_were_missed() {
    finds(Mistake::OldHoles, Theme::Quiet);
}
