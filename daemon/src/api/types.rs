//! What the API takes and gives, shared with the command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::failure::Fault;

/// How the pages move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The guest runs at the source until all but the last pages have moved.
    #[default]
    Precopy,
}

/// `POST /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// The guest's name, the same on both sides.
    pub vm: String,
    /// QMP socket of the QEMU that it leaves.
    pub qmp: PathBuf,
    /// The other daemon: `HOST:PORT`.
    pub to: String,
    /// How.
    #[serde(default)]
    pub mode: Mode,
    /// Data channels; chosen from the cores when absent.
    pub channels: Option<u16>,
    /// Longest downtime, in milliseconds; 300 when absent.
    pub downtime_limit_ms: Option<f64>,
    /// Bytes a second; unlimited when absent.
    pub bandwidth_limit: Option<u64>,
    /// Rounds without convergence; 30 when absent.
    pub max_rounds: Option<u32>,
    /// Milliseconds without a switchover; unlimited when absent.
    pub timeout_ms: Option<u64>,
    /// Compare both RAMs before the commit.
    #[serde(default)]
    pub verify: bool,
    /// Quit the source QEMU when the guest has moved.
    #[serde(default)]
    pub quit_source: bool,
}

/// The answer to `POST /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The migration.
    pub id: Uuid,
}

/// `POST /v1/receivers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiverRequest {
    /// The guest's name.
    pub vm: String,
    /// QMP socket of the QEMU that waits for it.
    pub qmp: PathBuf,
}

/// `POST /v1/migrations/ID/resolve`: one of the first three is true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResolveRequest {
    /// At the source: take the guest back.
    pub resume_here: bool,
    /// At the destination: run the guest that was committed to it.
    pub run_here: bool,
    /// Let go of the guest here.
    pub abandon: bool,
    /// The word that the other host's QEMU and pagecopyd cannot run any more.
    pub peer_fenced: bool,
}

/// The answer to `POST /v1/migrations/ID/resolve`. A refusal is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// What is done.
    pub done: String,
}

/// Every error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What happened, and whose fault it is.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
    /// Whose fault, for tools.
    pub fault: Fault,
}
