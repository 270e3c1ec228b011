//! `scripts/bench`: our migration beside QEMU's own, in turn, on the same guest and the same link.
//!
//! The link is a veth pair between two network namespaces. The guest fills its memory with random words and dirties a
//! working set at a set rate. Each migration has a new pair of QEMUs. Measured from outside, the same way for all:
//!
//! - total: from the command until the side that sends says that it is done;
//! - downtime: from the guest's last beat at the source to its first at the destination;
//! - CPU: user and system time of both QEMUs and, for ours, both daemons, over the total (so the guest's own work is in
//!   it, for all alike);
//! - bytes: what both ends of the link have sent, headers included.
//!
//! With `--postcopy`, the guest is switched over at once, or after one round, and how long its own touches of pages took
//! is asked of it, from its first beat at the destination to the end of the migration.
//!
//! With `--faults`, see [`benches::faults`].
//!
//! QEMU is set as well as we know how: `max-bandwidth` out of the way, one stream or `multifd` with two channels (ours
//! has two as well), the same downtime limit, and a destination without `-S` that resumes by itself.

mod contender;
mod qemu;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use benches::{Sample, to_json};
use tests::real::{
    Machine, Qemu, Role, Side, Version, World, assert_moved, cpu_seconds, outside_downtime,
};

use self::contender::Contender;

const CHANNELS: &str = "2";
const USAGE: &str = "bench [--postcopy] [--pairs N] [--mib N] [--rate MB/s] [--set MiB] [--downtime-limit MS] \
                     [--link-mbit N] [--json FILE]";

struct Options {
    pairs: usize,
    mib: u64,
    rate: u32,
    set: u32,
    limit_ms: u32,
    /// What the link lets through; as much as the machine can when there is none.
    link_mbit: Option<u32>,
    postcopy: bool,
    json: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        pairs: 5,
        mib: 1024,
        rate: 50,
        set: 256,
        limit_ms: 300,
        link_mbit: None,
        postcopy: false,
        json: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--postcopy" {
            options.postcopy = true;
            continue;
        }
        let value = words.next().ok_or(format!("{word} wants a value"))?;
        let bad = |_| format!("{word} {value}: not a number");
        match word.as_str() {
            "--pairs" => options.pairs = value.parse().map_err(bad)?,
            "--mib" => options.mib = value.parse().map_err(bad)?,
            "--rate" => options.rate = value.parse().map_err(bad)?,
            "--set" => options.set = value.parse().map_err(bad)?,
            "--downtime-limit" => {
                options.limit_ms = value.trim_end_matches("ms").parse().map_err(bad)?
            }
            "--link-mbit" => options.link_mbit = Some(value.parse().map_err(bad)?),
            "--json" => options.json = Some(value),
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--faults") {
        return benches::faults::run(std::env::args().skip(1));
    }
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("error: {error}\nusage: {USAGE}");
            return ExitCode::FAILURE;
        }
    };
    println!(
        "{} MiB of random words, {} MB/s dirtied over {} MiB, downtime limit {} ms, link {}, {} migrations each",
        options.mib,
        options.rate,
        options.set,
        options.limit_ms,
        options
            .link_mbit
            .map_or("unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s")),
        options.pairs
    );
    let contenders = if options.postcopy {
        &Contender::POSTCOPY[..]
    } else {
        &Contender::PRECOPY[..]
    };
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); contenders.len()];
    for pair in 0..options.pairs {
        for (contender, samples) in contenders.iter().zip(&mut samples) {
            let sample = run(*contender, &options);
            println!("{pair:>3} {:<24} {}", contender.name(), to_json(&sample));
            samples.push(sample);
        }
    }
    table::print(contenders, &samples);
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", table::report(&options, contenders, &samples));
        if let Err(error) = std::fs::write(path, text) {
            eprintln!("error: {path}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Both QEMUs of a migration. The guest has filled its memory.
fn start(contender: Contender, options: &Options, world: &World) -> (Qemu, Qemu) {
    let guest = format!("rate={} set={}", options.rate, options.set);
    let machine = Machine::new(Version::V10_0, options.mib, &guest);
    let qemu = |name: &str, side: Side, role: Role, extra: &[String]| {
        let mut machine = machine.clone();
        machine.extra.extend_from_slice(extra);
        let binary = machine.version.binary();
        let command = world.net.command(side, binary);
        Qemu::start_with(&world.scratch, name, &machine, role, command)
    };
    let (theirs, ours) = if contender.has_tls() && !contender.is_ours() {
        qemu::credentials(world.scratch.files())
    } else {
        Default::default()
    };
    let role = if contender.is_ours() {
        Role::Destination
    } else {
        Role::EagerDestination
    };
    let source = qemu("source", Side::A, Role::Source, &ours);
    let destination = qemu("destination", Side::B, role, &theirs);
    source.serial.wait_filled();
    source.serial.wait_beats(1000);
    (source, destination)
}

fn run(contender: Contender, options: &Options) -> Sample {
    let world = match contender {
        Contender::OursTls => World::tls(),
        _ => World::plain(),
    };
    if let Some(mbit) = options.link_mbit {
        world.net.limit(mbit);
    }
    let (mut source, mut destination) = start(contender, options, &world);
    let pids = [
        source.pid(),
        destination.pid(),
        world.daemon(Side::A).pid(),
        world.daemon(Side::B).pid(),
    ];
    let cpu = || pids.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
    let bytes = || world.net.bytes_sent(Side::A) + world.net.bytes_sent(Side::B);
    if contender.is_ours() {
        world
            .cli(Side::B)
            .receive("vm", destination.socket())
            .expect("the destination takes the guest");
    } else {
        qemu::prepare(contender, &mut source, &mut destination, options.limit_ms);
    }
    let (cpu_before, bytes_before, begun) = (cpu(), bytes(), Instant::now());
    let migration = if contender.is_ours() {
        let limit = format!("{}ms", options.limit_ms);
        let mut words = vec!["--channels", CHANNELS, "--downtime-limit", &limit];
        words.extend_from_slice(contender.options());
        Some(world.cli(Side::A).migrate("vm", &source, Side::B, &words))
    } else {
        qemu::begin(contender, &mut source);
        None
    };
    if contender.is_postcopy() {
        // Counted from here on: what the guest waits for is on its way.
        destination.serial.wait_beats(1);
        destination.serial.touches();
    }
    match migration {
        Some(migration) => {
            migration.finish().completed();
        }
        None => qemu::wait_done(&mut source),
    }
    let total = begun.elapsed();
    let (cpu_used, bytes_sent) = (cpu() - cpu_before, bytes() - bytes_before);
    destination.serial.wait_beats(1);
    let downtime = outside_downtime(&source.serial, &destination.serial);
    let touches = contender
        .is_postcopy()
        .then(|| destination.serial.touches());
    if contender.is_ours() {
        assert_moved(&mut source, &mut destination);
    } else {
        // What QEMU leaves open in itself is its own business.
        destination.serial.verify();
    }
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let megabytes = bytes_sent as f64 / 1e6;
    let mut sample = vec![
        ("total_ms", total.as_secs_f64() * 1e3),
        ("outside_downtime_ms", downtime.as_secs_f64() * 1e3),
        ("cpu_s", cpu_used),
        ("megabytes", megabytes),
    ];
    if let Some(touches) = touches {
        sample.push(("touch_p99_us", touches.quantile_us(0.99)));
        sample.push(("touch_p999_us", touches.quantile_us(0.999)));
    }
    sample
}
