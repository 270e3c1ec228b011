//! `scripts/demo`: a guest that dirties its memory moves from host `a` to host `b` and back, over TLS, before your eyes.
//!
//! The hosts are two network namespaces on this machine. The guest checks its own memory all the while and beats once a
//! millisecond on its serial port; from the beats the demo tells the downtime as a user would feel it.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::real::{
    Machine, Qemu, Role, Side, Version, World, assert_moved, outside_downtime, program,
};

const MIB: u64 = 512;
const RATE: u32 = 100;
const SET: u32 = 128;

/// One move, as the summary tells it.
struct Hop {
    way: &'static str,
    figures: Value,
    outside: Duration,
}

fn main() -> ExitCode {
    let begun = Instant::now();
    let world = World::tls();
    println!(
        "Two hosts, `a` and `b`: network namespaces joined by a veth pair, a pagecopyd in each."
    );
    println!("The configuration of host a, with certificates made just now:\n");
    let config =
        std::fs::read_to_string(world.folder(Side::A).join("pagecopyd.toml")).unwrap_or_default();
    for line in config.lines() {
        println!("    {line}");
    }
    let machine = Machine::new(Version::V10_0, MIB, &format!("rate={RATE} set={SET}"));
    println!(
        "\nA stock QEMU runs a guest with {MIB} MiB of RAM on host a. What makes it movable is the RAM's back end:\n"
    );
    println!(
        "    -object memory-backend-file,id=ram0,size={MIB}M,mem-path=/dev/shm/NAME,share=on\n"
    );
    let mut here = world.guest("first", &machine);
    println!(
        "The guest has filled its memory with known words, dirties {RATE} MB/s over {SET} MiB and checks every page it \
         reads.\n"
    );

    let mut hops = Vec::new();
    for (from, way, name) in [(Side::A, "a to b", "second"), (Side::B, "b to a", "third")] {
        // Long enough to see it run.
        here.serial.wait_beats(1000);
        let mut there = Qemu::start(&world.scratch, name, &machine, Role::Destination);
        let Some(figures) = migrate(&world, from, &here, &there) else {
            return ExitCode::FAILURE;
        };
        let outside = outside(&here, &there);
        // Panics, and so ends the demo with a failure, if a single word is wrong or a second guest runs.
        assert_moved(&mut here, &mut there);
        println!("The guest has checked all of its memory on the other side: whole.\n");
        hops.push(Hop {
            way,
            figures,
            outside,
        });
        here = there;
    }
    summary(&hops, begun);
    ExitCode::SUCCESS
}

/// Runs the two commands that an operator would, and returns the figures; none when the migration failed.
fn migrate(world: &World, from: Side, source: &Qemu, destination: &Qemu) -> Option<Value> {
    let to = from.other();
    let address = format!("{}:7700", to.address());
    println!(
        "{}$ pagecopy receive --vm demo --qmp {}",
        to.name(),
        destination.socket().display()
    );
    if let Err(error) = world.cli(to).receive("demo", destination.socket()) {
        eprintln!("{error}");
        return None;
    }
    println!(
        "{}$ pagecopy migrate --vm demo --qmp {} --to {address}",
        from.name(),
        source.socket().display()
    );
    let status = Command::new(program("pagecopy"))
        .arg("--api")
        .arg(world.daemon(from).api())
        .args(["migrate", "--vm", "demo", "--to", &address, "--qmp"])
        .arg(source.socket())
        .stdin(Stdio::null())
        .status()
        .ok()?;
    if !status.success() {
        return None;
    }
    world.cli(from).last_finished("demo")
}

fn outside(source: &Qemu, destination: &Qemu) -> Duration {
    destination.serial.wait_beats(1);
    outside_downtime(&source.serial, &destination.serial)
}

fn summary(hops: &[Hop], begun: Instant) {
    println!("        total    downtime  downtime   rounds  pages    bytes on    goodput   memory");
    println!("                 (we say)  (outside)          sent     the wire");
    for Hop {
        way,
        figures,
        outside,
    } in hops
    {
        let number = |name: &str| figures[name].as_f64().unwrap_or_default();
        println!(
            "{way}  {:>5.2} s  {:>5.1} ms  {:>5.1} ms  {:>7}  {:>7}  {:>5.0} MB  {:>4.1} Gbit/s  whole",
            number("total_ms") / 1e3,
            number("downtime_ms"),
            outside.as_secs_f64() * 1e3,
            number("rounds"),
            number("pages_sent"),
            number("bytes_on_wire") / 1e6,
            number("goodput_mbit_s") / 1e3,
        );
    }
    println!(
        "\nThere and back, no word of memory lost, in {:.0} s.",
        begun.elapsed().as_secs_f64()
    );
}
