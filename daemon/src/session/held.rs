//! A guest that is committed to this host and not known to run: it is kept here, shown as in doubt, until the matter is
//! decided.
//!
//! That is so after a restart between `Committed` and `Running`, and when QEMU would not start the guest. Everything that
//! may decide it comes here and is done one after the other: the source asks (the guest is run), the source says that its
//! operator has taken the guest back (`Aborted` is recorded), this host's operator decides. A source that says that what the
//! guest lacks is gone decides nothing, unless everything has come: then it has not taken the guest back, either, and the guest is
//! run. What each of them may do is [`pagecopy::engine::doubt`]'s.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::destination::{Destination, Input};
use pagecopy::engine::doubt::{
    Found, Resolution, Step, at_destination, memory_gone, when_withdrawn,
};
use pagecopy::engine::event::{Figures, Report, State};
use pagecopy::engine::journal::{Postcopy, Record, Side, postcopy, standing_for, switched};
use pagecopy::engine::{Failure, Fault, MigrationId};
use pagecopy::wire::Standing;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;
use transport::Regions;
use uuid::Uuid;

use super::arrive::{Over, Visit};
use super::destination::{Parts, Session, TakenOver, has_all};
use super::recover::let_go;
use super::{Clock, blocking, journal_failure, resume, spawned};
use crate::failure::{Shown, host, operator};
use crate::log;
use crate::migrations::{Decided, Finished, Migration, Request};
use crate::qemu::incoming::Incoming;
use crate::qemu::maps::incoming_with;
use crate::qemu::status::query_status;
use crate::qmp::Qmp;
use crate::service::Service;
use crate::store::JournalFile;

/// How long a guest that lacks pages may take to run.
const LACKING_LIMIT: Duration = Duration::from_secs(5);

/// Takes up a committed guest that no session serves, as its journal begins. `None`: there is another migration of that
/// guest here, or the journal does not begin.
pub(crate) fn take_up(
    service: &Arc<Service>,
    id: MigrationId,
    records: &[Record],
) -> Option<Arc<Migration>> {
    let Some(Record::Begun { vm, qmp, peer, .. }) = records.first() else {
        return None;
    };
    let (migration, mut requests) =
        Migration::new(id, vm, Side::Destination, peer, qmp.clone().into());
    if let Err(other) = service.migrations.add(&migration) {
        tracing::error!(id = %Uuid::from_bytes(id.0), vm, %other, "two migrations of this guest are open: a person has to look");
        return None;
    }
    if let Some(switch) = switched(records) {
        let mode = switch.way();
        migration.report(&Report::Switched { mode, switch });
    }
    show(
        id,
        &migration,
        "pagecopyd was started anew, and the guest may not have been run",
    );
    let (service, kept) = (Arc::clone(service), Arc::clone(&migration));
    log::spawn_for(id, async move {
        let over = Over(Arc::clone(&kept));
        hold(&service, id, &kept, &mut requests).await;
        drop(over);
        spawned::settle(&service, id).await;
        resume::take_up_again(&service, id);
    });
    Some(migration)
}

/// Keeps the guest of `id`, if it is committed and not known to run, until that is decided or the daemon ends.
pub(crate) async fn hold(
    service: &Arc<Service>,
    id: MigrationId,
    migration: &Arc<Migration>,
    requests: &mut UnboundedReceiver<Request>,
) {
    let held = Held {
        service: Arc::clone(service),
        id,
        migration: Arc::clone(migration),
        qmp: migration.shown().qmp,
    };
    if held.undecided() {
        // With post-copy QEMU may not be able to answer before the source serves.
        if !held.depends_on_its_source() {
            held.record_if_it_runs().await;
        }
        // A session may have ended as failed, and the disk kept what it had refused.
        if held.undecided() && migration.shown().state != State::InDoubt {
            show(
                id,
                migration,
                "it was given up, and the journal says otherwise",
            );
        }
    }
    while held.undecided() {
        match requests.recv().await {
            None | Some(Request::Shutdown) => return,
            Some(Request::Resolve(resolution, reply)) => {
                let decided = held.resolve(resolution).await;
                // Whoever asked may have left.
                let _ = reply.send(decided);
            }
            Some(Request::Withdrawn(reply)) => {
                let standing = held.withdrawn().await;
                // The source may have left.
                let _ = reply.send(standing);
            }
            Some(Request::Serve(caller)) => {
                if let Some(visit) = caller.take() {
                    held.run(Some(visit), requests).await;
                }
            }
            Some(
                Request::Poison(_, reply)
                | Request::StartPostcopy(reply)
                | Request::Recover(_, reply)
                | Request::Change(_, reply),
            ) => {
                // Whoever asked may have left.
                let _ = reply.send(Err(in_doubt()));
            }
            // It is too late to cancel, and there is no connection that channels could join.
            Some(Request::Cancel | Request::Disconnect | Request::Join(_)) => {}
            Some(Request::Lost(reason)) => held.source_lost(&reason, requests).await,
        }
    }
}

/// Shows what there is to decide.
fn show(id: MigrationId, migration: &Migration, why: &str) {
    let failure = host(
        format!("the guest is committed to this host and not known to run here: {why}"),
        "wait: it is run here by itself as soon as the source asks. If the source's QEMU and pagecopyd cannot run any more \
         (powered off, disk gone), run `pagecopy resolve ID --run-here --peer-fenced`; if the guest cannot run here, \
         `pagecopy resolve ID --abandon`, and the source takes it back",
    );
    show_failure(id, migration, &failure);
}

/// Says it once, however often it comes.
fn show_failure(id: MigrationId, migration: &Migration, failure: &Failure) {
    let shown = migration.shown().finished.and_then(|end| end.error);
    if shown.as_deref() != Some(&Shown(failure).to_string()) {
        finish(id, migration, State::InDoubt, Some(failure));
    }
}

fn finish(id: MigrationId, migration: &Migration, state: State, failure: Option<&Failure>) {
    let uuid = Uuid::from_bytes(id.0);
    match failure {
        Some(failure) => tracing::warn!(id = %uuid, ?state, failure = %Shown(failure), "migration"),
        None => tracing::info!(id = %uuid, ?state, "migration"),
    }
    migration.finish(Finished::new(id, state, failure, Figures::default()));
}

struct Held {
    service: Arc<Service>,
    id: MigrationId,
    migration: Arc<Migration>,
    qmp: PathBuf,
}

impl Held {
    fn standing(&self) -> Standing {
        match self.service.store.journals.read(self.id, Side::Destination) {
            Ok(records) => standing_for(records.as_deref()),
            Err(error) => {
                tracing::error!(id = %Uuid::from_bytes(self.id.0), %error, "the journal cannot be read");
                Standing::Unknown
            }
        }
    }

    fn undecided(&self) -> bool {
        self.standing() == Standing::Committed
    }

    /// The daemon before may have died between running the guest and saying so.
    async fn record_if_it_runs(&self) {
        let (found, qmp) = look(&self.qmp).await;
        if found == Found::Runs {
            // Without the record it is found to run the next time.
            if let Err(failure) = self.take(Step::RecordRunning, &found, qmp).await {
                tracing::error!(failure = %Shown(&failure), "that the guest runs could not be recorded");
            }
        }
    }

    async fn resolve(&self, resolution: Resolution) -> Decided {
        let (found, qmp) = look(&self.qmp).await;
        tracing::warn!(id = %Uuid::from_bytes(self.id.0), ?resolution, ?found, "the operator decides");
        if matches!(resolution, Resolution::Abandon { .. })
            && found == Found::StandsStill
            && self.depends_on_its_source()
        {
            return Err(operator(
                "refused: the source may have been told that the guest runs here, and then it would run nowhere",
                "wait: it is run as soon as the source comes; or end this host's QEMU, then decide again",
            ));
        }
        match at_destination(resolution, &found) {
            Ok(step) => {
                self.take(step, &found, qmp).await?;
                Ok(done(step, &found))
            }
            Err(refusal) => {
                if found == Found::Runs {
                    self.take(Step::RecordRunning, &found, qmp).await?;
                }
                Err(refusal)
            }
        }
    }

    async fn withdrawn(&self) -> Standing {
        let (found, qmp) = look(&self.qmp).await;
        tracing::warn!(id = %Uuid::from_bytes(self.id.0), ?found, "the source's operator has taken the guest back");
        if let Some(step) = when_withdrawn(&found)
            && let Err(failure) = self.take(step, &found, qmp).await
        {
            tracing::error!(failure = %Shown(&failure), "that the guest was taken back could not be recorded");
        }
        self.standing()
    }

    /// A source without the guest's memory cannot serve it, and may still have all of it in its QEMU: what lacks pages is not run
    /// without a person's word, and people must know. What lacks none is run, as when the source asks.
    async fn source_lost(&self, reason: &str, requests: &mut UnboundedReceiver<Request>) {
        if self.has_all() {
            tracing::warn!(id = %Uuid::from_bytes(self.id.0), reason, "the source has lost the guest's memory, all of which has come here");
            return self.run(None, requests).await;
        }
        let (found, qmp) = look(&self.qmp).await;
        tracing::error!(id = %Uuid::from_bytes(self.id.0), reason, ?found, "what the guest lacks is not at its source any more");
        if found != Found::Runs {
            return show_failure(self.id, &self.migration, &memory_gone(reason));
        }
        if let Err(failure) = self.take(Step::RecordRunning, &found, qmp).await {
            tracing::error!(failure = %Shown(&failure), "that the guest runs could not be recorded");
        }
    }

    /// QEMU's monitor, of a guest that can be run; or what the source is told.
    ///
    /// A guest that went first may have touched a page that lacks while QEMU held its big lock: then nobody can ask QEMU
    /// whether it runs before that page is here. It is run when the source serves.
    async fn monitor(&self, serves: bool, armed: bool) -> Result<Arc<Qmp>, Standing> {
        if armed {
            if !serves {
                return Err(Standing::Committed);
            }
            return Qmp::connect_unheard(&self.qmp)
                .await
                .map(Arc::new)
                .map_err(|failure| {
                    tracing::warn!(failure = %Shown(&failure), "the source serves, and the guest cannot be run");
                    Standing::Committed
                });
        }
        match look(&self.qmp).await {
            (Found::Runs | Found::StandsStill, Some(qmp)) => Ok(qmp),
            (found, _) => {
                tracing::warn!(id = %Uuid::from_bytes(self.id.0), ?found, "the source asks, and the guest cannot be run");
                Err(Standing::Committed)
            }
        }
    }

    async fn take(&self, step: Step, found: &Found, qmp: Option<Arc<Qmp>>) -> Result<(), Failure> {
        let journals = &self.service.store.journals;
        match step {
            Step::Run => {
                let qmp = qmp
                    .clone()
                    .ok_or_else(|| host("there is no QEMU", "report this"))?;
                match timeout(self.run_limit(), Incoming::new(qmp).run()).await {
                    Ok(ran) => ran?,
                    Err(_) => {
                        tracing::warn!(id = %Uuid::from_bytes(self.id.0), "the guest was told to run, and waits for memory that lacks");
                    }
                }
                // `Committed` is on disk, and a daemon that looks finds the guest running.
                if let Err(failure) = self.append(&Record::Running) {
                    tracing::error!(failure = %Shown(&failure), "that the guest runs could not be recorded");
                }
            }
            Step::RecordRunning => self.append(&Record::Running)?,
            Step::RecordAborted => {
                self.append(&Record::Aborted)?;
                if let Ok(Some(records)) = journals.read(self.id, Side::Destination) {
                    let_go(&self.service, self.id, &records);
                }
            }
        }
        // It lacks pages: whoever fetches them also ends this.
        if step != Step::RecordAborted && self.depends_on_its_source() {
            return Ok(());
        }
        if let (Some(qmp), Some(settings)) = (qmp, journals.settings(self.id)) {
            settings.restore(&qmp).await;
        }
        journals.forget_settings(self.id);
        if step == Step::RecordAborted {
            finish(
                self.id,
                &self.migration,
                State::Failed,
                Some(&given_back(found)),
            );
        } else {
            self.service.received(&self.migration.shown().vm);
            finish(self.id, &self.migration, State::Completed, None);
        }
        Ok(())
    }

    /// How long QEMU may take to say that the guest runs. One that lacks pages may wait for one of them before it can: it has been
    /// told to run, and what it waits for is for whoever fetches or poisons it.
    fn run_limit(&self) -> Duration {
        match self.depends_on_its_source() {
            true => LACKING_LIMIT,
            // QEMU's monitor has a limit of its own.
            false => Duration::MAX,
        }
    }

    fn depends_on_its_source(&self) -> bool {
        let records = self.service.store.journals.read(self.id, Side::Destination);
        records.is_ok_and(|records| {
            records.is_some_and(|records| postcopy(&records) == Postcopy::Open)
        })
    }

    fn has_all(&self) -> bool {
        let records = self.service.store.journals.read(self.id, Side::Destination);
        let records = records.ok().flatten();
        records.is_some_and(|records| has_all(&self.service, self.id, &records))
    }

    fn append(&self, record: &Record) -> Result<(), Failure> {
        let journals = &self.service.store.journals;
        let appended = journals
            .reopen(self.id, Side::Destination)
            .and_then(|mut journal| journal.append(record));
        appended.map_err(|error| journal_failure(&error))
    }

    /// A source that asks has not taken the guest back: it is run now, and the source is told on the connection on which
    /// it asked. One that has said that the memory is gone has been answered: there is no connection.
    async fn run(&self, visit: Option<Visit>, requests: &mut UnboundedReceiver<Request>) {
        let serves = visit.as_ref().is_none_or(Visit::serves);
        let (qmp, journal, taken_over) = match self.make_ready(serves).await {
            Ok(ready) => ready,
            Err(standing) => {
                if let Some(visit) = visit {
                    visit.answer_and_close(self.id, standing);
                }
                return;
            }
        };
        let journals = &self.service.store.journals;
        let (armed, there) = (taken_over.is_some(), visit.is_some());
        let switch = switched(journal.records());
        let setup = resume::setup(&self.service, self.id, &self.migration);
        let clock = Clock::start();
        let parts = |control, data, regions| Parts {
            id: self.id,
            service: Arc::clone(&self.service),
            migration: Arc::clone(&self.migration),
            clock,
            qmp,
            settings: journals.settings(self.id).unwrap_or_default(),
            journal,
            blocks: Vec::new(),
            pid: taken_over.as_ref().map_or(0, TakenOver::pid),
            control,
            data,
            taken_over,
            regions,
        };
        let (parts, events) = match visit.map(Visit::into_parts) {
            Some(visit) => {
                let parts = parts(Some(visit.control), visit.data, visit.regions);
                (parts, visit.events)
            }
            None => (
                parts(None, Vec::new(), Regions::new()),
                unbounded_channel().1,
            ),
        };
        match Session::start(parts) {
            Ok(session) => {
                let mut engine = Destination::recover(setup, armed, clock.now()).switched(switch);
                if !there {
                    engine.handle(clock.now(), Input::LinkLost(no_connection()));
                }
                session.run(engine, events, requests).await;
            }
            Err(failure) => {
                tracing::error!(failure = %Shown(&failure), "the guest could not be run")
            }
        }
    }

    /// What a session of a guest that can be run begins with; or what the source is told.
    async fn make_ready(
        &self,
        serves: bool,
    ) -> Result<(Arc<Qmp>, JournalFile, Option<TakenOver>), Standing> {
        let journals = &self.service.store.journals;
        let journal = journals
            .reopen(self.id, Side::Destination)
            .map_err(|error| {
                tracing::error!(failure = %Shown(&journal_failure(&error)), "the guest is not run");
                Standing::Committed
            })?;
        let records = journal.records().to_owned();
        let (looking, id) = (Arc::clone(&self.service), self.id);
        let taken_over = match postcopy(&records) {
            Postcopy::No => None,
            _ => {
                let taken_over = blocking(move || TakenOver::new(&looking, id, &records)).await;
                Some(taken_over.map_err(|failure| {
                    tracing::error!(failure = %Shown(&failure), "the guest's page faults cannot be served, so it is not run");
                    Standing::Committed
                })?)
            }
        };
        let qmp = self.monitor(serves, taken_over.is_some()).await?;
        Ok((qmp, journal, taken_over))
    }
}

fn no_connection() -> Failure {
    Failure::new(Fault::Network, "there is no connection", "")
}

fn in_doubt() -> Failure {
    operator(
        "refused: this migration is in doubt: whether the guest runs here is not known",
        "wait until the source asks, or decide by `pagecopy resolve`",
    )
}

/// Of a QEMU that has ended nobody knows whether it ran the guest before that was recorded, for a moment. The source does not run
/// it from there on, but from where it stopped.
const MAY_HAVE_WRITTEN: &str = "this host's QEMU is gone, and may have run the guest for a moment: the disks may have been written \
    since the guest stopped at the source, which does not know it. Where the guest goes on at the source, stop it and check its file \
    systems before anything else writes them; start it nowhere from a copy of its disks that is older";

fn done(step: Step, found: &Found) -> String {
    match step {
        Step::Run => "the guest runs here; the source lets go of it if it ever asks".to_owned(),
        Step::RecordRunning => "the guest runs here already".to_owned(),
        Step::RecordAborted => {
            let done = "the guest never will run here; the source takes it back when it asks";
            match found {
                Found::Gone => format!("{done}. Beware: {MAY_HAVE_WRITTEN}"),
                _ => done.to_owned(),
            }
        }
    }
}

/// What is shown from then on of a guest that never will run here.
fn given_back(found: &Found) -> Failure {
    let what = "it was decided that the guest never will run here: it belongs to the source";
    match found {
        Found::Gone => operator(what, format!("beware: {MAY_HAVE_WRITTEN}")),
        _ => operator(
            what,
            "end this host's QEMU if it is still there, and start another for the next attempt",
        ),
    }
}

/// Looks whether QEMU has the guest that was loaded into it, and whether it runs. Changes nothing.
async fn look(socket: &Path) -> (Found, Option<Arc<Qmp>>) {
    let qmp = match Qmp::connect(socket).await {
        Ok(qmp) => Arc::new(qmp),
        Err(failure) => return (gone_without(socket, None, &failure.what).await, None),
    };
    let found = match query_status(&qmp).await {
        Err(error) => Found::Unclear(error.to_string()),
        Ok(state) if state.running => Found::Runs,
        Ok(state) => match state.status.as_str() {
            "paused" => Found::StandsStill,
            // A QEMU without a guest: the one that had it is gone.
            "inmigrate" | "prelaunch" => {
                gone_without(socket, qmp.peer_pid(), "QEMU was started anew").await
            }
            // Stopped by an error, shut down, moved on: it has run here.
            _ => Found::Runs,
        },
    };
    (found, Some(qmp))
}

/// The QEMU that had the guest is not at its socket: gone, unless a process other than `known` is still there.
async fn gone_without(socket: &Path, known: Option<i32>, why: &str) -> Found {
    let (path, why) = (socket.to_owned(), why.to_owned());
    let others = blocking(move || {
        incoming_with(&path).map_err(|error| host(format!("/proc cannot be read: {error}"), ""))
    });
    match others.await {
        Err(failure) => Found::Unclear(failure.what),
        Ok(others) => match others.iter().find(|pid| Some(**pid) != known) {
            None => Found::Gone,
            Some(pid) => Found::Unclear(format!("{why}, and QEMU is still there as process {pid}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_lets_go_of_a_guest_whose_qemu_is_gone_is_told_of_its_disks() {
        for (found, warns) in [(Found::StandsStill, false), (Found::Gone, true)] {
            let texts = [done(Step::RecordAborted, &found), given_back(&found).remedy];
            for text in texts {
                assert_eq!(
                    text.contains("disks may have been written"),
                    warns,
                    "{text}"
                );
            }
        }
    }
}
