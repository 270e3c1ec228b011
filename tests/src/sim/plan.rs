//! A whole run as data, but for the small chances taken on the way: the guest, the hosts, the network, and what goes wrong
//! when.
//!
//! A plan is made from a seed (`generate`), made smaller while it still fails (`shrink`), and written as JSON in which
//! only what differs from [`Plan::default`], the plainest run there is, stands. So one that was kept as a regression
//! does not change when the generator does.

use std::time::Duration;

use pagecopy::engine::encoding::policy::Compress;
use pagecopy::engine::source::{After, Mode, Options};
use pagecopy::memory::BlockSpec;
use serde::{Deserialize, Serialize};

use super::clock::Rate;
use super::disk::Temper;
use super::fault::{Fault, Micros, When, micros};
use super::guest::Habits;

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Theme {
    /// Nothing fails; the guest and the speeds vary.
    Quiet,
    /// Links, hosts, disks, clocks and QEMUs fail; operators cancel.
    Faults,
    /// Daemons die and come back, and the answer to `Commit` is lost.
    Crashes,
    /// Disks write into pinned pages behind the tracker's back, and little else goes wrong.
    DirectIo,
    /// Both RAMs are compared before the commit.
    Verify,
    /// All of it together, with operators who ask for the wrong thing.
    Chaos,
    /// The guest goes before its memory, and nothing fails.
    PostCopy,
    /// The same, and whatever can go wrong does.
    Torn,
}

impl Theme {
    /// All themes.
    pub const ALL: [Theme; 8] = [
        Theme::Quiet,
        Theme::Faults,
        Theme::Crashes,
        Theme::DirectIo,
        Theme::Verify,
        Theme::Chaos,
        Theme::PostCopy,
        Theme::Torn,
    ];

    /// Whether the guest goes before its memory.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Theme::PostCopy | Theme::Torn)
    }

    /// The theme of a seed. Those in which the commit is at stake have more of them.
    pub fn of(seed: u64) -> Theme {
        use Theme::{Chaos, Crashes, DirectIo, Faults, PostCopy, Quiet, Torn, Verify};
        let turns = [
            Quiet, Faults, Crashes, Chaos, DirectIo, Crashes, Chaos, Verify, PostCopy, Torn,
        ];
        turns[usize::try_from(seed % 10).unwrap_or(0)]
    }
}

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Side {
    /// The guest leaves here.
    Source,
    /// The guest arrives here.
    Destination,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Side {
        match self {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        }
    }
}

/// One host: its delays, microseconds at most, and how often it fails.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Host {
    /// What a host operation takes (a scan, a digest, preparing).
    pub(super) operation_us: Micros,
    /// What a QEMU command takes.
    pub(super) qemu_us: Micros,
    /// Of a thousand host operations, how many fail.
    pub(super) operation_fails: u64,
    /// Of a thousand QEMU commands, how many fail.
    pub(super) qemu_fails: u64,
    /// The journal's disk.
    pub(super) disk: Temper,
    /// Its clock.
    pub(super) clock: Rate,
}

impl Default for Host {
    fn default() -> Host {
        Host {
            operation_us: 100,
            qemu_us: 1_000,
            operation_fails: 0,
            qemu_fails: 0,
            disk: Temper::default(),
            clock: Rate::default(),
        }
    }
}

/// The network, as transport's `mem` network takes it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Path {
    /// Least delay, in nanoseconds.
    pub(super) delay_min: u64,
    /// Greatest delay.
    pub(super) delay_max: u64,
    /// Of each channel and direction.
    pub(super) bytes_per_second: Option<u64>,
    /// Bytes that are read and placed at once.
    pub(super) piece: u64,
}

impl Default for Path {
    fn default() -> Path {
        Path {
            delay_min: 10_000,
            delay_max: 50_000,
            bytes_per_second: None,
            piece: 4096,
        }
    }
}

/// How the operator wants the memory moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum How {
    /// Before the guest.
    #[default]
    Precopy,
    /// The same, or the guest first rather than not at all.
    Auto,
    /// Rounds, until one does not pay.
    Hybrid,
    /// So many rounds.
    HybridRounds(u32),
    /// Rounds for so long.
    HybridTime(Micros),
    /// The guest first.
    Postcopy,
}

/// What the operator asked for when the migration began.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Wanted {
    pub(super) downtime_limit_us: Micros,
    pub(super) bandwidth_limit: Option<u64>,
    pub(super) max_rounds: u32,
    pub(super) timeout_us: Option<Micros>,
    /// The guest may be slowed.
    pub(super) throttle: bool,
    pub(super) verify: bool,
    pub(super) quit_source: bool,
    pub(super) how: How,
    /// Pages go encoded, each message in a way that chance decides.
    pub(super) encoded: bool,
    /// Pages of which the version sent last is kept.
    pub(super) versions: u64,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted {
            downtime_limit_us: 300_000,
            bandwidth_limit: None,
            max_rounds: 30,
            timeout_us: None,
            throttle: false,
            verify: false,
            quit_source: false,
            how: How::Precopy,
            encoded: false,
            versions: 64,
        }
    }
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Seeds the chances taken on the way.
    pub chance: u64,
    pub(super) blocks: Vec<BlockSpec>,
    /// For each block of the source, the index of the destination's.
    pub(super) order: Vec<usize>,
    pub(super) data_channels: u16,
    pub(super) direct_io: bool,
    pub(super) fixed_downtime_us: Micros,
    pub(super) wanted: Wanted,
    pub(super) habits: Habits,
    pub(super) network: Path,
    pub(super) device_state: usize,
    /// A channel copies what it is given and sends the copy later, as a socket does: a batch has been handed over long
    /// before it lands. Otherwise it reads the guest's RAM piece by piece while it sends, and pages arrive torn.
    pub(super) buffered: bool,
    /// The longest wait of a channel's thread before it takes up its next batch.
    pub(super) work_us: Micros,
    pub(super) source: Host,
    pub(super) destination: Host,
    /// An operator looks after a migration that is in doubt. Otherwise nobody does, and it stays so if nothing else
    /// ends it.
    pub(super) operator: bool,
    pub(super) faults: Vec<(When, Fault)>,
}

impl Default for Plan {
    /// A guest of 8 pages that does nothing, one channel, and nothing goes wrong.
    fn default() -> Plan {
        Plan {
            chance: 0,
            blocks: vec![BlockSpec {
                name: "ram0".into(),
                size: 8 * 4096,
                page_size: 4096,
            }],
            order: vec![0],
            data_channels: 1,
            direct_io: false,
            fixed_downtime_us: 10_000,
            wanted: Wanted::default(),
            habits: Habits::default(),
            network: Path::default(),
            device_state: 100,
            buffered: false,
            work_us: 10,
            source: Host::default(),
            destination: Host::default(),
            operator: true,
            faults: Vec::new(),
        }
    }
}

impl Plan {
    /// A plan as it was printed.
    ///
    /// # Errors
    /// It is no JSON, or has something in it that plans do not have.
    pub fn read(text: &str) -> Result<Plan, String> {
        let plan: Plan = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if plan.blocks.is_empty() || plan.order.len() != plan.blocks.len() {
            return Err("the order does not fit the blocks".to_owned());
        }
        Ok(plan)
    }

    /// The plan as JSON on one line, of which [`Plan::read`] makes the same again. What is as in the plainest plan is
    /// left out.
    pub fn write(&self) -> String {
        let value = |plan: &Plan| serde_json::to_value(plan).unwrap_or_default();
        without(value(self), &value(&Plan::default())).to_string()
    }

    pub(super) fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    pub(super) fn options(&self) -> Options {
        Options {
            downtime_limit: micros(self.wanted.downtime_limit_us),
            bandwidth_limit: self.wanted.bandwidth_limit,
            background_limit: None,
            max_rounds: self.wanted.max_rounds,
            timeout: self.wanted.timeout_us.map(micros),
            throttle: self.wanted.throttle,
            verify: self.wanted.verify,
            mode: match self.wanted.how {
                How::Precopy => Mode::Precopy,
                How::Auto => Mode::Auto { postcopy: true },
                How::Hybrid => Mode::Hybrid(After::Auto),
                How::HybridRounds(rounds) => Mode::Hybrid(After::Rounds(rounds)),
                How::HybridTime(time) => Mode::Hybrid(After::Time(micros(time))),
                How::Postcopy => Mode::Postcopy,
            },
            quit_source: self.wanted.quit_source,
            channels: None,
            compress: if self.wanted.encoded {
                Compress::Auto
            } else {
                Compress::Off
            },
        }
    }

    pub(super) fn fixed_downtime(&self) -> Duration {
        micros(self.fixed_downtime_us)
    }
}

/// `value` without what is the same in `plain`.
fn without(value: serde_json::Value, plain: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match (value, plain) {
        (Value::Object(value), Value::Object(plain)) => value
            .into_iter()
            .filter(|(key, value)| plain.get(key) != Some(value))
            .map(|(key, value)| {
                let rest = without(value, plain.get(&key).unwrap_or(&Value::Null));
                (key, rest)
            })
            .collect(),
        (value, _) => value,
    }
}
