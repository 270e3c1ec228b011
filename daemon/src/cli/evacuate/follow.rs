//! Hands the guests to the daemon's queue in their order, and follows all of them to their ends.
//!
//! They are looked at by asking for the list again and again, which needs nothing of a connection: a daemon that is started anew
//! has those that waited, and what the journals say of the others.

use std::collections::BTreeMap;
use std::time::Duration;

use pagecopy::engine::event::State;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::super::arguments::{EvacuateArguments, How};
use super::super::client::{CliError, Client};
use super::super::tell::Tell;
use super::plan::Leaving;
use crate::api::types::Begun;
use crate::migrations::{Finished, Shown};
use pagecopy::engine::journal::Side;

/// How often it is asked how they are.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A daemon that is away for longer is not waited for.
const AWAY_LIMIT: Duration = Duration::from_secs(120);

/// What has become of a guest.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Gone {
    /// Its name.
    pub(super) vm: String,
    /// Its migration, if there was one.
    pub(super) id: Option<Uuid>,
    /// The migration's state.
    #[serde(rename = "status")]
    pub(super) state: State,
    /// How long it was thought to take, in milliseconds.
    pub(super) predicted_ms: Option<f64>,
    /// Its memory.
    pub(super) ram_bytes: Option<u64>,
    /// How long it took, once it had begun, in milliseconds.
    pub(super) total_ms: Option<f64>,
    /// How long the guest stood still.
    pub(super) downtime_ms: Option<f64>,
    /// Bytes on all channels.
    pub(super) bytes_on_wire: Option<u64>,
    /// Why it has not moved.
    pub(super) error: Option<String>,
    /// What to do about it.
    pub(super) remedy: Option<String>,
}

impl Gone {
    fn of(leaving: &Leaving) -> Gone {
        Gone {
            vm: leaving.vm.clone(),
            id: leaving.id,
            state: State::Pending,
            predicted_ms: leaving.predicted_ms,
            ram_bytes: leaving.ram_bytes,
            total_ms: None,
            downtime_ms: None,
            bytes_on_wire: None,
            error: None,
            remedy: None,
        }
    }

    #[cfg(test)]
    pub(super) fn ended(state: State) -> Gone {
        let found = crate::guests::GuestFound {
            vm: "web1".to_owned(),
            qmp: "/q".into(),
            state: None,
            ram_bytes: Some(1 << 30),
            migration: None,
            error: None,
            remedy: None,
        };
        Gone {
            state,
            ..Gone::of(&Leaving::of(found))
        }
    }

    /// Whether there is nothing more to wait for. One in doubt may yet be decided, by whoever asks the destination.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.state,
            State::Completed | State::Failed | State::Cancelled | State::InDoubt
        )
    }

    fn fail(&mut self, state: State, what: &str, remedy: &str) {
        self.state = state;
        self.error = Some(what.to_owned());
        self.remedy = Some(remedy.to_owned()).filter(|remedy| !remedy.is_empty());
    }

    fn finish(&mut self, finished: &Finished) {
        let figures = &finished.figures;
        self.total_ms = Some(figures.total_ms).filter(|ms| *ms > 0.0);
        self.downtime_ms = figures.downtime_ms;
        self.bytes_on_wire = Some(finished.bytes_on_wire);
        self.error.clone_from(&finished.error);
        self.remedy.clone_from(&finished.remedy);
    }
}

/// What comes of a guest's handing over.
enum Asked {
    Taken(Uuid),
    /// The queue is full, or the daemon away: later.
    Later(CliError),
    Refused(CliError),
}

/// Moves all of them; returns when nothing more is to be waited for, or nobody wants to wait.
pub(super) async fn run(
    client: &Client,
    arguments: &EvacuateArguments,
    leaving: Vec<Leaving>,
    tell: Tell,
) -> Vec<Gone> {
    let gone = leaving.iter().map(Gone::of).collect();
    let mut evacuation = Evacuation {
        client,
        tell,
        to: &arguments.to,
        how: &arguments.how,
        // The daemon takes each once, even if its answer is lost and it is asked again.
        key: Uuid::new_v4(),
        leaving,
        gone,
        handed: 0,
        away_since: None,
        is_full: false,
    };
    evacuation.follow().await;
    evacuation.gone
}

struct Evacuation<'a> {
    client: &'a Client,
    tell: Tell,
    to: &'a str,
    how: &'a How,
    key: Uuid,
    leaving: Vec<Leaving>,
    gone: Vec<Gone>,
    /// So many were handed over, or need not be.
    handed: usize,
    away_since: Option<Instant>,
    /// That the queue is full has been told.
    is_full: bool,
}

impl Evacuation<'_> {
    async fn follow(&mut self) {
        // Without it Ctrl-C ends this program, and the guests go on.
        let mut interrupts = signal(SignalKind::interrupt()).ok();
        let mut interrupted = false;
        loop {
            self.hand_over().await;
            self.look().await;
            if self.is_over() || self.is_given_up() {
                return;
            }
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = interrupt(&mut interrupts) => {
                    if interrupted {
                        self.leave_alone("nobody waits for it any more");
                        return;
                    }
                    interrupted = true;
                    self.tell.note("cancelling (once more to leave them to pagecopyd)");
                    self.cancel().await;
                }
            }
        }
    }

    /// Hands over as many as the daemon takes.
    async fn hand_over(&mut self) {
        while let Some(leaving) = self.leaving.get(self.handed) {
            let asked = match (&leaving.unasked, leaving.id) {
                (Some((what, remedy)), _) => Asked::Refused(CliError::new(what, remedy)),
                (None, Some(id)) => Asked::Taken(id),
                (None, None) => self.ask(leaving).await,
            };
            let gone = &mut self.gone[self.handed];
            match asked {
                Asked::Taken(id) => gone.id = Some(id),
                Asked::Refused(error) => {
                    gone.fail(State::Failed, &error.what, &error.remedy);
                    tell_change(self.tell, gone);
                }
                Asked::Later(error) => return self.is_away(error),
            }
            self.handed += 1;
        }
    }

    async fn ask(&self, leaving: &Leaving) -> Asked {
        let how = self.how.clone();
        let request = how.request(&leaving.vm, &leaving.qmp, self.to);
        let key = format!("evacuate-{}-{}", self.key, self.handed);
        let answer = self
            .client
            .post_once("/v1/migrations", &request, &key)
            .await;
        match answer.map(serde_json::from_value) {
            Ok(Ok(Begun { id })) => Asked::Taken(id),
            Ok(Err(error)) => Asked::Refused(super::misunderstood(&error)),
            // No answer, or 429: the queue is full.
            Err(error) if matches!(error.status, None | Some(429)) => Asked::Later(error),
            Err(error) => Asked::Refused(error),
        }
    }

    /// Sees how everybody is.
    async fn look(&mut self) {
        let list = match self.client.get("/v1/migrations").await {
            Ok(list) => list,
            Err(error) => return self.is_away(error),
        };
        if self.away_since.take().is_some() {
            self.tell.note("pagecopyd is back");
        }
        let all: Vec<Shown> = serde_json::from_value(list).unwrap_or_default();
        let from_here = all.into_iter().filter(|one| one.side == Side::Source);
        let all: BTreeMap<Uuid, Shown> = from_here.map(|one| (one.id, one)).collect();
        for gone in &mut self.gone[..self.handed] {
            let before = gone.state;
            match gone.id.map(|id| all.get(&id)) {
                // Refused.
                None => {}
                Some(Some(shown)) => {
                    gone.state = shown.state;
                    match &shown.finished {
                        Some(finished) if gone.is_over() => gone.finish(finished),
                        _ => {}
                    }
                }
                Some(None) if gone.is_over() => {}
                Some(None) => gone.fail(
                    State::Failed,
                    "pagecopyd does not know its migration any more: it was started anew before that had begun",
                    "the guest has stayed: migrate it again",
                ),
            }
            if gone.state != before {
                tell_change(self.tell, gone);
            }
        }
    }

    /// The daemon does not answer, or its queue is full.
    fn is_away(&mut self, error: CliError) {
        let told = match error.status {
            Some(_) => std::mem::replace(&mut self.is_full, true),
            None => self
                .away_since
                .replace(self.away_since.unwrap_or_else(Instant::now))
                .is_some(),
        };
        if !told {
            self.tell.note(&format!("{}; waiting", error.what));
        }
    }

    fn is_given_up(&mut self) -> bool {
        let given_up = self
            .away_since
            .is_some_and(|since| since.elapsed() > AWAY_LIMIT);
        if given_up {
            self.leave_alone("pagecopyd is away");
        }
        given_up
    }

    /// Says of those that have not ended what will become of them.
    fn leave_alone(&mut self, why: &str) {
        for gone in self.gone.iter_mut().filter(|gone| !gone.is_over()) {
            let (what, remedy) = match gone.id {
                Some(id) => (
                    format!("{why}; pagecopyd goes on with it"),
                    format!("see `pagecopy status {id}`"),
                ),
                None => (
                    format!("{why}; it was not begun"),
                    "evacuate again".to_owned(),
                ),
            };
            gone.fail(gone.state, &what, &remedy);
        }
    }

    /// Nobody else is handed over, and who can be cancelled is: the last first, so that none of them gets its turn meanwhile.
    async fn cancel(&mut self) {
        for gone in &mut self.gone[self.handed..] {
            gone.fail(State::Cancelled, "it was not begun", "evacuate again");
            tell_change(self.tell, gone);
        }
        self.handed = self.gone.len();
        for gone in self.gone.iter().rev().filter(|gone| !gone.is_over()) {
            if let Some(id) = gone.id {
                let path = format!("/v1/migrations/{id}/cancel");
                // One that cannot be cancelled any more is waited for.
                let _ = self.client.post(&path, &Value::Null).await;
            }
        }
    }

    fn is_over(&self) -> bool {
        self.handed == self.gone.len() && self.gone.iter().all(Gone::is_over)
    }
}

/// Comes with the next Ctrl-C.
async fn interrupt(interrupts: &mut Option<Signal>) {
    match interrupts {
        Some(interrupts) => {
            interrupts.recv().await;
        }
        None => std::future::pending().await,
    }
}

fn tell_change(tell: Tell, gone: &Gone) {
    let why = gone.error.as_ref().filter(|_| gone.is_over());
    let why = why.map_or_else(String::new, |why| format!(": {why}"));
    tell.event(
        &format!("{}: {}{why}", gone.vm, gone.state.word()),
        || json!({ "event": "state", "vm": gone.vm, "id": gone.id, "state": gone.state }),
    );
}
