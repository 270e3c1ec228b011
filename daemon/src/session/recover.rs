//! After a restart: every migration that the journals leave open is taken up again.
//!
//! - Source without `CommitIntent`: the guest is resumed here if it stands still.
//! - Source with `CommitIntent` and no end: in doubt; the destination is asked.
//! - Destination without `Committed`: aborted, for good.
//! - Destination with `Committed` and no `Running`: if the guest runs, that is recorded; else it is in doubt, and run when
//!   the source asks and not before, because the source's operator may have taken the guest back meanwhile.
//! - Source whose operator has taken the guest back: the destination is told, until it has heard of it.

use std::path::Path;
use std::sync::Arc;

use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{
    Outcome, Record, Side, has_to_tell, is_settled, outcome, standing_for,
};
use pagecopy::engine::source::{Options, Setup, Source};
use pagecopy::engine::{MigrationId, Timeouts};
use pagecopy::wire::Standing;
use uuid::Uuid;

use super::arrive::Over;
use super::begin::{DOWNTIME_LIMIT, MAX_ROUNDS};
use super::source::{Parts, Session};
use super::{Clock, held, telling};
use crate::dial::Target;
use crate::failure::{Shown, host};
use crate::migrations::{Finished, Migration};
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
            Side::Source if is_overtaken(records, &read[at + 1..]) => {
                overtaken(service, *id, records)
            }
            Side::Source => source(service, *id, records),
            Side::Destination => destination(service, *id, records),
        }
    }
}

/// Whether an open journal of a guest that stays here was left behind by a disk that refused its end, and the guest may
/// have moved since, as a `later` journal of the same QEMU says: to resume it here would make two.
fn is_overtaken(records: &[Record], later: &[(MigrationId, Side, Vec<Record>)]) -> bool {
    let qemu = |records: &[Record]| match records.first() {
        Some(Record::Begun { qmp, .. }) => Some(qmp.clone()),
        _ => None,
    };
    !is_settled(records)
        && outcome(records) == Outcome::NotHere
        && later.iter().any(|(_, side, others)| {
            *side == Side::Source
                && qemu(others) == qemu(records)
                && outcome(others) != Outcome::NotHere
        })
}

fn overtaken(service: &Service, id: MigrationId, records: &[Record]) {
    tracing::warn!(id = %Uuid::from_bytes(id.0), "a later migration of this guest decides: nothing is done for this one");
    append(service, id, Side::Source, &Record::RolledBack);
    show_ended(service, id, records);
}

fn source(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    let found = outcome(records);
    let Some(Record::Begun { vm, qmp, peer, .. }) = records.first() else {
        return;
    };
    let target = Target {
        to: peer.clone(),
        security: service.security.clone(),
    };
    if is_settled(records) || found == Outcome::Here {
        show_ended(service, id, records);
        if has_to_tell(records) {
            tokio::spawn(telling::tell(Arc::clone(service), id, target));
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
    let clock = Clock::start();
    let parts = Parts {
        id,
        service: Arc::clone(service),
        migration: Arc::clone(&migration),
        clock,
        qmp: None,
        guest: None,
        settings: service.store.journals.settings(id).unwrap_or_default(),
        journal,
        target,
        memory: None,
        channels: Vec::new(),
    };
    let engine = Source::recover(setup(service, id, vm), found, clock.now());
    tokio::spawn(async move {
        let _over = Over(Arc::clone(&migration));
        match Session::start(parts) {
            Ok(session) => session.run(engine, requests).await,
            Err(failure) => tracing::error!(id = %uuid, failure = %Shown(&failure), "not taken up"),
        }
    });
}

/// Of the set-up only the names and the time-outs matter now.
fn setup(service: &Service, id: MigrationId, vm: &str) -> Setup {
    Setup {
        id,
        vm: vm.to_owned(),
        host: service.config.name.clone(),
        blocks: Vec::new(),
        direct_io: false,
        data_channels: 0,
        fixed_downtime: service.store.downtime.get(),
        options: Options {
            downtime_limit: DOWNTIME_LIMIT,
            bandwidth_limit: None,
            max_rounds: MAX_ROUNDS,
            timeout: None,
            verify: false,
            quit_source: false,
        },
        timeouts: Timeouts::default(),
    }
}

fn destination(service: &Arc<Service>, id: MigrationId, records: &[Record]) {
    let Some(Record::Begun { vm, qmp, .. }) = records.first() else {
        return;
    };
    let uuid = Uuid::from_bytes(id.0);
    match outcome(records) {
        Outcome::Open => {
            tracing::warn!(id = %uuid, vm, "a migration to here was cut off before its commit: aborted");
            append(service, id, Side::Destination, &Record::Aborted);
            show_ended(service, id, &[records, &[Record::Aborted]].concat());
            let (service, qmp) = (Arc::clone(service), qmp.clone());
            tokio::spawn(async move { put_settings_back(&service, id, qmp.as_ref()).await });
        }
        Outcome::Here if standing_for(Some(records)) == Standing::Committed => {
            held::take_up(service, id, records);
        }
        _ => show_ended(service, id, records),
    }
}

/// Makes a migration that has ended visible again, as far as its journal tells.
fn show_ended(service: &Service, id: MigrationId, records: &[Record]) {
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
    migration.over();
    if service.migrations.add(&migration).is_err() {
        return;
    }
    let (state, failure) = match outcome(records) {
        Outcome::Here => (State::Completed, None),
        _ => (
            State::Failed,
            Some(host(
                "it ended before pagecopyd was started anew",
                "see the log of that time",
            )),
        ),
    };
    migration.finish(Finished::new(
        id,
        state,
        failure.as_ref(),
        Figures::default(),
    ));
}

/// The waiting QEMU has not been touched otherwise.
async fn put_settings_back(service: &Service, id: MigrationId, qmp: &Path) {
    let Some(settings) = service.store.journals.settings(id) else {
        return;
    };
    if let Ok(qmp) = Qmp::connect(qmp).await {
        settings.restore(&qmp).await;
    }
    service.store.journals.forget_settings(id);
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
        let settled = journal(1, "/q", &[Record::RolledBack]).2;
        assert!(!is_overtaken(&settled, &[journal(2, "/q", &moved)]));
    }
}
