//! A post-copy that a daemon before this one has left: its guest runs here and lacks pages. Its page faults are taken over at
//! once, and fetching goes on when the source comes.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Setup, guest_lost};
use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{Postcopy, Record, Side, postcopy, standing_for, switched};
use pagecopy::engine::{Failure, MigrationId, Timeouts};
use pagecopy::wire::{AbortCode, Standing};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;
use transport::Regions;
use uuid::Uuid;

use super::arrive::Over;
use super::destination::{Parts, Session, TakenOver, has_ended};
use super::{Clock, blocking};
use crate::failure::Shown;
use crate::log;
use crate::migrations::{Finished, Migration, Request};
use crate::qmp::Qmp;
use crate::service::Service;

/// A source that has come is given over at once.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Takes up the migration of that journal. `None`: it is none of this kind, or cannot be taken up, which was told.
pub(crate) fn take_up(
    service: &Arc<Service>,
    id: MigrationId,
    records: &[Record],
) -> Option<Arc<Migration>> {
    let runs = standing_for(Some(records)) == Standing::Running;
    if !runs || postcopy(records) != Postcopy::Open {
        return None;
    }
    let Some(Record::Begun { vm, qmp, peer, .. }) = records.first() else {
        return None;
    };
    let uuid = Uuid::from_bytes(id.0);
    let (migration, mut requests) =
        Migration::new(id, vm, Side::Destination, peer, qmp.clone().into());
    if let Err(other) = service.migrations.add(&migration) {
        tracing::error!(id = %uuid, vm, %other, "two migrations of this guest are open: a person has to look");
        return None;
    }
    tracing::warn!(id = %uuid, vm, "a guest here lacks pages: its page faults are served again");
    let ended = has_ended(records);
    let (service, taken, records) = (
        Arc::clone(service),
        Arc::clone(&migration),
        records.to_owned(),
    );
    log::spawn_for(id, async move {
        let over = Over(Arc::clone(&taken));
        match prepare(&service, id, &taken, records).await {
            Ok((session, engine)) => {
                // There is no control channel: the source dials.
                let (_, events) = unbounded_channel();
                session.run(engine, events, &mut requests).await;
            }
            Err(failure) => {
                tracing::error!(id = %uuid, failure = %Shown(&failure), "the guest's page faults cannot be served");
                let failure = match ended {
                    true => guest_lost(&failure),
                    false => failure,
                };
                let figures = Figures::default();
                taken.finish(Finished::new(id, State::Failed, Some(&failure), figures));
                if ended {
                    record(&service, id, &failure);
                    service.received(&taken.shown().vm);
                    service.store.journals.forget_received(id);
                    tell_its_source(&failure, &mut requests).await;
                }
            }
        }
        drop(over);
    });
    Some(migration)
}

/// Records that the guest has ended, for its source and for daemons after this one. Where the disk refuses it they find it out again.
fn record(service: &Service, id: MigrationId, failure: &Failure) {
    let failure = Some(failure.clone());
    let journals = &service.store.journals;
    let recorded = journals
        .reopen(id, Side::Destination)
        .and_then(|mut journal| journal.append(&Record::Whole { failure }));
    if let Err(error) = recorded {
        tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&super::journal_failure(&error)), "the guest's end is not recorded");
    }
}

/// A guest that ended with its QEMU, while no daemon was there (with its host, say), needs nothing more of its source. It has come, or
/// comes again.
async fn tell_its_source(failure: &Failure, requests: &mut UnboundedReceiver<Request>) {
    if let Ok(Some(Request::Serve(caller))) = timeout(A_MOMENT, requests.recv()).await
        && let Some(visit) = caller.take()
    {
        visit.refuse(AbortCode::Qemu, failure.what.clone());
    }
}

/// The same, of a guest that is known to run since a moment ago.
pub(crate) fn take_up_again(service: &Arc<Service>, id: MigrationId) {
    if let Ok(Some(records)) = service.store.journals.read(id, Side::Destination) {
        take_up(service, id, &records);
    }
}

async fn prepare(
    service: &Arc<Service>,
    id: MigrationId,
    migration: &Arc<Migration>,
    records: Vec<Record>,
) -> Result<(Session, Destination), Failure> {
    let looking = Arc::clone(service);
    let taken_over = blocking(move || TakenOver::new(&looking, id, &records)).await?;
    let journals = &service.store.journals;
    let journal = journals
        .reopen(id, Side::Destination)
        .map_err(|error| super::journal_failure(&error))?;
    let clock = Clock::start();
    let engine = Destination::resume(
        setup(service, id, migration),
        taken_over.lacks(),
        clock.now(),
    )
    .switched(switched(journal.records()));
    let session = Session::start(Parts {
        id,
        service: Arc::clone(service),
        migration: Arc::clone(migration),
        clock,
        qmp: Arc::new(Qmp::connect_unheard(&migration.shown().qmp).await?),
        settings: journals.settings(id).unwrap_or_default(),
        journal,
        blocks: Vec::new(),
        pid: taken_over.pid(),
        control: None,
        data: Vec::new(),
        taken_over: Some(taken_over),
        regions: Regions::new(),
    })?;
    Ok((session, engine))
}

/// Of the set-up only the names and the time-outs matter now.
pub(crate) fn setup(service: &Service, id: MigrationId, migration: &Migration) -> Setup {
    Setup {
        id,
        host: service.config.name.clone(),
        vm: migration.shown().vm,
        blocks: Vec::new(),
        data_channels: 0,
        postcopy: Ok(()),
        timeouts: Timeouts::default(),
    }
}
