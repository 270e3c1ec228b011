//! A peer has connected: its first message says what it wants.
//!
//! `Hello`: a guest wants to come. With anything else a source comes back to a migration that is known here (`answer.rs`).

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "steps")]
use pagecopy::engine::destination::Output;
use pagecopy::engine::destination::{Destination, Input, Setup};
use pagecopy::engine::journal::{Record, Side, standing_for};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Timeouts};
use pagecopy::wire::{AbortCode, Message, Secret, Standing, capability};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use transport::{Channel, Peer, Regions};
use uuid::Uuid;

use super::answer::{self, Asked};
use super::destination::{Parts, Session};
use super::{Clock, blocking, held, journal_failure, resume};
use crate::failure::Shown;
use crate::lane::control::Control;
use crate::lane::{Lane, LaneEvent, Told};
use crate::limits::{BEGIN_LIMIT, FIRST_MESSAGE};
use crate::listener;
use crate::migrations::Migration;
use crate::names;
use crate::preflight::memory::Reserved;
use crate::preflight::own;
use crate::qemu::discover;
use crate::qemu::settings::{Role, Settings};
use crate::qmp::Qmp;
use crate::quota::Share;
use crate::rdma::Waiting;
use crate::service::Service;
use crate::store::Receiver;
use crate::sys;

/// Said to a source that was answered and did not go on. It answered while it was asked, so it is not the network's fault.
pub(super) const NOT_BEGUN: &str = "the source asked, was answered, and did not begin within 30 s: its disk may be slow to take the \
    journal, or its QEMU to answer";

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
    pub(super) service: Arc<Service>,
    pub(super) control: Lane<Message>,
    pub(super) events: UnboundedReceiver<Told>,
    pub(super) peer: Peer,
    pub(super) places: Vec<Share>,
    /// The margin of free memory does not count.
    forced: bool,
    data: Vec<Box<dyn Channel>>,
    regions: Regions,
}

/// A source on its way to whoever serves its migration. Should nobody take it, because that has just ended, it is told what the
/// journal says all the same: a host that is there must not look like one that does not answer.
#[derive(Debug)]
pub(crate) struct Caller {
    id: MigrationId,
    visit: Option<Box<Visit>>,
}

impl Caller {
    pub(super) fn new(id: MigrationId, visit: Visit) -> Caller {
        let visit = Some(Box::new(visit));
        Caller { id, visit }
    }

    /// The visit, for whoever serves it now.
    pub(super) fn take(mut self) -> Option<Visit> {
        self.visit.take().map(|visit| *visit)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(visit) = self.visit.take() {
            // Only looked at: whoever served it may still be writing.
            let records = visit
                .service
                .store
                .journals
                .read(self.id, Side::Destination);
            let standing = records.map_or(Standing::Unknown, |it| standing_for(it.as_deref()));
            visit.answer_and_close(self.id, standing);
        }
    }
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
        forced: false,
        data: connection.data,
        regions: connection.regions,
    };
    let (mut first, mut silent) = (
        visit.word(FIRST_MESSAGE).await,
        "nothing was said after connecting",
    );
    if let Ok(Some(LaneEvent::Message(Message::RdmaOffer { channels, bytes }))) = first {
        if let Err(reason) = visit.over_rdma(channels, bytes).await {
            return visit.refuse(AbortCode::Host, reason);
        }
        first = visit.word(FIRST_MESSAGE).await;
    }
    if let Ok(Some(LaneEvent::Message(Message::Compare { vm, force }))) = first {
        visit.forced = force;
        let facts = own::compared(&visit.service, &vm).await.to_text();
        visit.control.give(Message::Findings { facts });
        (first, silent) = (visit.word(BEGIN_LIMIT).await, NOT_BEGUN);
    }
    match first {
        Ok(Some(LaneEvent::Message(Message::Query { id }))) => visit.answer(Asked::Query(id)).await,
        Ok(Some(LaneEvent::Message(Message::Withdrawn { id }))) => {
            visit.answer(Asked::Withdrawn(id)).await;
        }
        Ok(Some(LaneEvent::Message(hello @ Message::Hello { .. }))) => {
            visit.receive(hello, None).await;
        }
        Ok(Some(LaneEvent::Message(Message::Preflight { vm, host, ram }))) => {
            visit.be_looked_at(vm, host, ram).await;
        }
        Ok(Some(LaneEvent::Message(ask @ Message::Spawn { .. }))) => visit.spawn(ask).await,
        Ok(Some(LaneEvent::Message(Message::Serve { id }))) => visit.answer(Asked::Serve(id)).await,
        Ok(Some(LaneEvent::Message(Message::Join { id, first, key }))) => {
            visit.join(id, first, key);
        }
        Ok(Some(LaneEvent::Message(Message::Lost { id, reason }))) => {
            visit.answer(Asked::Lost(id, reason)).await;
        }
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
        Err(_) => visit.refuse(AbortCode::TimedOut, silent.to_owned()),
    }
}

impl Visit {
    /// What the peer says next.
    pub(super) async fn word(&mut self, limit: Duration) -> Result<Option<LaneEvent>, Elapsed> {
        let told = timeout(limit, self.events.recv()).await;
        told.map(|told| told.map(Told::take))
    }

    /// Has the data channels go over RDMA, if this host takes part; says so or why not.
    ///
    /// # Errors
    /// The connection is of no use any more.
    async fn over_rdma(&mut self, channels: u16, bytes: u64) -> Result<(), String> {
        if usize::from(channels) != self.data.len() || channels == 0 {
            let had = self.data.len();
            return Err(format!(
                "{channels} channels over RDMA, where there are {had}"
            ));
        }
        let config = self.service.in_force.now();
        let listening =
            tokio::task::spawn_blocking(move || Waiting::listen(&config.rdma, bytes, channels));
        let waiting = match listening.await.map_err(|error| error.to_string())? {
            Ok(waiting) => waiting,
            Err(why) => {
                tracing::info!(peer = self.peer.address, why, "no RDMA with this peer");
                self.control.give(Message::RdmaAnswer {
                    address: String::new(),
                    secret: Secret([0; 32]),
                    reason: format!("{}: {why}", self.service.config.name),
                });
                return Ok(());
            }
        };
        self.control.give(Message::RdmaAnswer {
            address: waiting.address(),
            secret: Secret(waiting.secret()),
            reason: String::new(),
        });
        let regions = self.regions.clone();
        let beside = std::mem::take(&mut self.data);
        let gathered = tokio::task::spawn_blocking(move || waiting.gather(&regions, beside));
        self.data = gathered.await.map_err(|error| error.to_string())??;
        Ok(())
    }

    /// Tells the peer why not, and closes.
    pub(super) fn refuse(self, code: AbortCode, reason: String) {
        tracing::warn!(peer = self.peer.address, ?code, reason, "refused");
        let reason = format!("{}: {reason}", self.service.config.name);
        self.control.give(Message::Abort { code, reason });
        self.control.close();
    }

    #[tracing::instrument(name = "migration", level = "error", skip_all, fields(id = comes(&hello)))]
    pub(super) async fn receive(mut self, hello: Message, spawned: Option<Receiver>) {
        let Message::Hello {
            id,
            vm,
            host: from,
            capabilities,
            ..
        } = &hello
        else {
            return;
        };
        let (id, vm, offered) = (*id, vm.clone(), *capabilities);
        let who = format!("{from} ({})", self.peer.address);
        let waits = spawned.or_else(|| self.service.store.receivers.get(&vm));
        let Some(receiver) = waits else {
            let reason = format!(
                "no QEMU waits here for {vm:?}; run: pagecopy receive --vm {vm} --qmp SOCKET (or migrate with --spawn)"
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
        let from = Origin {
            shown: &who,
            names: names::of(&service.in_force.now(), &self.peer),
            forced: self.forced,
        };
        let making_ready = async {
            let (qmp, settings, journal, guest, reserved) =
                prepare(&service, id, &receiver, &migration, from).await?;
            let postcopy = match offered & capability::POSTCOPY {
                0 => Ok(()),
                _ => service.userfaultfd.try_out(&qmp, guest.pid).await,
            };
            Ok::<_, Unready>((qmp, settings, journal, guest, reserved, postcopy))
        };
        // The disk may be slow, and the source must not take this host for one that is gone.
        let (ready, early) = self.answering_pings(making_ready).await;
        match ready {
            Ok((qmp, settings, journal, guest, reserved, postcopy)) => {
                let setup = Setup {
                    id,
                    postcopy,
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
                    Ok(mut session) => {
                        let mut engine = Destination::new(setup, clock.now());
                        engine.handle(clock.now(), Input::Message(hello));
                        if let Some(input) = early.and_then(|event| session.lane_input(event)) {
                            engine.handle(clock.now(), input);
                        }
                        session.run(engine, self.events, &mut requests).await;
                        // What it has taken of the memory is not free any more.
                        drop(reserved);
                        // All that the peer sent is let go of now, which may have been much.
                        let _ = tokio::task::spawn_blocking(sys::give_freed_memory_back).await;
                        held::hold(&service, id, &migration, &mut requests).await;
                    }
                    Err(failure) => {
                        tracing::error!(failure = %Shown(&failure), "the guest could not be received")
                    }
                }
            }
            Err(Unready { code, failure }) => {
                super::end_early(id, &migration, &failure);
                self.refuse(
                    code,
                    format!("{}; what to do: {}", failure.what, failure.remedy),
                );
            }
        }
        drop(over);
        resume::take_up_again(&service, id);
    }

    /// Answers the peer's pings for as long as the work takes. What else comes first meanwhile is for whoever goes on with the visit,
    /// and nothing is heard after it.
    async fn answering_pings<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> (T, Option<LaneEvent>) {
        let mut work = pin!(work);
        let mut early = None;
        loop {
            tokio::select! {
                biased;
                done = &mut work => return (done, early),
                told = self.events.recv(), if early.is_none() => match told.map(Told::take) {
                    Some(LaneEvent::Message(Message::Ping { nonce })) => {
                        self.control.give(Message::Pong { nonce });
                    }
                    Some(event) => early = Some(event),
                    // It has told all there was to tell: the work goes on without.
                    None => return (work.await, early),
                },
            }
        }
    }

    /// The last answer of a visit.
    pub(crate) fn answer_and_close(self, id: MigrationId, standing: Standing) {
        self.control.give(Message::Answer { id, standing });
        self.control.close();
    }

    /// Whose it is, for what is limited for each peer.
    pub(super) fn peer_key(&self) -> String {
        listener::key(&self.peer)
    }

    /// How many data channels it brings.
    pub(super) fn channels(&self) -> usize {
        self.data.len()
    }

    /// Whether it brings channels to fetch pages over.
    pub(crate) fn serves(&self) -> bool {
        !self.data.is_empty()
    }

    /// As the journal says it; the last answer of a visit.
    pub(crate) fn answer_from_journal(self, id: MigrationId) {
        let standing = answer::standing(&self.service, id);
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

/// The migration that a source greets for.
fn comes(hello: &Message) -> Option<String> {
    match hello {
        Message::Hello { id, .. } => Some(Uuid::from_bytes(id.0).to_string()),
        _ => None,
    }
}

/// Where a guest comes from.
struct Origin<'a> {
    /// For people.
    shown: &'a str,
    /// By which names it was let in.
    names: Vec<String>,
    /// The margin of free memory does not count.
    forced: bool,
}

/// Makes QEMU ready, and begins the journal.
async fn prepare(
    service: &Arc<Service>,
    id: MigrationId,
    receiver: &Receiver,
    migration: &Migration,
    from: Origin<'_>,
) -> Result<Prepared, Unready> {
    let qmp = Arc::new(Qmp::connect(&receiver.qmp).await?);
    let guest = discover::destination(&qmp).await?;
    let reserved =
        Reserved::take(service, &guest.blocks, from.forced).map_err(|failure| Unready {
            code: AbortCode::NoMemory,
            failure,
        })?;
    let begun = Record::Begun {
        id,
        side: Side::Destination,
        vm: receiver.vm.clone(),
        qmp: receiver.qmp.display().to_string(),
        peer: from.shown.to_owned(),
        names: from.names,
    };
    let settings = Settings::read(&qmp, Role::Destination).await?;
    #[cfg(feature = "steps")]
    crate::steps::reached(Side::Destination, &Output::Journal(begun.clone())).await;
    let (keeping, kept) = (Arc::clone(service), settings.clone());
    let begun = blocking(move || {
        let journals = &keeping.store.journals;
        let journal = journals
            .create(id, Side::Destination, &begun)
            .map_err(|error| journal_failure(&error))?;
        let kept = journals.keep_settings(id, &kept);
        Ok((journal, kept.map_err(|error| journal_failure(&error))))
    });
    let (mut journal, kept) = begun.await?;
    let journals = &service.store.journals;
    let changed = match kept {
        Ok(()) => settings.change(&qmp).await,
        Err(failure) => Err(failure),
    };
    if let Err(failure) = changed {
        settings.restore(&qmp).await;
        journals.forget_settings(id);
        // Without the record a restarted daemon writes it, and a source that asks hears the same.
        let _ = journal.append(&Record::Aborted);
        return Err(failure.into());
    }
    tracing::info!(
        id = %migration.shown().id, pid = guest.pid, qemu = %guest.version, blocks = guest.blocks.len(),
        "QEMU waits for the guest"
    );
    Ok((qmp, settings, journal, guest, reserved))
}

type Prepared = (
    Arc<Qmp>,
    Settings,
    crate::store::JournalFile,
    crate::qemu::Guest,
    Reserved,
);

/// Why a guest cannot come, and how its source is told.
struct Unready {
    code: AbortCode,
    failure: Failure,
}

impl From<Failure> for Unready {
    fn from(failure: Failure) -> Unready {
        let code = match failure.fault {
            Fault::Qemu => AbortCode::Qemu,
            _ => AbortCode::Host,
        };
        Unready { code, failure }
    }
}

/// Marks a migration as over when its session has ended, however it did.
pub(crate) struct Over(pub(crate) Arc<Migration>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over();
    }
}
