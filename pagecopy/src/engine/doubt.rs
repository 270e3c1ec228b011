//! What an operator may decide about a migration in doubt, and what a destination makes of a committed guest that is not
//! known to run.
//!
//! Two words of an operator can bring a guest back into life, one on each side, and each of them is taken only with the
//! word of high-availability practice that the other side is *fenced*: its QEMU and its pagecopyd cannot run any more
//! (powered off, disk gone). Without that word the other side's answer decides, or nothing does. Letting go of a guest
//! needs no such word: done wrongly it leaves a guest stopped, with its memory whole, and never makes two.

use super::{Failure, Fault};
use crate::wire::Standing;

/// How an operator ends an `InDoubt` migration. Each is looked into first and may be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// At the source: take the guest back.
    ResumeHere {
        /// The operator's word that the destination's QEMU and pagecopyd cannot run any more.
        peer_fenced: bool,
    },
    /// At the destination: run the guest that was committed to it.
    RunHere {
        /// The operator's word that the source's QEMU and pagecopyd cannot run any more.
        peer_fenced: bool,
    },
    /// Let go of the guest here. At the source: it runs at the destination. At the destination: it never will run here.
    Abandon {
        /// The operator's word that the other side's QEMU and pagecopyd cannot run any more. It is needed at the source where the
        /// guest has run at the destination and lacks memory, which is lost then.
        peer_fenced: bool,
    },
}

/// A committed guest that is not known to run, as it is found at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// QEMU runs it.
    Runs,
    /// QEMU has it, loaded and stopped as it came.
    StandsStill,
    /// QEMU is gone, or was started anew without the guest.
    Gone,
    /// Nobody can tell, and why.
    Unclear(String),
}

/// What is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Record `Running`: it does.
    RecordRunning,
    /// Record `Aborted`: it does not, and never will.
    RecordAborted,
    /// Run it, then record `Running`.
    Run,
}

/// What the destination does about a decision of its operator.
///
/// # Errors
/// Refused, with the reason and what to do instead.
pub fn at_destination(resolution: Resolution, found: &Found) -> Result<Step, Failure> {
    match (resolution, found) {
        (Resolution::ResumeHere { .. }, _) => Err(refuse(
            "this is the destination of the migration: there is nothing to take back here",
            "use `--run-here` or `--abandon` here, or `--resume-here` at the source",
        )),
        (_, Found::Unclear(why)) => Err(refuse(
            format!("it cannot be told whether the guest runs here: {why}"),
            "see to this host's QEMU, or end it, then decide again",
        )),
        (Resolution::RunHere { .. }, Found::Runs) => Ok(Step::RecordRunning),
        (Resolution::Abandon { .. }, Found::Runs) => Err(refuse(
            "the guest runs here: the source may not take it back",
            "nothing: the source lets go of it as soon as it can ask here",
        )),
        (Resolution::RunHere { .. }, Found::Gone) => Err(refuse(
            "this host's QEMU no longer has the guest",
            "run `pagecopy resolve ID --abandon` here: the source takes the guest back when it asks",
        )),
        (Resolution::RunHere { peer_fenced: false }, Found::StandsStill) => Err(refuse(
            "the source's operator may have taken the guest back meanwhile, and then two would run",
            "wait: the guest is run here by itself as soon as the source asks. Only if the source's QEMU and pagecopyd cannot \
             run any more (powered off, disk gone), say so by adding `--peer-fenced`",
        )),
        (Resolution::RunHere { peer_fenced: true }, Found::StandsStill) => Ok(Step::Run),
        (Resolution::Abandon { .. }, Found::StandsStill | Found::Gone) => Ok(Step::RecordAborted),
    }
}

/// What the destination records when the source says that its operator has taken the guest back (`Withdrawn`); nothing
/// while it cannot be told whether the guest runs here.
pub fn when_withdrawn(found: &Found) -> Option<Step> {
    match found {
        Found::Runs => Some(Step::RecordRunning),
        Found::StandsStill | Found::Gone => Some(Step::RecordAborted),
        Found::Unclear(_) => None,
    }
}

/// The source came without the memory (`Lost`) that a committed guest lacks, which has not run here. It is not run: without
/// that memory it stands still at its first touch of it, for good. Nor is it lost yet: the file may come back, and a QEMU at
/// the source may hold all of the guest though its file was unlinked. Which of these it is only people can see.
pub fn memory_gone(reason: &str) -> Failure {
    Failure::new(
        Fault::PeerHost,
        format!(
            "the guest is committed to this host and has not run here, and the source's host does not have the memory any more \
             that it lacks: {reason}"
        ),
        "bring the source's RAM file back, and the guest is run here by itself. If the source's QEMU is still there, it has the \
         whole guest: end this host's QEMU, then run `pagecopy resolve ID --abandon` here, and the source takes the guest back. If \
         that is gone, too, make sure that the source's pagecopyd cannot run any more and run `pagecopy resolve ID --run-here \
         --peer-fenced` here, then `pagecopy resolve ID --poison --peer-fenced`: the guest goes on without what it lacks",
    )
}

/// What the source makes of its operator's decision and of what it heard of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AtSource {
    /// The operator's word counts: `ResumeHere` or `Abandon` is carried out.
    Granted,
    /// The destination has decided, in the same sense (`Ok`) or against the operator (`Err`).
    Decided(Result<&'static str, Failure>),
    /// Refused, and the doubt remains.
    Refused(Failure),
}

/// What was heard of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// There is no connection to it, or what there was died away.
    Nothing,
    /// Its pagecopyd is there, and says nothing of the guest: it let the source in or turned it away, and no answer came.
    Presence,
    /// Its answer.
    Answer(Standing),
}

/// See [`AtSource`].
pub(super) fn at_source(resolution: Resolution, heard: Heard) -> AtSource {
    use Heard::{Answer, Nothing, Presence};
    use Resolution::{Abandon, ResumeHere, RunHere};
    use Standing::{Aborted, Committed, Foreign, NoJournal, Running, Unknown};
    match (resolution, heard) {
        (RunHere { .. }, _) => AtSource::Refused(refuse(
            "this is the source of the migration: the guest is stopped here and may run at the destination",
            "use `--resume-here` or `--abandon` here, or `--run-here` at the destination",
        )),
        (ResumeHere { .. }, Answer(Running)) => AtSource::Decided(Err(refuse(
            "the destination answers that the guest runs there",
            "nothing: the migration completes",
        ))),
        (Abandon { .. }, Answer(Running)) => {
            AtSource::Decided(Ok("the destination answers that the guest runs there"))
        }
        (ResumeHere { .. }, Answer(Aborted)) => AtSource::Decided(Ok(
            "the destination answers that it never will run the guest: it is taken back here",
        )),
        (Abandon { .. }, Answer(Aborted)) => AtSource::Decided(Err(refuse(
            "the destination answers that it never will run the guest",
            "nothing: the guest is taken back here",
        ))),
        (_, Answer(Committed)) => AtSource::Refused(refuse(
            "the destination answers that the guest is committed to it: it may run there at any moment",
            "wait: the destination runs it now, and the migration completes. If it cannot, decide there with `pagecopy \
             resolve ID --abandon`, or end its QEMU and its pagecopyd for good and decide here then",
        )),
        (_, Presence) => AtSource::Refused(refuse(
            "the destination's pagecopyd is there, and has not said what became of the guest: it may run it",
            "ask again in a moment, and see that pagecopyd's log if it stays so. Only when nothing answers at that address any \
             more, because its pagecopyd and its QEMU are ended for good, decide here",
        )),
        (_, Answer(Unknown)) => AtSource::Refused(refuse(
            "the destination's pagecopyd answers, and has not decided: it may still run the guest",
            "ask again in a moment. If its log says that the journal cannot be read, end its pagecopyd and its QEMU for \
             good, then decide here",
        )),
        (_, Answer(Foreign)) => AtSource::Refused(refuse(
            "the destination's pagecopyd answers, and does not take this host for the one that the guest came from: it may run \
             the guest",
            "give pagecopyd the certificate back with which the migration began, or one with the same DNS name. Or end the \
             destination's pagecopyd and its QEMU for good, then decide here",
        )),
        (ResumeHere { peer_fenced: true } | Abandon { .. }, Nothing | Answer(NoJournal)) => {
            AtSource::Granted
        }
        (ResumeHere { peer_fenced: false }, Nothing | Answer(NoJournal)) => {
            let why = match heard {
                Answer(_) => "the destination's pagecopyd knows nothing of this migration",
                _ => "the destination does not answer",
            };
            AtSource::Refused(refuse(
                format!("{why}, and the guest may run there: two would run"),
                "wait until the destination can be asked. Only if its QEMU and its pagecopyd cannot run any more (powered off, \
                 disk gone), say so by adding `--peer-fenced`",
            ))
        }
    }
}

/// A decision that is refused: the operator's matter, in every case.
pub(super) fn refuse(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
    let what = format!("refused: {}", what.into());
    Failure::new(Fault::Operator, what, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUND: [Found; 4] = [
        Found::Runs,
        Found::StandsStill,
        Found::Gone,
        Found::Unclear(String::new()),
    ];

    #[test]
    fn only_a_fenced_word_runs_the_guest_at_the_destination_and_nothing_aborts_one_that_runs() {
        let resolutions = [
            Resolution::ResumeHere { peer_fenced: false },
            Resolution::ResumeHere { peer_fenced: true },
            Resolution::RunHere { peer_fenced: false },
            Resolution::RunHere { peer_fenced: true },
            Resolution::Abandon { peer_fenced: false },
        ];
        for resolution in resolutions {
            for found in FOUND {
                let at = format!("{resolution:?} {found:?}");
                match at_destination(resolution, &found) {
                    Ok(Step::Run) => {
                        assert_eq!(
                            resolution,
                            Resolution::RunHere { peer_fenced: true },
                            "{at}"
                        );
                        assert_eq!(found, Found::StandsStill, "{at}");
                    }
                    Ok(Step::RecordAborted) => {
                        assert_eq!(
                            resolution,
                            Resolution::Abandon { peer_fenced: false },
                            "{at}"
                        );
                        assert!(matches!(found, Found::StandsStill | Found::Gone), "{at}");
                    }
                    Ok(Step::RecordRunning) => assert_eq!(found, Found::Runs, "{at}"),
                    Err(failure) => {
                        assert!(failure.what.starts_with("refused: "), "{at}");
                        assert!(!failure.remedy.is_empty(), "{at}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_withdrawn_guest_is_aborted_unless_it_runs() {
        let steps = FOUND.map(|found| when_withdrawn(&found));
        assert_eq!(
            steps,
            [
                Some(Step::RecordRunning),
                Some(Step::RecordAborted),
                Some(Step::RecordAborted),
                None
            ]
        );
    }

    #[test]
    fn the_destinations_answer_beats_every_word_and_silence_needs_a_fence() {
        let all = [
            Heard::Nothing,
            Heard::Presence,
            Heard::Answer(Standing::Running),
            Heard::Answer(Standing::Aborted),
            Heard::Answer(Standing::Unknown),
            Heard::Answer(Standing::Committed),
            Heard::Answer(Standing::NoJournal),
            Heard::Answer(Standing::Foreign),
        ];
        let outcome = |resolution, heard| match at_source(resolution, heard) {
            AtSource::Granted => "granted",
            AtSource::Decided(Ok(_)) => "agreed",
            AtSource::Decided(Err(_)) => "overruled",
            AtSource::Refused(_) => "refused",
        };
        let row = |resolution| all.map(|heard| outcome(resolution, heard));
        assert_eq!(
            row(Resolution::ResumeHere { peer_fenced: false }),
            [
                "refused",
                "refused",
                "overruled",
                "agreed",
                "refused",
                "refused",
                "refused",
                "refused"
            ]
        );
        assert_eq!(
            row(Resolution::ResumeHere { peer_fenced: true }),
            [
                "granted",
                "refused",
                "overruled",
                "agreed",
                "refused",
                "refused",
                "granted",
                "refused"
            ]
        );
        assert_eq!(
            row(Resolution::Abandon { peer_fenced: false }),
            [
                "granted",
                "refused",
                "agreed",
                "overruled",
                "refused",
                "refused",
                "granted",
                "refused"
            ]
        );
        assert_eq!(
            row(Resolution::RunHere { peer_fenced: true }),
            ["refused"; 8]
        );
    }
}
