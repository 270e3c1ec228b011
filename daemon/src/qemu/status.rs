//! The state of QEMU's own migration and of its guest, by event where there is one and by query where one was missed.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, timeout_at};

use crate::failure::{Failure, qemu};
use crate::qmp::{Qmp, QmpError, QmpEvent};

/// QEMU's answer to `query-migrate`, as far as it is needed.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Migration {
    /// `none` is told by leaving it out.
    pub(crate) status: Option<String>,
    /// QEMU's words when it failed.
    pub(crate) error_desc: Option<String>,
    /// Why QEMU would refuse to migrate.
    #[serde(default)]
    pub(crate) blocked_reasons: Vec<String>,
}

/// QEMU's answer to `query-status`.
#[derive(Debug, Deserialize)]
pub(crate) struct RunState {
    /// Such as `running`, `paused`, `inmigrate`, `postmigrate`.
    pub(crate) status: String,
    /// Whether vCPUs run.
    pub(crate) running: bool,
}

pub(crate) async fn query_migrate(qmp: &Qmp) -> Result<Migration, QmpError> {
    qmp.query("query-migrate", json!({})).await
}

pub(crate) async fn query_status(qmp: &Qmp) -> Result<RunState, QmpError> {
    qmp.query("query-status", json!({})).await
}

/// The status of QEMU's own migration; `none` when there never was one.
pub(crate) async fn migration_status(qmp: &Qmp) -> Result<String, QmpError> {
    let status = query_migrate(qmp).await?.status;
    Ok(status.unwrap_or_else(|| "none".to_owned()))
}

/// Has QEMU run its guest, and checks that it does.
///
/// # Errors
/// QEMU refused or left, in its words; or `refused` with the state that it is in, and `remedy`.
pub(crate) async fn run_guest(qmp: &Qmp, refused: &str, remedy: &str) -> Result<(), Failure> {
    qmp.execute("cont", json!({})).await?;
    let state = query_status(qmp).await?;
    if state.running {
        return Ok(());
    }
    let status = state.status;
    Err(qemu(
        format!("{refused}: its state is \"{status}\""),
        remedy,
    ))
}

/// Whether QEMU's migration has ended in this status.
pub(crate) fn is_final(status: &str) -> bool {
    matches!(status, "completed" | "failed" | "cancelled" | "none")
}

/// Waits for QEMU's migration to come to a status that `wanted` takes, and returns it. `events` must have been
/// subscribed to before the order that leads there was given.
///
/// # Errors
/// QEMU left, or `limit` passed.
pub(crate) async fn wait_for(
    qmp: &Qmp,
    events: &mut Receiver<QmpEvent>,
    limit: Duration,
    wanted: impl Fn(&str) -> bool,
) -> Result<String, Failure> {
    let deadline = Instant::now() + limit;
    loop {
        let event = tokio::select! {
            biased;
            event = timeout_at(deadline, events.recv()) => event,
            () = qmp.gone() => return Err(QmpError::Gone.into()),
        };
        match event {
            Ok(Ok(event)) => {
                if let Some(status) = event.migration_status().filter(|status| wanted(status)) {
                    return Ok(status.to_owned());
                }
            }
            // Events were dropped because we were slow: ask once, then go on listening.
            Ok(Err(RecvError::Lagged(_))) => {
                let status = migration_status(qmp).await?;
                if wanted(&status) {
                    return Ok(status);
                }
            }
            Ok(Err(RecvError::Closed)) => return Err(QmpError::Gone.into()),
            Err(_) => {
                let status = migration_status(qmp).await?;
                return Err(qemu(
                    format!(
                        "QEMU's migration is still \"{status}\" after {} s",
                        limit.as_secs_f64()
                    ),
                    "see QEMU's log and whether one of its disks hangs, then try again",
                ));
            }
        }
    }
}

/// Why QEMU's migration failed, in its words.
pub(crate) async fn failure_words(qmp: &Qmp) -> String {
    match query_migrate(qmp).await {
        Ok(Migration {
            error_desc: Some(words),
            ..
        }) => words,
        Ok(_) => "QEMU gives no reason; its log may".to_owned(),
        Err(error) => error.to_string(),
    }
}
