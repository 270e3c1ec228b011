//! A source asks what became of a migration, comes to serve what the guest lacks, or says that its operator has taken the
//! guest back. It is answered from the journal; a session that still serves the migration is ended first, unless it has
//! committed. Only the peer that the migration came from is answered so.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::event::State;
use pagecopy::engine::journal::{
    Outcome, Postcopy, Record, Side, lost, outcome, postcopy, standing_for,
};
use pagecopy::engine::{Failure, MigrationId};
use pagecopy::wire::{AbortCode, Message, Standing};
use tokio::sync::oneshot;
use tokio::time::timeout;
use uuid::Uuid;

use super::arrive::{Caller, Visit};
use super::{held, resume};
use crate::failure::{Shown, host};
use crate::lane::{LaneEvent, Told};
use crate::limits::ASKING_PAUSE;
use crate::migrations::{Migration, Request};
use crate::names;
use crate::service::Service;

/// How long a session that was told to end may take to.
const END_LIMIT: Duration = Duration::from_secs(10);

impl Visit {
    /// Answers a source's questions, for as long as it asks.
    #[tracing::instrument(name = "migration", level = "error", skip_all, fields(id = %Uuid::from_bytes(first.id().0)))]
    pub(super) async fn answer(mut self, first: Asked) {
        let mut asked = Some(first);
        // The migration that it speaks for, of those that it has asked about.
        let mut own = None;
        loop {
            if let Some(asked) = asked.take() {
                let id = asked.id();
                if let Some(standing) = self.refuse_foreign(id, &asked) {
                    self.control.give(Message::Answer { id, standing });
                    continue;
                }
                own = Some(id);
                if let Asked::Lost(_, reason) = asked {
                    self.lost(id, reason);
                    continue;
                }
                if !matches!(asked, Asked::Serve(_)) {
                    end_uncommitted(&self.service, id).await;
                }
                let mut standing = standing(&self.service, id);
                tracing::info!(id = %Uuid::from_bytes(id.0), peer = self.peer.address, ?asked, ?standing, "a source asks");
                if let Asked::Serve(id) = asked {
                    if let Some(fetching) = fetching(&self.service, id) {
                        self.places.clear();
                        fetching.request(Request::Serve(Caller::new(id, self)));
                        return;
                    }
                    if let Some(end) = needs_nothing(&self.service, id) {
                        self.control.give(end);
                        continue;
                    }
                }
                if standing == Standing::Committed
                    && let Some(held) = held(&self.service, id)
                {
                    match asked {
                        Asked::Query(_) | Asked::Serve(_) => {
                            held.request(Request::Serve(Caller::new(id, self)));
                            return;
                        }
                        Asked::Withdrawn(_) => standing = withdraw(&held).await,
                        // Was answered above.
                        Asked::Lost(..) => {}
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
                    if let Some(id) = own {
                        close_journal(&self.service, id);
                    }
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

    /// What the guest here lacks is gone: people here must know.
    fn lost(&self, id: MigrationId, reason: String) {
        tracing::warn!(id = %Uuid::from_bytes(id.0), peer = self.peer.address, reason, "the source has lost the guest's memory");
        if let Some(end) = needs_nothing(&self.service, id) {
            return self.control.give(end);
        }
        let standing = standing(&self.service, id);
        let served = fetching(&self.service, id);
        let here = served.or_else(|| match standing {
            Standing::Committed => held(&self.service, id),
            _ => None,
        });
        if let Some(here) = here {
            here.request(Request::Lost(reason));
        }
        self.control.give(Message::Answer { id, standing });
    }

    /// What a peer is answered that does not speak for the migration, by its certificate: it must not end a session, nor run
    /// a guest, nor be fetched from. Nothing is known of who does while the journal cannot be read.
    pub(super) fn refuse_foreign(
        &self,
        id: MigrationId,
        asked: &dyn fmt::Debug,
    ) -> Option<Standing> {
        let journals = &self.service.store.journals;
        let records = match journals.read(id, Side::Destination) {
            Ok(records) => records.unwrap_or_default(),
            Err(error) => {
                let failure = unreadable(&error);
                tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "a source asks and cannot be told");
                return Some(Standing::Unknown);
            }
        };
        let names = names::recorded(&records);
        if names::includes(names, &self.peer) {
            return None;
        }
        tracing::warn!(
            id = %Uuid::from_bytes(id.0), ?asked, peer = self.peer.address, peer_names = ?self.peer.names, of = ?names,
            "a peer asks about a migration that is not its own: refused"
        );
        Some(Standing::Foreign)
    }
}

/// What a source came to say about a migration.
#[derive(Clone, Debug)]
pub(super) enum Asked {
    /// What became of it?
    Query(MigrationId),
    /// Its memory, of which the guest here lacks some, is served on this connection.
    Serve(MigrationId),
    /// Its operator has taken the guest back.
    Withdrawn(MigrationId),
    /// Its memory, of which the guest here lacks some, is gone.
    Lost(MigrationId, String),
}

impl Asked {
    fn id(&self) -> MigrationId {
        match self {
            Asked::Query(id) | Asked::Serve(id) | Asked::Withdrawn(id) | Asked::Lost(id, _) => *id,
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

/// What a source is told of a guest that went first and needs nothing more of it: that it is whole, or why it is not.
fn needs_nothing(service: &Service, id: MigrationId) -> Option<Message> {
    let records = service.store.journals.read(id, Side::Destination);
    let records = records.ok().flatten()?;
    if postcopy(&records) != Postcopy::Over {
        return None;
    }
    Some(match lost(&records) {
        None => Message::Whole { id, cost: None },
        Some(failure) => Message::Abort {
            code: AbortCode::Qemu,
            reason: format!("{}: {}", service.config.name, failure.what),
        },
    })
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

/// The session that serves the migration at this side, if one does.
pub(super) fn live(service: &Service, id: MigrationId) -> Option<Arc<Migration>> {
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
pub(super) fn standing(service: &Service, id: MigrationId) -> Standing {
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
        let failure = unreadable(&error);
        tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "a source asks and cannot be told");
        Standing::Unknown
    })
}

fn unreadable(error: &std::io::Error) -> Failure {
    host(
        format!("the journal cannot be read: {error}"),
        "see to the disk under state-dir",
    )
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
