//! The tests of the decisions.

use super::*;
use crate::engine::encoding::policy::Compress;

const MS: Duration = Duration::from_millis(1);

fn convergence(change: impl FnOnce(&mut Options)) -> Convergence {
    let mut options = Options {
        downtime_limit: 50 * MS,
        prefer: Prefer::default(),
        bandwidth_limit: None,
        background_limit: None,
        compress: Compress::Off,
        max_rounds: 1000,
        timeout: None,
        mode: super::super::Mode::Precopy,
        throttle: false,
        verify: false,
        quit_source: false,
        channels: None,
    };
    change(&mut options);
    let mut convergence = Convergence::new(&options, 20 * MS, 1 << 30);
    // 100 MB in 100 ms: 1 GB/s.
    convergence.sent(
        Sent {
            raw_bytes: 100_000_000,
            ..Sent::default()
        },
        100 * MS,
    );
    convergence
}

/// Round `round` at 100 ms each; `remaining` bytes were dirtied in it.
fn end(round: u32, remaining: u64) -> RoundEnd {
    RoundEnd {
        round,
        now: Time(0).after(round * 100 * MS),
        elapsed: round * 100 * MS,
        dirty: Scan {
            pages: remaining / 4096,
            bytes: remaining,
        },
        dirtied_in: 100 * MS,
        remaining,
        all_hot: false,
    }
}

#[test]
fn it_switches_over_exactly_when_the_prediction_is_within_the_limit() {
    let mut convergence = convergence(|options| options.downtime_limit = 40 * MS);
    assert_eq!(
        convergence.decide(&end(0, 20_100_000)).0,
        Decision::NextRound
    );
    let (decision, words) = convergence.decide(&end(1, 20_000_000));
    assert_eq!(decision, Decision::SwitchOver);
    assert_eq!(
        words,
        "switch over: 20.0 MB remain, the guest dirties 200.0 MB/s, goodput 1000.0 MB/s, \
         predicted downtime 40.0 ms (of it 20.0 ms whatever remains), limit 40.0 ms"
    );
}

#[test]
fn within_the_limit_a_round_is_added_only_if_limits_leave_room_for_it() {
    type Change = fn(&mut Options);
    let limits: [(Change, Decision); 3] = [
        (|_| {}, Decision::NextRound),
        (|options| options.max_rounds = 2, Decision::SwitchOver),
        (
            |options| options.timeout = Some(100 * MS),
            Decision::SwitchOver,
        ),
    ];
    for (limit, expected) in limits {
        let mut convergence = convergence(limit);
        assert_eq!(convergence.decide(&end(0, 29_000_000)).0, expected);
    }
}

#[test]
fn hot_pages_go_when_there_are_no_others() {
    let hot = RoundEnd {
        all_hot: true,
        ..end(0, 90_000_000)
    };
    assert_eq!(convergence(|_| {}).decide(&hot).0, Decision::NextRoundHot);
}

#[test]
fn it_gives_up_at_each_limit_and_not_before() {
    let mut rounds = convergence(|options| options.max_rounds = 3);
    assert_eq!(rounds.decide(&end(1, 90_000_000)).0, Decision::NextRound);
    let (Decision::GiveUp(failure), _) = rounds.decide(&end(2, 90_000_000)) else {
        panic!("three rounds are allowed")
    };
    assert_eq!(
        failure.what,
        "the guest dirties 900.0 MB/s, goodput 1000.0 MB/s; 3 rounds were sent, as many as are \
         allowed; predicted downtime 110.0 ms, limit 50.0 ms"
    );
    let mut time = convergence(|options| options.timeout = Some(200 * MS));
    assert_eq!(time.decide(&end(1, 90_000_000)).0, Decision::NextRound);
    assert!(time.out_of_time(199 * MS).is_none() && time.out_of_time(200 * MS).is_some());
    assert!(matches!(
        time.decide(&end(2, 90_000_000)).0,
        Decision::GiveUp(_)
    ));
}

#[test]
fn it_is_patient_as_long_as_things_improve() {
    let mut convergence = convergence(|_| {});
    let mut remaining = 900_000_000;
    for round in 0..40 {
        let decision = convergence.decide(&end(round, remaining)).0;
        assert_eq!(decision, Decision::NextRound, "round {round}");
        remaining = remaining / 100 * 98;
    }
    let stuck = (40..90).find(|round| {
        matches!(
            convergence.decide(&end(*round, 800_000_000)).0,
            Decision::GiveUp(_)
        )
    });
    assert!(
        stuck.is_some_and(|round| (60..=75).contains(&round)),
        "{stuck:?}"
    );
}

#[test]
fn latency_is_not_taken_for_goodput() {
    let mut convergence = convergence(|_| {});
    convergence.sent(
        Sent {
            raw_bytes: 4096,
            ..Sent::default()
        },
        MS,
    );
    assert!((convergence.goodput() - 1e9).abs() < 1.0);
    convergence.sent(
        Sent {
            raw_bytes: 50_000_000,
            ..Sent::default()
        },
        100 * MS,
    );
    assert!((convergence.goodput() - 0.75e9).abs() < 1.0);
}

#[test]
fn other_limits_are_in_force_at_once() {
    let mut convergence = convergence(|options| options.bandwidth_limit = Some(1_000_000));
    assert_eq!(
        convergence.decide(&end(1, 20_000_000)).0,
        Decision::NextRound
    );
    convergence.limits(50 * MS, None);
    assert!(convergence.goodput() > 1e6);
    convergence.sent(
        Sent {
            raw_bytes: 1_000_000_000,
            ..Sent::default()
        },
        1000 * MS,
    );
    convergence.limits(40 * MS, None);
    assert!((convergence.goodput() - 1e9).abs() < 1.0, "still measured");
    let (decision, _) = convergence.decide(&end(2, 20_000_000));
    assert_eq!(decision, Decision::SwitchOver);
}

#[test]
fn a_bandwidth_limit_bounds_the_goodput() {
    let convergence = convergence(|options| options.bandwidth_limit = Some(1_000_000));
    assert!((convergence.goodput() - 1e6).abs() < 1.0);
}

/// What has been sent after so many milliseconds, at 1 GB/s.
fn so_far(after: u32) -> (Sent, Duration) {
    let sent = Sent {
        raw_bytes: u64::from(after) * 1_000_000,
        ..Sent::default()
    };
    (sent, after * MS)
}

#[test]
fn where_total_time_is_preferred_a_round_ends_when_the_rest_fits_into_the_limit() {
    let (sent, took) = so_far(200);
    let early = |prefer, left, rate: f64| {
        let mut convergence = convergence(|options| options.prefer = prefer);
        convergence.dirty_rate = rate;
        convergence.ends_early(left, sent, took, took)
    };
    // 50 ms, of which 20 do not depend on bytes.
    assert!(early(Prefer::TotalTime, 30_000_000, 0.0));
    assert!(!early(Prefer::TotalTime, 30_100_000, 0.0));
    assert!(
        !early(Prefer::TotalTime, 30_000_000, 1e6),
        "it is dirtied meanwhile"
    );
    assert!(!early(Prefer::Downtime, 1, 0.0));
}

#[test]
fn no_round_ends_early_before_its_rate_is_known_nor_again_and_again() {
    let mut convergence = convergence(|options| options.prefer = Prefer::TotalTime);
    let (sent, took) = so_far(1);
    assert!(!convergence.ends_early(1, sent, took, took));
    let (sent, took) = so_far(9);
    let tried = (0..100).filter(|_| convergence.ends_early(1, sent, took, took));
    assert_eq!(tried.count(), 8);
}

#[test]
fn where_total_time_is_preferred_no_round_is_added() {
    let mut convergence = convergence(|options| options.prefer = Prefer::TotalTime);
    assert_eq!(
        convergence.decide(&end(0, 29_000_000)).0,
        Decision::SwitchOver
    );
}
