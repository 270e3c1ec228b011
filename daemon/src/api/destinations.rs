//! `/v1/destinations`: where guests of this host may go, as its configuration says.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Json;

use super::problem::Problems;
use crate::service::Service;

/// Where guests of this host may go, as its configuration says.
#[utoipa::path(
    get, path = "/v1/destinations", tag = "preflight", operation_id = "list_destinations",
    responses((
        status = 200, body = Vec<String>,
        description = "Each HOST:PORT, in the order of the configuration. For clients that are to choose one of them; others may be named all the same.",
        example = json!(["host-b:7070", "host-c:7070"]),
    ), Problems)
)]
pub(super) async fn list(State(service): State<Arc<Service>>) -> Json<Vec<String>> {
    Json(service.in_force.now().destinations.clone())
}
