//! Post-copy, source and destination against each other in one thread and virtual time: the guest goes first, and whatever
//! goes wrong at any step, it ends whole in one place.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, dead_code)]

mod pair;

use std::time::Duration;

use pagecopy::engine::destination;
use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::event::State;
use pagecopy::engine::source::{self, After, Mode};
use pair::{Pair, Trouble};

const STEPS: u64 = 400_000;

fn moving(mode: Mode) -> Pair {
    let mut pair = Pair::new(4000, |setup| {
        setup.options.mode = mode;
        setup.options.downtime_limit = Duration::from_millis(12);
    });
    pair.writes_per_ms = 2000;
    pair.working_set = 4000;
    pair
}

/// Until the guest runs at the destination and lacks pages.
fn until_it_fetches(pair: &mut Pair) {
    let serves = |pair: &Pair| {
        let state = pair.source.as_ref().map(source::Source::state);
        pair.destination_runs && state == Some(State::Migrating)
    };
    while !serves(pair) {
        assert!(pair.step(), "{:?}", pair.notices);
    }
    assert!(pair.lacks() > 0, "nothing lacks");
}

fn assert_moved(pair: &Pair) {
    let end = pair.result();
    assert_eq!(end.state, State::Completed, "{end:?} {:?}", pair.notices);
    let (state, failure) = pair.destination_finished.as_ref().unwrap();
    assert_eq!(*state, State::Completed, "{failure:?}");
    assert!(pair.destination_runs && !pair.source_runs);
    assert_eq!(pair.lacks(), 0);
    pair.assert_whole_there();
    assert!(!pair.moved.open, "the source's memory is still open");
}

#[test]
fn the_guest_goes_first_and_its_memory_follows() {
    for mode in [
        Mode::Postcopy,
        Mode::Hybrid(After::Rounds(1)),
        Mode::Hybrid(After::Auto),
        Mode::Hybrid(After::Time(Duration::from_millis(3))),
    ] {
        let mut pair = moving(mode);
        pair.run(STEPS);
        assert_moved(&pair);
        let figures = &pair.result().figures;
        assert!(figures.lacking_bytes.unwrap() > 0, "{mode:?}: {figures:?}");
        assert!(figures.postcopy_ms.unwrap() > 0.0, "{mode:?}: {figures:?}");
        assert!(figures.paused_ms.unwrap() < 1e-9, "{mode:?}: {figures:?}");
        assert_eq!(figures.faults.unwrap().faults, 3, "{mode:?}: {figures:?}");
        assert!(!pair.moved.written.is_empty(), "the guest wrote there");
    }
}

#[test]
fn at_once_nothing_is_sent_before_the_guest() {
    let mut pair = moving(Mode::Postcopy);
    pair.run(STEPS);
    assert_eq!(pair.result().figures.pages_sent, 0);
}

#[test]
fn a_quiet_guest_needs_no_post_copy() {
    let mut pair = Pair::new(3000, |setup| setup.options.mode = Mode::Hybrid(After::Auto));
    pair.run(STEPS);
    assert_moved(&pair);
    assert_eq!(pair.result().figures.lacking_bytes, None);
}

/// Faster than the link, and the operator allows it: rather than fail. If not, it stays.
#[test]
fn a_guest_that_is_too_busy_goes_first_where_that_is_allowed() {
    for allowed in [true, false] {
        let mut pair = moving(Mode::Auto { postcopy: allowed });
        pair.writes_per_ms = 3000;
        pair.run(STEPS);
        if allowed {
            assert_moved(&pair);
            assert!(pair.result().figures.lacking_bytes.unwrap() > 0);
        } else {
            assert_eq!(pair.result().state, State::Failed);
            assert!(pair.source_runs && !pair.destination_runs);
        }
    }
}

#[test]
fn by_hand_in_the_middle_of_a_round() {
    let mut pair = moving(Mode::Auto { postcopy: true });
    pair.writes_per_ms = 3000;
    while pair.rounds < 1 {
        assert!(pair.step());
    }
    pair.tell_source(source::Input::StartPostcopy);
    pair.drain();
    assert!(pair.decided.pop().unwrap().is_ok());
    pair.run(STEPS);
    assert_moved(&pair);

    let mut without = moving(Mode::Precopy);
    while without.rounds < 1 {
        assert!(without.step());
    }
    without.tell_source(source::Input::StartPostcopy);
    without.drain();
    assert!(without.decided.pop().unwrap().is_err());
}

#[test]
fn a_destination_that_cannot_is_told_before_anything_moves() {
    let mut pair = Pair::new(3000, |setup| {
        setup.options.mode = Mode::Postcopy;
        setup.data_channels = 1;
    });
    pair.run(STEPS);
    let failure = pair.result().failure.as_ref().unwrap();
    assert!(failure.what.contains("post-copy"), "{failure:?}");
    assert!(pair.source_runs);
}

/// The link is cut and comes back: a pause.
#[test]
fn a_cut_is_a_pause() {
    let mut pair = moving(Mode::Postcopy);
    until_it_fetches(&mut pair);
    for _ in 0..5 {
        pair.step();
    }
    let lacked = pair.lacks();
    pair.network_gone = true;
    pair.trouble(Trouble::LinkCut);
    let from = pair.now;
    while pair.now.since(from) < Duration::from_secs(60) {
        assert!(pair.step());
    }
    assert_eq!(pair.lacks(), lacked, "fetched without a link");
    assert_eq!(pair.source.as_ref().unwrap().state(), State::Paused);
    assert_eq!(pair.destination.as_ref().unwrap().state(), State::Paused);
    pair.network_gone = false;
    pair.run(STEPS);
    assert_moved(&pair);
    assert!(pair.result().figures.paused_ms.unwrap() >= 60_000.0);
}

/// Every trouble, at every step of a whole post-copy: one guest, whole, in the end.
#[test]
fn trouble_at_any_step_leaves_one_whole_guest() {
    let troubles = [
        Trouble::LinkCut,
        Trouble::CancelAtSource,
        Trouble::CancelAtDestination,
        Trouble::SourceHostFails,
        Trouble::DestinationHostFails,
        Trouble::SourceCrashes { synced: true },
        Trouble::SourceCrashes { synced: false },
        Trouble::DestinationCrashes { synced: true },
        Trouble::DestinationCrashes { synced: false },
    ];
    let fresh = || {
        let mut pair = Pair::new(600, |setup| setup.options.mode = Mode::Postcopy);
        pair.writes_per_ms = 10;
        pair.working_set = 600;
        pair
    };
    for trouble in troubles {
        let (mut moved, mut stayed, mut after) = (0, 0, 0);
        for at in 0.. {
            let mut pair = fresh();
            for _ in 0..at {
                pair.step();
            }
            if pair.ended() {
                break;
            }
            after += u32::from(pair.destination_runs);
            pair.trouble(trouble);
            for _ in 0..STEPS {
                if pair.ended() || !pair.step() {
                    break;
                }
            }
            assert!(
                pair.ended(),
                "{trouble:?} at {at}: no end: {:?} {:?} {:?}",
                pair.finished,
                pair.destination_finished,
                pair.notices
            );
            let end = pair.result();
            assert!(
                pair.source_runs != pair.destination_runs,
                "{trouble:?} at {at}: {end:?} {:?}",
                pair.notices
            );
            if pair.destination_runs {
                moved += 1;
                assert_eq!(end.state, State::Completed, "{trouble:?} at {at}: {end:?}");
                assert_eq!(pair.lacks(), 0, "{trouble:?} at {at}: {:?}", pair.notices);
                pair.assert_whole_there();
            } else {
                stayed += 1;
            }
        }
        assert!(
            moved > 0 && stayed + moved > 20 && after > 5,
            "{trouble:?}: {moved} {stayed} {after}"
        );
    }
}

#[test]
fn an_operator_may_give_up_what_lacks_when_the_source_is_gone_for_good() {
    let mut pair = moving(Mode::Postcopy);
    until_it_fetches(&mut pair);
    let poison = |peer_fenced| destination::Input::Poison { peer_fenced };
    pair.tell_destination(poison(true));
    pair.drain();
    assert!(pair.decided.pop().unwrap().is_err(), "the source is there");
    pair.network_gone = true;
    pair.trouble(Trouble::LinkCut);
    pair.tell_destination(poison(false));
    pair.drain();
    let refused = pair.decided.pop().unwrap().unwrap_err();
    assert!(refused.remedy.contains("--peer-fenced"), "{refused:?}");
    pair.tell_destination(poison(true));
    while pair.destination_finished.is_none() {
        assert!(pair.step());
    }
    assert!(pair.moved.poisoned > 0);
    assert!(pair.decided.pop().unwrap().is_ok());

    // The source lets go of it, when its operator says so.
    let abandon = |peer_fenced| source::Input::Resolve(Resolution::Abandon { peer_fenced });
    pair.tell_source(abandon(false));
    pair.drain();
    let refused = pair.decided.pop().unwrap().unwrap_err();
    assert!(refused.remedy.contains("--peer-fenced"), "{refused:?}");
    pair.tell_source(abandon(true));
    pair.drain();
    while pair.decided.is_empty() {
        assert!(pair.step());
    }
    assert!(pair.decided.pop().unwrap().is_ok());
    pair.run(STEPS);
    assert_eq!(pair.result().state, State::Failed);
}

#[test]
fn a_guest_that_ends_in_post_copy_frees_its_source() {
    let mut pair = moving(Mode::Postcopy);
    until_it_fetches(&mut pair);
    pair.destination_runs = false;
    pair.trouble(Trouble::DestinationQemuFails);
    pair.run(STEPS);
    let (state, failure) = pair.destination_finished.clone().unwrap();
    assert_eq!(state, State::Failed, "{failure:?}");
    assert_eq!(pair.result().state, State::Failed);
    assert!(!pair.source_runs, "the guest has run elsewhere");
}
