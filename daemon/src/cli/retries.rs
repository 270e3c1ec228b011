//! Trying a migration again that has failed, where that is safe and may help.
//!
//! It is safe after the `failed` of a guest that had not gone first (post-copy): that is said only when the guest runs at the
//! source and the destination will never run it. The next attempt is a migration of its own, with an id of its own, and is
//! refused like any other if its destination is not as it should be. After a doubt, a post-copy or an answer that did not come
//! nothing is tried: nobody here knows where the guest is. It may help where the network, the other host or the guest's writes
//! were to blame; what is wrong with the request, with QEMU or with this host will be so again.

use std::time::Duration;

use pagecopy::engine::event::{State, Way};
use serde_json::{Value, json};

use crate::failure::Fault;
use crate::migrations::Finished;

/// The pause before the first attempt after one that failed; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The attempts so far.
#[derive(Debug)]
pub(super) struct Retries {
    left: u32,
    pause: Duration,
    /// Those that failed and had another after them.
    failed: Vec<Value>,
    /// After how long there is another.
    pub(super) next: Option<Duration>,
}

impl Retries {
    pub(super) fn new(left: u32) -> Retries {
        Retries {
            left,
            pause: FIRST_PAUSE,
            failed: Vec::new(),
            next: None,
        }
    }

    /// An attempt has ended so. Its event says what came of those before; it is not the last one if there will be another.
    pub(super) fn after(&mut self, finished: &Finished, interrupted: bool, event: &mut Value) {
        self.next = self.again(finished, interrupted);
        if self.next.is_some() {
            event["event"] = json!("attempt-failed");
        } else if !self.failed.is_empty() {
            event["attempts"] = json!(self.failed);
        }
    }

    /// An attempt has ended so: after how long there is another, if there is.
    pub(super) fn again(&mut self, finished: &Finished, interrupted: bool) -> Option<Duration> {
        if interrupted || !may_help(finished) {
            return None;
        }
        self.once_more(json!({
            "id": finished.id, "at_ms": finished.at_ms, "error": finished.error, "fault": finished.fault,
        }))
    }

    /// None of several destinations could be chosen, since one could not be reached: nothing was begun, and that may pass.
    pub(super) fn after_nobody(&mut self, why: &str) -> Option<Duration> {
        self.once_more(json!({ "id": null, "error": why, "fault": Fault::Network }))
    }

    fn once_more(&mut self, failed: Value) -> Option<Duration> {
        self.left = self.left.checked_sub(1)?;
        let pause = self.pause;
        self.pause = LONGEST_PAUSE.min(self.pause * 2);
        self.failed.push(failed);
        Some(pause)
    }

    /// The attempts that were not the last, as the last event tells them.
    pub(super) fn failed(&self) -> &[Value] {
        &self.failed
    }

    /// Says that there will be another.
    pub(super) fn note(&self, as_json: bool, pause: Duration) {
        if !as_json {
            eprintln!(
                "pagecopy: the guest runs on here; it is tried again in {} s ({} more times at most)",
                pause.as_secs(),
                self.left + 1
            );
        }
    }
}

/// Whether another attempt is safe, and may end otherwise.
fn may_help(finished: &Finished) -> bool {
    let transient = [Fault::Network, Fault::PeerHost, Fault::Guest];
    finished.status == State::Failed
        && finished.figures.way() == Way::Precopy
        && finished
            .fault
            .is_some_and(|fault| transient.contains(&fault))
}

#[cfg(test)]
mod tests {
    use pagecopy::engine::event::Figures;
    use pagecopy::engine::{Failure, MigrationId};

    use super::*;

    fn ended(status: State, fault: Fault) -> Finished {
        let failure = Failure::new(fault, "what", "remedy");
        Finished::new(
            MigrationId([7; 16]),
            status,
            Some(&failure),
            Figures::default(),
        )
    }

    /// The pause before the next, and the event.
    fn after(retries: &mut Retries, end: &Finished) -> (Option<u64>, Value) {
        let mut event = json!({ "event": "finished" });
        retries.after(end, false, &mut event);
        (retries.next.map(|pause| pause.as_secs()), event)
    }

    #[test]
    fn only_what_is_safe_and_may_help_is_tried_again() {
        for (status, fault, again) in [
            (State::Failed, Fault::Network, true),
            (State::Failed, Fault::PeerHost, true),
            (State::Failed, Fault::Guest, true),
            (State::Failed, Fault::Operator, false),
            (State::Failed, Fault::ThisHost, false),
            (State::Failed, Fault::Qemu, false),
            (State::InDoubt, Fault::Network, false),
            (State::Cancelled, Fault::Network, false),
            (State::Completed, Fault::Network, false),
        ] {
            let mut retries = Retries::new(9);
            let (next, event) = after(&mut retries, &ended(status, fault));
            assert_eq!(next.is_some(), again, "{status:?} {fault:?}");
            assert_eq!(event["event"] == "finished", !again);
        }
        let mut gone_first = ended(State::Failed, Fault::PeerHost);
        gone_first.figures.lacking_bytes = Some(4096);
        assert_eq!(after(&mut Retries::new(9), &gone_first).0, None);
        let mut interrupted = Retries::new(9);
        let mut event = json!({ "event": "finished" });
        interrupted.after(&ended(State::Failed, Fault::Network), true, &mut event);
        assert_eq!(interrupted.next, None, "the operator has had enough");
    }

    #[test]
    fn pauses_double_and_the_last_event_has_all_attempts() {
        let mut retries = Retries::new(8);
        let end = ended(State::Failed, Fault::Network);
        let pauses: Vec<u64> = (0..8).filter_map(|_| after(&mut retries, &end).0).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        let (next, event) = after(&mut retries, &end);
        assert_eq!(next, None);
        assert_eq!(event["event"], "finished");
        assert_eq!(event["attempts"].as_array().map(Vec::len), Some(8));
        assert_eq!(event["attempts"][0]["fault"], "network");
        let mut once = Retries::new(1);
        assert_eq!(once.after_nobody("away"), Some(FIRST_PAUSE));
        assert_eq!(once.after_nobody("away"), None);
        assert_eq!(once.failed()[0]["fault"], "network");
        let (_, alone) = after(&mut Retries::new(0), &end);
        assert_eq!(
            alone,
            json!({ "event": "finished" }),
            "as ever without --retries"
        );
    }
}
