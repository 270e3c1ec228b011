//! `/v1/receivers`.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;

use super::problem::{ApiError, Problems};
use super::types::ReceiverRequest;
use crate::service::Service;
use crate::store::Receiver;

/// Makes a QEMU that waits the destination for a guest.
#[utoipa::path(
    post, path = "/v1/receivers", tag = "receivers", operation_id = "add_receiver", request_body = ReceiverRequest,
    responses((status = 201, description = "Its QEMU waits for the guest."), Problems)
)]
pub(super) async fn add(
    State(service): State<Arc<Service>>,
    request: Result<Json<ReceiverRequest>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(request) = request?;
    service
        .receive(Receiver {
            vm: request.vm,
            qmp: request.qmp,
        })
        .await?;
    Ok(StatusCode::CREATED)
}

/// The QEMUs that wait for guests.
#[utoipa::path(
    get, path = "/v1/receivers", tag = "receivers", operation_id = "list_receivers",
    responses((status = 200, description = "By the name of the guest.", body = Vec<Receiver>), Problems)
)]
pub(super) async fn list(State(service): State<Arc<Service>>) -> Json<Vec<Receiver>> {
    Json(service.store.receivers.list())
}

/// Has no QEMU wait for a guest any more.
#[utoipa::path(
    delete, path = "/v1/receivers/{vm}", tag = "receivers", operation_id = "remove_receiver",
    params(("vm" = String, Path, description = "The guest's name.")),
    responses((status = 204, description = "No QEMU waits for it any more."), Problems)
)]
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
