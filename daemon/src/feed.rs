//! What happens to all migrations, in one place: for those who watch the host and not a guest.
//!
//! The latest events are kept, so that a reader who was cut off goes on where it was; progress is not, there is more to
//! come. A reader who is slow misses events and is told so: nobody waits for a reader.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::migrations::{Shown, Told};

/// Events that are kept for readers who come back.
const KEPT: usize = 1024;
/// Events that a reader may be behind.
const BACKLOG: usize = 256;

/// An event, with whose it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Heard {
    /// The migration.
    pub id: Uuid,
    /// Its guest.
    pub vm: String,
    /// Which side this daemon is.
    pub side: pagecopy::engine::journal::Side,
    /// What happened.
    #[serde(flatten)]
    pub told: Told,
}

/// One event of the feed.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its number, from 1; none for progress.
    pub(crate) number: Option<u64>,
    /// [`Heard`] as JSON.
    pub(crate) value: Value,
}

/// What a reader begins with.
#[derive(Debug)]
pub(crate) struct Reader {
    /// What it has missed and is kept.
    pub(crate) history: Vec<Arc<Entry>>,
    /// Whether it has missed more than that.
    pub(crate) missed: bool,
    /// The number of the last event so far.
    pub(crate) last: u64,
    /// What comes.
    pub(crate) live: broadcast::Receiver<Arc<Entry>>,
}

/// All events of this daemon.
#[derive(Debug)]
pub(crate) struct Feed {
    /// Tells this start of the daemon from others: numbers begin anew.
    start: String,
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Entry>>,
    ended: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    entries: VecDeque<Arc<Entry>>,
}

impl Default for Feed {
    fn default() -> Feed {
        Feed {
            start: Uuid::new_v4().simple().to_string()[..12].to_owned(),
            kept: Mutex::default(),
            live: broadcast::channel(BACKLOG).0,
            ended: watch::channel(false).0,
        }
    }
}

impl Feed {
    /// Something has happened to the migration that is shown so. `value` is `told` as JSON, which whoever tells it has.
    pub(crate) fn tell(&self, shown: &Shown, told: &Told, value: &Value) {
        let value = heard(shown, value);
        let mut kept = self.lock();
        let number = (!told.is_progress()).then(|| {
            kept.last += 1;
            kept.last
        });
        let entry = Arc::new(Entry { number, value });
        if number.is_some() {
            if kept.entries.len() >= KEPT {
                kept.entries.pop_front();
            }
            kept.entries.push_back(Arc::clone(&entry));
        }
        // Under the lock, so that readers get them in this order. Without a reader nobody needs it.
        let _ = self.live.send(entry);
    }

    /// A reader, which saw the event that is called `after` last, if it was here before.
    pub(crate) fn read(&self, after: Option<&str>) -> Reader {
        let kept = self.lock();
        let after = after.map(|name| self.number(name));
        let history: Vec<_> = match after {
            Some(Some(after)) => {
                let is_new = |entry: &&Arc<Entry>| entry.number > Some(after);
                kept.entries.iter().filter(is_new).cloned().collect()
            }
            _ => Vec::new(),
        };
        let missed = match after {
            None => false,
            Some(None) => true,
            Some(Some(after)) => {
                u64::try_from(history.len()).unwrap_or(u64::MAX) != kept.last.saturating_sub(after)
            }
        };
        Reader {
            history,
            missed,
            last: kept.last,
            live: self.live.subscribe(),
        }
    }

    /// What the event of that number is called.
    pub(crate) fn name(&self, number: u64) -> String {
        format!("{}-{number}", self.start)
    }

    fn number(&self, name: &str) -> Option<u64> {
        let number = name.strip_prefix(&self.start)?.strip_prefix('-')?;
        number.parse().ok()
    }

    /// There is no more to come.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Whether the daemon is ending.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits until there is no more to come.
    pub(crate) async fn wait_end(&self) {
        // An error would say that the sender is gone, which lives in this feed.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`Heard`], of what has been made JSON already.
fn heard(shown: &Shown, told: &Value) -> Value {
    let mut heard = told.clone();
    heard["id"] = json!(shown.id);
    heard["vm"] = json!(shown.vm);
    heard["side"] = json!(shown.side);
    heard
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use pagecopy::engine::MigrationId;
    use pagecopy::engine::event::{Figures, Report, State};
    use pagecopy::engine::journal::Side;

    use super::*;
    use crate::migrations::{Finished, Migration};

    const ID: MigrationId = MigrationId([1; 16]);

    fn shown() -> Shown {
        Migration::new(ID, "web", Side::Source, "b:1", "/q".into())
            .0
            .shown()
    }

    fn notice(text: &str) -> Told {
        let text = text.to_owned();
        let report = Report::Notice { text };
        Told::Running { at_ms: 1, report }
    }

    fn tell(feed: &Feed, text: &str) {
        let told = notice(text);
        feed.tell(&shown(), &told, &told.value());
    }

    #[test]
    fn what_is_told_is_as_it_is_described() {
        let finished = Finished::new(ID, State::Completed, None, Figures::default());
        for told in [notice("a"), Told::Finished(Box::new(finished))] {
            let Shown { id, vm, side, .. } = shown();
            let value = told.value();
            let heard = Heard { id, vm, side, told };
            assert_eq!(
                super::heard(&shown(), &value),
                serde_json::to_value(heard).unwrap()
            );
        }
    }

    fn texts(reader: &Reader) -> Vec<&str> {
        reader
            .history
            .iter()
            .map(|entry| entry.value["text"].as_str().unwrap())
            .collect()
    }

    #[test]
    fn a_reader_goes_on_where_it_was() {
        let feed = Feed::default();
        assert!(feed.read(None).history.is_empty());
        for text in ["a", "b", "c"] {
            tell(&feed, text);
        }
        let again = feed.read(Some(&feed.name(1)));
        assert_eq!(
            (texts(&again), again.missed, again.last),
            (vec!["b", "c"], false, 3)
        );
        let current = feed.read(Some(&feed.name(3)));
        assert!(current.history.is_empty() && !current.missed);
        // A daemon that was started anew, and what never was a name of ours.
        for other in [
            Feed::default().name(1),
            "1".to_owned(),
            String::new(),
            format!("{}x", feed.name(1)),
        ] {
            assert!(feed.read(Some(&other)).missed, "{other}");
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_a_gap_is_told() {
        let feed = Feed::default();
        for number in 0..KEPT + 10 {
            tell(&feed, &number.to_string());
        }
        assert_eq!(feed.lock().entries.len(), KEPT);
        let late = feed.read(Some(&feed.name(5)));
        assert!(late.missed);
        assert_eq!(late.history.len(), KEPT);
        assert!(!feed.read(Some(&feed.name(10))).missed);
    }

    #[tokio::test]
    async fn a_reader_that_is_slow_is_told_and_holds_nobody_up() {
        let feed = Feed::default();
        let mut reader = feed.read(None);
        for number in 0..BACKLOG + 3 {
            tell(&feed, &number.to_string());
        }
        let error = reader.live.recv().await.unwrap_err();
        assert_eq!(error, broadcast::error::RecvError::Lagged(3));
        assert_eq!(reader.live.recv().await.unwrap().value["text"], "3");
    }
}
