//! After a restart: every migration that the journals leave open is taken up again.
//!
//! - Source without `CommitIntent`, or rolled back but not to the end: the guest is resumed here if it stands still.
//! - Source with `CommitIntent` and no end: in doubt; the destination is asked.
//! - Destination without `Committed`: aborted, for good.
//! - Destination with `Committed` and no `Running`: if the guest runs, that is recorded; else it is in doubt, and run when
//!   the source asks and not before, because the source's operator may have taken the guest back meanwhile.
//! - Source whose operator has taken the guest back: the destination is told, until it has heard of it.

use std::sync::Arc;

use pagecopy::engine::encoding::policy::Compress;
use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{
    Outcome, Postcopy, Record, Side, has_to_tell, is_settled, lost, outcome, postcopy,
    standing_for, switched,
};
use pagecopy::engine::source::{Mode, Options, Setup, Source};
use pagecopy::engine::{Failure, MigrationId, Timeouts};
use pagecopy::host::pager::forsake;
use pagecopy::host::ram::MappedRam;
use pagecopy::host::{Placer, process};
use pagecopy::wire::Standing;
use transport::Regions;
use uuid::Uuid;

use super::arrive::Over;
use super::begin::{DOWNTIME_LIMIT, MAX_ROUNDS};
use super::destination::TakenOver;
use super::source::{Memory, Parts, Session};
use super::{Clock, blocking, held, resume, telling};
use crate::dial::Target;
use crate::failure::{Shown, host};
use crate::lane::source::Encoding;
use crate::log;
use crate::migrations::{Finished, Migration};
use crate::names;
use crate::pull::pager_failure;
use crate::qemu::discover;
use crate::qemu::settings::Settings;
use crate::qemu::status::query_status;
use crate::qmp::Qmp;
use crate::service::Service;

/// Looks through the journals and takes up what is open. Returns when all sessions have been started.
pub(crate) fn recover(service: &Arc<Service>) {
    let journals = match service.store.journals.list() {
        Ok(journals) => journals,
        Err(error) => {
            return tracing::error!(%error, "the journals cannot be listed: nothing is taken up");
        }
    };
    let mut read = Vec::new();
    for (id, side) in journals {
        match service.store.journals.read(id, side) {
            Ok(Some(records)) => read.push((id, side, records)),
            Ok(None) => {}
            Err(error) => {
                let id = Uuid::from_bytes(id.0);
                tracing::error!(%id, ?side, %error, "this journal decides nothing: a person has to look")
            }
        }
    }
    for (at, (id, side, records)) in read.iter().enumerate() {
        match side {
            Side::Source
                if needs_care(service, *id, records) && is_overtaken(records, &read[at + 1..]) =>
            {
                overtaken(service, *id, records)
            }
            Side::Source => source(service, *id, records),
            Side::Destination => destination(service, *id, records),
        }
    }
}

/// Whether there is still something to do for a source's guest. `RolledBack` may have been written before QEMU was told:
/// settings that are still kept say that the session did not come to its end.
fn needs_care(service: &Service, id: MigrationId, records: &[Record]) -> bool {
    !is_settled(records) || service.store.journals.settings(id).is_some()
}

/// Whether a journal of a guest that stays here was left behind without its end (a disk refused it, say), and the guest
/// may have moved since, as a `later` journal of the same QEMU says: to resume it here would make two.
fn is_overtaken(records: &[Record], later: &[(MigrationId, Side, Vec<Record>)]) -> bool {
    let qemu = |records: &[Record]| match records.first() {
        Some(Record::Begun { qmp, .. }) => Some(qmp.clone()),
        _ => None,
    };
    outcome(records) == Outcome::NotHere
        && later.iter().any(|(_, side, others)| {
            *side == Side::Source
                && qemu(others) == qemu(records)
                && outcome(others) != Outcome::NotHere
        })
}

fn overtaken(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    tracing::warn!(id = %Uuid::from_bytes(id.0), "a later migration of this guest decides: nothing is done for this one");
    if !is_settled(records) {
        append(service, id, Side::Source, &Record::RolledBack);
    }
    // QEMU's settings are the later one's.
    service.store.journals.forget_settings(id);
    end(service, id, records);
}

fn source(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    let found = outcome(records);
    let settings = service.store.journals.settings(id);
    let Some(Record::Begun { vm, qmp, peer, .. }) = records.first() else {
        return;
    };
    let target = Target {
        to: peer.clone(),
        security: service.security.clone(),
        // Whether the operator wanted it is not in the journal.
        rdma: None,
        names: names::recorded(records).to_owned(),
    };
    let cared_for = !needs_care(service, id, records);
    let depends = postcopy(records) == Postcopy::Open;
    if cared_for || (found == Outcome::Here && !depends) {
        end(service, id, records);
        if has_to_tell(records) {
            log::spawn_for(id, telling::tell(Arc::clone(service), id, target));
        }
        return;
    }
    let uuid = Uuid::from_bytes(id.0);
    tracing::warn!(id = %uuid, vm, outcome = ?found, "a migration from here was cut off by the end of the daemon");
    let (migration, requests) = Migration::new(id, vm, Side::Source, peer, qmp.into());
    if service.migrations.add(&migration).is_err() {
        return tracing::error!(id = %uuid, vm, "two journals of this guest are open: a person has to look");
    }
    let journal = match service.store.journals.reopen(id, Side::Source) {
        Ok(journal) => journal,
        Err(error) => return tracing::error!(id = %uuid, %error, "the journal cannot be written"),
    };
    // A guest that went first is lost without this memory: the session tells its destination, and tries again.
    let memory = match depends.then(|| served(records)).transpose() {
        Ok(memory) => memory,
        Err(failure) => {
            tracing::error!(id = %uuid, failure = %Shown(&failure), "the guest's memory cannot be served");
            None
        }
    };
    let clock = Clock::start();
    let parts = Parts {
        id,
        service: Arc::clone(service),
        migration: Arc::clone(&migration),
        clock,
        qmp: None,
        guest: None,
        settings: settings.unwrap_or_default(),
        journal,
        target,
        memory,
        encoding: Encoding::none(),
        share: service.budget.share(0, None),
        channels: Vec::new(),
    };
    let engine = Source::recover(
        setup(service, id, vm),
        found,
        postcopy(records),
        clock.now(),
    )
    .switched(switched(records));
    log::spawn_for(id, async move {
        let _over = Over(Arc::clone(&migration));
        match Session::start(parts) {
            Ok(session) => session.run(engine, requests).await,
            Err(failure) => tracing::error!(id = %uuid, failure = %Shown(&failure), "not taken up"),
        }
    });
}

/// The memory that a guest in post-copy depends on, from its files: QEMU may have ended.
pub(super) fn served(records: &[Record]) -> Result<Memory, Failure> {
    let found = records.iter().find_map(|record| match record {
        Record::Serving { blocks, ram, .. } => Some((blocks, ram)),
        _ => None,
    });
    let (blocks, ram) =
        found.ok_or_else(|| host("the journal names no RAM file", "report this"))?;
    let files = ram
        .iter()
        .map(|file| process::open_ram_file(file).map(Arc::new))
        .collect::<std::io::Result<Vec<_>>>();
    let mapped = files.and_then(|files| MappedRam::map(blocks.iter().cloned().zip(files), false));
    let mapped = mapped.map_err(|error| {
        host(
            format!("a guest that was moved depends on its memory here, which cannot be opened: {error}"),
            "bring the RAM file back: it is looked for again and again. If it is gone for good, run `pagecopy resolve ID --poison \
             --peer-fenced` at the destination, or `pagecopy resolve ID --abandon` here",
        )
    })?;
    Ok(Memory {
        ram: Arc::new(mapped.clone()),
        mapped,
        tracker: None,
        regions: Regions::new(),
        specs: blocks.clone().into(),
    })
}

/// Of the set-up only the names and the time-outs matter now.
fn setup(service: &Service, id: MigrationId, vm: &str) -> Setup {
    Setup {
        id,
        vm: vm.to_owned(),
        host: service.config.name.clone(),
        blocks: Vec::new(),
        ram: Vec::new(),
        direct_io: false,
        data_channels: 0,
        fixed_downtime: service.store.downtime.get(),
        options: Options {
            downtime_limit: DOWNTIME_LIMIT,
            bandwidth_limit: None,
            background_limit: None,
            compress: Compress::Off,
            max_rounds: MAX_ROUNDS,
            timeout: None,
            mode: Mode::Precopy,
            throttle: false,
            verify: false,
            quit_source: false,
            channels: None,
        },
        timeouts: Timeouts::default(),
    }
}

fn destination(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    let Some(Record::Begun { vm, .. }) = records.first() else {
        return;
    };
    let uuid = Uuid::from_bytes(id.0);
    match outcome(records) {
        Outcome::Open => {
            tracing::warn!(id = %uuid, vm, "a migration to here was cut off before its commit: aborted");
            append(service, id, Side::Destination, &Record::Aborted);
            let_go(service, id, records);
            end(service, id, &[records, &[Record::Aborted]].concat());
        }
        Outcome::Here if standing_for(Some(records)) == Standing::Committed => {
            held::take_up(service, id, records);
        }
        Outcome::Here if postcopy(records) == Postcopy::Open => {
            resume::take_up(service, id, records);
        }
        _ => {
            // A daemon that was killed at the very end may have left it.
            service.store.journals.forget_received(id);
            end(service, id, records);
        }
    }
}

/// Ends what the guest's page faults wait for: it never runs here, and QEMU may stand in one, so it is not asked.
pub(super) fn let_go(service: &Service, id: MigrationId, records: &[Record]) {
    if postcopy(records) != Postcopy::No {
        match TakenOver::new(service, id, records) {
            Ok(taken_over) => taken_over.release(),
            // Its QEMU has ended as well, most likely.
            Err(failure) => {
                tracing::warn!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "QEMU's page faults are not let go of");
            }
        }
    }
    service.store.journals.forget_received(id);
}

/// Makes a migration that has ended visible again, as far as its journal tells, and does in the background what its
/// session would have done in the end, had the daemon lived. Until that is done, no other of the guest may begin here.
fn end(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    let Some(Record::Begun {
        side,
        vm,
        qmp,
        peer,
        ..
    }) = records.first()
    else {
        return;
    };
    let (migration, _) = Migration::new(id, vm, *side, peer, qmp.into());
    // QEMU's settings that are still kept say that the session did not come to its end.
    let settings = service.store.journals.settings(id);
    if settings.is_none() {
        migration.over();
    }
    if service.migrations.add(&migration).is_err() {
        return;
    }
    let here = outcome(records) == Outcome::Here;
    let (state, failure) = match lost(records) {
        Some(failure) => (State::Failed, Some(failure.clone())),
        None if here => (State::Completed, None),
        None => {
            let failure = host(
                "it ended before pagecopyd was started anew",
                "see the log of that time",
            );
            (State::Failed, Some(failure))
        }
    };
    let mut figures = Figures::default();
    if let Some(switch) = switched(records) {
        figures.switched(switch);
    }
    migration.finish(Finished::new(id, state, failure.as_ref(), figures));
    if let Some(settings) = settings {
        let (service, side) = (Arc::clone(service), *side);
        log::spawn_for(id, async move {
            let over = Over(migration);
            tidy(&service, id, &over.0, side, here, settings).await;
        });
    }
}

async fn tidy(
    service: &Service,
    id: MigrationId,
    migration: &Migration,
    side: Side,
    here: bool,
    settings: Settings,
) {
    let shown = migration.shown();
    if let Ok(qmp) = Qmp::connect(&shown.qmp).await {
        settings.restore(&qmp).await;
        if side == Side::Destination && !here {
            clear(&qmp).await;
        }
    }
    let receivers = &service.store.receivers;
    let waited = receivers
        .get(&shown.vm)
        .is_some_and(|receiver| receiver.qmp == shown.qmp);
    if side == Side::Destination && here && waited {
        service.received(&shown.vm);
    }
    service.store.journals.forget_settings(id);
}

/// Clears the RAM of a QEMU that still waits, of what came of a guest that will not. One that was given all device state does
/// not wait any more; one whose load was cut short takes no other guest, and keeps no memory of this one until it is ended.
async fn clear(qmp: &Qmp) {
    // Killed before the journal had the numbers.
    let waits = query_status(qmp)
        .await
        .is_ok_and(|state| state.status == "inmigrate");
    if !waits {
        return;
    }
    if let Some(pid) = qmp.peer_pid() {
        let forsaken = blocking(move || forsake(pid).map_err(|error| pager_failure(&error)));
        if let Err(failure) = forsaken.await {
            tracing::warn!(failure = %Shown(&failure), "the waiting QEMU's page faults are not let go of");
        }
    }
    let Ok(guest) = discover::waiting(qmp).await else {
        return;
    };
    let cleared = blocking(move || {
        let ram = discover::map_ram(&guest.blocks, true)?;
        ram.clear().map_err(|error| host(error.to_string(), ""))
    });
    if let Err(failure) = cleared.await {
        tracing::warn!(failure = %Shown(&failure), "the waiting guest's RAM could not be cleared");
    }
}

fn append(service: &Service, id: MigrationId, side: Side, record: &Record) {
    let appended = service
        .store
        .journals
        .reopen(id, side)
        .and_then(|mut journal| journal.append(record));
    if let Err(error) = appended {
        tracing::error!(id = %Uuid::from_bytes(id.0), %error, "the journal cannot be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(n: u8, qmp: &str, records: &[Record]) -> (MigrationId, Side, Vec<Record>) {
        let (id, side) = (MigrationId([n; 16]), Side::Source);
        let begun = Record::Begun {
            id,
            side,
            vm: "web".into(),
            qmp: qmp.into(),
            peer: "b:1".into(),
            names: Vec::new(),
        };
        (id, side, [&[begun], records].concat())
    }

    #[test]
    fn an_old_open_journal_resumes_nothing_that_has_moved_since() {
        let open = journal(1, "/q", &[]).2;
        let moved = [Record::CommitIntent, Record::GuestMoved];
        assert!(!is_overtaken(&open, &[]));
        assert!(!is_overtaken(&open, &[journal(2, "/other", &moved)]));
        assert!(!is_overtaken(
            &open,
            &[journal(2, "/q", &[Record::RolledBack])]
        ));
        assert!(is_overtaken(&open, &[journal(2, "/q", &moved)]));
        assert!(is_overtaken(
            &open,
            &[journal(2, "/q", &[Record::CommitIntent])]
        ));
        // Rolled back, but perhaps not to the end.
        let settled = journal(1, "/q", &[Record::RolledBack]).2;
        assert!(is_overtaken(&settled, &[journal(2, "/q", &moved)]));
    }
}
