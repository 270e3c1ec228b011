//! One migration, ours or QEMU's, and what it looked like from outside.

use std::time::{Duration, Instant};

use benches::link::Link;
use benches::record::{Plan, Run};
use benches::series::{MARGIN_MS, Progress};
use benches::ways::{Mover, Way};
use benches::work::Work;
use tests::real::{
    Levels, Machine, Net, Qemu, Role, Scratch, Side, Trust, Version, Watch, World, assert_moved,
    certified, cpu_seconds, outside_downtime,
};

use super::{qemu, warm};

/// The guest beats each millisecond; before and after a migration, this many are waited for.
const MARGIN_BEATS: usize = 1000;

/// Two hosts on a link.
pub(crate) fn world(way: &Way, link: Link) -> World {
    let scratch = Scratch::new();
    let trust = match (way.mover(), way.has_tls()) {
        (Mover::Ours, true) => certified(&scratch),
        _ => [Trust::Plaintext, Trust::Plaintext],
    };
    World::on(net(link), scratch, &trust)
}

/// A link.
pub(crate) fn net(link: Link) -> Net {
    let net = match link {
        Link::Loopback => Net::loopback(),
        Link::Veth | Link::Limited(_) => Net::new(),
    };
    if let Link::Limited(mbit) = link {
        net.limit(mbit);
    }
    net
}

/// Both QEMUs of a migration. The guest has filled its memory.
fn start(way: &Way, work: Work, plan: &Plan, world: &World) -> (Qemu, Qemu) {
    let mut machine = Machine::new(Version::V10_0, work.machine_mib(plan.mib), "");
    machine.guest = work.guest(plan.mib, plan.set_mib);
    let qemu = |name: &str, side: Side, role: Role, extra: &[String]| {
        let mut machine = machine.clone();
        machine.extra.extend_from_slice(extra);
        let binary = machine.version.binary();
        let command = world.net.command(side, binary);
        Qemu::start_with(&world.scratch, name, &machine, role, command)
    };
    let (theirs, ours, role) = match (way.mover(), way.has_tls()) {
        (Mover::Ours, _) => (vec![], vec![], Role::Destination),
        (_, false) => (vec![], vec![], Role::EagerDestination),
        (_, true) => {
            let (theirs, ours) = qemu::credentials(world.scratch.files());
            (theirs, ours, Role::EagerDestination)
        }
    };
    let source = qemu("source", Side::A, Role::Source, &ours);
    let destination = qemu("destination", Side::B, role, &theirs);
    source.serial.wait_filled();
    source.serial.wait_beats(MARGIN_BEATS + MARGIN_BEATS / 4);
    (source, destination)
}

/// Moves a guest, and says what that took; or why it was not moved.
pub(crate) fn run(way: &Way, link: Link, work: Work, plan: &Plan) -> Result<Run, String> {
    let world = world(way, link);
    let (mut source, mut destination) = start(way, work, plan, &world);
    match way.mover() {
        Mover::Ours => world.cli(Side::B).receive("vm", destination.socket())?,
        _ => qemu::prepare(way, &mut source, &mut destination, plan.downtime_limit_ms)?,
    }
    let daemons = [Side::A, Side::B].map(|side| world.daemon(side).pid());
    let pids = [[source.pid(), destination.pid()], daemons].concat();
    let cpu = || pids.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
    drop(warm::memory(plan.mib));
    source.serial.touches(); // counted from here on
    let held = (way.mover() == Mover::Ours).then(|| daemons.map(Watch::over));
    let (cpu_before, bytes_before, begun) = (cpu(), world.net.bytes_carried(), Instant::now());
    carry_out(way, plan, &world, &mut source, &mut destination)?;
    let total = begun.elapsed();
    let (cpu_used, bytes) = (cpu() - cpu_before, world.net.bytes_carried() - bytes_before);
    let held = held.map(|held| Levels::highest(&held.map(Watch::most)).memory_kib);
    destination.serial.wait_beats(1);
    let downtime = outside_downtime(&source.serial, &destination.serial);
    let touches = destination.serial.touches();
    destination
        .serial
        .wait_beats(MARGIN_BEATS + MARGIN_BEATS / 4);
    let progress = progress(&source, &destination, begun);
    if way.mover() == Mover::Ours {
        assert_moved(&mut source, &mut destination);
    } else {
        // What QEMU leaves open in itself is its own business.
        destination.serial.verify();
    }
    let done_ms = ms(total);
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let figures = [
        ("total_ms", done_ms),
        ("downtime_ms", ms(downtime)),
        ("cpu_s_per_gib", cpu_used * 1024.0 / plan.mib as f64),
        ("wire_mb", bytes as f64 / 1e6),
        ("touch_p99_us", touches.quantile_us(0.99)),
        ("touch_p999_us", touches.quantile_us(0.999)),
        ("loops_before", progress.rate(-MARGIN_MS, 0.0)),
        ("loops_during", progress.rate(0.0, done_ms)),
        ("loops_after", progress.rate(done_ms, done_ms + MARGIN_MS)),
    ];
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let held = held.map(|kib| ("daemon_mb", kib as f64 * 1024.0 / 1e6));
    let figures = figures.into_iter().chain(held);
    Ok(Run {
        failed: None,
        figures: figures
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        guest: Some(progress.series(done_ms)),
    })
}

/// Has the guest moved. With post-copy, the times of its touches count from its first beat at the destination.
fn carry_out(
    way: &Way,
    plan: &Plan,
    world: &World,
    source: &mut Qemu,
    destination: &mut Qemu,
) -> Result<(), String> {
    let migration = if way.mover() == Mover::Ours {
        let limits = [
            "--downtime-limit".to_owned(),
            format!("{}ms", plan.downtime_limit_ms),
            "--timeout".to_owned(),
            format!("{}s", plan.patience_s),
        ];
        let words = [way.options().as_slice(), &limits].concat();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Some(world.cli(Side::A).migrate("vm", source, Side::B, &words))
    } else {
        qemu::begin(way, source)?;
        None
    };
    if way.is_postcopy() {
        destination.serial.wait_beats(1);
        destination.serial.touches();
    }
    let Some(migration) = migration else {
        return qemu::wait_done(source, Duration::from_secs(plan.patience_s));
    };
    let outcome = migration.finish();
    let last = outcome.events.last();
    if outcome.status.success() && last.is_some_and(|event| event["status"] == "completed") {
        return Ok(());
    }
    let error = last.and_then(|event| event["error"].as_str());
    Err(error.unwrap_or(outcome.errors.trim()).to_owned())
}

/// What the guest got done, in milliseconds from the beginning of the migration.
fn progress(source: &Qemu, destination: &Qemu, begun: Instant) -> Progress {
    let since = |at: Instant| {
        let before = ms(begun.saturating_duration_since(at));
        ms(at.saturating_duration_since(begun)) - before
    };
    let states = [source.serial.states(), destination.serial.states()].concat();
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    Progress::new(
        states
            .iter()
            .map(|state| (since(state.at), state.checked as f64)),
    )
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
