//! What goes wrong in a run, and when. Times are in microseconds, so that a plan reads the same as text.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::names::{OUTPUTS, POSTCOPY_OUTPUTS};
use super::plan::{Side, Theme};
use super::rng::Rng;

/// Microseconds.
pub(super) type Micros = u64;

/// As the agenda takes it.
pub(super) fn micros(micros: Micros) -> Duration {
    Duration::from_micros(micros)
}

/// What an operator asks of a migration that is, or seems to be, in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Wish {
    /// The guest shall run at this side.
    RunHere,
    /// This side shall let go of the guest.
    LetGo,
}

/// Something that goes wrong at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Fault {
    /// Every connection breaks, and both sides see it.
    Cut,
    /// One channel breaks: that of this number, counted around.
    CutChannel(usize),
    /// Every connection breaks, and only this side sees it; the other hears nothing more.
    CutSeenOnlyBy(Side),
    /// Nothing moves for a while; then all of it arrives.
    Stall(Micros),
    /// Connections fall silent for good. New ones cannot be made until the time is over, if ever.
    Silence(Option<Micros>),
    /// What this side sends does not arrive for a while; then all of it does. The other direction is sound.
    OneWay(Side, Micros),
    /// The operator of that side cancels.
    Cancel(Side),
    /// The QEMU of that side dies.
    QemuDies(Side),
    /// The daemon of that side dies, and is started again after the time, if ever.
    DaemonDies(Side, Option<Micros>),
    /// The host of that side loses its power: daemon, QEMU, and what was not synced. It is up again after the time, if
    /// ever.
    HostDies(Side, Option<Micros>),
    /// The daemon of that side is stopped (SIGSTOP) for a while. QEMU, the kernel and the network go on.
    Freeze(Side, Micros),
    /// The host of that side sleeps for a while, QEMU and all.
    Sleep {
        /// Whose host.
        side: Side,
        /// For how long.
        time: Micros,
        /// Its clock goes on meanwhile, as when a hypervisor pauses it; otherwise it stands still.
        clock_goes: bool,
    },
    /// The clock of that side jumps ahead.
    ClockJumps(Side, Micros),
    /// The journal's disk of that side is full for a while, or for good.
    DiskFills(Side, Option<Micros>),
    /// Each sync of that side's journal takes so much longer from now on.
    DiskSlows(Side, Micros),
    /// The host of that side fails in something that it does for the engine (memory is full, say).
    HostFails(Side),
    /// The operator of that side asks for it without having made sure of the other side.
    Ask(Side, Wish),
    /// The operator ends the other side's QEMU and daemon, for good, and then asks for it at that side.
    FenceAndAsk(Side, Wish),
    /// The source's operator wants the guest to go before its memory, now.
    StartPostcopy,
    /// The source's operator wants other limits.
    Set {
        /// Bytes a second; 0 is unlimited. None stays as it was.
        bandwidth: Option<u64>,
        /// The longest downtime. None stays as it was.
        downtime_us: Option<Micros>,
    },
    /// The source's operator wants the destination dialled now.
    Recover,
    /// The destination's operator wants the guest to go on without what it lacks; `fenced`: having ended the source for good.
    GiveUpPages {
        /// Whether the source was.
        fenced: bool,
    },
}

/// How a moment lies to an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Moment {
    /// The engine has given it, and nothing has been done about it.
    Before,
    /// It has just been begun, and the next one has not: what takes time is under way.
    After,
    /// So much later.
    Later(Micros),
}

/// When something goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum When {
    /// At a time after the start.
    Time(Micros),
    /// At that side's output of that number, from 1.
    Output(Side, u64, Moment),
    /// When that side's engine gives an output of that name for so many times, from 1.
    Named(Side, String, u64, Moment),
}

/// Outputs of the switchover and the commit, around which it matters most what happens.
const LATE_MOMENTS: [(Side, &str); 18] = [
    (Side::Source, "StopGuest"),
    (Side::Source, "SaveDeviceState"),
    (Side::Source, "Send(Stopped)"),
    (Side::Source, "Send(DeviceStateEnd)"),
    (Side::Source, "Journal(CommitIntent)"),
    (Side::Source, "Send(Commit)"),
    (Side::Source, "Journal(GuestMoved)"),
    (Side::Source, "Journal(RolledBack)"),
    (Side::Source, "ResumeGuest"),
    (Side::Source, "Connect"),
    (Side::Destination, "Send(BarrierReached)"),
    (Side::Destination, "LoadDeviceState"),
    (Side::Destination, "Send(Loaded)"),
    (Side::Destination, "Journal(Committed)"),
    (Side::Destination, "RunGuest"),
    (Side::Destination, "Journal(Running)"),
    (Side::Destination, "Send(Running)"),
    (Side::Destination, "Journal(Aborted)"),
];

/// The faults of a run.
pub(super) fn faults(rng: &mut Rng, theme: Theme) -> Vec<(When, Fault)> {
    let count = match theme {
        Theme::Quiet | Theme::PostCopy => 0,
        Theme::DirectIo | Theme::Verify => u64::from(rng.chance(100)),
        Theme::Faults => rng.pick(&[0, 1, 1, 1, 2, 3]),
        Theme::Crashes => rng.pick(&[1, 1, 2, 2, 3]),
        Theme::Chaos => rng.pick(&[1, 2, 2, 3, 3, 4, 6]),
        Theme::Torn => rng.pick(&[1, 1, 2, 2, 3, 5]),
    };
    let late = if theme == Theme::Quiet { 0 } else { 500 };
    (0..count)
        .map(|_| {
            if theme == Theme::Torn && rng.chance(800) {
                (when_fetching(rng), fault_when_fetching(rng))
            } else {
                (when(rng, late), fault(rng, theme))
            }
        })
        .collect()
}

/// A daemon that dies at a certain output, each of them as likely as the others, and what brings that output about.
pub(super) fn death_at_any_output(rng: &mut Rng) -> (&'static str, Vec<(When, Fault)>) {
    let (side, output) = rng.pick(&OUTPUTS);
    let death = Fault::DaemonDies(side, or_never(rng, 500, 20_000_000));
    let when = When::Named(side, output.to_owned(), 1, moment(rng));
    let mut faults = vec![(when, death)];
    let after = |output: &str| When::Named(Side::Source, output.to_owned(), 1, Moment::After);
    match (side, output) {
        (_, "Send(Ping)" | "Send(Pong)") => {
            faults.push((
                after("Push"),
                Fault::Stall(rng.spread(1_000_000, 4_000_000)),
            ));
        }
        (_, "Send(Abort)" | "Journal(Aborted)") => {
            faults.push((When::Time(rng.spread(500, 50_000)), Fault::Cancel(side)));
        }
        (_, "Journal(RolledBack)") => {
            faults.push((after("Journal(CommitIntent)"), Fault::Cancel(side)));
        }
        (_, "Journal(TakenBack)") => faults.push((after("Send(Commit)"), Fault::Silence(None))),
        (_, "ResumeGuest") => faults.push((after("StopGuest"), Fault::Cancel(side))),
        (_, "Send(Query)" | "Connect") => faults.push((after("Send(Commit)"), Fault::Cut)),
        _ => {}
    }
    (output, faults)
}

/// Somewhere between the switchover and the end of post-copy, mostly while pages are fetched and the guest runs.
fn when_fetching(rng: &mut Rng) -> When {
    let named =
        |(side, name): (Side, &str), nth, moment| When::Named(side, name.to_owned(), nth, moment);
    match rng.below(10) {
        0..5 => {
            let begun = rng.pick(&[
                (Side::Source, "Journal(GuestMoved)"),
                (Side::Destination, "Journal(Running)"),
            ]);
            named(begun, 1, Moment::Later(rng.spread(1, 1_000_000)))
        }
        5..8 => {
            let step = rng.pick(&["Read", "Mark", "Map"]);
            let nth = rng.pick(&[1, 2, 5, 12, 25, 50]);
            named((Side::Destination, step), nth, moment(rng))
        }
        _ => {
            let output = rng.pick(&POSTCOPY_OUTPUTS);
            named(output, rng.pick(&[1, 1, 2, 3]), moment(rng))
        }
    }
}

fn fault_when_fetching(rng: &mut Rng) -> Fault {
    let side = rng.pick(&[Side::Source, Side::Destination]);
    match rng.below(20) {
        0..7 => Fault::DaemonDies(side, or_never(rng, 500, 20_000_000)),
        7..12 => network(rng, side),
        12 => Fault::QemuDies(rng.pick(&[Side::Source, Side::Source, Side::Destination])),
        13 => Fault::HostDies(side, or_never(rng, 1_000_000, 100_000_000)),
        14 => time(rng, side),
        15 => host(rng, side),
        16 => Fault::Recover,
        17 => Fault::GiveUpPages {
            fenced: rng.chance(300),
        },
        18 => Fault::Ask(Side::Source, Wish::LetGo),
        _ => Fault::Cancel(side),
    }
}

/// The operator does not wait for the rounds to end.
pub(super) fn by_hand(rng: &mut Rng) -> [(When, Fault); 1] {
    let when = match rng.below(3) {
        0 => When::Time(rng.spread(100, 200_000)),
        _ => {
            let name = rng.pick(&["Push", "Push", "Scan", "SendOn(Barrier)", "Attach"]);
            When::Named(
                Side::Source,
                name.to_owned(),
                rng.spread(1, 20),
                moment(rng),
            )
        }
    };
    [(when, Fault::StartPostcopy)]
}

/// The operator gives the migration other limits, once or more often, now and then too late.
pub(super) fn set(rng: &mut Rng) -> Vec<(When, Fault)> {
    let outputs = [
        "Attach",
        "Scan",
        "Push",
        "Push",
        "SendOn(Barrier)",
        "StopGuest",
        "Send(Commit)",
        "Detach",
    ];
    let count = rng.between(1, 3);
    (0..count)
        .map(|_| {
            let (name, nth) = (rng.pick(&outputs), rng.pick(&[1, 1, 2, 5, 20]));
            let when = When::Named(Side::Source, name.to_owned(), nth, moment(rng));
            let limit = rng.spread(4 << 20, 1 << 30);
            let limit = if rng.chance(300) { 0 } else { limit };
            let set = Fault::Set {
                bandwidth: rng.chance(800).then_some(limit),
                downtime_us: rng.chance(500).then(|| rng.spread(50_000, 300_000)),
            };
            (when, set)
        })
        .collect()
}

/// A daemon that dies at a certain step of post-copy, and what brings that step about.
pub(super) fn death_in_postcopy(rng: &mut Rng) -> Vec<(When, Fault)> {
    let (side, output) = rng.pick(&POSTCOPY_OUTPUTS);
    let death = Fault::DaemonDies(side, or_never(rng, 500, 20_000_000));
    let when = When::Named(side, output.to_owned(), 1, moment(rng));
    let mut faults = vec![(when, death)];
    let runs = |moment| When::Named(Side::Destination, "Journal(Running)".to_owned(), 1, moment);
    let soon = Moment::Later(rng.spread(1, 30_000));
    match output {
        "Send(Lacks)" => {
            faults.push((runs(soon), Fault::Stall(rng.spread(2_000_000, 5_000_000))));
        }
        "ConnectAll" | "Send(Serve)" | "StopPulling" | "Pull" | "Send(Resumed)" => {
            faults.push((runs(soon), Fault::Cut));
        }
        "Poison" => {
            faults.push((runs(soon), Fault::Silence(None)));
            let later = Moment::Later(rng.spread(11_000_000, 60_000_000));
            faults.push((runs(later), Fault::GiveUpPages { fenced: true }));
        }
        _ => {}
    }
    faults
}

/// The answer to `Commit` is lost, the destination may be down, and operators decide while nobody knows anything.
pub(super) fn decisions_in_doubt(rng: &mut Rng) -> Vec<(When, Fault)> {
    let commit = |moment| When::Named(Side::Source, "Send(Commit)".to_owned(), 1, moment);
    let lost = match rng.below(5) {
        0 => Fault::Cut,
        1 => Fault::CutSeenOnlyBy(Side::Source),
        2 => Fault::OneWay(Side::Destination, rng.spread(1_000_000, 300_000_000)),
        _ => Fault::Silence(or_never(rng, 1_000_000, 300_000_000)),
    };
    let mut faults = vec![(commit(moment(rng)), lost)];
    if rng.chance(700) {
        let output = rng.pick(&[
            "Journal(Committed)",
            "Journal(Committed)",
            "RunGuest",
            "Journal(Running)",
            "Send(Running)",
        ]);
        let restart = or_never(rng, 100_000, 30_000_000);
        let dies = rng.pick(&[
            Fault::DaemonDies(Side::Destination, restart),
            Fault::DaemonDies(Side::Destination, restart),
            Fault::HostDies(Side::Destination, restart),
        ]);
        let when = When::Named(Side::Destination, output.to_owned(), 1, moment(rng));
        faults.push((when, dies));
    }
    for _ in 0..rng.between(1, 3) {
        let side = rng.pick(&[Side::Source, Side::Destination]);
        let later = Moment::Later(rng.spread(10_000, 100_000_000));
        faults.push((commit(later), operator(rng, side)));
    }
    faults
}

/// A moment; `late` in a thousand are around the commit.
fn when(rng: &mut Rng, late: u64) -> When {
    let moment = moment(rng);
    if rng.chance(late) {
        let (side, name) = rng.pick(&LATE_MOMENTS);
        return When::Named(side, name.to_owned(), rng.pick(&[1, 1, 1, 2]), moment);
    }
    match rng.below(8) {
        0 | 1 => When::Time(rng.spread(1, 1_000_000)),
        2 => When::Output(Side::Source, rng.spread(1, 200), moment),
        3 => When::Output(Side::Destination, rng.spread(1, 60), moment),
        _ => {
            let (side, name) = rng.pick(&OUTPUTS);
            When::Named(side, name.to_owned(), rng.pick(&[1, 1, 2, 5]), moment)
        }
    }
}

fn moment(rng: &mut Rng) -> Moment {
    match rng.below(10) {
        0..3 => Moment::Before,
        3..6 => Moment::After,
        _ => Moment::Later(rng.spread(1, 10_000)),
    }
}

/// A time, or in some cases never.
fn or_never(rng: &mut Rng, low: Micros, high: Micros) -> Option<Micros> {
    rng.chance(850).then(|| rng.spread(low, high))
}

fn fault(rng: &mut Rng, theme: Theme) -> Fault {
    let side = rng.pick(&[Side::Source, Side::Destination]);
    let kind = match theme {
        Theme::Crashes => rng.pick(&[0, 0, 0, 0, 1, 2, 2, 3, 4]),
        Theme::Chaos => rng.below(7),
        _ => rng.pick(&[2, 2, 2, 3, 4, 5]),
    };
    match kind {
        0 => Fault::DaemonDies(side, or_never(rng, 500, 20_000_000)),
        1 => dies(rng, side),
        2 => network(rng, side),
        3 => Fault::Cancel(side),
        4 => time(rng, side),
        5 => host(rng, side),
        _ => operator(rng, side),
    }
}

fn dies(rng: &mut Rng, side: Side) -> Fault {
    match rng.below(3) {
        0 => Fault::QemuDies(side),
        1 => Fault::HostDies(side, or_never(rng, 1_000_000, 100_000_000)),
        _ => Fault::DaemonDies(side, or_never(rng, 500, 20_000_000)),
    }
}

fn network(rng: &mut Rng, side: Side) -> Fault {
    match rng.below(9) {
        0..2 => Fault::Cut,
        2 => Fault::CutChannel(rng.index(8)),
        3 => Fault::CutSeenOnlyBy(side),
        4 => Fault::Stall(rng.spread(100, 20_000_000)),
        5 => Fault::OneWay(side, rng.spread(10_000, 60_000_000)),
        _ => Fault::Silence(or_never(rng, 10_000, 60_000_000)),
    }
}

fn time(rng: &mut Rng, side: Side) -> Fault {
    match rng.below(4) {
        0 | 1 => Fault::Freeze(side, rng.spread(100, 60_000_000)),
        2 => Fault::Sleep {
            side,
            time: rng.spread(1_000, 60_000_000),
            clock_goes: rng.chance(500),
        },
        _ => Fault::ClockJumps(side, rng.spread(1_000, 3_600_000_000)),
    }
}

fn host(rng: &mut Rng, side: Side) -> Fault {
    match rng.below(4) {
        0 => Fault::QemuDies(side),
        1 => Fault::DiskFills(side, or_never(rng, 10_000, 20_000_000)),
        2 => Fault::DiskSlows(side, rng.spread(10_000, 12_000_000)),
        _ => Fault::HostFails(side),
    }
}

/// Operators who decide at any moment, wrongly as often as not. One who says that the other side is fenced has fenced it.
fn operator(rng: &mut Rng, side: Side) -> Fault {
    let wish = rng.pick(&[Wish::RunHere, Wish::LetGo]);
    if rng.chance(700) {
        Fault::Ask(side, wish)
    } else {
        Fault::FenceAndAsk(side, Wish::RunHere)
    }
}
