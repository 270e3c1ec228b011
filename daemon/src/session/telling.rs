//! Telling a destination that its operator's counterpart has taken the guest back.
//!
//! The operator gave the word that the destination is fenced. Should it come back all the same, it must not run the guest
//! when somebody there wants it: it is told, as soon as it can be reached and also by a later daemon, until it has answered
//! once. That costs a connection every 30 s at most, and nothing waits for it.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::event::{Figures, State};
use pagecopy::engine::journal::{Record, Side};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Timeouts};
use pagecopy::wire::{Message, Standing};
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::{sleep, timeout};
use transport::Channel;
use uuid::Uuid;

use crate::dial::{Target, Unreached, dial_control};
use crate::failure::{Shown, operator};
use crate::lane::control::Control;
use crate::lane::{Lane, LaneEvent, Told};
use crate::migrations::Finished;
use crate::service::Service;

/// Tells the destination of `id`, for as long as it takes.
pub(crate) async fn tell(service: Arc<Service>, id: MigrationId, target: Target) {
    let Timeouts {
        reconnect_first,
        reconnect_most,
        silence,
        ..
    } = Timeouts::default();
    let uuid = Uuid::from_bytes(id.0);
    let mut pause = reconnect_first;
    loop {
        match say(id, &target, silence).await {
            Ok(Standing::Running) => return contradicted(&service, id),
            Ok(standing @ (Standing::Aborted | Standing::NoJournal)) => {
                tracing::info!(id = %uuid, ?standing, "the destination knows that the guest was taken back");
                return record(&service, id);
            }
            Ok(standing) => {
                tracing::warn!(id = %uuid, ?standing, "the destination cannot record yet that the guest was taken back");
            }
            Err(failure) => tracing::debug!(id = %uuid, failure = %Shown(&failure), "not told yet"),
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(reconnect_most);
    }
}

/// Says so once.
async fn say(id: MigrationId, target: &Target, patience: Duration) -> Result<Standing, Failure> {
    match ask(Message::Withdrawn { id }, target, patience).await? {
        Message::Answer { id: of, standing } if of == id => Ok(standing),
        other => Err(unheard(&format!("it says {}", other.name()))),
    }
}

/// Says one thing at a destination, on a connection of its own; its answer.
pub(crate) async fn ask(
    question: Message,
    target: &Target,
    patience: Duration,
) -> Result<Message, Unreached> {
    ask_on(dial_control(target).await?, question, patience).await
}

/// The same, on the control channel of a connection that was made for it and is closed then.
pub(crate) async fn ask_on(
    channel: Box<dyn Channel>,
    question: Message,
    patience: Duration,
) -> Result<Message, Unreached> {
    let (sender, mut events) = unbounded_channel();
    let to_us = move |told: Told| {
        // Nobody waits for an answer any more.
        let _ = sender.send(told);
    };
    let control = Control::default();
    let lane = Lane::start("control", ChannelId(0), channel, control, (), to_us)
        .map_err(Unreached::met)?;
    lane.give(question);
    let answer = async {
        while let Some(told) = events.recv().await {
            match told.take() {
                LaneEvent::Message(
                    answer @ (Message::Answer { .. }
                    | Message::Whole { .. }
                    | Message::ChannelsTaken { .. }
                    | Message::Abort { .. }),
                ) => return Some(answer),
                LaneEvent::Lost(..) | LaneEvent::Misbehaved(_) => return None,
                _ => {}
            }
        }
        None
    };
    let answer = timeout(patience, answer).await.ok().flatten();
    lane.close();
    answer.ok_or_else(|| Unreached::met(unheard("it does not answer")))
}

fn unheard(why: &str) -> Failure {
    Failure::new(
        Fault::PeerHost,
        format!("the destination was not heard: {why}"),
        "",
    )
}

fn record(service: &Service, id: MigrationId) {
    let journals = &service.store.journals;
    let told = journals
        .reopen(id, Side::Source)
        .and_then(|mut journal| journal.append(&Record::Told));
    if let Err(error) = told {
        tracing::warn!(id = %Uuid::from_bytes(id.0), %error, "not recorded; the next daemon tells the destination again");
    }
}

/// The word was wrong. Nothing here may end a guest: that is for people, and they must know at once.
fn contradicted(service: &Service, id: MigrationId) {
    record(service, id);
    let failure = operator(
        "TWO GUESTS MAY RUN: the operator took the guest back with the word that the destination is fenced, and the \
         destination answers that the guest runs there",
        "stop one of the two at once, before both write to the same disks; keep the one whose disks' state counts",
    );
    tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "the operator's word was wrong");
    if let Some(migration) = service
        .migrations
        .side(Uuid::from_bytes(id.0), Side::Source)
    {
        let end = Finished::new(id, State::Failed, Some(&failure), Figures::default());
        migration.finish(end);
    }
}
