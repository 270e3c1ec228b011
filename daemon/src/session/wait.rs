//! Before a migration begins: it waits for its turn, which outlives the daemon.
//!
//! One that must wait is on the disk before its request is answered, and stays there until its journal has begun: from then on
//! the journal alone says what becomes of it. So a daemon that is started anew begins each of them once, under the id that was
//! told, and none twice.

use std::sync::Arc;

use pagecopy::engine::MigrationId;
use pagecopy::engine::event::{Report, State};
use pagecopy::engine::journal::Side;
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;

use super::{CANCELLED, begin, change, end_early, tell};
use crate::api::types::{ChangeRequest, MigrationRequest};
use crate::failure::{Failure, Shown, host, operator};
use crate::log;
use crate::migrations::{Decided, Migration, Request};
use crate::queue::Full;
use crate::queue::turns::Place;
use crate::service::Service;
use crate::store::Waiting;

/// Why a migration is not taken.
#[derive(Debug)]
pub enum Refused {
    /// As many wait as may.
    Full(Failure),
    /// Whatever else is wrong with the request, or here.
    Failed(Failure),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Refused {
        Refused::Failed(failure)
    }
}

impl From<Full> for Refused {
    fn from(Full { waiting }: Full) -> Refused {
        Refused::Full(operator(
            format!("the queue is full: {waiting} migrations wait, and no more may (max-pending)"),
            "ask again when some have begun, cancel some of those that wait, or raise max-pending or max-concurrent",
        ))
    }
}

/// Takes a migration that may have to wait. Its request is checked already.
///
/// # Errors
/// The queue is full, its guest is already on its way, or the disk refused.
pub(crate) fn enter(service: &Arc<Service>, request: MigrationRequest) -> Result<Uuid, Refused> {
    let uuid = Uuid::new_v4();
    let id = MigrationId(*uuid.as_bytes());
    let (migration, requests) = known(id, &request);
    if let Some(running) = service.migrations.running(&request.vm, Side::Source) {
        return Err(already(&request, running).into());
    }
    let place = service.queue.enter(uuid, request.priority)?;
    service
        .migrations
        .add(&migration)
        .map_err(|running| already(&request, running))?;
    tracing::info!(id = %uuid, vm = request.vm, to = request.to, "migration requested");
    if place.number().is_some() {
        let waiting = Waiting {
            id: uuid,
            request: request.clone(),
        };
        if let Err(error) = service.store.pending.insert(waiting) {
            let failure = not_kept(&error);
            end_early(id, &migration, &failure);
            migration.over();
            return Err(failure.into());
        }
    }
    start(service, id, migration, request, requests, place);
    Ok(uuid)
}

/// Takes up those that waited when the daemon ended.
pub(crate) fn take_up(service: &Arc<Service>) {
    for Waiting { id: uuid, request } in service.store.pending.list() {
        let id = MigrationId(*uuid.as_bytes());
        if !matches!(service.store.journals.read(id, Side::Source), Ok(None)) {
            // It had begun: what came of it is the journal's to say.
            forget(service, id);
            continue;
        }
        let place = service.queue.enter_again(uuid, request.priority);
        let (migration, requests) = known(id, &request);
        match service.migrations.add(&migration) {
            Ok(()) => {
                tracing::info!(id = %uuid, vm = request.vm, to = request.to, "a migration that waits is taken up again");
                start(service, id, migration, request, requests, place);
            }
            Err(running) => {
                // Both may be known at a time once this one has ended.
                migration.over();
                let _ = service.migrations.add(&migration);
                end_early(id, &migration, &already(&request, running));
                forget(service, id);
            }
        }
    }
    service.queue.call();
}

fn known(
    id: MigrationId,
    request: &MigrationRequest,
) -> (Arc<Migration>, UnboundedReceiver<Request>) {
    let made = Migration::new(
        id,
        &request.vm,
        Side::Source,
        &request.to,
        request.qmp.clone(),
    );
    made.0.set_priority(request.priority);
    made
}

fn start(
    service: &Arc<Service>,
    id: MigrationId,
    migration: Arc<Migration>,
    request: MigrationRequest,
    requests: UnboundedReceiver<Request>,
    place: Place,
) {
    let task = begin::migrate(Arc::clone(service), id, migration, request, requests, place);
    log::spawn_for(id, task);
}

/// Waits for the turn of `migration`; says whether it has come. Otherwise it was cancelled, or the daemon ends.
pub(super) async fn turn(
    service: &Service,
    id: MigrationId,
    migration: &Migration,
    request: &mut MigrationRequest,
    requests: &mut UnboundedReceiver<Request>,
    place: Place,
) -> bool {
    if let Some(number) = place.number() {
        let state = State::Pending;
        tell(migration, &Report::State { state });
        let text = format!("waits for its turn: number {number} of those that wait");
        tell(migration, &Report::Notice { text });
    }
    let asked = loop {
        let asked = tokio::select! {
            biased;
            () = place.turn() => break None,
            asked = begin::asked(requests) => asked,
        };
        match asked {
            Request::Change(change, reply) => {
                let decided = change_one(service, migration, request, &place, &change);
                // Whoever asked may have left.
                let _ = reply.send(decided);
            }
            ends => break Some(ends),
        }
    };
    match asked {
        None => migration.hold(place),
        Some(Request::Cancel) => {
            forget(service, id);
            let failure = operator(CANCELLED, "nothing: the guest runs on here");
            end_early(id, migration, &failure);
            return false;
        }
        // It stays on the disk.
        Some(_) => return false,
    }
    // What was so when it was asked for may not be so any more.
    if let Err(failure) = service.refuse_unsound(&request.vm, &request.qmp) {
        forget(service, id);
        end_early(id, migration, &failure);
        return false;
    }
    true
}

/// Changes one that waits: on the disk first.
fn change_one(
    service: &Service,
    migration: &Migration,
    request: &mut MigrationRequest,
    place: &Place,
    change: &ChangeRequest,
) -> Decided {
    let waiting = Waiting {
        id: migration.shown().id,
        request: change::changed(request, change),
    };
    let kept = service.store.pending.insert(waiting.clone());
    kept.map_err(|error| not_kept(&error))?;
    *request = waiting.request;
    place.prioritise(request.priority);
    migration.set_priority(request.priority);
    tracing::info!(id = %waiting.id, ?change, "a migration that waits is changed");
    let now = place.number();
    Ok(now.map_or_else(
        || "it begins as asked".to_owned(),
        |number| format!("it waits, number {number} of those that do, and will begin as asked"),
    ))
}

/// It waits no more: its journal has begun, or it has ended.
pub(super) fn forget(service: &Service, id: MigrationId) {
    let uuid = Uuid::from_bytes(id.0);
    if let Err(error) = service.store.pending.remove(uuid) {
        tracing::error!(id = %uuid, failure = %Shown(&not_kept(&error)), "a migration that waits no more is still in the queue's file");
    }
}

fn already(request: &MigrationRequest, running: Uuid) -> Failure {
    operator(
        format!(
            "{:?} is already being migrated from here (migration {running})",
            request.vm
        ),
        "wait for it, or cancel it with `pagecopy cancel`",
    )
}

fn not_kept(error: &std::io::Error) -> Failure {
    host(
        format!("the queue could not be written: {error}"),
        "see to the disk under state-dir",
    )
}
