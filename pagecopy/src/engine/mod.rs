//! The engines: pure state machines that decide a migration.
//!
//! [`Source`](source::Source) and [`Destination`](destination::Destination) share one shape:
//!
//! ```text
//! engine.handle(now, input)            something happened
//! engine.poll() -> Option<Output>      something to do, in order; poll until None after every handle
//! engine.poll_timeout() -> Option<Time>  when to call handle(now, Input::Tick) at the latest
//! ```
//!
//! The driver (the daemon's session, or the simulation) carries out each output and answers with the input named at it.
//! Outputs are carried out in order; those that take time run in the background and answer later. An engine never waits
//! in a call, never panics on an input, and ignores a late answer to something that it has given up.

pub mod bitmap;
pub mod channels;
mod course;
pub mod destination;
pub mod doubt;
pub mod encoding;
mod end;
pub mod event;
pub mod journal;
mod liveness;
mod outbox;
pub mod pacing;
pub mod pull;
pub mod source;
pub mod split;
mod timeouts;

pub use timeouts::Timeouts;

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time: nanoseconds of a monotonic clock of the driver's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// This time and `duration` more; saturates.
    #[must_use]
    pub fn after(self, duration: Duration) -> Time {
        Time(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// From `earlier` to this time; zero when it is not later.
    #[must_use]
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Names a migration everywhere: on the wire, in journals, in the API (as a UUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

/// A channel of the connection: 0 is the control channel, data channels start at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u16);

/// The control channel.
pub const CONTROL: ChannelId = ChannelId(0);

/// Whose fault a failure is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The operator asked for it (cancel) or for something that cannot be.
    Operator,
    /// This host: its kernel, memory, disk, privileges, daemon.
    ThisHost,
    /// The other host.
    PeerHost,
    /// The network between them.
    Network,
    /// The guest dirties memory faster than it can be sent.
    Guest,
    /// QEMU on either side.
    Qemu,
}

/// Why a migration ended without completing: whose fault, what happened, what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose fault.
    pub fault: Fault,
    /// What happened, in words with figures.
    pub what: String,
    /// What the reader can do about it.
    pub remedy: String,
}

impl Failure {
    /// A failure with its remedy.
    pub fn new(fault: Fault, what: impl Into<String>, remedy: impl Into<String>) -> Failure {
        Failure {
            fault,
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}
