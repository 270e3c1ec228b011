//! `/v1/guests`: which guests there are on this host, and how they are.

use std::sync::Arc;

use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::Json;

use super::problem::{ApiError, Problems};
use crate::guests::{self, GuestFound, GuestsRequest};
use crate::service::Service;

/// Which guests there are on this host, and how they are.
#[utoipa::path(
    post, path = "/v1/guests", tag = "preflight", operation_id = "look_at_guests", request_body = GuestsRequest,
    responses((status = 200, description = "By their names.", body = Vec<GuestFound>), Problems)
)]
pub(super) async fn look(
    State(service): State<Arc<Service>>,
    request: Result<Json<GuestsRequest>, JsonRejection>,
) -> Result<Json<Vec<GuestFound>>, ApiError> {
    let Json(request) = request?;
    Ok(Json(guests::look(&service, request).await?))
}
