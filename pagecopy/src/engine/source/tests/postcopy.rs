//! Post-copy at the source: what must come before what.

use super::*;
use crate::engine::event::{FaultFigures, PostcopyCost};
use crate::engine::source::Mode;

mod let_go;

/// Nothing is needed here any more, and the guest runs on.
const RELEASED: Record = Record::Released { failure: None };

/// That nothing is needed here any more, as it is recorded.
fn released(asked: &[Output]) -> Option<Record> {
    asked.iter().find_map(|output| match output {
        Output::Journal(record @ Record::Released { .. }) => Some(record.clone()),
        _ => None,
    })
}

fn lost() -> Input {
    Input::LinkLost(Failure::new(Fault::Network, "cut", ""))
}

fn setup_of(mode: Mode) -> Setup {
    let mut setup = setup();
    setup.options.mode = mode;
    setup.options.background_limit = None;
    setup.data_channels = 2;
    setup
}

fn runs() -> Vec<Run> {
    vec![Run {
        block: BlockId(0),
        first: 3,
        pages: 2,
    }]
}

fn accept() -> Input {
    accept_with(3, "")
}

fn accept_with(capabilities: u64, reason: &str) -> Input {
    Input::Message(Message::Accept {
        version: 1,
        capabilities,
        host: "beta".into(),
        reason: reason.into(),
    })
}

fn attached() -> Input {
    Input::Attached {
        stopped: Duration::ZERO,
        populated: runs(),
    }
}

/// Up to `Commit`: nothing is sent of the guest's memory, and two pages lack.
fn switched_over() -> (Source, Vec<Output>) {
    switched_over_with(setup_of(Mode::Postcopy))
}

fn switched_over_with(setup: Setup) -> (Source, Vec<Output>) {
    let mut source = Source::new(setup, Time(0));
    let mut asked = Vec::new();
    let mut now = NOW;
    for input in [
        accept(),
        attached(),
        Input::Message(Message::BarrierReached { round: 0 }),
        Input::Unchanged,
        Input::GuestStopped,
        Input::Scanned {
            dirty: Vec::new(),
            populated: Populated::Runs(runs()),
            took: Duration::ZERO,
        },
        Input::DeviceState(bytes::Bytes::from_static(b"state")),
        Input::DeviceStateSaved,
        Input::Message(Message::BarrierReached { round: 1 }),
        Input::Message(Message::Loaded),
        Input::Journaled(Record::CommitIntent),
    ] {
        now = now.after(Duration::from_millis(6));
        source.handle(now, input);
        asked.extend(outputs(&mut source));
    }
    (source, asked)
}

/// The guest runs at the destination, which fetches.
fn serving() -> Source {
    serving_with(setup_of(Mode::Postcopy))
}

fn serving_with(setup: Setup) -> Source {
    let (mut source, _) = switched_over_with(setup);
    let now = NOW.after(Duration::from_secs(1));
    source.handle(now, Input::Message(Message::Running));
    source.handle(now, Input::Journaled(Record::GuestMoved));
    assert_eq!(phase(&source), "Serving");
    outputs(&mut source);
    source
}

#[test]
fn the_memory_is_open_before_anybody_may_read_it_and_recorded_before_commit() {
    let (_, asked) = switched_over();
    assert_eq!(
        sent(&asked),
        [
            "Hello",
            "Populate",
            "Barrier",
            "Barrier",
            "Stopped",
            "Lacking",
            "LackingEnd",
            "Barrier",
            "Barrier",
            "DeviceState",
            "DeviceStateEnd",
            "Commit"
        ]
    );
    let lacking = Message::Lacking {
        block: 0,
        first: 0,
        words: vec![0b11000],
    };
    let open = position(&asked, &Output::OpenReads);
    assert!(open < position(&asked, &Output::Send(lacking)));
    let served = asked
        .iter()
        .position(|output| matches!(output, Output::Journal(Record::Serving { .. })));
    assert!(served.unwrap() < position(&asked, &Output::Journal(Record::CommitIntent)));
    assert!(
        !asked
            .iter()
            .any(|output| matches!(output, Output::Push { .. }))
    );
}

#[test]
fn nothing_is_let_go_of_before_the_destination_is_whole_and_that_is_on_disk() {
    let mut source = serving();
    assert_eq!(source.state(), State::Migrating);
    let id = setup().id;
    source.handle(NOW, Input::Message(Message::Whole { id, cost: None }));
    assert_eq!(outputs(&mut source), [Output::Journal(RELEASED)]);
    source.handle(NOW, Input::Journaled(RELEASED));
    let asked = outputs(&mut source);
    assert_eq!(sent(&asked), ["Closed"]);
    assert!(position(&asked, &Output::Detach) < position(&asked, &Output::QuitGuest));
    assert_eq!(source.state(), State::Completed);
}

/// Figures of a destination that was started anew are shorter than our own; any figures are only shown.
#[test]
fn what_it_cost_is_the_longer_of_what_both_have_counted() {
    let ended = |cost| {
        let mut source = serving();
        let (id, later) = (setup().id, NOW.after(Duration::from_secs(5)));
        source.handle(later, Input::Message(Message::Whole { id, cost }));
        source.handle(later, Input::Journaled(RELEASED));
        let Some(Output::Finished(end)) = outputs(&mut source).pop() else {
            panic!()
        };
        let figures = end.figures;
        (figures.faults, figures.postcopy_ms, figures.paused_ms)
    };
    let faults = FaultFigures {
        faults: 3,
        ..FaultFigures::default()
    };
    let cost = |postcopy_us, paused_us| {
        Some(PostcopyCost {
            faults,
            postcopy_us,
            paused_us,
        })
    };
    assert_eq!(ended(None), (None, Some(4000.0), Some(0.0)));
    let shorter = (Some(faults), Some(4000.0), Some(0.0));
    assert_eq!(ended(cost(1_000_000, 0)), shorter);
    let longer = (Some(faults), Some(9000.0), Some(2000.0));
    assert_eq!(ended(cost(9_000_000, 2_000_000)), longer);
    let (_, postcopy, paused) = ended(cost(u64::MAX, u64::MAX));
    assert!(postcopy.unwrap().is_finite() && paused.unwrap().is_finite());
}

/// No failure of this host takes the only copy of the guest's memory away.
#[test]
fn only_the_destination_or_the_operator_ends_it() {
    let failure = || Failure::new(Fault::ThisHost, "something", "");
    for input in [
        Input::Cancel,
        Input::HostFailed(failure()),
        Input::QemuFailed(failure()),
        Input::JournalFailed(Record::GuestMoved, failure()),
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
        Input::Resolve(Resolution::ResumeHere { peer_fenced: true }),
        Input::StartPostcopy,
        lost(),
        Input::Message(Message::Whole {
            id: crate::engine::MigrationId([0xee; 16]),
            cost: None,
        }),
    ] {
        let mut source = serving();
        source.handle(NOW, input.clone());
        let asked = outputs(&mut source);
        assert!(
            !asked.iter().any(|output| matches!(
                output,
                Output::Detach | Output::ResumeGuest | Output::Journal(_)
            )),
            "{input:?}: {asked:?}"
        );
        assert_eq!(phase(&source), "Serving", "{input:?}");
    }
}

#[test]
fn a_slow_disk_under_the_last_record_is_no_silence_of_the_destination() {
    let (mut source, _) = switched_over();
    source.handle(NOW, Input::Message(Message::Running));
    let late = NOW.after(Duration::from_secs(60));
    source.handle(late, Input::Journaled(Record::GuestMoved));
    source.handle(late, Input::Tick);
    assert_eq!(source.state(), State::Migrating);
}

#[test]
fn a_restarted_daemon_serves_on() {
    let mut source = Source::recover(setup_of(Mode::Postcopy), Outcome::Here, Postcopy::Open, NOW);
    assert!(outputs(&mut source).contains(&Output::ConnectAll));
    assert_eq!(source.state(), State::Paused);
}

/// In doubt, and the destination has taken what serves it.
fn served_in_doubt() -> Source {
    let mut doubt = Source::recover(setup_of(Mode::Postcopy), Outcome::Open, Postcopy::Open, NOW);
    assert!(outputs(&mut doubt).contains(&Output::ConnectAll));
    doubt.handle(NOW, Input::Reconnected);
    assert_eq!(sent(&outputs(&mut doubt)), ["Serve"]);
    doubt.handle(NOW, Input::Message(Message::Resumed));
    assert_eq!(phase(&doubt), "InDoubt");
    assert_eq!(outputs(&mut doubt), []);
    doubt
}

/// The destination may need pages to run the guest: it gets them, and the guest is let go of when it has run and not before.
#[test]
fn a_source_in_doubt_serves_and_lets_go_of_nothing() {
    let mut doubt = served_in_doubt();
    let later = NOW.after(Duration::from_secs(5));
    doubt.handle(later, Input::Tick);
    assert!(matches!(
        &outputs(&mut doubt)[..],
        [Output::Send(Message::Ping { .. })]
    ));
    // Who fetches answers: the operator cannot take the guest back over that.
    doubt.handle(
        later,
        Input::Resolve(Resolution::ResumeHere { peer_fenced: true }),
    );
    assert!(matches!(
        &outputs(&mut doubt)[..],
        [Output::Decided(Err(_))]
    ));
    doubt.handle(later, Input::Message(Message::Running));
    assert_eq!(outputs(&mut doubt), [Output::Journal(Record::GuestMoved)]);
    doubt.handle(later, Input::Journaled(Record::GuestMoved));
    assert_eq!(
        (phase(&doubt).as_str(), doubt.state()),
        ("Serving", State::Migrating)
    );
    // Over the same connection.
    assert!(!outputs(&mut doubt).contains(&Output::ConnectAll));
}

/// Its QEMU may die before the guest has run there: the destination never runs it then, and it is whole here.
#[test]
fn a_guest_that_never_ran_is_taken_back_from_a_source_that_served() {
    let mut doubt = served_in_doubt();
    doubt.handle(NOW, lost());
    let again = doubt.poll_timeout().unwrap();
    assert!(
        again <= NOW.after(Duration::from_secs(1)),
        "the guest waits"
    );
    doubt.handle(again, Input::Tick);
    assert_eq!(outputs(&mut doubt), [Output::ConnectAll]);
    doubt.handle(again, Input::Reconnected);
    let id = MigrationId([3; 16]);
    let standing = Standing::Aborted;
    doubt.handle(again, Input::Message(Message::Answer { id, standing }));
    assert!(outputs(&mut doubt).contains(&Output::ResumeGuest));
}

/// What only follows when the guest has run says so.
#[test]
fn a_guest_that_has_run_is_let_go_of_however_it_ended() {
    let id = MigrationId([3; 16]);
    let ends = [
        (Message::Whole { id, cost: None }, State::Completed),
        (
            Message::Abort {
                code: AbortCode::Qemu,
                reason: "it has ended".into(),
            },
            State::Failed,
        ),
    ];
    for (message, state) in ends {
        let mut doubt = served_in_doubt();
        doubt.handle(NOW, Input::Message(message));
        assert_eq!(outputs(&mut doubt), [Output::Journal(Record::GuestMoved)]);
        doubt.handle(NOW, Input::Journaled(Record::GuestMoved));
        let record = released(&outputs(&mut doubt)).unwrap();
        // A daemon that is started anew knows it, too.
        assert_eq!(
            matches!(record, Record::Released { failure: None }),
            state == State::Completed
        );
        doubt.handle(NOW, Input::Journaled(record));
        assert!(!outputs(&mut doubt).contains(&Output::ResumeGuest));
        assert_eq!(doubt.state(), state);
    }
}

/// A destination that ends a connection has decided nothing by it: the guest may run there.
#[test]
fn an_abort_decides_nothing_when_the_guest_may_run() {
    for code in AbortCode::ALL {
        let abort = Message::Abort {
            code,
            reason: "no question has come for too long".into(),
        };
        let mut doubt = Source::recover(setup(), Outcome::Open, Postcopy::No, NOW);
        doubt.handle(NOW, Input::Reconnected);
        outputs(&mut doubt);
        doubt.handle(NOW, Input::Message(abort.clone()));
        assert_eq!(outputs(&mut doubt), [], "{code:?}");
        assert_eq!(phase(&doubt), "InDoubt");
        let again = doubt.poll_timeout().unwrap();
        doubt.handle(again, Input::Tick);
        assert_eq!(outputs(&mut doubt), [Output::Connect]);
        if code != AbortCode::Qemu {
            let mut serving = serving();
            serving.handle(NOW.after(Duration::from_secs(1)), Input::Message(abort));
            assert_eq!(
                (phase(&serving).as_str(), serving.state()),
                ("Serving", State::Paused)
            );
        }
    }
}

#[test]
fn it_is_offered_only_where_it_is_wanted_and_can_be() {
    let offers = |mode, verify, channels| {
        let mut setup = setup_of(mode);
        setup.options.verify = verify;
        setup.data_channels = channels;
        let asked = outputs(&mut Source::new(setup, Time(0)));
        asked.iter().any(|output| {
            matches!(output, Output::Send(Message::Hello { capabilities, .. }) if capabilities & 2 != 0)
        })
    };
    let auto = |postcopy| Mode::Auto { postcopy };
    assert!(offers(auto(true), false, 2) && offers(Mode::Postcopy, false, 2));
    assert!(!offers(auto(false), false, 2) && !offers(Mode::Precopy, false, 2));
    assert!(!offers(auto(true), true, 2) && !offers(auto(true), false, 1));
}

/// A destination that cannot serve page faults says so before anything else happens.
#[test]
fn what_the_destination_cannot_is_refused_or_done_without() {
    for mode in [
        Mode::Postcopy,
        Mode::Hybrid(crate::engine::source::After::Auto),
    ] {
        let mut source = Source::new(setup_of(mode), Time(0));
        source.handle(NOW, accept_with(1, "no device; what to do: open it"));
        let asked = outputs(&mut source);
        assert!(!asked.contains(&Output::Attach), "{asked:?}");
        let failure = asked.iter().find_map(|output| match output {
            Output::Finished(finished) => finished.failure.clone(),
            _ => None,
        });
        let failure = failure.unwrap();
        assert!(failure.what.ends_with("no device; what to do: open it"));
        assert!(failure.remedy.contains("--mode precopy"), "{failure:?}");
    }
    let mut source = Source::new(setup_of(Mode::Auto { postcopy: true }), Time(0));
    source.handle(NOW, accept_with(1, "no device"));
    let asked = outputs(&mut source);
    assert!(asked.contains(&Output::Attach));
    let warned = |output: &Output| matches!(output, Output::Report(Report::Notice { text }) if text.ends_with("no device"));
    assert!(asked.iter().any(warned), "{asked:?}");
}

/// Over RDMA the destination reads by itself, and nothing goes out here.
#[test]
fn a_destination_that_lacks_less_and_less_reads() {
    let mut source = serving();
    let mut now = NOW.after(Duration::from_secs(2));
    for left in (1..100).rev() {
        now = now.after(Duration::from_secs(1));
        source.handle(now, Input::Read { bytes: 0 });
        let faults = FaultFigures::default();
        let bytes = left * 4096;
        source.handle(now, Input::Message(Message::Lacks { bytes, faults }));
    }
    let paused = |output: &Output| matches!(output, Output::Report(Report::Paused { .. }));
    assert!(!outputs(&mut source).iter().any(paused));
}

/// How long a person waits to be told that a destination which answers does not fetch.
#[test]
fn a_destination_that_reads_nothing_though_it_lacks_pages_is_a_pause() {
    let mut source = serving();
    let unread = Timeouts::default().unread;
    let start = NOW.after(Duration::from_secs(2));
    let lacks = |bytes| {
        Input::Message(Message::Lacks {
            bytes,
            faults: FaultFigures::default(),
        })
    };
    let told = |source: &mut Source| -> Vec<Output> {
        let mut told = outputs(source);
        told.retain(|output| {
            matches!(
                output,
                Output::Report(Report::State { .. } | Report::Paused { .. })
            )
        });
        told
    };
    // It reads, however little, and as long as it does nothing is wrong.
    let mut now = start;
    for bytes in 0..60 {
        now = now.after(Duration::from_secs(1));
        source.handle(now, Input::Read { bytes });
        source.handle(now, lacks(8192));
    }
    assert_eq!(told(&mut source), []);
    let read_last = now;
    while now < read_last.after(unread) {
        assert_eq!(told(&mut source), []);
        now = now.after(Duration::from_secs(1));
        source.handle(now, Input::Read { bytes: 59 });
        source.handle(now, lacks(8192));
    }
    let said = told(&mut source);
    assert!(
        matches!(&said[..], [Output::Report(Report::State { state: State::Paused }), Output::Report(Report::Paused { reason })]
            if reason.contains("has read none for 10 s")),
        "{said:?}"
    );
    // It is said once, and the destination is connected: its memory is not let go of.
    now = now.after(Duration::from_secs(5));
    source.handle(now, lacks(8192));
    assert_eq!(told(&mut source), []);
    source.handle(
        now,
        Input::Resolve(Resolution::Abandon { peer_fenced: false }),
    );
    assert!(matches!(
        &outputs(&mut source)[..],
        [Output::Decided(Err(_))]
    ));
    // It reads on.
    let read_on = read_last.after(unread + Duration::from_secs(20));
    source.handle(read_on, Input::Message(Message::Pong { nonce: 1 }));
    assert_eq!(told(&mut source), []);
    source.handle(read_on, Input::Read { bytes: 60 });
    let state = State::Migrating;
    assert_eq!(told(&mut source), [Output::Report(Report::State { state })]);
    let id = MigrationId([3; 16]);
    source.handle(read_on, Input::Message(Message::Whole { id, cost: None }));
    source.handle(read_on, Input::Journaled(RELEASED));
    let end = outputs(&mut source);
    let figures = end.iter().find_map(|output| match output {
        Output::Finished(finished) => Some(finished.figures.clone()),
        _ => None,
    });
    assert_eq!(figures.unwrap().paused_ms, Some(20_000.0));
}

/// One that keeps to a small limit, under which a page takes its time, also when a daemon serves it that does not know the limit.
#[test]
fn a_destination_that_reads_as_slowly_as_it_may_is_no_pause() {
    let mut setup = setup_of(Mode::Postcopy);
    setup.options.background_limit = Some(1);
    let mut taken_up =
        Source::recover(setup_of(Mode::Postcopy), Outcome::Here, Postcopy::Open, NOW);
    taken_up.handle(NOW, Input::Reconnected);
    taken_up.handle(NOW, Input::Message(Message::Resumed));
    outputs(&mut taken_up);
    for mut source in [serving_with(setup), taken_up] {
        let paused = |output: &Output| matches!(output, Output::Report(Report::Paused { .. }));
        let start = NOW.after(Duration::from_secs(2));
        let mut told = Vec::new();
        for second in 0..=91 {
            told.extend(outputs(&mut source));
            // It stops at 31 s.
            let bytes = 1 + second.min(31) / 31;
            let now = start.after(Duration::from_secs(second));
            source.handle(now, Input::Message(Message::Pong { nonce: second }));
            source.handle(now, Input::Read { bytes });
        }
        assert!(!told.iter().any(paused), "{told:?}");
        assert!(outputs(&mut source).iter().any(paused));
    }
}

/// One that answers pings is not better for saying nothing of what it lacks.
#[test]
fn a_destination_that_answers_and_says_and_reads_nothing_is_a_pause() {
    let mut source = serving();
    let start = NOW.after(Duration::from_secs(2));
    let paused = |source: &mut Source| {
        let paused = |output: &Output| matches!(output, Output::Report(Report::Paused { .. }));
        outputs(source).iter().any(paused)
    };
    for second in 0..=10 {
        assert!(!paused(&mut source), "after {second} s");
        let now = start.after(Duration::from_secs(second));
        source.handle(now, Input::Message(Message::Pong { nonce: second }));
        source.handle(now, Input::Read { bytes: 9 });
    }
    assert!(paused(&mut source));
}

/// One that lacks nothing has nothing to read: it lets go of its QEMU's memory, and says so as long as that takes.
#[test]
fn a_destination_that_lacks_nothing_reads_nothing() {
    let mut source = serving();
    let start = NOW.after(Duration::from_secs(2));
    source.handle(start, Input::Read { bytes: 9 });
    let lacks = Message::Lacks {
        bytes: 0,
        faults: FaultFigures::default(),
    };
    source.handle(start, Input::Message(lacks));
    let late = start.after(Timeouts::default().unread * 3);
    source.handle(late, Input::Message(Message::Pong { nonce: 1 }));
    source.handle(late, Input::Read { bytes: 9 });
    let paused = |output: &Output| matches!(output, Output::Report(Report::Paused { .. }));
    assert!(!outputs(&mut source).iter().any(paused));
}
