//! `scripts/bench --faults`: what a page fault of a post-copy takes while the background saturates the link, beside what it
//! takes without a background, in turn, on real QEMU.
//!
//! The link is a veth pair that lets `--link-mbit` through. The guest fills its memory with random words and writes to
//! random pages of a working set; it is switched over at once, so that nearly each of its first touches is a page fault.
//! Once the background runs as it likes, until nothing lacks. Then, with a new guest, for as long as that took, under
//! `--postcopy-bandwidth-limit`, which lets next to nothing through but what somebody waits for.
//!
//! Both measures of the same time are printed: the destination's own, from the kernel's report of a fault until its page is
//! mapped (`fault_us`, and its stages), and the guest's, of its first touches of pages, with all that lies between the two:
//! the kernel, QEMU, and processors that are busy.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ::tests::real::{Machine, PATIENCE, Side, Touches, Version, World, assert_moved};
use clap::Parser;
use serde_json::{Value, json};

use crate::{Sample, medians, to_json};

/// What a fault may take under load, in terms of what it takes alone.
const PROMISE: f64 = 3.0;
/// Next to nothing.
const ALONE: &str = "1KB/s";

/// What a page fault of a post-copy takes with and without the background.
#[derive(Debug, Parser)]
#[command(name = "bench --faults")]
struct Options {
    /// That it is this that is wanted.
    #[arg(long, hide = true)]
    faults: bool,
    /// Post-copies with the background, and as many without.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// The guest's RAM, in MiB.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// What it writes, in MB/s.
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// How much of its memory it writes to, in MiB.
    #[arg(long, default_value_t = 256)]
    set: u32,
    /// Mbit/s that the link lets through.
    #[arg(long, default_value_t = 1000)]
    link_mbit: u32,
    /// Where to write the medians, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs the benchmark with these arguments, of which the first is the program.
pub fn run(words: impl Iterator<Item = String>) -> ExitCode {
    let options = match Options::try_parse_from(words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    match compare(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), String> {
    println!(
        "{} MiB of random words, {} MB/s written over {} MiB, link {} Mbit/s, {} post-copies each",
        options.mib, options.rate, options.set, options.link_mbit, options.pairs
    );
    let (mut loaded, mut alone) = (Vec::new(), Vec::new());
    for pair in 0..options.pairs {
        let (sample, took) = under_load(options);
        println!("{pair:>3} under load {}", to_json(&sample));
        loaded.push(sample);
        let sample = without_load(options, took);
        println!("{pair:>3} alone      {}", to_json(&sample));
        alone.push(sample);
    }
    let [loaded, alone] = [medians(&loaded), medians(&alone)];
    println!("\n{:<22} {:>12} {:>12}", "medians", "under load", "alone");
    for ((name, loaded), (_, alone)) in loaded.iter().zip(&alone) {
        println!("{name:<22} {loaded:>12.1} {alone:>12.1}");
    }
    let [ours, guests] = ["fault_p99_us", "touch_p99_us"].map(|name| times(&loaded, &alone, name));
    let verdict = if ours <= PROMISE { "kept" } else { "missed" };
    println!(
        "p99 under load: {ours:.2} times that alone by our measure (promised: {PROMISE}, {verdict}), {guests:.2} times \
         as the guest sees it"
    );
    let Some(path) = &options.json else {
        return Ok(());
    };
    let report =
        json!({ "under_load": to_json(&loaded), "alone": to_json(&alone), "p99_times": ours });
    std::fs::write(path, format!("{report:#}\n"))
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn times(loaded: &Sample, alone: &Sample, name: &str) -> f64 {
    let of = |sample: &Sample| {
        let found = sample.iter().find(|(known, _)| *known == name);
        found.map_or(f64::NAN, |(_, value)| *value)
    };
    of(loaded) / of(alone)
}

fn machine(options: &Options) -> Machine {
    let guest = format!("rate={} set={}", options.rate, options.set);
    Machine::new(Version::V10_0, options.mib, &guest)
}

/// With the background; how long that took.
fn under_load(options: &Options) -> (Sample, Duration) {
    let (world, machine) = (World::plain(), machine(options));
    world.net.limit(options.link_mbit);
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let words = ["--mode", "postcopy"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &words);
    destination.serial.wait_beats(1);
    destination.serial.touches();
    let (begun, sent) = (Instant::now(), world.net.bytes_sent(Side::A));
    migration.finish().completed();
    let took = begun.elapsed();
    let sent = world.net.bytes_sent(Side::A) - sent;
    let touches = destination.serial.touches();
    let end = world.cli(Side::B).last_finished("vm").unwrap_or_default();
    assert_moved(&mut source, &mut destination);
    let used = share_of_link(sent, took, options.link_mbit);
    (sample(&end, &end, &touches, used), took)
}

/// Without it, for as long.
fn without_load(options: &Options, during: Duration) -> Sample {
    let (world, machine) = (World::plain(), machine(options));
    world.net.limit(options.link_mbit);
    let source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    let limit = ["--postcopy-bandwidth-limit", ALONE];
    let words = [&["--mode", "postcopy"][..], &limit].concat();
    let migration = world.begin(Side::A, "vm", &source, &destination, &words);
    destination.serial.wait_beats(1);
    destination.serial.touches();
    let (begun, sent) = (Instant::now(), world.net.bytes_sent(Side::A));
    // Its reports come once a second, and each has all since the beginning.
    let report = migration.wait_event("the last report", during + PATIENCE, |event| {
        let at = event["postcopy_ms"].as_f64().unwrap_or(0.0);
        event["event"] == "postcopy" && at >= during.as_secs_f64() * 1e3
    });
    let used = share_of_link(
        world.net.bytes_sent(Side::A) - sent,
        begun.elapsed(),
        options.link_mbit,
    );
    let touches = destination.serial.touches();
    let id = world.cli(Side::B).id_of("vm");
    let shown = world.cli(Side::B).status(&id);
    sample(&report, &shown["faults"], &touches, used)
}

fn share_of_link(bytes: u64, time: Duration, mbit: u32) -> f64 {
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let bits = bytes as f64 * 8.0;
    bits / (time.as_secs_f64() * f64::from(mbit) * 1e6)
}

fn sample(figures: &Value, stages: &Value, touches: &Touches, link_used: f64) -> Sample {
    let figure = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let fault = |name: &str| figure(&figures["fault_us"][name]);
    let stage = |name: &str| figure(&stages[name]["p99"]);
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let touched = touches.count() as f64;
    vec![
        ("link_used_percent", link_used * 100.0),
        ("faults", figure(&figures["faults"])),
        ("fault_p50_us", fault("p50")),
        ("fault_p99_us", fault("p99")),
        ("fault_p999_us", fault("p999")),
        ("fault_max_us", fault("max")),
        ("read_p99_us", stage("read_us")),
        ("queue_p99_us", stage("queue_us")),
        ("wire_p99_us", stage("wire_us")),
        ("place_p99_us", stage("place_us")),
        ("touches", touched),
        ("touch_p50_us", touches.quantile_us(0.5)),
        ("touch_p99_us", touches.quantile_us(0.99)),
        ("touch_p999_us", touches.quantile_us(0.999)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_named_when_they_are_wrong() {
        let parse = |words: &[&str]| {
            let words = [&["bench", "--faults"], words].concat();
            Options::try_parse_from(words)
                .map(|options| (options.pairs, options.link_mbit))
                .map_err(|error| error.to_string())
        };
        assert_eq!(parse(&["--pairs", "2"]), Ok((2, 1000)));
        assert_eq!(parse(&["--link-mbit", "400"]), Ok((3, 400)));
        for wrong in [&["--pairs", "x"][..], &["--what", "1"], &["--set"]] {
            let Err(error) = parse(wrong) else {
                panic!("{wrong:?} is taken")
            };
            assert!(error.contains(wrong[0]), "{error}");
        }
    }

    #[test]
    fn how_much_longer_is_by_name() {
        let (loaded, alone) = (vec![("a", 6.0), ("b", 3.0)], vec![("a", 2.0), ("b", 3.0)]);
        assert!((times(&loaded, &alone, "a") - 3.0).abs() < 1e-9);
        assert!(times(&loaded, &alone, "c").is_nan());
    }
}
