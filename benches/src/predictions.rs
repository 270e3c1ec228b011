//! `scripts/bench --predictions`: the downtime that was predicted when a guest was stopped, beside what it was.
//!
//! For each rate that is asked for, one guest goes there and back between two daemons, as often as is asked for. What it takes to
//! stop a guest and to run it on, a host learns from the migrations before: the first from each host teach, and are not counted.
//! All others are, whatever came of them; one that was not predicted is not near.
//!
//! What is promised is of the downtime as the source measures it, from its order to stop until it hears that the guest runs,
//! since that is what it predicts. Beside it stands the guest's own word, the gap in its beats, by which the same is counted.

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

/// Moves a guest there and back, and says how near the downtimes were to what had been predicted of them.
#[derive(Debug, Parser)]
#[command(name = "bench --predictions")]
struct Options {
    /// That it is this that is wanted.
    #[arg(long, hide = true)]
    predictions: bool,
    /// Migrations that are counted, for each rate.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    moves: u16,
    /// The guest's RAM, in MiB.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// What it writes, in MB/s; several, each with a guest and daemons of its own, as in `0,5,200`.
    #[arg(long, value_delimiter = ',', default_value = "50")]
    rate: Vec<u32>,
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
        "{} MiB, up to {} MiB of them written, {} migrations there and back after {TEACHING} that teach, link {}",
        options.mib,
        options.set,
        options.moves,
        options
            .link_mbit
            .map_or_else(|| "unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s"))
    );
    println!(
        "measured: by the source, from its order to stop until it hears that the guest runs; outside: the gap in the guest's beats"
    );
    let mut told = Vec::new();
    for rate in &options.rate {
        println!(
            "\n{:<12} {:>13} {:>12} {:>11} {:>6}",
            format!("{rate} MB/s"),
            "predicted ms",
            "measured ms",
            "outside ms",
            "ratio"
        );
        let summary = summary(&foretold(*rate, &options));
        println!("{summary}");
        told.push(format!("{rate} MB/s: {summary}"));
    }
    if told.len() > 1 {
        println!("\n{}", told.join("\n"));
    }
    ExitCode::SUCCESS
}

/// How many of all were near, and how far off they were.
fn summary(all: &[Foretold]) -> String {
    let (promised, of) = (PROMISE * 100.0, all.len());
    let near = all.iter().filter(|one| one.is_near()).count();
    let felt = all.iter().filter(|one| one.is_near_outside()).count();
    let kept = if is_kept(near, of) { "kept" } else { "missed" };
    let ratios: Vec<f64> = all.iter().map(Foretold::ratio).collect();
    let ratios: Vec<f64> = ratios.into_iter().filter(|it| it.is_finite()).collect();
    let spread = Spread::of(&ratios).map_or_else(String::new, |spread| {
        let Spread {
            least,
            median,
            most,
        } = spread;
        format!("; predicted by measured {median:.2} ({least:.2} to {most:.2})")
    });
    format!(
        "within {:.0} % of the measured downtime: {near} of {of} (promised {promised:.0} %: {kept}), of the outside one: {felt} of \
         {of}{spread}",
        NEAR * 100.0,
    )
}

/// Those that count.
fn foretold(rate: u32, options: &Options) -> Vec<Foretold> {
    let world = World::plain();
    if let Some(mbit) = options.link_mbit {
        world.net.limit(mbit);
    }
    let guest = format!("rate={rate} set={}", options.set);
    let machine = Machine::new(Version::V10_0, options.mib, &guest);
    let mut here = world.guest("guest-0", &machine);
    let moves = usize::from(options.moves);
    let mut all = Vec::with_capacity(moves);
    let hosts = [Side::A, Side::B].into_iter().cycle();
    for (number, from) in (1..=moves + TEACHING).zip(hosts) {
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
            "{number:>12} {:>13.1} {:>12.1} {:>11.1} {:>6.2}{}",
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

    /// The same of what the guest missed.
    fn is_near_outside(&self) -> bool {
        (self.predicted / self.outside - 1.0).abs() <= NEAR
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

    #[test]
    fn all_count_whatever_came_of_them() {
        let mut all = [Foretold {
            predicted: 9.0,
            measured: 10.0,
            outside: 13.0,
        }; 10];
        let felt = "of the outside one: 0 of 10; predicted by measured 0.90 (0.90 to 0.90)";
        assert_eq!(
            summary(&all),
            format!("within 30 % of the measured downtime: 10 of 10 (promised 90 %: kept), {felt}")
        );
        all[3].predicted = f64::NAN;
        assert!(summary(&all).contains(" 9 of 10 (promised 90 %: kept)"));
        all[4].predicted = 13.1;
        let missed = summary(&all);
        assert!(missed.contains(" 8 of 10 (promised 90 %: missed), of the outside one: 1 of 10"));
        assert!(missed.ends_with("0.90 (0.90 to 1.31)"), "{missed}");
    }
}
