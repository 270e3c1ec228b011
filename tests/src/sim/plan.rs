//! What a seed decides before a run begins: the guest, the hosts, the network, and what will go wrong when.

use std::time::Duration;

use pagecopy::engine::source::Options;
use pagecopy::memory::BlockSpec;
use transport::mem::Faults;

use super::disk::Temper;
use super::guest::{Habits, Pattern};
use super::rng::Rng;

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theme {
    /// Nothing fails; the guest and the speeds vary.
    Quiet,
    /// Links, hosts, disks and QEMUs fail; operators cancel.
    Faults,
    /// Daemons die and come back, and the answer to `Commit` is lost.
    Crashes,
    /// Disks write into pinned pages behind the tracker's back, and little else goes wrong.
    DirectIo,
    /// Both RAMs are compared before the commit.
    Verify,
}

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The guest leaves here.
    Source,
    /// The guest arrives here.
    Destination,
}

/// Something that goes wrong at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Every connection breaks, and both sides see it.
    Cut,
    /// Nothing moves for a while; then all of it arrives.
    Stall(Duration),
    /// Connections fall silent for good. New ones cannot be made until the time is over, if ever.
    Silence(Option<Duration>),
    /// The operator of that side cancels.
    Cancel(Side),
    /// The QEMU of that side dies.
    QemuDies(Side),
    /// The daemon of that side dies, and is started again after the time, if ever.
    DaemonDies(Side, Option<Duration>),
}

/// When something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At a time after the start.
    Time(Duration),
    /// When that side's engine gives the `nth` output (from 1), or that much later. Without a delay it is before the output is
    /// carried out.
    Output(Side, u64, Duration),
    /// When that side's engine first gives an output of that name, or that much later.
    Named(Side, &'static str, Duration),
}

/// The delays of one host, in microseconds at most, and how often it fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    /// What a host operation takes (a scan, a digest, preparing).
    pub(super) operation_us: u64,
    /// What a QEMU command takes.
    pub(super) qemu_us: u64,
    /// Of a thousand host operations, how many fail.
    pub(super) operation_fails: u64,
    /// Of a thousand QEMU commands, how many fail.
    pub(super) qemu_fails: u64,
    /// The journal's disk.
    pub(super) disk: Temper,
}

/// A whole run, but for the small chances taken on the way.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) blocks: Vec<BlockSpec>,
    /// For each block of the source, the index of the destination's.
    pub(super) order: Vec<usize>,
    pub(super) data_channels: u16,
    pub(super) direct_io: bool,
    pub(super) fixed_downtime: Duration,
    pub(super) options: Options,
    pub(super) habits: Habits,
    pub(super) network: Faults,
    pub(super) device_state: usize,
    /// A channel copies what it is given and sends the copy later, as a socket does: a batch has been handed over long
    /// before it lands. Otherwise it reads the guest's RAM piece by piece while it sends, and pages arrive torn.
    pub(super) buffered: bool,
    /// The longest wait of a channel's thread before it takes up its next batch, in microseconds.
    pub(super) work_us: u64,
    pub(super) source: Host,
    pub(super) destination: Host,
    pub(super) faults: Vec<(When, Fault)>,
}

impl Plan {
    /// The plan of a seed's run.
    pub(super) fn new(theme: Theme, seed: &Rng) -> Plan {
        let mut rng = seed.stream("plan");
        let blocks = blocks(&mut rng);
        let bytes: u64 = blocks.iter().map(|block| block.size).sum();
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        rng.shuffle(&mut order);
        let direct_io = theme == Theme::DirectIo || (theme != Theme::Quiet && rng.chance(200));
        let rough = theme == Theme::Faults && rng.chance(400);
        let options = options(&mut rng, theme);
        Plan {
            order,
            data_channels: u16::try_from(rng.between(1, 5)).unwrap_or(1),
            direct_io,
            fixed_downtime: rng.micros(1_000, 20_000),
            options,
            habits: habits(&mut rng, &blocks, direct_io),
            network: network(&mut rng, bytes),
            device_state: rng.index(100_000),
            buffered: seed.stream("buffered").chance(500),
            work_us: rng.spread(1, 500),
            source: host(&mut rng, rough),
            destination: host(&mut rng, rough),
            faults: faults(&mut rng, theme),
            blocks,
        }
    }
}

fn blocks(rng: &mut Rng) -> Vec<BlockSpec> {
    let count = rng.pick(&[1, 1, 1, 2, 3]);
    (0..count)
        .map(|number| {
            let (page_size, pages) = match rng.below(100) {
                0..3 => (2 << 20, rng.between(1, 2)),
                _ => (4096, rng.spread(8, 384 / count)),
            };
            BlockSpec {
                name: format!("ram{number}"),
                size: pages * page_size,
                page_size,
            }
        })
        .collect()
}

fn options(rng: &mut Rng, theme: Theme) -> Options {
    let quiet = theme == Theme::Quiet;
    Options {
        downtime_limit: rng.micros(if quiet { 50_000 } else { 10_000 }, 300_000),
        bandwidth_limit: rng.chance(150).then(|| rng.spread(4 << 20, 1 << 30)),
        max_rounds: u32::try_from(rng.between(2, 30)).unwrap_or(30),
        timeout: rng.chance(200).then(|| rng.micros(100_000, 60_000_000)),
        verify: theme == Theme::Verify || rng.chance(100),
        quit_source: rng.chance(200),
    }
}

fn habits(rng: &mut Rng, blocks: &[BlockSpec], direct_io: bool) -> Habits {
    let pages: u64 = blocks.iter().map(BlockSpec::pages).sum();
    let hot = usize::try_from(rng.spread(1, pages.max(2) / 2)).unwrap_or(1);
    Habits {
        pattern: rng.pick(&[
            Pattern::Uniform,
            Pattern::HotSpot { pages: hot },
            Pattern::Sequential,
        ]),
        writes: rng.pick(&[0, 100, 1_000, 5_000, 20_000, 100_000, 400_000]),
        punches: rng.pick(&[0, 0, 50, 1_000]),
        reads: if direct_io { rng.spread(50, 20_000) } else { 0 },
        longest_read: rng.micros(200, 50_000),
        touched_percent: rng.between(0, 100),
    }
}

fn network(rng: &mut Rng, bytes: u64) -> Faults {
    let delay_min = rng.spread(200, 20_000);
    Faults {
        delay_min,
        delay_max: delay_min + rng.spread(1_000, 300_000),
        // The whole RAM in 1 ms to half a second, or as fast as can be.
        bytes_per_second: rng.chance(700).then(|| bytes * rng.spread(2, 1_000)),
        piece: rng
            .pick(&[1024, 4096, 16 << 10, 256 << 10])
            .max(bytes / 512),
    }
}

fn host(rng: &mut Rng, rough: bool) -> Host {
    Host {
        operation_us: rng.spread(50, 3_000),
        qemu_us: rng.spread(100, 10_000),
        operation_fails: if rough { rng.pick(&[0, 5, 30]) } else { 0 },
        qemu_fails: if rough { rng.pick(&[0, 20, 100]) } else { 0 },
        disk: Temper {
            sync_us: rng.spread(50, 10_000),
            refuses: if rough { rng.pick(&[0, 20, 200]) } else { 0 },
        },
    }
}

/// Outputs before the switchover at which something may go wrong.
const EARLY_MOMENTS: [(Side, &str); 6] = [
    (Side::Source, "Attach"),
    (Side::Source, "Scan"),
    (Side::Source, "Push"),
    (Side::Source, "DrainIo"),
    (Side::Destination, "Prepare"),
    (Side::Destination, "Send(Accept)"),
];

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

fn faults(rng: &mut Rng, theme: Theme) -> Vec<(When, Fault)> {
    let count = match theme {
        Theme::Quiet => 0,
        Theme::DirectIo | Theme::Verify => u64::from(rng.chance(100)),
        Theme::Faults => rng.pick(&[0, 1, 1, 1, 2, 3]),
        Theme::Crashes => rng.pick(&[1, 1, 2, 2, 3]),
    };
    let late = if theme == Theme::Crashes { 700 } else { 400 };
    (0..count)
        .map(|_| (when(rng, late), fault(rng, theme)))
        .collect()
}

/// A moment; `late` in a thousand are around the commit.
fn when(rng: &mut Rng, late: u64) -> When {
    let delay = if rng.chance(300) {
        Duration::ZERO
    } else {
        rng.micros(1, 10_000)
    };
    if rng.chance(late) {
        let (side, name) = rng.pick(&LATE_MOMENTS);
        return When::Named(side, name, delay);
    }
    match rng.below(5) {
        0 | 1 => When::Time(rng.micros(1, 1_000_000)),
        2 => When::Output(Side::Source, rng.spread(1, 200), delay),
        3 => When::Output(Side::Destination, rng.spread(1, 60), delay),
        _ => {
            let (side, name) = rng.pick(&EARLY_MOMENTS);
            When::Named(side, name, delay)
        }
    }
}

fn fault(rng: &mut Rng, theme: Theme) -> Fault {
    let side = rng.pick(&[Side::Source, Side::Destination]);
    let crash = theme == Theme::Crashes && rng.chance(700);
    match if crash { 9 } else { rng.below(9) } {
        0..3 => Fault::Cut,
        3 => Fault::Stall(rng.micros(100, 20_000_000)),
        4 => Fault::Silence(Some(rng.micros(10_000, 60_000_000))),
        5 => Fault::Silence(rng.chance(700).then(|| rng.micros(10_000, 60_000_000))),
        6 | 7 => Fault::Cancel(side),
        8 if theme == Theme::Faults => Fault::QemuDies(side),
        _ => Fault::DaemonDies(side, rng.chance(900).then(|| rng.micros(500, 20_000_000))),
    }
}
