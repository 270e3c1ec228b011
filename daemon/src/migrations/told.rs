//! What is told of a migration: its events, and its end.

use std::time::{SystemTime, UNIX_EPOCH};

use pagecopy::engine::MigrationId;
use pagecopy::engine::event::{Figures, Report, State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::failure::{self, Failure, Fault};
use crate::preflight::outcome::Outcome;
use crate::pull::FaultReport;

/// How a migration ended: the last event, as the command line prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Finished {
    /// Always `finished`.
    pub event: String,
    /// The migration.
    pub id: Uuid,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// `completed`, `failed`, `cancelled` or `in-doubt`.
    pub status: State,
    /// How it moved: `precopy`, `hybrid` or `postcopy`.
    pub mode: String,
    /// What its pages began to move over: `tcp`, `tls`, `unix` or `rdma`; none before there was a connection.
    pub transport: Option<String>,
    /// What they moved over in the end: another where RDMA broke and was not taken again.
    #[serde(default)]
    pub transport_at_end: Option<String>,
    /// Bytes on all channels, both ways, headers and encryption included.
    pub bytes_on_wire: u64,
    /// Why, unless completed, in one line: what, whose fault, what to do.
    pub error: Option<String>,
    /// Whose fault it is, unless completed.
    pub fault: Option<Fault>,
    /// What to do about it, unless completed.
    pub remedy: Option<String>,
    /// At the destination of a post-copy: what its page faults cost, in detail.
    #[serde(flatten)]
    pub faults: Option<FaultReport>,
    /// At the source, of pre-copy: what was predicted of it, and what became of it. None where round 0 did not end.
    #[serde(default)]
    pub predicted: Option<Outcome>,
    /// The engine's figures.
    #[serde(flatten)]
    pub figures: Figures,
}

impl Finished {
    /// The end of migration `id`.
    pub fn new(
        id: MigrationId,
        status: State,
        failure: Option<&Failure>,
        figures: Figures,
    ) -> Finished {
        Finished {
            event: "finished".to_owned(),
            id: Uuid::from_bytes(id.0),
            at_ms: now_ms(),
            status,
            mode: figures.way().word().to_owned(),
            transport: None,
            transport_at_end: None,
            bytes_on_wire: 0,
            error: failure.map(|failure| failure::Shown(failure).to_string()),
            fault: failure.map(|failure| failure.fault),
            remedy: failure.map(|failure| failure.remedy.clone()),
            faults: None,
            predicted: None,
            figures,
        }
    }
}

/// One event of a migration, as it is sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Told {
    /// While it runs.
    Running {
        /// When, in milliseconds since 1970.
        at_ms: u64,
        /// What.
        #[serde(flatten)]
        report: Report,
    },
    /// Its end.
    Finished(Box<Finished>),
}

impl Told {
    /// Whether it is one of many that tell how far a migration is.
    pub(crate) fn is_progress(&self) -> bool {
        matches!(
            self,
            Told::Running {
                report: Report::Progress(_) | Report::Postcopy(_),
                ..
            }
        )
    }

    /// As JSON.
    pub(crate) fn value(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
