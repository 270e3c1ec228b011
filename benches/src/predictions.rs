//! `scripts/bench --predictions`: the downtime that was predicted when a guest was stopped, beside what it was.
//!
//! One guest goes there and back between two daemons, as often as is asked for. What it takes to stop a guest and to run it
//! on, a host learns from the migrations before: the first from each host teach, and are not counted.

use std::process::ExitCode;

use ::tests::real::{Machine, Side, Version, World, assert_moved, outside_downtime};
use clap::Parser;

use crate::stats::Spread;

/// How far a prediction may be from what was measured…
const NEAR: f64 = 0.3;
/// …in this share of all.
const PROMISE: f64 = 0.9;
/// The first of each host.
const TEACHING: usize = 2;

/// Moves one guest there and back, and says how near the downtimes were to what had been predicted of them.
#[derive(Debug, Parser)]
#[command(name = "bench --predictions")]
struct Options {
    /// That it is this that is wanted.
    #[arg(long, hide = true)]
    predictions: bool,
    /// Migrations that are counted.
    #[arg(long, default_value_t = 10)]
    moves: usize,
    /// The guest's RAM, in MiB.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// What it writes, in MB/s.
    #[arg(long, default_value_t = 50)]
    rate: u32,
    /// How much of its memory it writes to, in MiB.
    #[arg(long, default_value_t = 256)]
    set: u32,
    /// Mbit/s that the link lets through; as much as it can, when absent.
    #[arg(long)]
    link_mbit: Option<u32>,
}

/// A downtime, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Foretold {
    predicted: f64,
    /// As the source measured it.
    measured: f64,
    /// As the guest missed it.
    outside: f64,
}

/// Runs the benchmark with these arguments, of which the first is the program.
pub fn run(words: impl Iterator<Item = String>) -> ExitCode {
    let options = match Options::try_parse_from(words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    println!(
        "{} MiB, {} MB/s written over {} MiB, {} migrations there and back, link {}",
        options.mib,
        options.rate,
        options.set,
        options.moves,
        options
            .link_mbit
            .map_or_else(|| "unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s"))
    );
    println!(
        "{:>3} {:>13} {:>12} {:>11} {:>6}",
        "", "predicted ms", "measured ms", "outside ms", "ratio"
    );
    let all = foretold(&options);
    let ratios: Vec<f64> = all.iter().map(Foretold::ratio).collect();
    let near = all.iter().filter(|one| one.is_near()).count();
    if let Some(Spread {
        least,
        median,
        most,
    }) = Spread::of(&ratios)
    {
        println!("predicted by measured: {median:.2} ({least:.2} to {most:.2})");
    }
    let kept = is_kept(near, all.len());
    println!(
        "within {:.0} %: {near} of {} (promised: {:.0} %, {})",
        NEAR * 100.0,
        all.len(),
        PROMISE * 100.0,
        if kept { "kept" } else { "missed" }
    );
    ExitCode::SUCCESS
}

/// Those that count.
fn foretold(options: &Options) -> Vec<Foretold> {
    let world = World::plain();
    if let Some(mbit) = options.link_mbit {
        world.net.limit(mbit);
    }
    let guest = format!("rate={} set={}", options.rate, options.set);
    let machine = Machine::new(Version::V10_0, options.mib, &guest);
    let mut here = world.guest("guest-0", &machine);
    let mut all = Vec::with_capacity(options.moves);
    let hosts = [Side::A, Side::B].into_iter().cycle();
    for (number, from) in (1..=options.moves + TEACHING).zip(hosts) {
        let mut there = world.waiting(&format!("guest-{number}"), &machine);
        let outcome = world.migrate(from, "vm", &here, &there, &[]);
        let end = outcome.completed();
        there.serial.wait_beats(1);
        let figure = |name: &str| end[name].as_f64().unwrap_or(f64::NAN);
        let one = Foretold {
            predicted: figure("predicted_downtime_ms"),
            measured: figure("downtime_ms"),
            outside: outside_downtime(&here.serial, &there.serial).as_secs_f64() * 1e3,
        };
        assert_moved(&mut here, &mut there);
        // Its memory is needed.
        let _ = std::fs::remove_file(here.ram());
        here = there;
        let counts = number > TEACHING;
        println!(
            "{number:>3} {:>13.1} {:>12.1} {:>11.1} {:>6.2}{}",
            one.predicted,
            one.measured,
            one.outside,
            one.ratio(),
            if counts { "" } else { "  teaches" }
        );
        if counts {
            all.push(one);
        }
    }
    all
}

/// Whether so many of all are enough.
#[allow(clippy::cast_precision_loss)] // far below 2^53
fn is_kept(near: usize, all: usize) -> bool {
    near as f64 >= all as f64 * PROMISE
}

impl Foretold {
    fn ratio(&self) -> f64 {
        self.predicted / self.measured
    }

    fn is_near(&self) -> bool {
        (self.ratio() - 1.0).abs() <= NEAR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_is_near_or_it_is_not() {
        let foretold = |predicted| Foretold {
            predicted,
            measured: 10.0,
            outside: 0.0,
        };
        assert!(foretold(12.9).is_near() && foretold(7.1).is_near());
        assert!(!foretold(13.1).is_near() && !foretold(6.9).is_near());
        assert!(!foretold(f64::NAN).is_near(), "what was not predicted");
        assert!(is_kept(9, 10) && !is_kept(8, 10));
    }
}
