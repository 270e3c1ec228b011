//! `/v1/receivers`.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;

use super::ApiError;
use super::migrations::bad_json;
use super::types::ReceiverRequest;
use crate::service::Service;
use crate::store::Receiver;

pub(super) async fn add(
    State(service): State<Arc<Service>>,
    request: Result<Json<ReceiverRequest>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(request) = request.map_err(bad_json)?;
    service
        .receive(Receiver {
            vm: request.vm,
            qmp: request.qmp,
        })
        .await?;
    Ok(StatusCode::CREATED)
}

pub(super) async fn list(State(service): State<Arc<Service>>) -> Json<Vec<Receiver>> {
    Json(service.store.receivers.list())
}

pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    Path(vm): Path<String>,
) -> Result<StatusCode, ApiError> {
    if service.forget_receiver(&vm)? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(ApiError::not_found(
        format!("no QEMU waits here for {vm:?}"),
        "see `pagecopy list`",
    ))
}
