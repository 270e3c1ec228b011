//! Hands the guests to the daemon's queue in their order, and follows all of them to their ends.
//!
//! They are looked at by asking for the list again and again, which needs nothing of a connection: a daemon that is started anew
//! has those that waited, and what the journals say of the others.
//!
//! Where several destinations are named, they are ranked for a guest when the one before it has begun: by then its destination has
//! reserved the memory that it takes, so no two are sent where there is room for one. No more than one of them waits in the queue.

use std::collections::BTreeMap;
use std::time::Duration;

use pagecopy::engine::event::State;
use pagecopy::engine::journal::Side;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::super::arguments::{EvacuateArguments, How};
use super::super::choose::{Choice, Wanted, choose};
use super::super::client::{CliError, Client};
use super::super::retries::Retries;
use super::super::tell::Tell;
use super::gone::Gone;
use super::plan::Leaving;
use crate::api::types::Begun;
use crate::migrations::Shown;

/// How often it is asked how they are.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A daemon that is away for longer is not waited for.
const AWAY_LIMIT: Duration = Duration::from_secs(120);

/// What comes of a guest's handing over.
enum Asked {
    Taken(Uuid),
    /// The queue is full, or the daemon away: later.
    Later(CliError),
    Refused(CliError),
    /// No destination could be reached, which may pass.
    Nobody(CliError),
    /// Ctrl-C came while its destination was being chosen.
    Interrupted,
}

/// Moves all of them to one of these; returns when nothing more is to be waited for, or nobody wants to wait.
pub(super) async fn run(
    client: &Client,
    arguments: &EvacuateArguments,
    to: &[String],
    leaving: Vec<Leaving>,
    tell: Tell,
) -> Vec<Gone> {
    let retries = arguments.to.retries;
    let mut evacuation = Evacuation {
        client,
        tell,
        to,
        how: &arguments.how,
        // The daemon takes each once, even if its answer is lost and it is asked again.
        key: Uuid::new_v4(),
        guests: leaving
            .into_iter()
            .map(|one| Guest::new(one, retries))
            .collect(),
        away_since: None,
        is_full: false,
        interrupted: false,
        // Without it Ctrl-C ends this program, and the guests go on.
        interrupts: signal(SignalKind::interrupt()).ok(),
    };
    evacuation.follow().await;
    let guests = evacuation.guests.into_iter();
    guests.map(|guest| guest.gone).collect()
}

/// A guest that leaves.
struct Guest {
    leaving: Leaving,
    gone: Gone,
    retries: Retries,
    /// When it is to be handed over; none when it was, or need not be.
    due: Option<Instant>,
}

impl Guest {
    fn new(leaving: Leaving, retries: u32) -> Guest {
        Guest {
            gone: Gone::of(&leaving),
            leaving,
            retries: Retries::new(retries),
            due: Some(Instant::now()),
        }
    }

    fn is_due(&self) -> bool {
        self.due.is_some_and(|due| due <= Instant::now())
    }

    /// Whether it was handed over, and its destination may not have reserved its memory yet.
    fn has_not_begun(&self) -> bool {
        self.due.is_none() && matches!(self.gone.state, State::Pending | State::Preparing)
    }

    /// How it is now, by what the daemon shows of its migration.
    fn see(&mut self, shown: Option<&Shown>) {
        match shown {
            Some(shown) => {
                self.gone.state = shown.state;
                match &shown.finished {
                    Some(finished) if self.gone.is_over() => self.gone.finish(finished),
                    _ => {}
                }
            }
            None if self.gone.is_over() => {}
            None => self.gone.fail(
                State::Failed,
                "pagecopyd does not know its migration any more: it was started anew before that had begun",
                "the guest has stayed: migrate it again",
            ),
        }
    }

    /// It has failed. With a pause it is tried again after it, and is nothing of the attempt before.
    fn try_again(&mut self, pause: Option<Duration>) -> Option<Duration> {
        let pause = pause?;
        self.due = Some(Instant::now() + pause);
        self.leaving.id = None;
        self.gone = Gone {
            attempts: self.retries.failed().to_vec(),
            ..Gone::of(&self.leaving)
        };
        Some(pause)
    }
}

struct Evacuation<'a> {
    client: &'a Client,
    tell: Tell,
    to: &'a [String],
    how: &'a How,
    key: Uuid,
    guests: Vec<Guest>,
    away_since: Option<Instant>,
    /// That the queue is full has been told.
    is_full: bool,
    /// Nobody else is to begin.
    interrupted: bool,
    interrupts: Option<Signal>,
}

impl Evacuation<'_> {
    async fn follow(&mut self) {
        loop {
            self.hand_over().await;
            self.look().await;
            if self.is_over() || self.is_given_up() {
                return;
            }
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = interrupt(&mut self.interrupts) => {
                    if self.interrupted {
                        self.leave_alone("nobody waits for it any more");
                        return;
                    }
                    self.cancel().await;
                }
            }
        }
    }

    /// Hands over as many as the daemon takes.
    async fn hand_over(&mut self) {
        for index in 0..self.guests.len() {
            if !self.guests[index].is_due() {
                continue;
            }
            if self.to.len() > 1 && self.guests.iter().any(Guest::has_not_begun) {
                return;
            }
            let asked = self.asked(index).await;
            let guest = &mut self.guests[index];
            match asked {
                Asked::Taken(id) => guest.gone.id = Some(id),
                Asked::Nobody(error) => {
                    let pause = guest.retries.after_nobody(&error.what);
                    if let Some(pause) = guest.try_again(pause) {
                        tell_attempt(self.tell, &guest.gone, pause);
                        continue;
                    }
                    guest.gone.fail(State::Failed, &error.what, &error.remedy);
                    tell_change(self.tell, &guest.gone);
                }
                Asked::Refused(error) => {
                    guest.gone.fail(State::Failed, &error.what, &error.remedy);
                    tell_change(self.tell, &guest.gone);
                }
                Asked::Later(error) => return self.is_away(error),
                Asked::Interrupted => return self.cancel().await,
            }
            guest.due = None;
        }
    }

    async fn asked(&mut self, index: usize) -> Asked {
        let Guest { leaving, gone, .. } = &self.guests[index];
        if let Some((what, remedy)) = &leaving.unasked {
            return Asked::Refused(CliError::new(what, remedy));
        }
        if let Some(id) = leaving.id {
            return Asked::Taken(id);
        }
        // One that was chosen and not taken yet: under its key nothing else may be asked for.
        let chosen = gone.to.clone().map(Choice::To);
        let choice = match chosen {
            Some(chosen) => Ok(chosen),
            // Looking takes a second for each destination, and nothing has begun.
            None => tokio::select! {
                biased;
                () = interrupt(&mut self.interrupts) => return Asked::Interrupted,
                choice = choose(self.client, wanted(self.to, self.how, leaving), self.tell) => choice,
            },
        };
        let to = match choice {
            Ok(Choice::To(to)) => to,
            Ok(Choice::Nowhere { why, may_pass }) => {
                return match may_pass {
                    true => Asked::Nobody(why),
                    false => Asked::Refused(why),
                };
            }
            Err(error) if error.status.is_none() => return Asked::Later(error),
            Err(error) => return Asked::Refused(error),
        };
        self.guests[index].gone.to = Some(to.clone());
        self.begin(index, &to).await
    }

    async fn begin(&self, index: usize, to: &str) -> Asked {
        let Guest {
            leaving, retries, ..
        } = &self.guests[index];
        let how = self.how.clone();
        let request = how.request(&leaving.vm, &leaving.qmp, to);
        let attempt = retries.failed().len();
        let key = format!("evacuate-{}-{index}-{attempt}", self.key);
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
        let (tell, interrupted) = (self.tell, self.interrupted);
        for guest in self.guests.iter_mut().filter(|guest| guest.due.is_none()) {
            // Without one it was refused.
            let Some(id) = guest.gone.id else { continue };
            let (before, shown) = (guest.gone.state, all.get(&id));
            guest.see(shown);
            if guest.gone.state == before {
                continue;
            }
            let finished = shown.and_then(|shown| shown.finished.as_ref());
            let again = finished.filter(|_| guest.gone.state == State::Failed && !interrupted);
            let pause = again.and_then(|finished| guest.retries.again(finished, false));
            match guest.try_again(pause) {
                Some(pause) => tell_attempt(tell, &guest.gone, pause),
                None => tell_change(tell, &guest.gone),
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
        let all = self.guests.iter_mut().map(|guest| &mut guest.gone);
        all.filter(|gone| !gone.is_over())
            .for_each(|gone| gone.leave_alone(why));
    }

    /// Nobody else is handed over, and who can be cancelled is: the last first, so that none of them gets its turn meanwhile.
    async fn cancel(&mut self) {
        self.interrupted = true;
        self.tell
            .note("cancelling (once more to leave them to pagecopyd)");
        for guest in &mut self.guests {
            if guest.due.take().is_some() {
                guest
                    .gone
                    .fail(State::Cancelled, "it was not begun", "evacuate again");
                tell_change(self.tell, &guest.gone);
            }
        }
        let under_way = self.guests.iter().map(|guest| &guest.gone).rev();
        for gone in under_way.filter(|gone| !gone.is_over()) {
            if let Some(id) = gone.id {
                let path = format!("/v1/migrations/{id}/cancel");
                // One that cannot be cancelled any more is waited for.
                let _ = self.client.post(&path, &Value::Null).await;
            }
        }
    }

    fn is_over(&self) -> bool {
        let mut all = self.guests.iter();
        all.all(|guest| guest.due.is_none() && guest.gone.is_over())
    }
}

fn wanted<'a>(to: &'a [String], how: &'a How, leaving: &'a Leaving) -> Wanted<'a> {
    Wanted {
        vm: &leaving.vm,
        qmp: &leaving.qmp,
        to,
        how,
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

/// Its last attempt has failed, and there will be another.
fn tell_attempt(tell: Tell, gone: &Gone, pause: Duration) {
    let attempt = gone.attempts.last().unwrap_or(&Value::Null);
    let why = attempt["error"].as_str().unwrap_or_default();
    let line = format!(
        "{}: failed: {why}; it runs on here, and is tried again in {} s",
        gone.vm,
        pause.as_secs()
    );
    tell.event(&line, || {
        let mut event = attempt.clone();
        event["event"] = json!("attempt-failed");
        event["vm"] = json!(gone.vm);
        event
    });
}
