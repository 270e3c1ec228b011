//! One migration, ours or QEMU's, and what it looked like from outside.

use std::fs;
use std::time::Duration;

use benches::hosts::Hosts;
use benches::hosts::ask::{Ask, By, Counters, Ended, Heard, Order, Pem, Start, Touched};
use benches::hosts::clock::Between;
use benches::record::{Plan, Run};
use benches::series::{MARGIN_MS, Progress};
use benches::ways::{Mover, Way};
use benches::work::Work;
use tests::real::{Certs, Identity, Role, Scratch, Side, assert_follows};

use super::qemu;

/// The guest beats each millisecond; so many are waited for after a migration.
const SETTLED_BEATS: usize = 1250;
/// Beats in which a guest would be noticed that still runs at the source.
const SILENT_BEATS: usize = 300;

/// Moves a guest, and says what that took; or why it was not moved.
pub(crate) fn run(way: &Way, work: Work, plan: &Plan, hosts: &mut Hosts) -> Result<Run, String> {
    start(way, work, plan, hosts)?;
    match way.mover() {
        Mover::Ours => hosts.destination.ask::<()>(&Ask::Receive)?,
        _ => qemu::prepare(way, hosts, plan.downtime_limit_ms)?,
    }
    hosts.destination.ask::<()>(&Ask::Warm(plan.mib))?;
    let allocated = allocated(work, plan, hosts)?;
    let before = hosts.clocks()?;
    let armed: Counters = hosts.destination.ask(&Ask::Arm)?;
    let (ended, counted) = carry_out(way, plan, hosts)?;
    hosts.destination.ask::<()>(&Ask::Beats(1))?;
    let touched: Touched = hosts.destination.ask(&Ask::Touches)?;
    let after = hosts.clocks()?;
    hosts.destination.ask::<()>(&Ask::Beats(SETTLED_BEATS))?;
    let [left, arrived] = heard(hosts)?;
    check(way, plan, hosts, &left, &arrived)?;
    let seen = Seen {
        used: used(hosts.one_device, &ended, [armed, counted]),
        ended,
        clocks: Between { before, after },
        left,
        arrived,
        touched,
        allocated,
    };
    seen.figures(plan)
}

/// Both QEMUs, and for ours the daemons. The guest has filled its memory.
fn start(way: &Way, work: Work, plan: &Plan, hosts: &mut Hosts) -> Result<(), String> {
    let identities = way.has_tls().then(certified).transpose()?;
    let daemons = hosts.daemons();
    let ours = way.mover() == Mover::Ours;
    let side = |side: Side, role: Role| {
        let at = side as usize;
        Ask::Start(Box::new(Start {
            name: side.name().to_owned(),
            role,
            qemu: hosts.qemus[at].clone(),
            machine_mib: work.machine_mib(plan.mib),
            allocated: plan.allocated && role != Role::Source,
            guest: work.guest(plan.mib, plan.set_mib),
            daemon: ours.then(|| daemons[at]),
            identity: identities.as_ref().map(|both| both[at].clone()),
            device: hosts.routes[at].device.clone(),
        }))
    };
    let waits = match ours {
        true => Role::Destination,
        false => Role::EagerDestination,
    };
    let starts = [side(Side::A, Role::Source), side(Side::B, waits)];
    hosts.source.ask::<Vec<u32>>(&starts[0])?;
    hosts.destination.ask::<Vec<u32>>(&starts[1])?;
    hosts.source.ask::<()>(&Ask::Settle)
}

/// How many bytes of the destination's RAM are allocated; all of them, when that is asked for.
fn allocated(work: Work, plan: &Plan, hosts: &mut Hosts) -> Result<u64, String> {
    let bytes: u64 = hosts.destination.ask(&Ask::Allocated)?;
    let all = work.machine_mib(plan.mib) << 20;
    if plan.allocated && bytes < all {
        return Err(format!(
            "the destination's QEMU has {bytes} bytes of the guest's RAM where prealloc=on is for all {all}"
        ));
    }
    Ok(bytes)
}

/// Certificates of both hosts, by an authority that was made for them.
fn certified() -> Result<[Pem; 2], String> {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let pem = |side: Side| -> std::io::Result<Pem> {
        let Identity { ca, cert, key } = certs.identity(side.name());
        Ok(Pem {
            ca: fs::read_to_string(ca)?,
            cert: fs::read_to_string(cert)?,
            key: fs::read_to_string(key)?,
        })
    };
    let both = pem(Side::A).and_then(|a| Ok([a, pem(Side::B)?]));
    both.map_err(|error| format!("certificates: {error}"))
}

/// Has the guest moved: what the side that sends saw of it, and what the destination had used by then. With post-copy, the
/// times of touches count from the first beat at the destination.
fn carry_out(way: &Way, plan: &Plan, hosts: &mut Hosts) -> Result<(Ended, Counters), String> {
    let ours = way.mover() == Mover::Ours;
    let limits = [
        "--downtime-limit".to_owned(),
        format!("{}ms", plan.downtime_limit_ms),
        "--timeout".to_owned(),
        format!("{}s", plan.patience_s),
    ];
    let order = Order {
        to: if ours {
            hosts.daemons()[1]
        } else {
            hosts.qemu_at()
        },
        by: match ours {
            true => By::Daemon([way.options().as_slice(), &limits].concat()),
            false => By::Qemu(way.is_postcopy()),
        },
        patience_s: plan.patience_s,
    };
    hosts.source.ask::<()>(&Ask::Begin(order))?;
    let mut lacking = Ok(());
    if way.is_postcopy() {
        lacking = hosts.destination.ask::<()>(&Ask::Beats(1));
        lacking =
            lacking.and_then(|()| hosts.destination.ask::<Touched>(&Ask::Touches).map(|_| ()));
    }
    // Whoever moved it knows better why it does not run there.
    let patience = Duration::from_secs(plan.patience_s);
    let ended = hosts.source.ask_for(patience, &Ask::Finish)?;
    lacking?;
    Ok((ended, hosts.destination.ask(&Ask::Disarm)?))
}

/// What the guest has said at each host.
fn heard(hosts: &mut Hosts) -> Result<[Heard; 2], String> {
    Ok([
        hosts.source.ask(&Ask::Hear)?,
        hosts.destination.ask(&Ask::Hear)?,
    ])
}

/// The guest is whole; when we moved it, it runs there only, and nothing is left in either QEMU.
fn check(
    way: &Way,
    plan: &Plan,
    hosts: &mut Hosts,
    left: &Heard,
    arrived: &Heard,
) -> Result<(), String> {
    let patience = Duration::from_secs(plan.patience_s);
    if way.mover() != Mover::Ours {
        // What QEMU leaves open in itself is its own business.
        return hosts.destination.ask_for(patience, &Ask::Verify);
    }
    let (last, first) = left
        .last
        .zip(arrived.first)
        .ok_or("the guest has not beaten")?;
    assert_follows(last.1, first.1);
    hosts.destination.ask::<()>(&Ask::Beats(SILENT_BEATS))?;
    hosts.destination.ask_for::<()>(patience, &Ask::Arrived)?;
    hosts.source.ask(&Ask::Left(left.beats))
}

/// What both sides have used.
fn used(one_device: bool, ended: &Ended, [armed, counted]: [Counters; 2]) -> Counters {
    let bytes = |before: &Counters, after: &Counters| after.bytes.saturating_sub(before.bytes);
    let there = if one_device {
        0
    } else {
        bytes(&armed, &counted)
    };
    Counters {
        cpu_s: ended.after.cpu_s - ended.before.cpu_s + counted.cpu_s - armed.cpu_s,
        bytes: bytes(&ended.before, &ended.after) + there,
        daemon_kib: ended.after.daemon_kib.max(counted.daemon_kib),
    }
}

/// All that was seen of a migration, each side's times by its own clock.
struct Seen {
    ended: Ended,
    used: Counters,
    clocks: Between,
    left: Heard,
    arrived: Heard,
    touched: Touched,
    /// Bytes of the destination's RAM that were there before.
    allocated: u64,
}

impl Seen {
    fn figures(&self, plan: &Plan) -> Result<Run, String> {
        let beats = self.left.last.zip(self.arrived.first);
        let (last, first) = beats.ok_or("the guest has not beaten on both hosts")?;
        // Below zero by no more than what is not known of the clocks.
        let downtime_ms = (self.clocks.ours(first.0) - last.0).max(0.0);
        let done_ms = self.ended.ended_ms - self.ended.begun_ms;
        let progress = self.progress();
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let figures = [
            ("total_ms", done_ms),
            ("downtime_ms", downtime_ms),
            ("downtime_error_ms", self.clocks.error_ms()),
            ("cpu_s_per_gib", self.used.cpu_s * 1024.0 / plan.mib as f64),
            ("wire_mb", self.used.bytes as f64 / 1e6),
            ("allocated_mb", self.allocated as f64 / 1e6),
            ("touch_p99_us", self.touched.p99_us),
            ("touch_p999_us", self.touched.p999_us),
            ("loops_before", progress.rate(-MARGIN_MS, 0.0)),
            ("loops_during", progress.rate(0.0, done_ms)),
            ("loops_after", progress.rate(done_ms, done_ms + MARGIN_MS)),
        ];
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let held = self
            .used
            .daemon_kib
            .map(|kib| ("daemon_mb", kib as f64 * 1024.0 / 1e6));
        let figures = figures.into_iter().chain(held);
        Ok(Run {
            failed: None,
            figures: figures
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            guest: Some(progress.series(done_ms)),
        })
    }

    /// What the guest got done, in milliseconds from the beginning of the migration.
    fn progress(&self) -> Progress {
        let here = self.left.states.iter().copied();
        let there = self.arrived.states.iter();
        let there = there.map(|(at, checked)| (self.clocks.ours(*at), *checked));
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let since = |(at, checked): (f64, u64)| (at - self.ended.begun_ms, checked as f64);
        Progress::new(here.chain(there).map(since))
    }
}
