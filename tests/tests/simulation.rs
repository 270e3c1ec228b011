//! Many thousands of simulated migrations, each decided by its seed, with the checker of `tests::sim` always on.
//!
//! They are the same in every run, unless more is asked for: with `PAGECOPY_SEEDS=n` there are `n` of them, and with it or
//! with `PAGECOPY_ALL` all but the first few thousand follow a base that is taken from the clock and printed, so that each
//! run sees others; `PAGECOPY_BASE_SEED=n` repeats them. A seed that breaks an invariant is printed with the reason, the
//! smallest plan that still breaks it, the end of its trace, and the commands that replay both.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime};

use pagecopy::engine::event::State;
use tests::sim::{
    Broken, CHANNEL_LIMIT, Happened, Mistake, OUTPUTS, Outcome, POSTCOPY_OUTPUTS, Plan, Side,
    Survey, Theme, Wish, broken, run, run_traced, shrink,
};

mod kept;

/// Seeds, unless `PAGECOPY_SEEDS` says otherwise.
const SEEDS: u64 = 100_000;
/// So many of them are the same in every run.
const FIXED: u64 = 5_000;
/// Where the others begin, unless each run is to see others.
const BASE: u64 = 1 << 40;
/// With fewer seeds than this, chance alone could leave something out.
const ENOUGH: u64 = 50_000;
/// So many of the rarest things are shown with how rare they are.
const NEAREST: usize = 8;
/// Lines of the trace that are printed for a seed that fails.
const LAST_LINES: usize = 60;
/// How long a failing plan is made smaller.
const SHRINK: Duration = Duration::from_secs(20);
/// The command that replays a run.
const REPLAY: &str = "cargo test -p tests --test simulation replay -- --nocapture";

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number"))
    })
}

/// The words of a complaint, without its figures.
fn kind(what: &str) -> String {
    what.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// How to see a plan's run again, and the end of it.
fn show(text: &mut String, plan: &Plan, mistake: Option<Mistake>) {
    let outcome = run_traced(plan, mistake);
    let first = outcome.trace.len().saturating_sub(LAST_LINES);
    let _ = writeln!(
        text,
        "{}\nreplay it: PAGECOPY_PLAN='{0}' {REPLAY}\nthe end of its trace:\n{}",
        plan.write(),
        outcome.trace[first..].join("\n")
    );
}

/// All about a seed that failed.
fn explain(failed: &Broken) -> String {
    let (theme, seed) = (Theme::of(failed.seed), failed.seed);
    let wanted = kind(&failed.what);
    let small = shrink(&Plan::of(seed), None, SHRINK, |outcome| {
        broken(theme, outcome).is_some_and(|what| kind(&what) == wanted)
    });
    let mut text = format!(
        "{theme:?}, seed {seed}: {}\nreplay it: PAGECOPY_SEED={seed} {REPLAY}\nthe smallest plan that does the same: ",
        failed.what
    );
    show(&mut text, &small, None);
    text
}

/// `PAGECOPY_SEED=n` or `PAGECOPY_PLAN=json`: runs that one, with its whole trace. Does nothing otherwise.
#[test]
fn replay() {
    let seed = number("PAGECOPY_SEED");
    let plan = match (std::env::var("PAGECOPY_PLAN"), seed) {
        (Ok(text), _) => Plan::read(&text).unwrap(),
        (Err(_), Some(seed)) => Plan::of(seed),
        _ => return,
    };
    let theme = seed.map_or(Theme::Chaos, Theme::of);
    let outcome = run_traced(&plan, None);
    println!("{}\n{}", plan.write(), outcome.trace.join("\n"));
    println!(
        "{theme:?}: {:?} after {} events and {:?}, the guest runs at {:?}; {:?}",
        outcome.state, outcome.steps, outcome.time, outcome.guest, outcome.tally
    );
    assert_eq!(broken(theme, &outcome), None);
}

#[test]
fn a_hundred_thousand_seeds() {
    let asked = number("PAGECOPY_SEEDS");
    let seeds = asked.unwrap_or(SEEDS);
    let others = asked.is_some() || std::env::var_os("PAGECOPY_ALL").is_some();
    let base = number("PAGECOPY_BASE_SEED").unwrap_or_else(|| {
        if !others {
            return BASE;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.unwrap().as_secs() << 24
    });
    println!("the same again: PAGECOPY_SEEDS={seeds} PAGECOPY_BASE_SEED={base}");
    let fixed = seeds.min(FIXED);
    let survey = Survey::of(&[0..fixed, base..base + (seeds - fixed)]);
    print(&survey);
    if let Some(first) = survey.broken.first() {
        let failed: Vec<String> = survey
            .broken
            .iter()
            .map(|broken| format!("{}: {}", broken.seed, broken.what))
            .collect();
        panic!(
            "{} of {seeds} seeds failed, such as\n{}\n\n{}",
            survey.failures,
            failed.join("\n"),
            explain(first)
        );
    }
    assert_eq!(survey.total(), seeds);
    assert_ends(&survey);
    if seeds >= ENOUGH {
        assert_happened(&survey);
        assert_crashes(&survey);
    }
}

fn print(survey: &Survey) {
    let seconds = survey.took.as_secs_f64();
    println!(
        "{} seeds in {seconds:.1} s, {:.0} a second; {:.1} h of virtual time; for one run at most {} events and {:.0} s",
        survey.total(),
        survey.total() as f64 / seconds,
        survey.virtual_time.as_secs_f64() / 3600.0,
        survey.most_steps,
        survey.most_time.as_secs_f64()
    );
    for ((theme, state, guest), count) in &survey.ends {
        println!("{count:>8} {theme:?}: {state}, the guest at {guest:?}");
    }
    for (what, count) in &survey.happened {
        println!("{count:>8} {what:?}");
    }
    println!("daemons that died before, after, and some time after an output:");
    for ((side, output), counts) in crashes(survey) {
        println!(
            "{:>8} {:>5} {:>5} {side:?} {output}",
            counts[0], counts[1], counts[2]
        );
    }
}

/// How often daemons died at each output: before it was carried out, right after, and some time after.
fn crashes(survey: &Survey) -> BTreeMap<(Side, String), [u64; 3]> {
    let mut table = BTreeMap::<_, [u64; 3]>::new();
    for ((side, output, moment), count) in &survey.crashes {
        let column = ["before", "after", "later"]
            .iter()
            .position(|column| column == moment);
        table.entry((*side, output.to_string())).or_default()[column.unwrap()] += count;
    }
    table
}

/// No theme is empty: at least so many in a thousand of its migrations ended so.
fn assert_ends(survey: &Survey) {
    use State::{Cancelled, Completed, Failed};
    use Theme::{Chaos, Crashes, DirectIo, Faults, PostCopy, Quiet, Torn, Verify};
    let (source, destination) = (Some(Side::Source), Some(Side::Destination));
    if survey.total() < 1_000 {
        return;
    }
    for (theme, state, guest, least) in [
        (Quiet, Completed, destination, 700),
        (Quiet, Failed, source, 5),
        (Faults, Completed, destination, 200),
        (Faults, Failed, source, 100),
        (Faults, Cancelled, source, 20),
        (Crashes, Completed, destination, 150),
        (Crashes, Failed, source, 150),
        (Chaos, Completed, destination, 100),
        (Chaos, Failed, source, 150),
        (DirectIo, Completed, destination, 400),
        (Verify, Completed, destination, 400),
        (PostCopy, Completed, destination, 800),
        (Torn, Completed, destination, 300),
        (Torn, Failed, source, 50),
    ] {
        let share = survey.share(theme, state, guest);
        assert!(
            share >= least,
            "{theme:?}, {state:?} with the guest at {guest:?}: only {share} in a thousand"
        );
    }
}

/// Every fault and every rare way really occurs: in at least so many of 100,000 runs.
fn assert_happened(survey: &Survey) {
    use Happened::*;
    let both = |what: fn(Side) -> Happened, least| {
        [
            (what(Side::Source), least),
            (what(Side::Destination), least),
        ]
    };
    let single = [
        (Cut, 500),
        (ChannelCut, 300),
        (PartialWrite, 1_000),
        (Stalled, 300),
        (Silence, 800),
        (ReconnectFailed, 300),
        (ChannelsOvertook, 20_000),
        (StoppedOvertaken, 300),
        (ClocksDrifted, 500),
        (Doubted, 1_500),
        (DoubtedForGood, 20),
        (NearlyFullChannel, 20),
        (AskedFenced(Side::Source, Wish::RunHere), 30),
        (AskedUnfenced(Side::Source, Wish::RunHere), 100),
        (AskedUnfenced(Side::Source, Wish::LetGo), 100),
        (AskedUnfenced(Side::Destination, Wish::RunHere), 2),
        (AskedUnfenced(Side::Destination, Wish::LetGo), 2),
        (AskedFenced(Side::Destination, Wish::RunHere), 1),
        (WentAsDelta, 1_500),
        (Throttled, 500),
        (ThrottledAndMoved, 100),
        (WentFirst, 10_000),
        (WentByHand, 500),
        (LimitsChanged, 3_000),
        (LimitsRefused, 500),
        (BecameWhole, 5_000),
        (SaidLost, 20),
        (HeardOfLoss, 10),
        (Waited, 1_000),
        (WaitedOnItsWay, 1_000),
        (DevicesWaited, 1_000),
        (Interrupted, 400),
        (FetchedOn, 400),
        (TakenUp, 300),
        (ServedOn, 200),
        (ServedWithoutQemu, 10),
        (WasWholeBefore, 150),
        (HadEndedBefore, 8),
        (Poisoned, 30),
        (PausedForGood, 10),
        (LetGoOf, 25),
    ];
    let sides = [
        both(CutSeenOnlyBy, 100),
        both(OneWaySilence, 100),
        both(Cancelled, 500),
        both(QemuDied, 500),
        both(DaemonDied, 2_000),
        both(HostDied, 300),
        both(TornLine, 80),
        both(LostRecord, 80),
        both(DiskRefused, 100),
        both(DiskFull, 50),
        both(SlowDisk, 30),
        both(HostFailed, 200),
        both(QemuFailed, 50),
        both(Frozen, 300),
        both(SleptClockStood, 80),
        both(SleptClockWent, 80),
        both(ClockJumped, 150),
    ];
    let mut margins: Vec<(f64, String)> = single
        .into_iter()
        .chain(sides.into_iter().flatten())
        .map(|(what, least)| {
            let count = survey.count(what);
            let wanted = least as f64 * survey.total() as f64 / 100_000.0;
            let text = format!("{what:?}: {count}, and {wanted:.0} expected at least");
            (count as f64 / wanted, text)
        })
        .collect();
    margins.sort_by(|one, other| one.0.total_cmp(&other.0));
    println!("nearest to too seldom:");
    for (margin, text) in margins.iter().take(NEAREST) {
        println!("{margin:>8.1} times: {text}");
    }
    let rare: Vec<&String> = margins
        .iter()
        .take_while(|(margin, _)| *margin < 1.0)
        .map(|(_, text)| text)
        .collect();
    assert!(rare.is_empty(), "too seldom: {rare:#?}");
}

/// Daemons die at every output there is: before it is carried out, right after, and later.
fn assert_crashes(survey: &Survey) {
    let table = crashes(survey);
    let rarest = OUTPUTS
        .iter()
        .chain(&POSTCOPY_OUTPUTS)
        .filter_map(|(side, output)| {
            let counts = table.get(&(*side, (*output).to_owned()))?;
            Some((*counts.iter().min()?, side, output))
        })
        .min();
    println!("the rarest death: {rarest:?}");
    let missing: Vec<String> = OUTPUTS
        .iter()
        .chain(&POSTCOPY_OUTPUTS)
        .filter(|(side, output)| {
            let counts = table.get(&(*side, (*output).to_owned()));
            counts.is_none_or(|counts| counts.contains(&0))
        })
        .map(|(side, output)| format!("{side:?} {output}"))
        .collect();
    assert!(missing.is_empty(), "no daemon died at {missing:#?}");
}

/// What failed once does not fail again. The plans are data, made small when they were found, so that a change of what
/// seeds are made of does not change them; each is run with other chances, too.
#[test]
fn what_failed_once() {
    for (theme, story, plan) in kept::KEPT {
        let mut plan = Plan::read(plan).unwrap();
        for chance in [plan.chance].into_iter().chain(0..kept::CHANCES) {
            plan.chance = chance;
            let Some(what) = broken(*theme, &run(&plan, None)) else {
                continue;
            };
            let mut text = format!("{theme:?}: {what}. Its story: {story}\n");
            show(&mut text, &plan, None);
            panic!("{text}");
        }
    }
}

/// Doubt is where a guest could run twice or nowhere: many runs must go through it, and it must end in every way.
#[test]
fn doubt_ends_both_ways() {
    let mut ends = BTreeMap::new();
    for seed in (0..4_000).filter(|seed| matches!(Theme::of(*seed), Theme::Crashes | Theme::Chaos))
    {
        let outcome = run(&Plan::of(seed), None);
        if outcome.doubted {
            *ends.entry(format!("{:?}", outcome.state)).or_insert(0) += 1;
        }
    }
    for (state, least) in [("Completed", 5), ("Failed", 5), ("InDoubt", 1)] {
        assert!(
            ends.get(state).is_some_and(|count| *count >= least),
            "of 2000 runs, in doubt and then {state}: {ends:?}"
        );
    }
}

/// A guest that goes first, of which all has come or not when the source's host goes with its memory, and the destination's daemon
/// dies before it runs it. The source says that it has lost it when it is back.
fn lost_before_it_ran(operator: bool, bytes_per_second: u64) -> Plan {
    let plan = format!(
        r#"{{"data_channels":2,"operator":{operator},"wanted":{{"how":"Postcopy"}},"network":{{"bytes_per_second":{bytes_per_second}}},
            "habits":{{"touched_percent":100}},"blocks":[{{"name":"ram0","page_size":4096,"size":262144}}],"faults":[
            [{{"Named":["Destination","RunGuest",1,"Before"]}},{{"HostDies":["Source",1000000]}}],
            [{{"Named":["Destination","RunGuest",1,"Before"]}},{{"DaemonDies":["Destination",500000]}}]]}}"#
    );
    Plan::read(&plan).unwrap()
}

/// The same destination has all of the guest: it runs it, and nobody has to be asked.
#[test]
fn a_guest_that_has_all_of_its_memory_is_run_though_its_source_has_lost_it() {
    let mut plan = lost_before_it_ran(false, 1_000_000_000);
    let mut ran = 0;
    for chance in 0..kept::CHANCES {
        plan.chance = chance;
        let outcome = run(&plan, None);
        assert_eq!(outcome.violation, None, "chance {chance}");
        if outcome
            .tally
            .happened()
            .contains(&Happened::RunWithoutItsSource)
        {
            assert_eq!(
                (outcome.state, outcome.guest),
                (State::Completed, Some(Side::Destination)),
                "chance {chance}"
            );
            ran += 1;
        }
    }
    assert!(ran > kept::CHANCES / 2, "{ran} times");
}

/// Committed to a destination whose daemon dies before it runs it, and the source's host goes with the memory: no seed comes
/// by that often enough.
#[test]
fn a_guest_that_has_not_run_waits_for_people_when_its_memory_is_gone() {
    for (operator, end) in [
        (true, Happened::Poisoned),
        (false, Happened::DoubtedForGood),
    ] {
        let mut plan = lost_before_it_ran(operator, 200_000);
        let mut ended = 0;
        for chance in 0..kept::CHANCES {
            plan.chance = chance;
            let outcome = run(&plan, None);
            assert_eq!(outcome.violation, None, "chance {chance}");
            let happened = outcome.tally.happened();
            let both = [Happened::KeptWithoutMemory, end];
            ended += u64::from(both.iter().all(|what| happened.contains(what)));
        }
        // All of it may have come while the devices waited for some of it, or the operator may have come first.
        assert!(ended > kept::CHANCES / 2, "{end:?}: {ended} times");
    }
}

/// A guest that goes first and ends with its QEMU while it lacks memory and the source is `away`.
fn ended_while_its_source_was_away(away: &str) -> Plan {
    let plan = format!(
        r#"{{"data_channels":2,"wanted":{{"how":"Postcopy"}},"network":{{"bytes_per_second":200000}},
            "blocks":[{{"name":"ram0","page_size":4096,"size":262144}}],"faults":[
            [{{"Named":["Destination","Journal(Running)",1,{{"Later":20000}}]}},{away}],
            [{{"Named":["Destination","Journal(Running)",1,{{"Later":40000}}]}},{{"QemuDies":"Destination"}}]]}}"#
    );
    Plan::read(&plan).unwrap()
}

/// It is not said to be whole, however the source was away, and whatever it still has: it hears that its guest has ended, and a
/// daemon of it that is started anew has not forgotten it.
#[test]
fn a_guest_that_ended_while_its_source_was_away_is_said_to_have_ended() {
    for (away, least) in [
        (r#""Cut""#, kept::CHANCES * 9 / 10),
        (
            r#"{"DaemonDies":["Source",500000]}"#,
            kept::CHANCES * 9 / 10,
        ),
        (r#"{"HostDies":["Source",1000000]}"#, kept::CHANCES * 9 / 10),
    ] {
        let mut plan = ended_while_its_source_was_away(away);
        let mut heard = 0;
        for chance in 0..kept::CHANCES {
            plan.chance = chance;
            let outcome = run(&plan, None);
            assert_eq!(outcome.violation, None, "{away}, chance {chance}");
            if outcome.tally.happened().contains(&Happened::HadEndedBefore) {
                assert_eq!(outcome.state, State::Failed, "{away}, chance {chance}");
                let failure = outcome.failure.unwrap();
                assert!(
                    failure.what.contains("has ended with its QEMU"),
                    "{failure:?}"
                );
                heard += 1;
            }
        }
        assert!(heard >= least, "{away}: {heard} times");
    }
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..40 {
        let plan = Plan::of(seed);
        let (one, other) = (run_traced(&plan, None), run_traced(&plan, None));
        assert!(one.trace.len() > 2, "seed {seed} has a trace");
        assert_eq!(one.trace, other.trace, "seed {seed}");
    }
}

#[test]
fn a_plan_reads_as_it_was_written() {
    for seed in 0..500 {
        let plan = Plan::of(seed);
        assert_eq!(Plan::read(&plan.write()), Ok(plan), "seed {seed}");
    }
    assert_eq!(Plan::default().write(), "{}");
    assert!(Plan::read(r#"{"no_such_thing":1}"#).is_err());
}

/// A failure is made small, and the small plan fails in the same way.
#[test]
fn a_failing_plan_is_made_smaller() {
    let mistake = Some(Mistake::ResumeAfterCommit);
    let fails = |outcome: &Outcome| {
        let violation = outcome.violation.as_ref();
        violation.is_some_and(|violation| violation.what == "two guests run")
    };
    let plan = (0..)
        .map(Plan::of)
        .find(|plan| fails(&run(plan, mistake)) && plan.write().len() > 1_000)
        .unwrap();
    let small = shrink(&plan, mistake, SHRINK / 4, fails);
    assert!(fails(&run(&small, mistake)));
    assert!(
        small.write().len() * 2 < plan.write().len(),
        "{}\nbecame only\n{}",
        plan.write(),
        small.write()
    );
}

/// The limit on bytes in flight, as the README states it.
#[test]
fn bytes_in_flight_are_bounded() {
    assert_eq!(CHANNEL_LIMIT, 8 << 20);
}

/// Where a mistake is looked for: where any seed leads, but for one that hardly any seed comes by.
fn plan_for(mistake: Mistake, seed: u64) -> Plan {
    match mistake {
        Mistake::HeldWithoutNeed => {
            let mut plan = lost_before_it_ran(seed.is_multiple_of(2), 1_000_000_000);
            plan.chance = seed;
            plan
        }
        Mistake::ForgottenEnd => {
            let mut plan = ended_while_its_source_was_away(r#""Cut""#);
            plan.chance = seed;
            plan
        }
        _ => Plan::of(seed),
    }
}

/// The checker finds each planted mistake.
fn finds(mistake: Mistake) {
    let begun = Instant::now();
    let found = (0..SEEDS).find_map(|seed| {
        Some((
            seed,
            run(&plan_for(mistake, seed), Some(mistake)).violation?,
        ))
    });
    let Some((seed, violation)) = found else {
        panic!("{mistake:?} was not found by {SEEDS} seeds");
    };
    println!(
        "{mistake:?}: found by seed {seed}, after {:.3} s: {}",
        begun.elapsed().as_secs_f64(),
        violation.what
    );
}

macro_rules! mistakes {
    ($($name:ident: $mistake:ident,)*) => {
        $(
            #[test]
            fn $name() {
                finds(Mistake::$mistake);
            }
        )*

        /// None of them was forgotten here.
        #[test]
        fn every_mistake_is_looked_for() {
            assert_eq!([$(Mistake::$mistake),*], Mistake::ALL);
        }
    };
}

mistakes! {
    finds_a_dirty_bit_cleared_after_reading: ClearAfterRead,
    finds_a_barrier_that_overtakes_writes: EarlyBarrier,
    finds_a_zero_run_placed_late: LateZero,
    finds_disk_reads_that_were_not_waited_for: NoDrain,
    finds_pages_that_did_not_age: NoAgeing,
    finds_a_guest_run_without_the_record: NoCommittedRecord,
    finds_a_page_that_was_not_sent: DroppedPage,
    finds_a_write_that_comes_too_late: LateWrite,
    finds_a_commit_without_the_record: NoCommitIntentRecord,
    finds_ram_that_was_not_cleared: NoClear,
    finds_holes_that_were_missed: OldHoles,
    finds_a_guest_resumed_after_commit: ResumeAfterCommit,
    finds_a_guest_run_before_commit: RunBeforeCommit,
    finds_a_commit_before_its_record: LateCommitIntentRecord,
    finds_a_guest_run_before_the_record: LateCommittedRecord,
    finds_a_guest_said_to_run_before_it_does: EarlyRunning,
    finds_too_many_bytes_in_flight: EarlyPushed,
    finds_a_run_that_never_ends: LostTimer,
    finds_a_page_marked_after_it_was_mapped: MarkAfterMap,
    finds_a_page_fetched_again_after_a_crash: ForgotReceived,
    finds_a_guest_loaded_before_its_page_faults_wait: LateArm,
    finds_page_faults_that_do_not_wait_for_a_dead_daemon: ReleaseOnDrop,
    finds_reads_answered_from_an_old_copy: ServeOldCopy,
    finds_a_page_that_was_not_said_to_lack: ForgotLacking,
    finds_memory_let_go_of_too_early: DetachWhenMoved,
    finds_a_delta_against_a_version_that_is_gone: StaleVersion,
    finds_a_delta_against_a_version_that_was_lost: LostVersion,
    finds_a_guest_that_waits_for_a_source_that_it_does_not_need: HeldWithoutNeed,
    finds_a_guest_that_is_slowed_for_good: ThrottledForGood,
    finds_a_guest_said_to_be_whole_that_has_ended: ForgottenEnd,
    finds_a_limit_that_is_not_kept: OldLimit,
}
