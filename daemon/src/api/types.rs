//! What the API takes and gives, shared with the command line.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::rdma::Pin;

/// How the guest's memory moves.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// As `precopy`; where that would not converge and post-copy is allowed, the guest goes first
    #[default]
    Auto,
    /// The guest runs at the source until all but the last pages have moved
    Precopy,
    /// Rounds of pre-copy; then the guest goes first and fetches what it lacks
    Hybrid,
    /// The guest goes first, and fetches its memory
    Postcopy,
}

/// How pages are encoded.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As they are
    #[default]
    Off,
    /// Compressed
    Zstd,
    /// As the difference to the version sent before, where there is one
    Delta,
    /// Each page as it is smallest where the link is the limit, as they are where the processors are: measured all the time
    Auto,
}

/// Whether the guest is slowed where pre-copy falls behind.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Throttle {
    /// Never
    #[default]
    Off,
    /// Its vCPUs that write stand still for a share of their time, no larger than it takes: where rounds of pre-copy do not become
    /// shorter and the guest may not go first
    Auto,
}

/// What pages go over.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RDMA where both hosts have a device, reach each other and allow it; else TCP
    #[default]
    Auto,
    /// RDMA, or the migration does not begin
    Rdma,
    /// TCP
    Tcp,
}

/// How many data channels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number of channels, or auto")]
pub enum Channels {
    /// So many, always.
    Number(u16),
    /// At first as when absent; then, while pages are sent, as many as are measured to pay.
    Measured(Auto),
}

impl Channels {
    /// The number, where one was given.
    pub(crate) fn number(self) -> Option<u16> {
        match self {
            Channels::Number(number) => Some(number),
            Channels::Measured(Auto::Auto) => None,
        }
    }
}

/// The word for what is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// As it is measured
    Auto,
}

/// `POST /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// The guest's name, the same on both sides.
    pub vm: String,
    /// QMP socket of the QEMU that it leaves.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// The other daemon: `HOST:PORT`.
    pub to: String,
    /// Whether the other daemon starts the QEMU that the guest comes to, under its policy.
    #[serde(default)]
    pub spawn: bool,
    /// How.
    #[serde(default)]
    pub mode: Mode,
    /// With `auto`: whether the guest may go first, and depend on both hosts for a while. The daemon's `allow-postcopy` allows
    /// it, too.
    #[serde(default)]
    pub allow_postcopy: bool,
    /// With `hybrid`: rounds of pre-copy. With neither this nor the next: as long as they pay.
    pub postcopy_after_rounds: Option<u32>,
    /// With `hybrid`: milliseconds of pre-copy.
    pub postcopy_after_ms: Option<u64>,
    /// What pages go over.
    #[serde(default)]
    pub transport: Transport,
    /// Memory that may be pinned for RDMA here: `auto`, `all`, or a size such as `8GiB`; as the daemon's configuration says when
    /// absent.
    #[schema(value_type = Option<String>)]
    pub rdma_pin: Option<Pin>,
    /// Data channels: so many, or `auto`; when absent as many as the link and the cores ask for, always.
    pub channels: Option<Channels>,
    /// Longest downtime, in milliseconds; 300 when absent.
    pub downtime_limit_ms: Option<f64>,
    /// Bytes a second; unlimited when absent.
    pub bandwidth_limit: Option<u64>,
    /// Bytes a second for what a guest that has gone first lacks and does not wait for; as `bandwidth_limit` when absent.
    pub postcopy_bandwidth_limit: Option<u64>,
    /// How pages are encoded; as the daemon's configuration says when absent.
    pub compress: Option<Compress>,
    /// Whether the guest is slowed where pre-copy falls behind; as the daemon's configuration says when absent. Not with `hybrid` and
    /// `postcopy`; with `auto`, where the guest may not go first.
    pub throttle: Option<Throttle>,
    /// Bytes of memory for the versions of pages that deltas are made from; as the daemon's configuration says when absent.
    pub delta_cache: Option<u64>,
    /// From -100 to 100: among those that wait the most urgent begins first, and of a host's bandwidth 100 is given four times as
    /// much as 0.
    #[serde(default)]
    pub priority: i32,
    /// Rounds without convergence; 30 when absent.
    pub max_rounds: Option<u32>,
    /// Milliseconds without a switchover; unlimited when absent.
    pub timeout_ms: Option<u64>,
    /// Compare both RAMs before the commit.
    #[serde(default)]
    pub verify: bool,
    /// Go on where the guest fits at the destination and `memory-margin` beside it does not; never where something fails.
    #[serde(default)]
    pub force: bool,
    /// Quit the source QEMU when the guest has moved.
    #[serde(default)]
    pub quit_source: bool,
}

/// `PATCH /v1/migrations/ID`: what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeRequest {
    /// Bytes a second; `null` is unlimited.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub bandwidth_limit: Option<Option<u64>>,
    /// Longest downtime, in milliseconds.
    pub downtime_limit_ms: Option<f64>,
    /// From -100 to 100.
    pub priority: Option<i32>,
}

/// Tells `null` from what is absent.
fn given<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// The answer to `POST /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Begun {
    /// The migration.
    pub id: Uuid,
}

/// `POST /v1/receivers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiverRequest {
    /// The guest's name.
    pub vm: String,
    /// QMP socket of the QEMU that waits for it.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
}

/// `POST /v1/migrations/ID/recover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RecoverRequest {
    /// Another address of the destination's daemon: `HOST:PORT`.
    pub to: Option<String>,
}

/// `POST /v1/migrations/ID/resolve`: one of the first four is true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResolveRequest {
    /// At the source: take the guest back.
    pub resume_here: bool,
    /// At the destination: run the guest that was committed to it.
    pub run_here: bool,
    /// Let go of the guest here. At the source of a paused post-copy only with `peer_fenced`, unless its memory is gone already.
    pub abandon: bool,
    /// At the destination of a paused post-copy: the guest goes on without what it lacks.
    pub poison: bool,
    /// The word that the other host's QEMU and pagecopyd cannot run any more.
    pub peer_fenced: bool,
}

/// The answer to `POST /v1/migrations/ID/resolve`. A refusal is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resolved {
    /// What is done.
    pub done: String,
}
