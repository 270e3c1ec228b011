//! Web hooks: who is named in the configuration is told over HTTP when a migration's state changes, when it has ended, and when
//! a guest writes about as fast as the link carries, or faster.
//!
//! Hooks read the feed (`feed.rs`) as any reader does and have a bounded queue each, so that nobody waits for one who does not
//! answer: what finds its queue full is lost, and the log says so.

mod outpaced;
mod send;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::config::Config;
use crate::config::hooks::About;
use crate::failure::Failure;
use crate::feed::{Entry, Feed};
use outpaced::Outpaced;
use send::Target;

/// Messages that wait for one hook.
const WAITING: usize = 256;
/// How long the last messages may take when the daemon ends.
const END: Duration = Duration::from_secs(2);

/// A message for a hook.
#[derive(Clone, Debug)]
struct Message {
    /// The same in each attempt.
    delivery: Uuid,
    about: About,
    body: Arc<str>,
}

/// The hooks of this daemon.
#[derive(Debug)]
pub(crate) struct Hooks {
    reader: JoinHandle<()>,
    stop: oneshot::Sender<()>,
    senders: Vec<JoinHandle<()>>,
}

/// One hook, as its messages are put into its queue.
struct Queue {
    url: String,
    events: Vec<About>,
    messages: mpsc::Sender<Message>,
    is_full: bool,
}

impl Hooks {
    /// Tells the hooks of `config` what `feed` tells from now on.
    ///
    /// # Errors
    /// A file that a hook names is wrong.
    pub(crate) fn start(config: &Config, feed: &Arc<Feed>) -> Result<Hooks, Failure> {
        let (mut queues, mut senders) = (Vec::new(), Vec::new());
        for hook in &config.hooks {
            let target = Target::new(hook)?;
            let (messages, waiting) = mpsc::channel(WAITING);
            senders.push(tokio::spawn(target.send_all(waiting)));
            queues.push(Queue {
                url: hook.url.text.clone(),
                events: hook.events.clone(),
                messages,
                is_full: false,
            });
        }
        let (stop, stopped) = oneshot::channel();
        let live = feed.read(None).live;
        let reader = tokio::spawn(read(live, stopped, queues, config.name.clone()));
        Ok(Hooks {
            reader,
            stop,
            senders,
        })
    }

    /// Everything has happened: what waits is told, within moments.
    pub(crate) async fn end(self) {
        // It reads what is left, and its queues close. A panic in it has been told already.
        drop(self.stop);
        let _ = self.reader.await;
        for sender in self.senders {
            let abort = sender.abort_handle();
            if tokio::time::timeout(END, sender).await.is_err() {
                abort.abort();
            }
        }
    }
}

/// Puts what concerns them into the hooks' queues.
async fn read(
    mut live: broadcast::Receiver<Arc<Entry>>,
    mut stopped: oneshot::Receiver<()>,
    mut queues: Vec<Queue>,
    host: String,
) {
    if queues.is_empty() {
        return;
    }
    let mut outpaced = Outpaced::default();
    loop {
        let received = tokio::select! {
            biased;
            received = live.recv() => received,
            _ = &mut stopped => return,
        };
        let entry = match received {
            Ok(entry) => entry,
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "hooks are not told some of what has happened");
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        for (about, value) in messages(&entry, &mut outpaced) {
            put(&mut queues, about, &host, value);
        }
    }
}

/// What hooks are told of an event.
fn messages(entry: &Entry, outpaced: &mut Outpaced) -> Vec<(About, Value)> {
    let event = &entry.value;
    match event["event"].as_str() {
        Some("state") => vec![(About::State, event.clone())],
        Some("finished") => {
            outpaced.ended(event);
            vec![(About::Finished, event.clone())]
        }
        Some("progress") => {
            let told = outpaced.progress(event);
            told.into_iter()
                .map(|told| (About::Outpaced, told))
                .collect()
        }
        _ => Vec::new(),
    }
}

fn put(queues: &mut [Queue], about: About, host: &str, mut value: Value) {
    value["host"] = json!(host);
    let message = Message {
        delivery: Uuid::new_v4(),
        about,
        body: value.to_string().into(),
    };
    for queue in queues
        .iter_mut()
        .filter(|queue| queue.events.contains(&about))
    {
        match queue.messages.try_send(message.clone()) {
            Ok(()) => queue.is_full = false,
            Err(TrySendError::Full(_)) if !queue.is_full => {
                queue.is_full = true;
                tracing::warn!(
                    url = queue.url,
                    "a hook does not keep up: it is not told all"
                );
            }
            Err(_) => {}
        }
    }
}
