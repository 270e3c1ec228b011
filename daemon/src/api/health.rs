//! `/healthz` and `/readyz`: whether the daemon lives, and whether it can do what it is for.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Json;
use rustix::fs::StatVfsMountFlags;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{ApiError, Kind, Problems};
use crate::service::Service;

/// Bytes that must be free for journals: some migrations' worth.
const ROOM: u64 = 1 << 20;

/// The daemon is well.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct Health {
    /// What this daemon calls itself.
    pub name: String,
    /// Its version.
    pub version: String,
}

fn well(service: &Service) -> Json<Health> {
    Json(Health {
        name: service.config.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// The daemon answers.
#[utoipa::path(
    get, path = "/healthz", tag = "daemon", operation_id = "health",
    responses((status = 200, description = "It answers.", body = Health), Problems)
)]
pub(super) async fn healthz(State(service): State<Arc<Service>>) -> Json<Health> {
    well(&service)
}

/// The daemon takes migrations: it is not about to end, and its journals have room.
#[utoipa::path(
    get, path = "/readyz", tag = "daemon", operation_id = "readiness",
    responses((status = 200, description = "It takes migrations.", body = Health), Problems)
)]
pub(super) async fn readyz(State(service): State<Arc<Service>>) -> Result<Json<Health>, ApiError> {
    if service.migrations.feed().has_ended() {
        return Err(not_ready(
            "pagecopyd is ending".to_owned(),
            "wait until it is started again",
        ));
    }
    let folder = &service.config.state_dir;
    let problem = match rustix::fs::statvfs(folder) {
        Err(error) => Some(error.to_string()),
        Ok(disk) if disk.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            Some("it is read-only".to_owned())
        }
        Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM => {
            Some("its disk is full".to_owned())
        }
        Ok(_) => None,
    };
    match problem {
        None => Ok(well(&service)),
        Some(problem) => Err(not_ready(
            format!(
                "journals cannot be written to state-dir {}: {problem}",
                folder.display()
            ),
            "see to the disk under state-dir",
        )),
    }
}

fn not_ready(what: String, remedy: &str) -> ApiError {
    ApiError::new(Kind::NotReady, what, remedy)
}
