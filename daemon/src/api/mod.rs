//! The daemon's API: HTTP over a unix socket that only its owner may open.
//!
//! ```text
//! POST   /v1/migrations                begin one: MigrationRequest → {"id": …}
//! GET    /v1/migrations                all
//! GET    /v1/migrations/ID             one
//! GET    /v1/migrations/ID/events      server-sent events, the history first, up to "finished"
//! POST   /v1/migrations/ID/cancel
//! POST   /v1/migrations/ID/resolve     {"resume_here" | "run_here" | "abandon": true, "peer_fenced": …} → {"done": …};
//!                                      answered when the other host has been asked; 409 with the reason when refused
//! POST   /v1/receivers                 {"vm", "qmp"}: this QEMU waits for that guest
//! GET    /v1/receivers
//! DELETE /v1/receivers/VM
//! ```
//!
//! Errors are JSON: `{"error": what and whose fault, "remedy": what to do}`.

mod migrations;
mod receivers;
pub mod types;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{delete, get, post};
use tokio::net::UnixListener;

use crate::failure::{Failure, Fault, Shown, host, operator};
use crate::service::Service;
use types::ErrorBody;

/// The API of `service`.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route(
            "/v1/migrations",
            post(migrations::begin).get(migrations::list),
        )
        .route("/v1/migrations/{id}", get(migrations::show))
        .route("/v1/migrations/{id}/events", get(migrations::events))
        .route("/v1/migrations/{id}/cancel", post(migrations::cancel))
        .route(
            "/v1/migrations/{id}/start-postcopy",
            post(migrations::start_postcopy),
        )
        .route("/v1/migrations/{id}/recover", post(migrations::recover))
        .route("/v1/migrations/{id}/resolve", post(migrations::resolve))
        .route("/v1/receivers", post(receivers::add).get(receivers::list))
        .route("/v1/receivers/{vm}", delete(receivers::remove))
        .with_state(service)
}

/// Makes the socket, readable and writable for its owner only. One that nobody listens on any more is replaced.
///
/// # Errors
/// Somebody listens on it, it is no socket, or its directory cannot be written.
pub fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let cannot = |error: io::Error| {
        host(
            format!("the API socket {} cannot be made: {error}", path.display()),
            "choose another path for api",
        )
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(cannot)?;
    }
    if let Ok(metadata) = fs::symlink_metadata(path) {
        let dead = metadata.file_type().is_socket()
            && std::os::unix::net::UnixStream::connect(path).is_err();
        if !dead {
            return Err(operator(
                format!(
                    "the API socket {} is in use by another program, or is no socket",
                    path.display()
                ),
                "end the other daemon, or choose another path for api",
            ));
        }
        fs::remove_file(path).map_err(cannot)?;
    }
    // Nobody may connect in the moment before the mode is set: make it under a name of its own, then move it there.
    let hidden = path.with_extension(format!("{}.new", std::process::id()));
    let listener = UnixListener::bind(&hidden).map_err(cannot)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).map_err(cannot)?;
    fs::rename(&hidden, path).map_err(cannot)?;
    Ok(listener)
}

/// A failure as an HTTP answer.
pub(crate) struct ApiError(StatusCode, ErrorBody);

impl ApiError {
    fn not_found(what: String, remedy: &str) -> ApiError {
        ApiError(
            StatusCode::NOT_FOUND,
            ErrorBody {
                error: what,
                remedy: remedy.to_owned(),
                fault: Fault::Operator,
            },
        )
    }

    fn conflict(failure: &Failure) -> ApiError {
        ApiError(StatusCode::CONFLICT, body(failure))
    }
}

fn body(failure: &Failure) -> ErrorBody {
    let without_remedy = Failure {
        remedy: String::new(),
        ..failure.clone()
    };
    ErrorBody {
        error: Shown(&without_remedy).to_string(),
        remedy: failure.remedy.clone(),
        fault: failure.fault,
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let status = match failure.fault {
            Fault::Operator => StatusCode::BAD_REQUEST,
            Fault::ThisHost => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_GATEWAY,
        };
        ApiError(status, body(&failure))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}
