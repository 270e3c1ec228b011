//! Many seeds, on all cores: how they ended, what happened on the way, and which of them broke an invariant.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pagecopy::engine::Fault;
use pagecopy::engine::event::State;

use super::{Happened, Name, Outcome, Plan, Side, Theme, run};

/// Seeds that a thread takes at a time.
const TURN: u64 = 64;
/// So many failures are kept; the run goes on, to count them.
const KEPT: usize = 20;

/// A seed that broke an invariant.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which.
    pub seed: u64,
    /// What it broke.
    pub what: String,
}

/// What is known of many runs.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Runs, by theme.
    pub runs: BTreeMap<Theme, u64>,
    /// Runs that ended so, with the guest there, by theme.
    pub ends: BTreeMap<(Theme, String, Option<Side>), u64>,
    /// Runs in which it happened.
    pub happened: BTreeMap<Happened, u64>,
    /// Deaths of daemons before, after or some time after an output.
    pub crashes: BTreeMap<(Side, Name, &'static str), u64>,
    /// The first runs that broke an invariant.
    pub broken: Vec<Broken>,
    /// How many there were.
    pub failures: u64,
    /// The most events of one run.
    pub most_steps: u64,
    /// The most virtual time of one run.
    pub most_time: Duration,
    /// Virtual time of all runs.
    pub virtual_time: Duration,
    /// What all of it took.
    pub took: Duration,
}

/// What is wrong with the end of a run, if anything is.
pub fn broken(theme: Theme, outcome: &Outcome) -> Option<String> {
    if let Some(violation) = &outcome.violation {
        return Some(violation.what.clone());
    }
    let failure = outcome.failure.as_ref()?;
    match theme {
        Theme::Quiet | Theme::PostCopy if failure.fault != Fault::Guest => {
            Some(format!("nothing went wrong, and yet: {failure:?}"))
        }
        _ if failure.what.contains("differ") => Some(format!("the RAMs differ: {failure:?}")),
        _ => None,
    }
}

impl Survey {
    /// Runs all seeds of the ranges, on as many threads as there are cores.
    pub fn of(ranges: &[Range<u64>]) -> Survey {
        let begun = Instant::now();
        let next = AtomicU64::new(0);
        let all: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let survey = Mutex::new(Survey::default());
        let threads = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut mine = Survey::default();
                    loop {
                        let first = next.fetch_add(TURN, Ordering::Relaxed);
                        if first >= all {
                            break;
                        }
                        for index in first..(first + TURN).min(all) {
                            mine.run(nth(ranges, index));
                        }
                    }
                    if let Ok(mut survey) = survey.lock() {
                        survey.add(mine);
                    }
                });
            }
        });
        let mut survey = survey.into_inner().unwrap_or_default();
        survey.took = begun.elapsed();
        survey.broken.sort_by_key(|broken| broken.seed);
        survey
    }

    /// Runs one seed.
    fn run(&mut self, seed: u64) {
        let theme = Theme::of(seed);
        let outcome = run(&Plan::of(seed), None);
        *self.runs.entry(theme).or_default() += 1;
        let end = (theme, format!("{:?}", outcome.state), outcome.guest);
        *self.ends.entry(end).or_default() += 1;
        for what in outcome.tally.happened() {
            *self.happened.entry(*what).or_default() += 1;
        }
        for crash in outcome.tally.crashes() {
            *self.crashes.entry(*crash).or_default() += 1;
        }
        self.most_steps = self.most_steps.max(outcome.steps);
        self.most_time = self.most_time.max(outcome.time);
        self.virtual_time += outcome.time;
        if let Some(what) = broken(theme, &outcome) {
            self.failures += 1;
            if self.broken.len() < KEPT {
                self.broken.push(Broken { seed, what });
            }
        }
    }

    fn add(&mut self, other: Survey) {
        fn sum<K: Ord>(to: &mut BTreeMap<K, u64>, from: BTreeMap<K, u64>) {
            for (key, count) in from {
                *to.entry(key).or_default() += count;
            }
        }
        sum(&mut self.runs, other.runs);
        sum(&mut self.ends, other.ends);
        sum(&mut self.happened, other.happened);
        sum(&mut self.crashes, other.crashes);
        self.broken.extend(other.broken);
        self.failures += other.failures;
        self.most_steps = self.most_steps.max(other.most_steps);
        self.most_time = self.most_time.max(other.most_time);
        self.virtual_time += other.virtual_time;
    }

    /// All runs.
    pub fn total(&self) -> u64 {
        self.runs.values().sum()
    }

    /// Runs of a theme that ended so, in a thousand of the theme's.
    pub fn share(&self, theme: Theme, state: State, guest: Option<Side>) -> u64 {
        let count = self.ends.get(&(theme, format!("{state:?}"), guest));
        let all = self.runs.get(&theme).copied().unwrap_or(0).max(1);
        count.copied().unwrap_or(0) * 1000 / all
    }

    /// Runs in which it happened.
    pub fn count(&self, what: Happened) -> u64 {
        self.happened.get(&what).copied().unwrap_or(0)
    }
}

/// The `index`th seed of the ranges.
fn nth(ranges: &[Range<u64>], mut index: u64) -> u64 {
    for range in ranges {
        let len = range.end - range.start;
        if index < len {
            return range.start + index;
        }
        index -= len;
    }
    0
}
