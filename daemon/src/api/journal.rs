//! `/v1/migrations/ID/journal`: what has happened and what was decided, all at once. `events` follows what comes.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::Json;
use pagecopy::engine::MigrationId;
use pagecopy::engine::journal::{Record, Side};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::migrations::find;
use super::problem::{ApiError, Problems};
use crate::failure::host;
use crate::migrations::Told;
use crate::service::Service;

/// Which side, where this daemon is both.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Which {
    /// The side; where this daemon is both and it is left out, the source.
    side: Option<Side>,
}

/// What a migration has come to so far.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Journal {
    /// Its events without progress, the oldest first: rounds with what was decided from them, states, notices, the end.
    #[schema(value_type = Vec<Told>)]
    events: Vec<Value>,
    /// The names of the records in its journal on the disk, each synced before it was acted upon. None where there is no
    /// journal: nothing was begun, or it has ended long ago.
    #[schema(example = json!(["begun", "commit-intent", "guest-moved"]))]
    records: Vec<String>,
}

/// What has happened to a migration and what was decided.
#[utoipa::path(
    get, path = "/v1/migrations/{id}/journal", tag = "migrations", operation_id = "read_journal",
    params(("id" = Uuid, Path, description = "The migration's id."), Which),
    responses((status = 200, description = "What has happened and what was decided.", body = Journal), Problems)
)]
pub(super) async fn read(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Json<Journal>, ApiError> {
    let Query(Which { side }) = which?;
    let mut migration = find(&service, &id)?;
    if let Some(side) = side {
        let id = migration.shown().id;
        migration = service.migrations.side(id, side).ok_or_else(|| {
            ApiError::not_found(
                format!("this daemon is not the {} of migration {id}", side.word()),
                "leave side out",
            )
        })?;
    }
    let shown = migration.shown();
    let journals = service.store.journals.clone();
    let (id, side) = (MigrationId(*shown.id.as_bytes()), shown.side);
    let unreadable = |error: &dyn std::fmt::Display| {
        host(
            format!(
                "the journal of migration {} cannot be read: {error}",
                shown.id
            ),
            "see to the disk under state-dir",
        )
    };
    // A disk may take its time.
    let records = tokio::task::spawn_blocking(move || journals.read(id, side));
    let records = records.await.map_err(|error| unreadable(&error))?;
    let records = records.map_err(|error| unreadable(&error))?;
    Ok(Json(Journal {
        events: migration.events().0,
        records: records.unwrap_or_default().iter().map(name).collect(),
    }))
}

/// What a record is called, in the journal too.
fn name(record: &Record) -> String {
    let value = serde_json::to_value(record).unwrap_or(Value::Null);
    value["record"].as_str().unwrap_or_default().to_owned()
}
