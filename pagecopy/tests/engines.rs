//! Source and destination against each other, in one thread and virtual time: what must happen when all goes well, and
//! what must never happen when anything goes wrong at any step.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, dead_code)]

mod pair;

use std::time::Duration;

use pagecopy::engine::Fault;
use pagecopy::engine::doubt::{Resolution, Step};
use pagecopy::engine::event::State;
use pagecopy::engine::journal::Record;
use pagecopy::engine::source;
use pair::{Pair, Trouble};

const STEPS: u64 = 200_000;

#[test]
fn an_idle_guest_moves_after_one_round() {
    let mut pair = Pair::new(3000, |_| {});
    pair.run(STEPS);
    assert_eq!(pair.result().state, State::Completed, "{:?}", pair.result());
    assert!(pair.destination_runs && !pair.source_runs);
    assert_eq!(pair.source_pages, pair.destination_pages);
    let figures = &pair.result().figures;
    assert_eq!(
        (figures.rounds, figures.pages_sent, figures.pages_zero),
        (1, 2000, 0)
    );
    assert_eq!(figures.attach_stop_us, Some(300));
    assert_eq!(figures.device_state_bytes, 300_000);
    let downtime = figures.downtime_ms.unwrap();
    assert!((1.0..20.0).contains(&downtime), "{downtime}");
}

#[test]
fn a_guest_that_writes_moves_whole() {
    for direct_io in [false, true] {
        let mut pair = Pair::new(20_000, |setup| {
            setup.direct_io = direct_io;
            setup.options.downtime_limit = Duration::from_millis(12);
        });
        pair.writes_per_ms = 100;
        pair.working_set = 4000;
        pair.run(STEPS);
        assert_eq!(pair.result().state, State::Completed, "{:?}", pair.result());
        assert!(pair.rounds > 1, "one round was enough");
        assert_eq!(pair.source_pages, pair.destination_pages);
    }
}

#[test]
fn what_becomes_a_hole_arrives_as_one() {
    let mut pair = Pair::new(3000, |_| {});
    while pair.rounds < 1 {
        assert!(pair.step());
    }
    // A balloon takes it, and no scan sees that.
    pair.source_pages[100] = 0;
    pair.run(STEPS);
    assert_eq!(pair.result().state, State::Completed);
    assert_eq!(pair.source_pages, pair.destination_pages);
}

#[test]
fn the_bandwidth_limit_is_kept() {
    let mut pair = Pair::new(30_000, |setup| {
        setup.options.bandwidth_limit = Some(20_000_000)
    });
    pair.run(STEPS);
    let figures = &pair.result().figures;
    // 20,000 pages of 4 KiB at 20 MB/s, less the first batches that the bucket lets through.
    assert!(
        (3_800.0..4_300.0).contains(&figures.total_ms),
        "{figures:?}"
    );
}

#[test]
fn a_guest_that_is_too_busy_stays_with_a_verdict() {
    let limits: [fn(&mut source::Options); 3] = [
        |options| options.max_rounds = 5,
        |options| options.timeout = Some(Duration::from_millis(700)),
        |_| {},
    ];
    for limit in limits {
        let mut pair = Pair::new(40_000, |setup| {
            setup.options.downtime_limit = Duration::from_millis(15);
            setup.options.bandwidth_limit = Some(100_000_000);
            setup.options.max_rounds = 10_000;
            limit(&mut setup.options);
        });
        pair.writes_per_ms = 2000;
        pair.run(STEPS);
        let failure = pair.result().failure.clone().unwrap();
        assert_eq!(
            (pair.result().state, failure.fault),
            (State::Failed, Fault::Guest),
            "{failure:?}"
        );
        assert!(
            failure.what.contains("MB/s, goodput") && failure.what.contains("limit 15.0 ms"),
            "{}",
            failure.what
        );
        assert!(failure.remedy.contains("--downtime-limit"));
        assert!(pair.source_runs && !pair.destination_runs);
        assert_eq!(pair.destination_finished.unwrap().0, State::Failed);
    }
}

/// 40,000 pages at 100 MB/s, of which it writes 8 GB/s at full speed.
fn too_fast(change: impl FnOnce(&mut source::Options)) -> Pair {
    let mut pair = Pair::new(40_000, |setup| {
        setup.options.downtime_limit = Duration::from_millis(60);
        setup.options.bandwidth_limit = Some(100_000_000);
        setup.options.throttle = true;
        change(&mut setup.options);
    });
    pair.writes_per_ms = 2000;
    pair
}

#[test]
fn a_guest_that_is_too_busy_is_slowed_as_far_as_it_takes() {
    let mut pair = too_fast(|_| {});
    pair.run(STEPS);
    let figures = &pair.result().figures;
    assert_eq!(pair.result().state, State::Completed, "{:?}", pair.result());
    assert!(figures.downtime_ms.unwrap() < 70.0, "{figures:?}");
    assert_eq!(pair.source_pages, pair.destination_pages);
    // More and more, and let go of once it stood still.
    let (last, slowed) = pair.throttled.split_last().unwrap();
    assert_eq!(*last, 0, "{:?}", pair.throttled);
    assert!(slowed.iter().all(|percent| (1..=99).contains(percent)));
    assert_eq!(Some(&figures.throttle_percent), slowed.iter().max());
    assert!(figures.throttle_percent > 90, "{figures:?}");
}

#[test]
fn a_guest_that_is_slowed_is_let_go_of_however_it_ends() {
    for trouble in TROUBLES {
        let mut pair = too_fast(|_| {});
        while pair.throttled.is_empty() {
            assert!(pair.step(), "{trouble:?}");
        }
        pair.trouble(trouble);
        pair.run(STEPS);
        assert_eq!(
            pair.throttled.last(),
            Some(&0),
            "{trouble:?}: {:?}",
            pair.throttled
        );
    }
}

#[test]
fn nobody_is_slowed_who_converges_or_may_go_first() {
    let mut converges = too_fast(|_| {});
    converges.writes_per_ms = 15;
    let postcopy = |options: &mut source::Options| {
        options.mode = source::Mode::Auto { postcopy: true };
    };
    let limit_of_devices = |options: &mut source::Options| {
        options.downtime_limit = Duration::from_millis(10);
    };
    for mut pair in [converges, too_fast(postcopy), too_fast(limit_of_devices)] {
        pair.run(STEPS);
        assert_eq!(pair.throttled, [0; 0]);
    }
}

#[test]
fn verify_agrees_and_says_what_it_cost() {
    let mut pair = Pair::new(5000, |setup| setup.options.verify = true);
    pair.run(STEPS);
    assert_eq!(pair.result().state, State::Completed, "{:?}", pair.result());
    assert!(pair.result().figures.verify_ms.unwrap() >= 1.0);
}

#[test]
fn verify_names_the_page_that_differs() {
    let mut pair = Pair::new(5000, |setup| setup.options.verify = true);
    pair.spoil = Some(3001);
    pair.run(STEPS);
    let failure = pair.result().failure.clone().unwrap();
    assert!(
        failure
            .what
            .contains("page 3001 (at byte 0xbb9000) of RAMBlock \"ram\""),
        "{}",
        failure.what
    );
    assert!(pair.source_runs && !pair.destination_runs);
}

const TROUBLES: [Trouble; 11] = [
    Trouble::CancelAtSource,
    Trouble::CancelAtDestination,
    Trouble::LinkCut,
    Trouble::SourceQemuFails,
    Trouble::SourceHostFails,
    Trouble::DestinationHostFails,
    Trouble::DestinationQemuFails,
    Trouble::SourceCrashes { synced: false },
    Trouble::SourceCrashes { synced: true },
    Trouble::DestinationCrashes { synced: false },
    Trouble::DestinationCrashes { synced: true },
];

/// A migration of which every step is disturbed once.
fn small(verify: bool) -> Pair {
    let mut pair = Pair::new(600, |setup| setup.options.verify = verify);
    pair.writes_per_ms = 5;
    pair
}

#[test]
fn trouble_at_any_step_leaves_one_whole_guest() {
    for verify in [false, true] {
        let mut undisturbed = small(verify);
        undisturbed.run(STEPS);
        for trouble in TROUBLES {
            let mut ends = [0; 2];
            for step in 0..undisturbed.steps {
                let mut pair = small(verify);
                for _ in 0..step {
                    pair.step();
                }
                pair.trouble(trouble);
                pair.run(STEPS);
                let at = format!(
                    "{trouble:?} at step {step}: {:?} {:?}",
                    pair.finished, pair.notices
                );
                assert!(pair.source_runs != pair.destination_runs, "{at}");
                let completed = pair.result().state == State::Completed;
                assert_eq!(completed, pair.destination_runs, "{at}");
                if completed {
                    assert_eq!(pair.source_pages, pair.destination_pages, "{at}");
                }
                ends[usize::from(completed)] += 1;
            }
            assert!(
                ends[0] > 0 && ends[1] > 0,
                "{trouble:?} ends both ways: {ends:?}"
            );
        }
    }
}

#[test]
fn the_guest_runs_on_within_100_ms_when_something_fails_before_commit() {
    let mut pair = small(false);
    while pair.source_runs {
        assert!(pair.step());
    }
    let cut = pair.now;
    pair.trouble(Trouble::LinkCut);
    while !pair.source_runs {
        assert!(pair.step());
    }
    assert!(pair.now.since(cut) < Duration::from_millis(100));
}

/// Both guests stand still, `Commit` is lost or on its way, and the network is gone.
fn in_doubt() -> Pair {
    let mut pair = small(false);
    loop {
        let mut ahead = small(false);
        for _ in 0..=pair.steps {
            ahead.step();
        }
        ahead.network_gone = true;
        ahead.trouble(Trouble::LinkCut);
        if ahead
            .finished
            .last()
            .is_some_and(|finished| finished.state == State::InDoubt)
        {
            return ahead;
        }
        assert!(pair.step() && !pair.ended());
    }
}

#[test]
fn in_doubt_nothing_is_resumed_and_the_peer_is_asked_until_it_answers() {
    let mut pair = in_doubt();
    for _ in 0..50 {
        assert!(pair.step());
    }
    assert!(
        !pair.source_runs && pair.notices.iter().any(|text| text.contains("no route")),
        "{:?}",
        pair.notices
    );
    pair.tell_source(source::Input::Cancel);
    pair.network_gone = false;
    pair.run(STEPS);
    assert!(
        pair.notices
            .iter()
            .any(|text| text.contains("too late to cancel"))
    );
    assert!(pair.source_runs != pair.destination_runs);
    assert_eq!(pair.finished.len(), 2);
}

#[test]
fn an_operator_decides_when_the_peer_is_gone() {
    for (resolution, state) in [
        (Resolution::ResumeHere { peer_fenced: true }, State::Failed),
        (Resolution::Abandon { peer_fenced: false }, State::Completed),
    ] {
        let mut pair = in_doubt();
        pair.destination = None;
        pair.destination_runs = false;
        for _ in 0..20 {
            assert!(pair.step());
        }
        pair.tell_source(source::Input::Resolve(resolution));
        pair.run(STEPS);
        assert_eq!(
            (pair.result().state, pair.source_runs),
            (
                state,
                resolution != Resolution::Abandon { peer_fenced: false }
            )
        );
    }
}

const AT_SOURCE: [Resolution; 3] = [
    Resolution::ResumeHere { peer_fenced: false },
    Resolution::ResumeHere { peer_fenced: true },
    Resolution::Abandon { peer_fenced: false },
];
const AT_DESTINATION: [Resolution; 3] = [
    Resolution::RunHere { peer_fenced: false },
    Resolution::RunHere { peer_fenced: true },
    Resolution::Abandon { peer_fenced: false },
];

/// Every moment at which a lost connection leaves the source in doubt, with the destination's daemon as it is or killed.
fn doubts() -> Vec<(String, Pair)> {
    // A guest that does not write: each step is one of the migration's.
    let small = || Pair::new(600, |_| {});
    let mut undisturbed = small();
    undisturbed.run(STEPS);
    let mut doubts = Vec::new();
    for step in 0..undisturbed.steps {
        for crash in [
            None,
            Some(Trouble::DestinationCrashes { synced: false }),
            Some(Trouble::DestinationCrashes { synced: true }),
        ] {
            let mut pair = small();
            for _ in 0..step {
                pair.step();
            }
            pair.network_gone = true;
            pair.trouble(crash.unwrap_or(Trouble::LinkCut));
            // Until what was under way at the destination has come to its end.
            for _ in 0..200 {
                pair.step();
            }
            if pair
                .source
                .as_ref()
                .is_some_and(|it| it.state() == State::InDoubt)
            {
                let at = format!("step {step}, {crash:?}, {:?}", pair.standing());
                doubts.push((at, pair));
            }
        }
    }
    assert!(doubts.len() > 10, "{} moments of doubt", doubts.len());
    doubts
}

/// What both operators got.
#[derive(Default)]
struct Asked {
    source: Option<String>,
    destination: Option<Step>,
}

fn ask_both(pair: &mut Pair, source: Resolution, destination: Resolution, first: bool) -> Asked {
    let mut asked = Asked::default();
    for at_source in [first, !first] {
        if at_source {
            let fenced = source == Resolution::ResumeHere { peer_fenced: true };
            pair.false_word = fenced && pair.network_gone;
            let told = pair.source_decides(source, 2000).expect("an answer");
            asked.source = told.ok();
        } else {
            asked.destination = pair.destination_decides(destination).ok();
        }
    }
    asked
}

#[test]
fn two_operators_who_are_wrong_at_once_make_no_two_guests() {
    let mut seen = std::collections::BTreeSet::new();
    for source in AT_SOURCE {
        for destination in AT_DESTINATION {
            for (source_first, back) in [(true, true), (true, false), (false, true), (false, false)]
            {
                for (at, mut pair) in doubts() {
                    pair.network_gone = !back;
                    let asked = ask_both(&mut pair, source, destination, source_first);
                    let at = format!(
                        "{at}: {source:?} {destination:?}, source first {source_first}, network {back}: {:?} {:?}",
                        asked.source, asked.destination
                    );
                    // Without the network a word that nobody could check may have made two; from now on none does.
                    let runs_there = pair.destination_runs;
                    pair.network_gone = false;
                    for _ in 0..300 {
                        pair.step();
                        pair.source_tells();
                    }
                    let more = pair.destination_decides(Resolution::RunHere { peer_fenced: true });
                    let two = pair.source_runs && pair.destination_runs;
                    assert!(!two || pair.false_word && runs_there, "{at}, then {more:?}");
                    let none = !pair.source_runs && !pair.destination_runs;
                    let let_go = source == Resolution::Abandon { peer_fenced: false }
                        && asked.source.is_some();
                    assert!(!none || let_go, "no guest runs: {at}: {:?}", pair.finished);
                    seen.insert((two, none, asked.source.is_some(), asked.destination));
                }
            }
        }
    }
    // The table is no empty one: each kind of end was seen.
    assert!(
        seen.iter().any(|(two, ..)| *two),
        "a false word that nobody could check"
    );
    assert!(seen.iter().any(|(two, none, ..)| !two && !none));
    for step in [Step::Run, Step::RecordAborted] {
        assert!(
            seen.iter().any(|(.., taken)| *taken == Some(step)),
            "{step:?}"
        );
    }
}

#[test]
fn there_is_nothing_to_resolve_without_doubt() {
    let mut pair = small(false);
    pair.tell_source(source::Input::Resolve(Resolution::ResumeHere {
        peer_fenced: true,
    }));
    pair.run(STEPS);
    let refusal = pair.decided[0].clone().unwrap_err();
    assert!(refusal.what.contains("not in doubt"), "{refusal:?}");
    assert_eq!(pair.result().state, State::Completed);
}

#[test]
fn a_source_that_falls_silent_is_given_up_and_a_destination_too() {
    let mut pair = small(false);
    for _ in 0..10 {
        pair.step();
    }
    let source = pair.source.take();
    while pair.destination_finished.is_none() {
        assert!(pair.step());
    }
    let (_, failure) = pair.destination_finished.take().unwrap();
    assert!(failure.unwrap().what.contains("silent for 10.0 s"));
    let mut pair = small(false);
    pair.source = source;
    pair.destination = None;
    pair.run(STEPS);
    assert!(
        pair.result()
            .failure
            .as_ref()
            .unwrap()
            .what
            .contains("has not answered for 10.0 s")
    );
}

#[test]
fn a_disk_that_refuses_a_record_never_makes_two_guests_or_none() {
    use Record::{Aborted, Closed, CommitIntent, Committed, GuestMoved, Running};
    for record in [
        CommitIntent,
        GuestMoved,
        Committed,
        Running,
        Closed,
        Aborted,
    ] {
        for there in [false, true] {
            let mut pair = small(false);
            pair.refused = vec![record.clone()];
            pair.refused_but_there = there;
            pair.run(STEPS);
            let at = format!("{record:?} {there}: {:?}", pair.finished);
            assert!(pair.source_runs != pair.destination_runs, "{at}");
            let stays = matches!(record, CommitIntent | Committed);
            assert_eq!(pair.source_runs, stays, "{at}");
        }
    }
}

#[test]
fn a_disk_that_takes_neither_decision_leaves_it_to_the_operator() {
    let mut pair = small(false);
    pair.refused = vec![Record::Committed, Record::Aborted];
    while pair.destination_finished.is_none() {
        assert!(pair.step());
    }
    let failure = pair.destination_finished.clone().unwrap().1.unwrap();
    assert!(failure.remedy.contains("--resume-here"), "{failure:?}");
    while pair.finished.is_empty() {
        assert!(pair.step());
    }
    assert_eq!(pair.result().state, State::InDoubt);
    assert!(!pair.source_runs && !pair.destination_runs);
}

#[test]
fn a_guest_that_does_not_resume_is_said_to_stand_stopped() {
    let mut pair = small(false);
    while pair.source_runs {
        assert!(pair.step());
    }
    pair.qemu_refuses = true;
    pair.trouble(Trouble::CancelAtSource);
    pair.run(STEPS);
    let failure = pair.result().failure.clone().unwrap();
    assert_eq!(pair.result().state, State::Failed);
    assert!(
        failure.what.contains("stands stopped here: QEMU said no"),
        "{failure:?}"
    );
    assert!(failure.remedy.contains("`cont`"), "{failure:?}");
}

#[test]
fn a_committed_guest_is_started_until_it_runs() {
    let mut pair = small(false);
    pair.qemu_refuses = true;
    while pair.finished.is_empty() {
        assert!(pair.step());
    }
    assert_eq!(pair.result().state, State::InDoubt);
    pair.qemu_refuses = false;
    pair.run(STEPS);
    assert_eq!(pair.result().state, State::Completed);
    assert!(pair.destination_runs);
}

#[test]
fn a_committed_guest_that_never_starts_is_left_to_the_operator_and_not_resumed_here() {
    let mut pair = small(false);
    pair.qemu_refuses = true;
    while pair.destination_finished.is_none() {
        assert!(pair.step());
    }
    let (state, failure) = pair.destination_finished.clone().unwrap();
    assert_eq!(state, State::InDoubt);
    assert!(failure.unwrap().what.contains("does not start"));
    for _ in 0..100 {
        assert!(pair.step());
    }
    assert_eq!(pair.result().state, State::InDoubt);
    assert!(!pair.source_runs && !pair.destination_runs);
}
