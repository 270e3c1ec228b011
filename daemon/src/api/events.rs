//! Server-sent events: of one migration, and of all.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::migrations::find;
use super::problem::{ApiError, Problems};
use crate::feed::{Entry, Feed, Heard};
use crate::migrations::{Migration, Told};
use crate::service::Service;

/// Events on their way to one reader.
const ON_THE_WAY: usize = 16;

type Sender = mpsc::Sender<Result<Event, Infallible>>;

/// The events of one migration.
#[utoipa::path(
    get, path = "/v1/migrations/{id}/events", tag = "migrations", operation_id = "follow_migration",
    params(("id" = Uuid, Path, description = "The migration's id.")),
    responses(
        (status = 200, description = "Server-sent events: what has happened, then what happens, up to `finished`.",
            body = Told, content_type = "text/event-stream"),
        Problems
    )
)]
pub(super) async fn of_one(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    let migration = find(&service, &id)?;
    let (sender, receiver) = mpsc::channel(ON_THE_WAY);
    tokio::spawn(follow(migration, sender));
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()))
}

/// Sends the history and then what happens, up to the `finished` event or until the reader leaves.
async fn follow(migration: Arc<Migration>, sender: Sender) {
    let (history, mut live) = migration.events();
    drop(migration);
    for event in history {
        if !send(&sender, &event).await || is_finished(&event) {
            return;
        }
    }
    loop {
        let event = tokio::select! {
            event = live.recv() => event,
            () = sender.closed() => return,
        };
        let event = match event {
            Ok(event) => event,
            // A reader that is far behind misses old progress, never the end.
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        if !send(&sender, &event).await || is_finished(&event) {
            return;
        }
    }
}

async fn send(sender: &Sender, event: &Value) -> bool {
    let event = Event::default().data(event.to_string());
    sender.send(Ok(event)).await.is_ok()
}

fn is_finished(event: &Value) -> bool {
    event.get("event").and_then(Value::as_str) == Some("finished")
}

/// The events of all migrations.
#[utoipa::path(
    get, path = "/v1/events", tag = "migrations", operation_id = "follow_all", extensions(("x-endless" = json!(true))),
    params(("Last-Event-ID" = Option<String>, Header, description = "The last event that was seen: what came since is sent first.")),
    responses(
        (status = 200, body = Heard, content_type = "text/event-stream", description = "Server-sent events of all migrations, \
            without end. The first is `{\"event\": \"open\", \"missed\": …}`; `missed` says that more has happened since the \
            last event that was seen than is kept. `{\"event\": \"missed\"}` says so later, to a reader that is too slow: look \
            at the list again. All but progress have an id."),
        Problems
    )
)]
pub(super) async fn of_all(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let after = headers
        .get("last-event-id")
        .map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned());
    let (sender, receiver) = mpsc::channel(ON_THE_WAY);
    tokio::spawn(follow_all(service, after, sender));
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default())
}

async fn follow_all(service: Arc<Service>, after: Option<String>, sender: Sender) {
    let feed = Arc::clone(service.migrations.feed());
    drop(service);
    let mut reader = feed.read(after.as_deref());
    let open = json!({ "event": "open", "missed": reader.missed });
    let mut first = Event::default().data(open.to_string());
    // Before what is sent again, its id would skip that.
    if reader.history.is_empty() {
        first = first.id(feed.name(reader.last));
    }
    if sender.send(Ok(first)).await.is_err() {
        return;
    }
    for entry in std::mem::take(&mut reader.history) {
        if sender.send(Ok(event(&feed, &entry))).await.is_err() {
            return;
        }
    }
    loop {
        let received = tokio::select! {
            received = reader.live.recv() => received,
            () = sender.closed() => return,
            () = feed.wait_end() => return,
        };
        let event = match received {
            Ok(entry) => event(&feed, &entry),
            Err(RecvError::Lagged(_)) => {
                Event::default().data(json!({ "event": "missed" }).to_string())
            }
            Err(RecvError::Closed) => return,
        };
        if sender.send(Ok(event)).await.is_err() {
            return;
        }
    }
}

fn event(feed: &Feed, entry: &Entry) -> Event {
    let event = Event::default().data(entry.value.to_string());
    match entry.number {
        Some(number) => event.id(feed.name(number)),
        None => event,
    }
}
