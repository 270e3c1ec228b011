//! The migrations that this daemon knows: what the API shows of them, and how it reaches their sessions.

mod told;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pagecopy::engine::MigrationId;
use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::event::{Report, State, Way};
use pagecopy::engine::journal::Side;
use pagecopy::wire::Standing;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use utoipa::ToSchema;
use uuid::Uuid;

use self::told::now_ms;
pub use self::told::{Finished, Told};
use crate::api::metrics::Counters;
use crate::api::types::ChangeRequest;
use crate::failure::Failure;
use crate::feed::Feed;
use crate::limits::MAX_HISTORY;
use crate::preflight::outcome::Foresight;
use crate::pull::FaultReport;
use crate::queue::turns::Place;
use crate::session::Joining;
use crate::session::arrive::Caller;

/// Ended migrations that stay visible.
const KEPT: usize = 200;
/// Live events kept for a reader that is behind: ten seconds of them. Every migration that stays visible has room for so
/// many, about 80 bytes each.
const EVENT_BACKLOG: usize = 128;

/// What becomes of an operator's decision: what is done, or why it is refused.
pub(crate) type Decided = Result<String, Failure>;

/// What the operator asks of a running migration.
#[derive(Debug)]
pub(crate) enum Request {
    /// End it; the guest stays at the source.
    Cancel,
    /// Decide one that is in doubt.
    Resolve(Resolution, oneshot::Sender<Decided>),
    /// At the source: the guest goes first.
    StartPostcopy(oneshot::Sender<Decided>),
    /// At the source of a paused post-copy: dial the destination now, perhaps at another address.
    Recover(Option<String>, oneshot::Sender<Decided>),
    /// At the destination of a paused post-copy: the guest goes on without what lacks; with the word that the source is
    /// fenced.
    Poison(bool, oneshot::Sender<Decided>),
    /// At the source: other limits, or another priority.
    Change(ChangeRequest, oneshot::Sender<Decided>),
    /// The daemon ends: cancel, unless the guest is already on its way.
    Shutdown,
    /// At the destination: the source has lost the connection and asks on another.
    Disconnect,
    /// At the destination: the source asks about a committed guest, or serves the memory of one in post-copy, on this
    /// connection.
    Serve(Caller),
    /// At the destination, before the guest is handed over: the source has made data channels more.
    Join(Joining),
    /// At the destination of a post-copy: the source does not have what the guest lacks any more, and why.
    Lost(String),
    /// At the destination, of a committed guest: the source's operator has taken it back.
    Withdrawn(oneshot::Sender<Standing>),
}

/// What is shown of a migration.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Shown {
    /// The migration.
    pub id: Uuid,
    /// The guest's name.
    pub vm: String,
    /// Which side this daemon is.
    pub side: Side,
    /// The other daemon.
    pub peer: String,
    /// QEMU's QMP socket here.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// Its state.
    pub state: State,
    /// How it moves: pre-copy until the guest goes before its memory.
    pub mode: Way,
    /// How urgent it is, from -100 to 100.
    pub priority: i32,
    /// While it waits for its turn: its place among those that do, from 1.
    pub place: Option<u32>,
    /// At the source: percent of its time for which the guest is kept from writing now.
    #[serde(default)]
    pub throttle_percent: u32,
    /// Data channels that carry pages, once that was decided anew.
    #[serde(default)]
    pub channels: Option<u16>,
    /// Why it is paused, while it is.
    pub reason: Option<String>,
    /// The last progress event.
    #[schema(value_type = Option<Report>)]
    pub progress: Option<Value>,
    /// At the destination of a post-copy that is under way: what its page faults cost, in detail.
    pub faults: Option<FaultReport>,
    /// How it ended.
    pub finished: Option<Finished>,
}

/// A migration, shared by its session and the API.
#[derive(Debug)]
pub struct Migration {
    inner: Mutex<Inner>,
    live: broadcast::Sender<Value>,
    requests: mpsc::UnboundedSender<Request>,
    /// Whether the session has ended.
    over: watch::Sender<bool>,
    /// While it counts among those that run: what it gives up for the next.
    place: Mutex<Option<Place>>,
    /// Who else is told, once the daemon knows it.
    host: OnceLock<Host>,
    /// At the source: what it will take.
    foresight: OnceLock<Foresight>,
}

/// Those who are told of every migration of this host.
#[derive(Clone, Debug)]
struct Host {
    feed: Arc<Feed>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Inner {
    shown: Shown,
    /// Every event but the progress, for late readers.
    history: Vec<Value>,
}

impl Inner {
    /// Adds an event. Notices may come for as long as a peer cannot be asked: the oldest of them makes room.
    fn keep(&mut self, event: Value) {
        if self.history.len() >= MAX_HISTORY {
            let oldest = self.history.iter().position(|event| {
                let name = event.get("event").and_then(Value::as_str);
                matches!(name, Some("notice" | "paused"))
            });
            self.history.remove(oldest.unwrap_or(0));
        }
        self.history.push(event);
    }
}

impl Migration {
    /// A migration that begins. The session takes the operator's requests from the receiver.
    pub(crate) fn new(
        id: MigrationId,
        vm: &str,
        side: Side,
        peer: &str,
        qmp: PathBuf,
    ) -> (Arc<Migration>, mpsc::UnboundedReceiver<Request>) {
        let (requests, receiver) = mpsc::unbounded_channel();
        let shown = Shown {
            id: Uuid::from_bytes(id.0),
            vm: vm.to_owned(),
            side,
            peer: peer.to_owned(),
            qmp,
            state: State::Pending,
            mode: Way::Precopy,
            priority: 0,
            place: None,
            throttle_percent: 0,
            channels: None,
            reason: None,
            progress: None,
            faults: None,
            finished: None,
        };
        let inner = Mutex::new(Inner {
            shown,
            history: Vec::new(),
        });
        let (live, over) = (broadcast::channel(EVENT_BACKLOG).0, watch::channel(false).0);
        (
            Arc::new(Migration {
                inner,
                live,
                requests,
                over,
                place: Mutex::default(),
                host: OnceLock::new(),
                foresight: OnceLock::new(),
            }),
            receiver,
        )
    }

    /// What is shown now.
    pub fn shown(&self) -> Shown {
        self.lock().shown.clone()
    }

    /// Asks the session for something. False when the session has ended.
    pub(crate) fn request(&self, request: Request) -> bool {
        self.requests.send(request).is_ok()
    }

    /// What is shown of how urgent it is.
    pub(crate) fn set_priority(&self, priority: i32) {
        self.lock().shown.priority = priority;
    }

    /// It runs, and holds its place meanwhile.
    pub(crate) fn hold(&self, place: Place) {
        *self.place() = Some(place);
    }

    /// Lets the next begin.
    fn give_way(&self) {
        let place = self.place().take();
        drop(place);
    }

    fn place(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it predicted what this migration will take, from now on.
    pub(crate) fn foresee(&self, foresight: Foresight) {
        // It begins once.
        let _ = self.foresight.set(foresight);
    }

    /// An engine's report.
    pub fn report(&self, report: &Report) {
        if let Some(foresight) = self.foresight.get() {
            foresight.hear(report);
        }
        let told = Told::Running {
            at_ms: now_ms(),
            report: report.clone(),
        };
        let value = told.value();
        // It does not go on by itself, and may take hours. Neither does a doubt, which is told as an end.
        if let Report::State {
            state: State::Paused,
        } = report
        {
            self.give_way();
        }
        let mut inner = self.lock();
        match report {
            // How it has ended is shown with all figures, which come soon: who sees that it is over finds them.
            Report::State {
                state: State::Completed | State::Failed | State::Cancelled,
            } => {}
            Report::State { state } => {
                inner.shown.state = *state;
                inner.shown.reason = None;
            }
            Report::Switched { mode, .. } => inner.shown.mode = *mode,
            Report::Throttle { throttle_percent } => {
                inner.shown.throttle_percent = *throttle_percent;
            }
            Report::Channels { channels, .. } => inner.shown.channels = Some(*channels),
            Report::Paused { reason } => inner.shown.reason = Some(reason.clone()),
            Report::Progress { .. } | Report::Postcopy { .. } => {
                inner.shown.progress = Some(value.clone());
            }
            _ => {}
        }
        if !told.is_progress() {
            inner.keep(value.clone());
        }
        if let Some(host) = self.host.get() {
            host.feed.tell(&inner.shown, &told, &value);
        }
        // Without a reader nobody needs it.
        let _ = self.live.send(value);
    }

    /// What the page faults of a post-copy that is under way cost so far.
    pub(crate) fn measured(&self, faults: FaultReport) {
        self.lock().shown.faults = Some(faults);
    }

    /// The migration ended so (an in-doubt one may end once more).
    pub fn finish(&self, mut finished: Finished) {
        self.give_way();
        match finished.figures.way() {
            // Or without figures: a daemon before this one had them.
            Way::Precopy => finished.mode = self.lock().shown.mode.word().to_owned(),
            way => self.lock().shown.mode = way,
        }
        if let Some(foresight) = self.foresight.get() {
            let completed = finished.status == State::Completed;
            finished.predicted = foresight.outcome(&finished.figures, completed);
        }
        let told = Told::Finished(Box::new(finished.clone()));
        let value = told.value();
        let mut inner = self.lock();
        if let Some(host) = self.host.get() {
            host.counters.finished(inner.shown.side, &finished);
            host.feed.tell(&inner.shown, &told, &value);
        }
        inner.shown.state = finished.status;
        inner.shown.reason = None;
        inner.shown.faults = None;
        inner.shown.throttle_percent = 0;
        inner.shown.finished = Some(finished);
        // A late reader of a resolved migration must not stop at its doubt.
        inner
            .history
            .retain(|event| event.get("event") != Some(&json!("finished")));
        inner.keep(value.clone());
        let _ = self.live.send(value);
    }

    /// The session has ended.
    pub fn over(&self) {
        self.give_way();
        self.over.send_replace(true);
    }

    /// Whether the session has ended.
    pub fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    /// Whether the guest runs at the destination and depends on both hosts.
    pub(crate) fn is_postcopy(&self) -> bool {
        let inner = self.lock();
        let progress = inner.shown.progress.as_ref();
        let told = progress.and_then(|progress| progress.get("event")) == Some(&json!("postcopy"));
        !self.is_over() && (told || inner.shown.state == State::Paused)
    }

    fn runs(&self, vm: &str, side: Side) -> bool {
        let inner = self.lock();
        !self.is_over() && inner.shown.vm == vm && inner.shown.side == side
    }

    /// Waits until the session has ended.
    pub async fn wait_over(&self) {
        // An error would say that the sender is gone, which lives in this migration.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// The events so far without progress, and those to come.
    pub fn events(&self) -> (Vec<Value>, broadcast::Receiver<Value>) {
        let inner = self.lock();
        (inner.history.clone(), self.live.subscribe())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All migrations of this daemon.
#[derive(Debug)]
pub struct Migrations {
    map: Mutex<BTreeMap<u64, Arc<Migration>>>,
    host: Host,
}

impl Default for Migrations {
    fn default() -> Migrations {
        Migrations {
            map: Mutex::default(),
            host: Host {
                feed: Arc::default(),
                counters: Arc::new(Counters::new()),
            },
        }
    }
}

impl Migrations {
    /// Makes a migration known. At most one of a guest may run on each side (both sides may be here).
    ///
    /// # Errors
    /// The one that runs.
    pub fn add(&self, migration: &Arc<Migration>) -> Result<(), Uuid> {
        let mut map = self.lock();
        let Shown { vm, side, .. } = migration.shown();
        let running = map.values().find(|other| other.runs(&vm, side));
        if let Some(running) = running.filter(|_| !migration.is_over()) {
            return Err(running.shown().id);
        }
        // One that is taken up again was told already.
        let _ = migration.host.set(self.host.clone());
        let key = map.keys().next_back().map_or(0, |last| last + 1);
        map.insert(key, Arc::clone(migration));
        let ended: Vec<u64> = map
            .iter()
            .filter(|(_, m)| m.is_over())
            .map(|(key, _)| *key)
            .collect();
        for key in ended.iter().take(ended.len().saturating_sub(KEPT)) {
            map.remove(key);
        }
        Ok(())
    }

    /// A migration in doubt that has to do with the guest `vm` or with the QEMU at `qmp`.
    pub fn in_doubt(&self, vm: &str, qmp: &Path) -> Option<Shown> {
        let same_socket = |other: &Path| {
            let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
            real(other) == real(qmp)
        };
        let map = self.lock();
        map.values()
            .filter(|migration| !migration.is_over())
            .map(|migration| migration.shown())
            .filter(|shown| shown.state == State::InDoubt)
            .find(|shown| shown.vm == vm || same_socket(&shown.qmp))
    }

    /// The migration of `vm` that runs on that side, if one does.
    pub fn running(&self, vm: &str, side: Side) -> Option<Uuid> {
        let map = self.lock();
        map.values()
            .find(|migration| migration.runs(vm, side))
            .map(|migration| migration.shown().id)
    }

    /// The migration of that id; with both sides here, the source's.
    pub fn get(&self, id: Uuid) -> Option<Arc<Migration>> {
        self.side(id, Side::Source)
            .or_else(|| self.side(id, Side::Destination))
    }

    /// The migration of that id, seen from one side.
    pub fn side(&self, id: Uuid, side: Side) -> Option<Arc<Migration>> {
        let matches = |shown: &Shown| shown.id == id && shown.side == side;
        // The latest: one that was taken up again comes behind its earlier self.
        self.lock()
            .values()
            .rev()
            .find(|migration| matches(&migration.lock().shown))
            .cloned()
    }

    /// All, in the order in which they began.
    pub fn list(&self) -> Vec<Arc<Migration>> {
        self.lock().values().cloned().collect()
    }

    /// What happens to all of them.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.host.feed
    }

    /// What adds up over all of them.
    pub(crate) fn counters(&self) -> &Counters {
        &self.host.counters
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Migration>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use pagecopy::engine::event::Figures;

    fn migration(n: u8, vm: &str) -> Arc<Migration> {
        Migration::new(
            MigrationId([n; 16]),
            vm,
            Side::Source,
            "peer:1",
            "/qmp".into(),
        )
        .0
    }

    fn finished(status: State) -> Finished {
        Finished::new(MigrationId([1; 16]), status, None, Figures::default())
    }

    #[test]
    fn one_migration_a_guest_at_a_time() {
        let all = Migrations::default();
        let first = migration(1, "web");
        all.add(&first).unwrap();
        all.add(&migration(2, "db")).unwrap();
        assert_eq!(all.add(&migration(3, "web")).unwrap_err(), first.shown().id);
        first.over();
        all.add(&migration(3, "web")).unwrap();
        assert_eq!(all.list().len(), 3);
        assert!(all.get(first.shown().id).is_some());
    }

    #[test]
    fn notices_do_not_add_up_for_ever() {
        let migration = migration(1, "web");
        migration.report(&Report::State {
            state: State::InDoubt,
        });
        for number in 0..MAX_HISTORY + 5 {
            migration.report(&Report::Notice {
                text: number.to_string(),
            });
        }
        let (history, _) = migration.events();
        assert_eq!(history.len(), MAX_HISTORY);
        assert_eq!(history[0]["event"], json!("state"));
        assert_eq!(history[1]["text"], json!("6"), "the oldest are gone");
    }

    #[test]
    fn what_is_shown_as_over_has_its_figures() {
        let migration = migration(1, "web");
        for state in [State::Migrating, State::Failed] {
            migration.report(&Report::State { state });
        }
        let shown = migration.shown();
        assert_eq!((shown.state, shown.finished), (State::Migrating, None));
        migration.finish(finished(State::Failed));
        let shown = migration.shown();
        assert!(shown.state == State::Failed && shown.finished.is_some());
    }

    #[test]
    fn a_late_reader_sees_the_latest_end_only() {
        let migration = migration(1, "web");
        migration.report(&Report::State {
            state: State::Migrating,
        });
        migration.finish(finished(State::InDoubt));
        migration.finish(finished(State::Completed));
        let (history, _) = migration.events();
        assert_eq!(history.len(), 2);
        assert_eq!(history[1]["status"], json!("completed"));
        assert_eq!(history[1]["rounds"], json!(0));
        assert_eq!(migration.shown().state, State::Completed);
    }
}
