//! `/v1/migrations`.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::{HeaderMap, HeaderName, LOCATION};
use axum::response::{IntoResponse, Json};
use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::event::State as MigrationState;
use pagecopy::engine::journal::Side;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::problem::{ApiError, Kind, Problems};
use super::types::{
    Begun, ChangeRequest, MigrationRequest, RecoverRequest, ResolveRequest, Resolved,
};
use crate::dial::check_host_port;
use crate::failure::{Failure, operator};
use crate::migrations::{Decided, Migration, Request, Shown};
use crate::service::Service;
use crate::session::change;
use crate::store::Once;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// Bytes of a key.
const MAX_KEY: usize = 255;

/// Begins a migration, or has it wait for its turn.
#[utoipa::path(
    post, path = "/v1/migrations", tag = "migrations", operation_id = "begin_migration", request_body = MigrationRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "A word of the caller's for this request. Sent again with the \
        same, it begins nothing and is answered as before.")),
    responses((status = 201, description = "It has begun, or waits for its turn.", body = Begun,
        headers(("Location" = String, description = "Where it is shown."),
            ("Idempotent-Replayed" = Option<String>, description = "`true` where it had begun before, under this key."))), Problems)
)]
pub(super) async fn begin(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
    request: Result<Json<MigrationRequest>, JsonRejection>,
) -> Result<impl IntoResponse, ApiError> {
    let key = idempotency_key(&headers)?;
    let Json(request) = request?;
    let once = match key {
        None => Once::Begun(service.begin(request).await?),
        Some(key) => {
            let asked = serde_json::to_value(&request).unwrap_or_default();
            let begin = service.begin(request);
            service.store.keys.once(key, asked, begin).await?
        }
    };
    let (id, is_replayed) = match once {
        Once::Begun(id) => (id, false),
        Once::Again(id) => (id, true),
        Once::Another(id) => {
            return Err(ApiError::new(
                Kind::KeyReused,
                format!(
                    "the idempotency key is that of another request, which has begun migration {id}"
                ),
                "send each request with a key of its own, and the same request with the same key",
            ));
        }
    };
    let place = [(LOCATION, format!("/v1/migrations/{id}"))];
    let replayed = is_replayed.then_some([(REPLAYED, "true")]);
    Ok((StatusCode::CREATED, place, replayed, Json(Begun { id })))
}

/// The key that the caller has given its request.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else {
        return match headers.contains_key(IDEMPOTENCY_KEY) {
            true => Err(wrong_key("there are several")),
            false => Ok(None),
        };
    };
    let key = key.to_str().map_err(|_| wrong_key("it is no ASCII"))?;
    let is_word = key.bytes().all(|byte| byte.is_ascii_graphic());
    if key.is_empty() || key.len() > MAX_KEY || !is_word {
        return Err(wrong_key("it is empty, too long, or has blanks"));
    }
    Ok(Some(key))
}

fn wrong_key(why: &str) -> ApiError {
    ApiError::new(
        Kind::BadRequest,
        format!("the header Idempotency-Key is not understood: {why}"),
        format!("send one word of at most {MAX_KEY} ASCII characters, such as a UUID"),
    )
}

/// All migrations that this daemon knows.
#[utoipa::path(
    get, path = "/v1/migrations", tag = "migrations", operation_id = "list_migrations",
    responses((status = 200, description = "In the order in which they began.", body = Vec<Shown>), Problems)
)]
pub(super) async fn list(State(service): State<Arc<Service>>) -> Json<Vec<Shown>> {
    Json(service.all_shown())
}

/// One migration.
#[utoipa::path(
    get, path = "/v1/migrations/{id}", tag = "migrations", operation_id = "show_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")),
    responses((status = 200, description = "What is known of it now.", body = Shown), Problems)
)]
pub(super) async fn show(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Shown>, ApiError> {
    Ok(Json(service.shown(&*find(&service, &id)?)))
}

/// Changes the limits or the priority of a migration.
#[utoipa::path(
    patch, path = "/v1/migrations/{id}", tag = "migrations", operation_id = "change_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")), request_body = ChangeRequest,
    responses((status = 200, description = "It is so from now on.", body = Resolved), Problems)
)]
pub(super) async fn change(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    request: Result<Json<ChangeRequest>, JsonRejection>,
) -> Result<Json<Resolved>, ApiError> {
    let Json(request) = request?;
    change::check(&request)?;
    let migration = find(&service, &id)?;
    if migration.is_over() {
        return Err(ended(&id));
    }
    ask(&migration, |reply| Request::Change(request, reply)).await
}

/// Ends a migration; the guest stays where it is.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/cancel", tag = "migrations", operation_id = "cancel_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")),
    responses((status = 202, description = "It ends; the guest stays at the source."), Problems)
)]
pub(super) async fn cancel(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let migration = find(&service, &id)?;
    if migration.shown().state == MigrationState::InDoubt {
        return Err(ApiError::conflict(&operator(
            format!(
                "migration {id} is in doubt: the guest is committed to the destination and may run there, so it cannot be \
                 cancelled"
            ),
            "wait until the source has asked the destination, or decide with `pagecopy resolve`",
        )));
    }
    if migration.is_postcopy() {
        return Err(ApiError::conflict(&operator(
            format!(
                "the guest of migration {id} runs at the destination already, so it cannot be cancelled"
            ),
            "wait until it lacks nothing; see `pagecopy status`",
        )));
    }
    if migration.is_over() || !migration.request(Request::Cancel) {
        return Err(ended(&id));
    }
    Ok(StatusCode::ACCEPTED)
}

fn ended(id: &str) -> ApiError {
    ApiError::conflict(&operator(
        format!("migration {id} has ended already"),
        "see `pagecopy status` for how it ended",
    ))
}

/// Has the guest go before its memory now.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/start-postcopy", tag = "migrations", operation_id = "start_postcopy",
    params(("id" = Uuid, Path, description = "The migration's id.")),
    responses((status = 200, description = "The guest goes first.", body = Resolved), Problems)
)]
pub(super) async fn start_postcopy(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Resolved>, ApiError> {
    let migration = find(&service, &id)?;
    ask(&migration, Request::StartPostcopy).await
}

/// Dials the destination of a paused post-copy now.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/recover", tag = "migrations", operation_id = "recover_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")), request_body = RecoverRequest,
    responses((status = 200, description = "The destination is dialled.", body = Resolved), Problems)
)]
pub(super) async fn recover(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    request: Result<Json<RecoverRequest>, JsonRejection>,
) -> Result<Json<Resolved>, ApiError> {
    let Json(RecoverRequest { to }) = request?;
    if let Some(to) = to.as_ref().filter(|to| !to.starts_with("unix:")) {
        check_host_port(to)?;
    }
    let migration = find(&service, &id)?;
    ask(&migration, |reply| Request::Recover(to, reply)).await
}

/// Has the session look into what the operator wants, and waits for what becomes of it.
async fn ask(
    migration: &Migration,
    request: impl FnOnce(oneshot::Sender<Decided>) -> Request,
) -> Result<Json<Resolved>, ApiError> {
    let (reply, decided) = oneshot::channel();
    migration.request(request(reply));
    match decided.await {
        Ok(Ok(done)) => Ok(Json(Resolved { done })),
        Ok(Err(refusal)) => Err(ApiError::conflict(&refusal)),
        // The session has ended meanwhile.
        Err(_) => Err(ApiError::conflict(&nothing_to_decide(&migration.shown()))),
    }
}

/// Decides a migration that is in doubt or paused.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/resolve", tag = "migrations", operation_id = "resolve_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")), request_body = ResolveRequest,
    responses((status = 200, description = "The decision is taken.", body = Resolved), Problems)
)]
pub(super) async fn resolve(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    request: Result<Json<ResolveRequest>, JsonRejection>,
) -> Result<Json<Resolved>, ApiError> {
    let Json(request) = request?;
    let ResolveRequest {
        resume_here,
        run_here,
        abandon,
        poison,
        peer_fenced,
    } = request;
    let wish = match (resume_here, run_here, abandon, poison, peer_fenced) {
        (true, false, false, false, peer_fenced) => {
            Wish::Decide(Resolution::ResumeHere { peer_fenced })
        }
        (false, true, false, false, peer_fenced) => {
            Wish::Decide(Resolution::RunHere { peer_fenced })
        }
        (false, false, true, false, peer_fenced) => {
            Wish::Decide(Resolution::Abandon { peer_fenced })
        }
        (false, false, false, true, peer_fenced) => Wish::Poison { peer_fenced },
        _ => {
            return Err(operator(
                "say one of resume_here, run_here, abandon and poison, with peer_fenced if that is so",
                "see `pagecopy resolve --help`",
            )
            .into());
        }
    };
    let migration = undecided(&service, &id, &wish)?;
    match wish {
        Wish::Decide(resolution) => {
            ask(&migration, |reply| Request::Resolve(resolution, reply)).await
        }
        Wish::Poison { peer_fenced } => {
            ask(&migration, |reply| Request::Poison(peer_fenced, reply)).await
        }
    }
}

/// What an operator wants of a migration that does not go on by itself.
enum Wish {
    Decide(Resolution),
    Poison { peer_fenced: bool },
}

/// The migration of that id, at the side where the operator has something to decide.
fn undecided(service: &Service, id: &str, wish: &Wish) -> Result<Arc<Migration>, ApiError> {
    let known = find(service, id)?;
    let uuid = known.shown().id;
    let sides = match wish {
        Wish::Decide(_) => &[Side::Source, Side::Destination][..],
        Wish::Poison { .. } => &[Side::Destination][..],
    };
    let waits = |state| matches!(state, MigrationState::InDoubt | MigrationState::Paused);
    sides
        .iter()
        .filter_map(|side| service.migrations.side(uuid, *side))
        .find(|migration| waits(migration.shown().state))
        .ok_or_else(|| ApiError::conflict(&nothing_to_decide(&known.shown())))
}

/// Why there is nothing to decide, and what was.
fn nothing_to_decide(shown: &Shown) -> Failure {
    let end = shown.finished.as_ref().map(|finished| {
        let why = finished.error.as_ref();
        why.map_or_else(String::new, |why| format!(": {why}"))
    });
    let (id, state) = (shown.id, shown.state.word());
    match end {
        Some(why) => operator(
            format!("refused: migration {id} is not in doubt, it is {state}{why}"),
            "only a migration whose state is in-doubt or paused needs a decision, and takes one only",
        ),
        None => operator(
            format!("refused: migration {id} is not in doubt, it is {state}"),
            "wait for it",
        ),
    }
}

pub(super) fn find(service: &Service, id: &str) -> Result<Arc<Migration>, ApiError> {
    let id = Uuid::parse_str(id).map_err(|_| {
        operator(
            format!("{id:?} is not the id of a migration"),
            "see `pagecopy list` for the ids",
        )
    })?;
    service.migrations.get(id).ok_or_else(|| {
        ApiError::not_found(
            format!("there is no migration {id} here"),
            "see `pagecopy list`",
        )
    })
}
