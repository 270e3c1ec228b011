//! The daemon's API: HTTP over a unix socket that only its owner may open, or those who have a role (`access.rs`).
//!
//! Its paths, with what they take and give, are described at `/v1/openapi.json`, which is made of the handlers themselves
//! (`openapi.rs`): a route is added with `routes!`, and cannot be without its description. Every error is a [`Problem`].
//!
//! [`Problem`]: problem::Problem

pub mod access;
mod destinations;
mod events;
mod guard;
mod guests;
mod health;
mod journal;
pub mod metrics;
mod migrations;
mod openapi;
mod page;
mod peer;
mod preflight;
pub mod problem;
mod receivers;
pub mod types;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::{Extension, Router};
use tokio::net::UnixListener;
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::failure::{Failure, host, operator};
use crate::service::Service;
use peer::{Peer, TlsListener};

/// The longest request that is taken.
const MAX_REQUEST: usize = 64 << 10;

/// The API of `service`.
pub fn router(service: Arc<Service>) -> Router {
    let (routes, description) = routes().split_for_parts();
    let text = openapi::text(&description);
    let routes = routes
        .fallback(problem::no_such_route)
        .layer(Extension(text))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(Arc::clone(&service));
    // Around the whole of it: a layer of its own would not see what methods a path takes.
    Router::new()
        .fallback_service(routes)
        .layer(from_fn_with_state(Arc::clone(&service), access::check))
        .layer(from_fn(guard::refuse_foreign))
        .layer(from_fn(problem::every_error))
}

/// Every path, with its description.
fn routes() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::with_openapi(openapi::Description::openapi())
        .routes(routes!(migrations::begin, migrations::list))
        .routes(routes!(migrations::show, migrations::change))
        .routes(routes!(events::of_one))
        .routes(routes!(journal::read))
        .routes(routes!(migrations::cancel))
        .routes(routes!(migrations::start_postcopy))
        .routes(routes!(migrations::recover))
        .routes(routes!(migrations::resolve))
        .routes(routes!(receivers::add, receivers::list))
        .routes(routes!(receivers::remove))
        .routes(routes!(guests::look))
        .routes(routes!(destinations::list))
        .routes(routes!(preflight::dirty_rate))
        .routes(routes!(preflight::preflight))
        .routes(routes!(events::of_all))
        .routes(routes!(metrics::metrics))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(openapi::describe))
        .routes(routes!(page::page))
        .routes(routes!(access::caller))
}

/// Serves the API on the socket, and over TCP where there is a listener, until the sender of `end` is gone and what was asked
/// has been answered.
pub async fn serve(
    service: Arc<Service>,
    socket: UnixListener,
    remote: Option<std::net::TcpListener>,
    end: watch::Receiver<()>,
) -> io::Result<()> {
    let router = router(Arc::clone(&service)).into_make_service_with_connect_info::<Peer>();
    let ended = |mut end: watch::Receiver<()>| async move {
        // Nothing is ever sent.
        let _ = end.changed().await;
    };
    let local = axum::serve(socket, router.clone()).with_graceful_shutdown(ended(end.clone()));
    let Some(remote) = remote else {
        return local.await;
    };
    let remote = TlsListener::new(remote, service.security.clone())?;
    let remote = axum::serve(remote, router).with_graceful_shutdown(ended(end));
    tokio::try_join!(local.into_future(), remote.into_future())?;
    Ok(())
}

/// Makes the socket, readable and writable for its owner only, or for everybody where `roles` say who may do what. One that nobody listens on any more is replaced.
///
/// # Errors
/// Somebody listens on it, it is no socket, or its directory cannot be written.
pub fn listen(path: &Path, has_roles: bool) -> Result<UnixListener, Failure> {
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
    let mode = if has_roles { 0o666 } else { 0o600 };
    fs::set_permissions(&hidden, fs::Permissions::from_mode(mode)).map_err(cannot)?;
    fs::rename(&hidden, path).map_err(cannot)?;
    Ok(listener)
}
