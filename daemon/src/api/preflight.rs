//! `/v1/dirty-rate`: what is looked at before a guest moves.

use std::sync::Arc;

use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::Json;

use super::problem::{ApiError, Problems};
use crate::preflight::dirty_rate::{self, DirtyRate, DirtyRateRequest};
use crate::preflight::{self, Preflight, PreflightRequest};
use crate::service::Service;

/// Samples how fast a guest writes its memory; moves nothing.
#[utoipa::path(
    post, path = "/v1/dirty-rate", tag = "preflight", operation_id = "sample_dirty_rate", request_body = DirtyRateRequest,
    responses((status = 200, description = "How fast the guest writes its memory. Comes when the time is over.", body = DirtyRate), Problems)
)]
pub(super) async fn dirty_rate(
    State(service): State<Arc<Service>>,
    request: Result<Json<DirtyRateRequest>, JsonRejection>,
) -> Result<Json<DirtyRate>, ApiError> {
    let Json(request) = request?;
    Ok(Json(dirty_rate::sample(&service, request).await?))
}

/// Looks at all that a migration depends on, on both hosts; moves nothing.
#[utoipa::path(
    post, path = "/v1/preflight", tag = "preflight", operation_id = "preflight", request_body = PreflightRequest,
    responses((status = 200, description = "What a migration would find, also where it would fail. Comes after about a second.", body = Preflight),
        Problems)
)]
pub(super) async fn preflight(
    State(service): State<Arc<Service>>,
    request: Result<Json<PreflightRequest>, JsonRejection>,
) -> Result<Json<Preflight>, ApiError> {
    let Json(request) = request?;
    Ok(Json(preflight::run(&service, request).await?))
}
