//! What an engine tells people: states, progress, decisions with their figures, and the result.

use serde::{Deserialize, Serialize};

use super::Failure;
use super::encoding::Encoded;

/// The state of a migration as a person sees it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Accepted, not begun.
    Pending,
    /// Connecting, comparing both sides, attaching.
    Preparing,
    /// Rounds of pre-copy; the guest runs at the source.
    Migrating,
    /// Switchover: the guest is stopped, or starting at the destination.
    Completing,
    /// The guest runs at the destination.
    Completed,
    /// Ended by a failure; the guest runs at the source.
    Failed,
    /// Ended by the operator; the guest runs at the source.
    Cancelled,
    /// At the source: the destination may run the guest; the source keeps everything and asks. At the destination: the
    /// guest is committed to it and not known to run; it is run when the source asks.
    InDoubt,
    /// The guest runs at the destination, lacks pages, and gets none, for its source is away or nobody fetches: what touches
    /// one of them waits.
    Paused,
}

impl State {
    /// The state in one word, as the API spells it.
    pub fn word(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Preparing => "preparing",
            State::Migrating => "migrating",
            State::Completing => "completing",
            State::Completed => "completed",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
            State::InDoubt => "in-doubt",
            State::Paused => "paused",
        }
    }
}

/// How a guest moves, or has moved.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// It runs at the source until its memory has come, as far as is known yet.
    #[default]
    Precopy,
    /// Some of its memory came before it, the rest does after it.
    Hybrid,
    /// It went before its memory.
    Postcopy,
}

impl Way {
    /// In one word, as the API spells it.
    pub fn word(self) -> &'static str {
        match self {
            Way::Precopy => "precopy",
            Way::Hybrid => "hybrid",
            Way::Postcopy => "postcopy",
        }
    }
}

/// What a post-copy began with.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Bytes of pages that had been sent before, all rounds.
    pub sent_bytes: u64,
    /// Bytes that the guest lacked then.
    pub lacking_bytes: u64,
}

impl Switch {
    /// Whether there was pre-copy before.
    pub fn way(self) -> Way {
        match self.sent_bytes {
            0 => Way::Postcopy,
            _ => Way::Hybrid,
        }
    }
}

/// Something worth telling while a migration runs.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Report {
    /// The state changed.
    State {
        /// The new state.
        state: State,
    },
    /// Why a post-copy is paused, behind that state and when the reason changes.
    Paused {
        /// In words, with what to do where there is something.
        reason: String,
    },
    /// Where a round stands. At most ten a second.
    Progress(Progress),
    /// A round ended, with what was decided from it and why.
    Round {
        /// Round, from 0.
        round: u32,
        /// How long it took, in milliseconds.
        ms: f64,
        /// Pages sent that are not zero.
        pages_sent: u64,
        /// Pages sent as zero.
        pages_zero: u64,
        /// What of them went encoded.
        #[serde(flatten)]
        encoded: Encoded,
        /// Pages found dirty by the scan after it.
        pages_dirty: u64,
        /// Hot pages held back.
        pages_held: u64,
        /// How long the scan took, in microseconds.
        scan_us: u64,
        /// Predicted downtime in milliseconds.
        predicted_downtime_ms: f64,
        /// Percent of its time for which the guest is kept from writing from now on.
        #[serde(default)]
        throttle_percent: u32,
        /// The decision and its reason, in words with figures.
        decision: String,
    },
    /// The guest is switched over before its memory: both sides tell the same. A daemon that takes it up anew tells it again.
    Switched {
        /// Hybrid or post-copy.
        mode: Way,
        /// With what.
        #[serde(flatten)]
        switch: Switch,
    },
    /// From now on the guest is kept from writing for another share of its time, so that pre-copy can follow.
    Throttle {
        /// Percent of its time; 0: it is not slowed any more.
        throttle_percent: u32,
    },
    /// What was decided about the number of data channels, and why.
    Channels {
        /// Data channels that carry pages from now on.
        channels: u16,
        /// The decision and its reason, in words with figures.
        decision: String,
    },
    /// Where post-copy stands. About one a second.
    Postcopy(PostcopyProgress),
    /// Something that a person should know and that changes no state: a request that was refused, an attempt that failed
    /// and will be made again.
    Notice {
        /// What, in words.
        text: String,
    },
}

/// Where a round stands.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Round, from 0.
    pub round: u32,
    /// Bytes of guest memory still to send, as known now.
    pub remaining_bytes: u64,
    /// Bytes of guest memory in all.
    pub total_bytes: u64,
    /// Share of this round that is done, 0 to 100.
    pub percent: u32,
    /// Bytes a second that left as pages, lately.
    pub goodput_bytes_s: u64,
    /// Bytes a second that the guest dirtied, by the last scan.
    pub dirty_bytes_s: u64,
    /// Predicted downtime in milliseconds if the switchover came now; none before it is known.
    pub predicted_downtime_ms: Option<f64>,
    /// Percent of its time for which the guest is kept from writing.
    #[serde(default)]
    pub throttle_percent: u32,
    /// Data channels that carry pages.
    #[serde(default)]
    pub channels: u16,
    /// What has gone encoded so far.
    #[serde(flatten)]
    pub encoded: Encoded,
    /// Expected seconds to the end of this round.
    pub eta_s: Option<f64>,
}

/// Where post-copy stands.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PostcopyProgress {
    /// Hybrid or post-copy.
    pub mode: Way,
    /// Bytes that the guest lacks: for these it depends on its source.
    pub lacking_bytes: u64,
    /// Since the guest's first moment at the destination, in milliseconds.
    pub postcopy_ms: f64,
    /// How long of that the hosts were not connected, in milliseconds.
    pub paused_ms: f64,
    /// Page faults so far; at the source, as the destination told them.
    #[serde(flatten)]
    pub faults: FaultFigures,
}

/// Page faults that waited for pages which were not there yet, as the destination's daemon has counted them since it was
/// started.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultFigures {
    /// How many are over.
    pub faults: u64,
    /// How many wait now.
    pub faults_waiting: u64,
    /// How long they waited, until the page was mapped.
    pub fault_us: Quantiles,
}

/// How long things took, in microseconds. Each is at least the one before.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half of them took no longer.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
    /// All.
    pub max: u64,
}

/// What a post-copy cost, as the destination tells it in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PostcopyCost {
    /// Its page faults.
    pub faults: FaultFigures,
    /// From the guest's first moment there until it lacked nothing, in microseconds.
    pub postcopy_us: u64,
    /// How long of that the hosts were not connected, in microseconds.
    pub paused_us: u64,
}

/// The figures of a migration, complete when it has ended.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// From the start to the end, in milliseconds.
    pub total_ms: f64,
    /// From QEMU's order to stop until the destination said that the guest runs, as the source saw it; milliseconds.
    pub downtime_ms: Option<f64>,
    /// What was predicted at the moment of the switchover.
    pub predicted_downtime_ms: Option<f64>,
    /// Of the downtime, what `--verify` cost.
    pub verify_ms: Option<f64>,
    /// Of the downtime, what does not depend on bytes (stop, final scan, device state, load, run); feeds the next prediction.
    pub fixed_downtime_ms: Option<f64>,
    /// Rounds of pre-copy, the first included.
    pub rounds: u32,
    /// Pages sent that are not zero, all rounds.
    pub pages_sent: u64,
    /// Pages sent as zero, all rounds.
    pub pages_zero: u64,
    /// What of them went encoded.
    #[serde(flatten)]
    pub encoded: Encoded,
    /// Bytes of device state.
    pub device_state_bytes: u64,
    /// Bytes of pages sent a second, over the time in which pages were sent; megabits a second.
    pub goodput_mbit_s: f64,
    /// The largest share of its time, in percent, for which the guest was kept from writing.
    #[serde(default)]
    pub throttle_percent: u32,
    /// How long one thread of QEMU was stopped to attach, in microseconds.
    pub attach_stop_us: Option<u64>,
    /// With post-copy: bytes that the guest lacked when it was switched over.
    pub lacking_bytes: Option<u64>,
    /// With post-copy: bytes of pages that the source had sent before that.
    pub sent_bytes: Option<u64>,
    /// With post-copy: from the guest's first moment at the destination until it lacked nothing, in milliseconds. Each daemon
    /// counts from when it was started; at the source, the longer of what both have counted.
    pub postcopy_ms: Option<f64>,
    /// With post-copy: how long of that the hosts were not connected, in milliseconds.
    pub paused_ms: Option<f64>,
    /// With post-copy: its page faults; at the source, as the destination told them, if it did.
    #[serde(flatten)]
    pub faults: Option<FaultFigures>,
}

impl Figures {
    /// How the guest moved.
    pub fn way(&self) -> Way {
        match (self.lacking_bytes, self.sent_bytes) {
            (None, _) => Way::Precopy,
            (Some(_), Some(0)) => Way::Postcopy,
            (Some(_), _) => Way::Hybrid,
        }
    }

    /// What the post-copy began with.
    pub fn switched(&mut self, switch: Switch) {
        self.lacking_bytes = Some(switch.lacking_bytes);
        self.sent_bytes = Some(switch.sent_bytes);
    }
}

/// How a migration ended at the source.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// `Completed`, `Failed`, `Cancelled` or `InDoubt`.
    pub state: State,
    /// Why, unless completed.
    pub failure: Option<Failure>,
    /// The figures.
    pub figures: Figures,
}
