//! A peer has connected: its first message says what it wants.
//!
//! `Hello`: a guest wants to come. `Query`: a source that lost its connection asks what became of a migration; it is
//! answered from the journal, and a session that still serves the migration is ended first, unless it has committed.
//! `Withdrawn`: the source's operator has taken the guest back.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "steps")]
use pagecopy::engine::destination::Output;
use pagecopy::engine::destination::{Destination, Input, Setup};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::{Outcome, Postcopy, Record, Side, outcome, postcopy, standing_for};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Timeouts};
use pagecopy::wire::{AbortCode, Message, Standing};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::timeout;
use transport::{Channel, Peer, Regions};
use uuid::Uuid;

use super::destination::{Parts, Session, has_its_qemu};
use super::{Clock, held, journal_failure, resume};
use crate::failure::{Shown, host};
use crate::lane::control::Control;
use crate::lane::{Lane, LaneEvent, Told};
use crate::limits::{ASKING_PAUSE, FIRST_MESSAGE};
use crate::migrations::{Migration, Request};
use crate::qemu::discover;
use crate::qemu::settings::{Role, Settings};
use crate::qmp::Qmp;
use crate::quota::Share;
use crate::service::Service;
use crate::store::Receiver;
use crate::sys;

/// How long a session that was told to end may take to.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A connection whose channels are all there.
pub(crate) struct Connection {
    /// The control channel.
    pub(crate) control: Box<dyn Channel>,
    /// The data channels, in order.
    pub(crate) data: Vec<Box<dyn Channel>>,
    /// What the channels give access to.
    pub(crate) regions: Regions,
    /// Who connected.
    pub(crate) peer: Peer,
    /// Its share of the connections.
    pub(crate) share: Share,
    /// The shares of its channels, until it is in a migration.
    pub(crate) places: Vec<Share>,
}

/// A peer, as far as it is served before a session takes over.
pub(crate) struct Visit {
    service: Arc<Service>,
    control: Lane<Message>,
    events: UnboundedReceiver<Told>,
    peer: Peer,
    places: Vec<Share>,
    data: Vec<Box<dyn Channel>>,
    regions: Regions,
}

/// A connection that a session goes on with.
pub(crate) struct VisitParts {
    pub(crate) control: Lane<Message>,
    pub(crate) events: UnboundedReceiver<Told>,
    pub(crate) data: Vec<Box<dyn Channel>>,
    pub(crate) regions: Regions,
}

impl fmt::Debug for Visit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Visit")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// Serves a connection to its end.
pub(crate) async fn serve(service: Arc<Service>, connection: Connection) {
    let (sender, events) = unbounded_channel();
    let to_session = move |told| {
        // A visit that has ended needs no events.
        let _ = sender.send(told);
    };
    let control = match Lane::start(
        "control",
        ChannelId(0),
        connection.control,
        Control::default(),
        connection.share,
        to_session,
    ) {
        Ok(control) => control,
        Err(failure) => {
            return tracing::error!(failure = %Shown(&failure), "a peer could not be served");
        }
    };
    let mut visit = Visit {
        service,
        control,
        events,
        peer: connection.peer,
        places: connection.places,
        data: connection.data,
        regions: connection.regions,
    };
    let first = timeout(FIRST_MESSAGE, visit.events.recv()).await;
    match first.map(|told| told.map(Told::take)) {
        Ok(Some(LaneEvent::Message(Message::Query { id }))) => visit.answer(Asked::Query(id)).await,
        Ok(Some(LaneEvent::Message(Message::Withdrawn { id }))) => {
            visit.answer(Asked::Withdrawn(id)).await;
        }
        Ok(Some(LaneEvent::Message(hello @ Message::Hello { .. }))) => {
            visit.receive(hello).await;
        }
        Ok(Some(LaneEvent::Message(Message::Serve { id }))) => visit.answer(Asked::Serve(id)).await,
        Ok(Some(LaneEvent::Message(other))) => {
            visit.refuse(
                AbortCode::Protocol,
                format!("{} came first, where Hello or Query should", other.name()),
            );
        }
        Ok(Some(LaneEvent::Misbehaved(what))) => visit.refuse(AbortCode::Protocol, what),
        Ok(_) => tracing::info!(
            peer = visit.peer.address,
            "a peer connected and left without a word"
        ),
        Err(_) => visit.refuse(
            AbortCode::TimedOut,
            "nothing was said after connecting".to_owned(),
        ),
    }
}

impl Visit {
    /// Tells the peer why not, and closes.
    fn refuse(self, code: AbortCode, reason: String) {
        tracing::warn!(peer = self.peer.address, ?code, reason, "refused");
        let reason = format!("{}: {reason}", self.service.config.name);
        self.control.give(Message::Abort { code, reason });
        self.control.close();
    }

    async fn receive(mut self, hello: Message) {
        let Message::Hello {
            id, vm, host: from, ..
        } = &hello
        else {
            return;
        };
        let (id, vm) = (*id, vm.clone());
        let who = format!("{from} ({})", self.peer.address);
        let Some(receiver) = self.service.store.receivers.get(&vm) else {
            let reason = format!(
                "no QEMU waits here for {vm:?}; run: pagecopy receive --vm {vm} --qmp SOCKET"
            );
            return self.refuse(AbortCode::UnknownVm, reason);
        };
        // A Hello comes once. An id that is known is a replay, of a migration that may have been decided.
        let known = self.service.store.journals.read(id, Side::Destination);
        if !matches!(known, Ok(None)) {
            let reason = format!(
                "migration {} is known here already: it cannot begin once more",
                Uuid::from_bytes(id.0)
            );
            return self.refuse(AbortCode::Protocol, reason);
        }
        if let Err(refusal) = self.service.refuse_in_doubt(&vm, &receiver.qmp) {
            return self.refuse(AbortCode::Busy, refusal.what);
        }
        let (migration, mut requests) =
            Migration::new(id, &vm, Side::Destination, &who, receiver.qmp.clone());
        if let Err(running) = self.service.migrations.add(&migration) {
            let reason = format!("{vm:?} is already being migrated here (migration {running})");
            return self.refuse(AbortCode::Busy, reason);
        }
        // From here on it is in a migration, of which there is one for each QEMU that waits.
        self.places.clear();
        tracing::info!(id = %Uuid::from_bytes(id.0), vm, from = who, "a guest wants to come");
        let over = Over(Arc::clone(&migration));
        let service = Arc::clone(&self.service);
        match prepare(&self.service, id, &receiver, &migration, &who).await {
            Ok((qmp, settings, journal, guest)) => {
                let setup = Setup {
                    id,
                    postcopy: true,
                    host: self.service.config.name.clone(),
                    vm,
                    blocks: guest
                        .blocks
                        .iter()
                        .map(|block| block.spec.clone())
                        .collect(),
                    data_channels: u16::try_from(self.data.len()).unwrap_or(u16::MAX),
                    timeouts: Timeouts::default(),
                };
                let clock = Clock::start();
                let parts = Parts {
                    id,
                    service: self.service,
                    migration: Arc::clone(&migration),
                    clock,
                    qmp,
                    settings,
                    journal,
                    blocks: guest.blocks,
                    pid: guest.pid,
                    control: Some(self.control),
                    data: self.data,
                    taken_over: None,
                    regions: self.regions,
                };
                match Session::start(parts) {
                    Ok(session) => {
                        let mut engine = Destination::new(setup, clock.now());
                        engine.handle(clock.now(), Input::Message(hello));
                        session.run(engine, self.events, &mut requests).await;
                        // All that the peer sent is let go of now, which may have been much.
                        let _ = tokio::task::spawn_blocking(sys::give_freed_memory_back).await;
                        held::hold(&service, id, &migration, &mut requests).await;
                    }
                    Err(failure) => {
                        tracing::error!(failure = %Shown(&failure), "the guest could not be received")
                    }
                }
            }
            Err(failure) => {
                super::end_early(id, &migration, &failure);
                let code = if failure.fault == Fault::Qemu {
                    AbortCode::Qemu
                } else {
                    AbortCode::Host
                };
                self.refuse(
                    code,
                    format!("{}; what to do: {}", failure.what, failure.remedy),
                );
            }
        }
        drop(over);
        resume::take_up_again(&service, id);
    }

    /// Answers a source's questions, for as long as it asks.
    async fn answer(mut self, first: Asked) {
        let mut asked = Some(first);
        loop {
            if let Some(asked) = asked.take() {
                let id = asked.id();
                if !matches!(asked, Asked::Serve(_)) {
                    end_uncommitted(&self.service, id).await;
                }
                let mut standing = standing(&self.service, id);
                tracing::info!(id = %Uuid::from_bytes(id.0), peer = self.peer.address, ?asked, ?standing, "a source asks");
                // It is being started, or the disk has refused that it runs: with post-copy QEMU may not be able to say so
                // before the source serves what the guest lacks.
                if standing == Standing::Committed && is_starting_postcopy(&self.service, id) {
                    standing = Standing::Running;
                }
                if let Asked::Serve(id) = asked {
                    if let Some(fetching) = fetching(&self.service, id) {
                        // If it is over by now, the connection ends and the source comes again.
                        self.places.clear();
                        fetching.request(Request::Serve(Box::new(self)));
                        return;
                    }
                    if is_whole(&self.service, id) {
                        self.control.give(Message::Whole { id, cost: None });
                        continue;
                    }
                }
                if standing == Standing::Committed
                    && let Some(held) = held(&self.service, id)
                {
                    match asked {
                        // If it is over by now, the connection ends and the source asks again.
                        Asked::Query(_) | Asked::Serve(_) => {
                            held.request(Request::Serve(Box::new(self)));
                            return;
                        }
                        Asked::Withdrawn(_) => standing = withdraw(&held).await,
                    }
                }
                if standing == Standing::Running && matches!(asked, Asked::Withdrawn(_)) {
                    tracing::error!(id = %Uuid::from_bytes(id.0), "TWO GUESTS MAY RUN: the guest runs here, and the source's \
                        operator has taken it back: stop one of the two at once");
                }
                self.control.give(Message::Answer { id, standing });
            }
            let Ok(told) = timeout(ASKING_PAUSE, self.events.recv()).await else {
                let reason = "no question has come for too long".to_owned();
                return self.refuse(AbortCode::TimedOut, reason);
            };
            match told.map(Told::take) {
                Some(LaneEvent::Message(Message::Query { id })) => asked = Some(Asked::Query(id)),
                Some(LaneEvent::Message(Message::Withdrawn { id })) => {
                    asked = Some(Asked::Withdrawn(id));
                }
                Some(LaneEvent::Message(Message::Closed)) => {
                    close_journal(&self.service, first.id());
                    return self.control.close();
                }
                Some(LaneEvent::Message(Message::Ping { nonce })) => {
                    self.control.give(Message::Pong { nonce })
                }
                Some(LaneEvent::Message(_)) => {}
                Some(LaneEvent::Misbehaved(what)) => return self.refuse(AbortCode::Protocol, what),
                _ => return,
            }
        }
    }

    /// The last answer of a visit.
    pub(crate) fn answer_and_close(self, id: MigrationId, standing: Standing) {
        self.control.give(Message::Answer { id, standing });
        self.control.close();
    }

    /// Whether it brings channels to fetch pages over.
    pub(crate) fn serves(&self) -> bool {
        !self.data.is_empty()
    }

    /// As the journal says it; the last answer of a visit.
    pub(crate) fn answer_from_journal(self, id: MigrationId) {
        let standing = standing(&self.service, id);
        self.answer_and_close(id, standing);
    }

    /// The connection, for a session that goes on with it.
    pub(crate) fn into_parts(self) -> VisitParts {
        VisitParts {
            control: self.control,
            events: self.events,
            data: self.data,
            regions: self.regions,
        }
    }
}

/// Makes QEMU ready, and begins the journal.
async fn prepare(
    service: &Service,
    id: MigrationId,
    receiver: &Receiver,
    migration: &Migration,
    from: &str,
) -> Result<Prepared, Failure> {
    let qmp = Arc::new(Qmp::connect(&receiver.qmp).await?);
    let guest = discover::destination(&qmp).await?;
    let begun = Record::Begun {
        id,
        side: Side::Destination,
        vm: receiver.vm.clone(),
        qmp: receiver.qmp.display().to_string(),
        peer: from.to_owned(),
    };
    let settings = Settings::read(&qmp, Role::Destination).await?;
    let journals = &service.store.journals;
    #[cfg(feature = "steps")]
    crate::steps::reached(Side::Destination, &Output::Journal(begun.clone())).await;
    let mut journal = journals
        .create(id, Side::Destination, &begun)
        .map_err(|error| journal_failure(&error))?;
    let kept = journals.keep_settings(id, &settings);
    let changed = match kept.map_err(|error| journal_failure(&error)) {
        Ok(()) => settings.change(&qmp).await,
        Err(failure) => Err(failure),
    };
    if let Err(failure) = changed {
        settings.restore(&qmp).await;
        journals.forget_settings(id);
        // Without the record a restarted daemon writes it, and a source that asks hears the same.
        let _ = journal.append(&Record::Aborted);
        return Err(failure);
    }
    tracing::info!(
        id = %migration.shown().id, pid = guest.pid, qemu = %guest.version, blocks = guest.blocks.len(),
        "QEMU waits for the guest"
    );
    Ok((qmp, settings, journal, guest))
}

/// What a source came to say about a migration.
#[derive(Clone, Copy, Debug)]
enum Asked {
    /// What became of it?
    Query(MigrationId),
    /// Its memory, of which the guest here lacks some, is served on this connection.
    Serve(MigrationId),
    /// Its operator has taken the guest back.
    Withdrawn(MigrationId),
}

impl Asked {
    fn id(self) -> MigrationId {
        match self {
            Asked::Query(id) | Asked::Serve(id) | Asked::Withdrawn(id) => id,
        }
    }
}

/// The session that fetches the memory of a guest in post-copy; one is begun if a daemon before this one has left it.
fn fetching(service: &Arc<Service>, id: MigrationId) -> Option<Arc<Migration>> {
    match live(service, id) {
        Some(migration) => Some(migration).filter(|it| it.shown().state != State::InDoubt),
        None => {
            let records = service.store.journals.read(id, Side::Destination);
            resume::take_up(service, id, &records.ok().flatten()?)
        }
    }
}

/// Whether a session starts a guest that went first, and its QEMU is there.
fn is_starting_postcopy(service: &Service, id: MigrationId) -> bool {
    let records = service.store.journals.read(id, Side::Destination);
    let open = records.is_ok_and(|records| {
        records
            .is_some_and(|records| postcopy(&records) == Postcopy::Open && has_its_qemu(&records))
    });
    open && live(service, id).is_some_and(|it| it.shown().state != State::InDoubt)
}

/// Whether a guest that went first needs nothing more of its source.
fn is_whole(service: &Service, id: MigrationId) -> bool {
    let records = service.store.journals.read(id, Side::Destination);
    records.is_ok_and(|records| records.is_some_and(|records| postcopy(&records) == Postcopy::Over))
}

/// Who keeps the committed guest that no session serves; `None` while a session runs it.
fn held(service: &Arc<Service>, id: MigrationId) -> Option<Arc<Migration>> {
    match live(service, id) {
        Some(migration) => Some(migration).filter(|it| it.shown().state == State::InDoubt),
        None => {
            let records = service.store.journals.read(id, Side::Destination);
            held::take_up(service, id, &records.ok().flatten()?)
        }
    }
}

async fn withdraw(held: &Migration) -> Standing {
    let (reply, heard) = oneshot::channel();
    held.request(Request::Withdrawn(reply));
    // Without an answer it is being decided at this moment: the source says it again.
    heard.await.unwrap_or(Standing::Committed)
}

type Prepared = (
    Arc<Qmp>,
    Settings,
    crate::store::JournalFile,
    crate::qemu::Guest,
);

/// Marks a migration as over when its session has ended, however it did.
pub(crate) struct Over(pub(crate) Arc<Migration>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over();
    }
}

/// The session that serves the migration at this side, if one does.
fn live(service: &Service, id: MigrationId) -> Option<Arc<Migration>> {
    service
        .migrations
        .side(Uuid::from_bytes(id.0), Side::Destination)
        .filter(|migration| !migration.is_over())
}

/// A source that asks has lost its connection: a session that has not committed has nothing to wait for.
async fn end_uncommitted(service: &Service, id: MigrationId) {
    let Some(migration) = live(service, id) else {
        return;
    };
    // The engine takes this as a lost link: before the commit it gives up, after it nothing changes.
    migration.request(Request::Disconnect);
    let records = service
        .store
        .journals
        .read(id, Side::Destination)
        .ok()
        .flatten();
    let undecided = records.is_none_or(|records| outcome(&records) == Outcome::Open);
    if undecided && timeout(END_LIMIT, migration.wait_over()).await.is_err() {
        tracing::warn!(id = %Uuid::from_bytes(id.0), "the session that was asked about does not end");
    }
}

/// What the journal says. An open one that no session serves is aborted first, for good.
fn standing(service: &Service, id: MigrationId) -> Standing {
    let journals = &service.store.journals;
    let read = || {
        let records = journals.read(id, Side::Destination)?;
        let open = records
            .as_ref()
            .is_some_and(|records| outcome(records) == Outcome::Open);
        if open && live(service, id).is_none() {
            let mut journal = journals.reopen(id, Side::Destination)?;
            journal.append(&Record::Aborted)?;
            return Ok(standing_for(Some(journal.records())));
        }
        Ok(standing_for(records.as_deref()))
    };
    read().unwrap_or_else(|error: std::io::Error| {
        let failure = host(format!("the journal cannot be read: {error}"), "see to the disk under state-dir");
        tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "a source asks and cannot be told");
        Standing::Unknown
    })
}

fn close_journal(service: &Service, id: MigrationId) {
    let journals = &service.store.journals;
    let close = || {
        let mut journal = journals.reopen(id, Side::Destination)?;
        if outcome(journal.records()) == Outcome::Here {
            journal.append(&Record::Closed)?;
        }
        Ok::<(), std::io::Error>(())
    };
    if let Err(error) = close() {
        tracing::warn!(id = %Uuid::from_bytes(id.0), %error, "the journal could not be closed");
    }
}
