//! A source that comes without the memory that the guest lacks, or does not lack.

use super::*;

fn lost(all_here: bool) -> Input {
    Input::SourceLost {
        reason: "no such file".into(),
        all_here,
    }
}

fn failed() -> Input {
    Input::QemuFailed(Failure::new(Fault::Qemu, "not now", ""))
}

/// What the operator reads, and that it ends when the memory is there after all.
#[test]
fn a_source_without_the_memory_is_a_pause_with_a_reason() {
    let reason_of = |outputs: &[Output]| {
        outputs.iter().rev().find_map(|output| match output {
            Output::Report(Report::Paused { reason }) => Some(reason.clone()),
            _ => None,
        })
    };
    let lost = || lost(false);
    // Also over a connection that nobody has noticed to be dead.
    for mut destination in [paused(), fetching()] {
        destination.handle(NOW, lacks(8192));
        destination.handle(NOW, lost());
        let said = outputs(&mut destination);
        let reason = reason_of(&said).unwrap();
        for words in ["no such file", "8192 bytes", "--poison --peer-fenced"] {
            assert!(reason.contains(words), "{reason}");
        }
        assert_eq!(destination.state(), State::Paused);
        // It comes again and again.
        destination.handle(NOW, lost());
        assert_eq!(outputs(&mut destination), []);
        destination.handle(NOW, Input::Served);
        let served = outputs(&mut destination);
        assert!(served.contains(&Output::Pull) && reason_of(&served).is_none());
        assert_eq!(destination.state(), State::Migrating);
    }
    // Before the guest runs here, and while it is being run, it only says that the connection is of no use.
    for (mut destination, expected) in [
        (arming().0, vec![]),
        (starting(), vec![Output::StopPulling]),
    ] {
        let before = destination.state();
        destination.handle(NOW, lost());
        assert_eq!(
            (outputs(&mut destination), destination.state()),
            (expected, before)
        );
    }
}

/// It is not run with what is here, unless it is being run already.
#[test]
fn a_guest_that_has_not_run_is_not_run_without_its_memory() {
    let lost = || lost(false);
    let left = |destination: &mut Destination| {
        let told = outputs(destination);
        assert!(!told.contains(&Output::RunGuest), "{told:?}");
        assert!(
            matches!(&told[..], [.., Output::Finished { state: State::InDoubt, failure: Some(why), .. }]
                if why.what.contains("no such file") && why.remedy.contains("--abandon")),
            "{told:?}"
        );
    };
    // Before the order to run it, while it is carried out in vain, and between two attempts.
    let mut destination = committing();
    destination.handle(NOW, lost());
    destination.handle(NOW, Input::Journaled(Record::Committed));
    left(&mut destination);
    let mut destination = starting();
    destination.handle(NOW, lost());
    destination.handle(NOW, failed());
    left(&mut destination);
    let mut destination = starting();
    destination.handle(NOW, failed());
    destination.handle(NOW, lost());
    left(&mut destination);
    // It is there after all.
    let mut destination = starting();
    destination.handle(NOW, lost());
    destination.handle(NOW, Input::Served);
    destination.handle(NOW, failed());
    let again = destination.poll_timeout().unwrap();
    destination.handle(again, Input::Tick);
    assert!(outputs(&mut destination).contains(&Output::RunGuest));
}

/// Where everything has come, nothing is needed of the source: the guest is run, or runs on, whatever has become of it there.
#[test]
fn a_guest_whose_memory_has_all_come_is_run_without_its_source() {
    let runs = |destination: &mut Destination| {
        assert!(outputs(destination).contains(&Output::RunGuest));
        destination.handle(NOW, whole());
        destination.handle(NOW, Input::GuestRunning);
        destination.handle(NOW, Input::Journaled(Record::Running));
        destination.handle(NOW, Input::Journaled(WHOLE));
        let told = outputs(destination);
        let completed = |output: &Output| {
            matches!(
                output,
                Output::Finished {
                    state: State::Completed,
                    ..
                }
            )
        };
        assert!(told.contains(&Output::Journal(WHOLE)), "{told:?}");
        assert!(told.iter().any(completed), "{told:?}");
    };
    let mut destination = committing();
    destination.handle(NOW, lost(true));
    destination.handle(NOW, Input::Journaled(Record::Committed));
    runs(&mut destination);
    // Its last page was on its way through the daemon, and all is here before it is decided.
    let mut destination = committing();
    destination.handle(NOW, lost(false));
    destination.handle(NOW, whole());
    destination.handle(NOW, Input::Journaled(Record::Committed));
    runs(&mut destination);
    // It is tried again, as ever.
    let mut destination = starting();
    destination.handle(NOW, failed());
    destination.handle(NOW, lost(true));
    outputs(&mut destination);
    let again = destination.poll_timeout().unwrap();
    destination.handle(again, Input::Tick);
    runs(&mut destination);
    // It runs, and people are told of no pause.
    let mut destination = fetching();
    destination.handle(NOW, lost(true));
    assert_eq!(outputs(&mut destination), [Output::StopPulling]);
    assert_eq!(destination.state(), State::Migrating);
    destination.handle(NOW, whole());
    assert!(outputs(&mut destination).contains(&Output::Journal(WHOLE)));
}
