//! A migration in doubt on real QEMU: it ends by itself when the destination can be asked again, an operator ends it where
//! that cannot make two guests, and whatever could is refused and says why.
//!
//! The daemon at the destination is held at a step of the commit (`--features steps`), and there the network goes, or a
//! process.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tests::real::{
    Machine, Manner, Migration, Qemu, RunAs, Scratch, Side, Steps, Version, World, certified,
    eventually,
};

/// What most guests here do.
const DIRTIES: &str = "rate=5 set=8";

/// Two hosts with a guest under way, whose destination stands at a step of the commit.
struct Doubt {
    world: World,
    source: Qemu,
    destination: Qemu,
    migration: Option<Migration>,
    id: String,
    held: Option<tests::real::Held>,
    _steps: Steps,
}

impl Doubt {
    /// The destination stands at `step`.
    fn at(step: &str) -> Doubt {
        Doubt::with(step, DIRTIES, &[])
    }

    /// The same with a guest that dirties as `guest` says, migrated with `options`.
    fn with(step: &str, guest: &str, options: &[&str]) -> Doubt {
        let scratch = Scratch::new();
        let steps = Steps::listen(
            &scratch.files().join("steps.sock"),
            &[format!("destination {step} 1")],
        );
        let [a, b] = certified(&scratch);
        let manner = |side: Side, trust, steps| Manner {
            name: side.name().to_owned(),
            trust,
            steps,
            run_as: RunAs::User,
        };
        let manners = [
            manner(Side::A, a, None),
            manner(Side::B, b, Some(steps.socket().to_owned())),
        ];
        let world = World::of(scratch, &manners);
        let machine = Machine::new(Version::V10_0, 64, guest);
        let source = world.guest("source", &machine);
        let destination = world.waiting("destination", &machine);
        let migration = world.begin(Side::A, "vm", &source, &destination, options);
        let held = steps.wait(Duration::from_secs(60)).unwrap();
        let id = world.cli(Side::A).id_of("vm");
        Doubt {
            world,
            source,
            destination,
            migration: Some(migration),
            id,
            held: Some(held),
            _steps: steps,
        }
    }

    /// `Committed` is on the destination's disk, and its daemon is dead.
    fn committed_and_killed() -> Doubt {
        let mut doubt = Doubt::at("Journaled(Committed)");
        doubt.world.net.cut();
        doubt.world.daemon_mut(Side::B).kill();
        doubt.held = None;
        doubt.wait_in_doubt();
        doubt
    }

    /// The same of a guest that went first, and the source's daemon has come back without the RAM file. `enough` waits for what
    /// the guest is to have by then, with `options`.
    fn without_its_file(options: &[&str], enough: impl Fn(&Doubt)) -> Doubt {
        // What is poisoned ends a QEMU without KVM when it is touched.
        let touches_nothing = "rate=0 set=16 sweep=0";
        let options = [&["--mode", "postcopy"], options].concat();
        let mut doubt = Doubt::with("Journaled(Committed)", touches_nothing, &options);
        enough(&doubt);
        doubt.world.daemon_mut(Side::B).kill();
        doubt.held = None;
        doubt.wait_in_doubt();
        doubt.world.daemon_mut(Side::A).kill();
        std::fs::remove_file(doubt.source.ram()).unwrap();
        doubt.world.restart(Side::A);
        doubt.world.restart(Side::B);
        doubt
    }

    /// The same, and it lacks pages.
    fn committed_without_its_file() -> Doubt {
        // Half is empty at the source, too; what it needs to be run is at the bottom.
        Doubt::lacking_without_its_file("20MB/s", 75)
    }

    /// It has so many of 100 pages, and fetches no faster than `limit`.
    fn lacking_without_its_file(limit: &str, percent: usize) -> Doubt {
        let slowly = ["--postcopy-bandwidth-limit", limit];
        let doubt = Doubt::without_its_file(&slowly, |doubt| doubt.wait_received(percent));
        let told = eventually(Duration::from_secs(60), || {
            let shown = doubt.world.cli(Side::B).status(&doubt.id);
            let error = shown["finished"]["error"].as_str().unwrap_or_default();
            match error.contains("does not have the memory any more") {
                true => Ok(error.to_owned()),
                false => Err(shown.to_string()),
            }
        });
        assert_says(
            &told.unwrap(),
            &["RAM file back", "--abandon", "--run-here --peer-fenced"],
        );
        assert_eq!(doubt.state(Side::B), "in-doubt");
        assert_eq!(doubt.state(Side::A), "in-doubt");
        assert_eq!(
            doubt.destination.serial.beats(),
            0,
            "run without its memory"
        );
        doubt
    }

    /// Waits until so many of 100 pages are marked as received: the channels fetch on while the session is held.
    fn wait_received(&self, percent: usize) {
        let state = self.world.daemon(Side::B).state();
        let file = state.join("journal").join(format!("{}.received", self.id));
        let all = eventually(Duration::from_secs(60), || {
            let bytes = std::fs::read(&file).map_err(|error| error.to_string())?;
            // The bits are behind the header's page.
            let here = bytes[4096..].iter().filter(|byte| **byte == 0xff).count();
            match here * 100 >= (bytes.len() - 4096) * percent {
                true => Ok(()),
                false => Err(format!("{here} of {} bytes", bytes.len() - 4096)),
            }
        });
        all.unwrap();
    }

    /// The command line has told the doubt, and so does the daemon.
    fn wait_in_doubt(&mut self) {
        let outcome = self.migration.take().unwrap().finish();
        let error = outcome.not_completed("in-doubt");
        assert!(error.contains("--resume-here --peer-fenced"), "{error}");
        assert_eq!(outcome.status.code(), Some(4));
        assert_eq!(self.state(Side::A), "in-doubt");
        assert_eq!(self.source.qmp.status(), "postmigrate");
    }

    fn state(&self, side: Side) -> String {
        let shown = self.world.cli(side).status(&self.id);
        shown["state"].as_str().unwrap().to_owned()
    }

    fn wait_state(&self, side: Side, wanted: &str) {
        // The source asks every 30 s at the latest.
        let came = eventually(Duration::from_secs(60), || {
            let state = self.state(side);
            if state == wanted {
                return Ok(());
            }
            let shown = self.world.cli(side).status(&self.id);
            Err(format!(
                "{state} at {}, and never {wanted}: {shown}",
                side.name()
            ))
        });
        came.unwrap();
    }

    fn resolve(&self, side: Side, options: &[&str]) -> Result<String, String> {
        let words = [&["resolve", &self.id], options].concat();
        let output = self.world.cli(side).run(&words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            assert_eq!(output.status.code(), Some(1));
            Err(text(&output.stderr))
        }
    }

    /// Refused, with all of `words`.
    fn refused(&self, side: Side, options: &[&str], words: &[&str]) {
        let refusal = self.resolve(side, options).expect_err("it is refused");
        assert_says(&refusal, &[&["refused: ", "what to do:"], words].concat());
    }

    /// To migrate or receive the guest, or to receive with its QEMU, is refused on a host where it is in doubt.
    fn nothing_else_touches_it(&self, side: Side, qemu: &Qemu) {
        let cli = self.world.cli(side);
        let why = ["is in doubt here", &self.id];
        for vm in ["vm", "another"] {
            assert_says(&cli.receive(vm, qemu.socket()).unwrap_err(), &why);
            let outcome = cli.migrate(vm, qemu, side.other(), &[]).finish();
            assert!(!outcome.status.success());
            assert_says(&outcome.errors, &why);
        }
        let output = cli.run(&["cancel", &self.id]);
        assert_says(
            &String::from_utf8_lossy(&output.stderr),
            &["cannot be cancelled"],
        );
    }

    fn assert_runs_only_at_source(&mut self) {
        self.source.serial.wait_beats(100);
        self.source.serial.verify();
        assert_eq!(self.source.qmp.status(), "running");
        assert_eq!(self.destination.serial.beats(), 0, "a second guest ran");
    }

    fn assert_runs_only_at_destination(&mut self) {
        assert_eq!(self.source.qmp.status(), "postmigrate");
        let beats = self.source.serial.beats();
        self.destination.serial.wait_beats(100);
        self.destination.serial.verify();
        assert_eq!(self.destination.qmp.status(), "running");
        assert_eq!(self.source.serial.beats(), beats, "a second guest ran");
    }
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn doubt_ends_by_itself_when_the_destination_can_be_asked_again() {
    let mut doubt = Doubt::at("Send(Running)");
    doubt.world.net.cut();
    doubt.held.take().unwrap().go();
    doubt.wait_in_doubt();
    doubt.refused(
        Side::A,
        &["--resume-here"],
        &["does not answer", "two would run", "--peer-fenced"],
    );
    doubt.refused(
        Side::A,
        &["--run-here", "--peer-fenced"],
        &["this is the source"],
    );
    doubt.nothing_else_touches_it(Side::A, &doubt.source);
    // The daemon that asks may be another.
    doubt.world.restart(Side::A);
    assert_eq!(doubt.state(Side::A), "in-doubt");
    doubt.nothing_else_touches_it(Side::A, &doubt.source);
    doubt.world.net.mend();
    // Asked at once, the destination answers, and overrules the operator's word.
    match doubt.resolve(Side::A, &["--resume-here", "--peer-fenced"]) {
        Err(refusal) => assert_says(&refusal, &["refused: "]),
        Ok(done) => panic!("taken back while it runs at the destination: {done}"),
    }
    doubt.wait_state(Side::A, "completed");
    doubt.assert_runs_only_at_destination();
    doubt.refused(
        Side::A,
        &["--abandon"],
        &["is not in doubt, it is completed"],
    );
    doubt.refused(
        Side::B,
        &["--abandon"],
        &["is not in doubt, it is completed"],
    );
}

#[test]
fn a_committed_guest_runs_when_the_source_asks_a_daemon_that_was_started_anew() {
    let mut doubt = Doubt::committed_and_killed();
    doubt.world.restart(Side::B);
    doubt.wait_state(Side::B, "in-doubt");
    let shown = doubt.world.cli(Side::B).status(&doubt.id);
    assert_says(
        shown["finished"]["error"].as_str().unwrap(),
        &[
            "committed to this host",
            "as soon as the source asks",
            "--run-here --peer-fenced",
        ],
    );
    doubt.refused(
        Side::B,
        &["--run-here"],
        &[
            "the source's operator may have taken the guest back",
            "--peer-fenced",
        ],
    );
    doubt.refused(Side::B, &["--resume-here"], &["this is the destination"]);
    doubt.nothing_else_touches_it(Side::B, &doubt.destination);
    assert_eq!(
        doubt.destination.serial.beats(),
        0,
        "run before the source asked"
    );
    doubt.world.net.mend();
    doubt.wait_state(Side::A, "completed");
    doubt.wait_state(Side::B, "completed");
    doubt.assert_runs_only_at_destination();
}

#[test]
fn a_guest_that_the_destination_lets_go_of_is_taken_back() {
    let mut doubt = Doubt::committed_and_killed();
    doubt.world.restart(Side::B);
    doubt.wait_state(Side::B, "in-doubt");
    let done = doubt.resolve(Side::B, &["--abandon"]).unwrap();
    assert_says(&done, &["never will run here"]);
    doubt.refused(
        Side::B,
        &["--run-here", "--peer-fenced"],
        &["is not in doubt, it is failed", "never will run here"],
    );
    doubt.world.net.mend();
    doubt.wait_state(Side::A, "failed");
    doubt.assert_runs_only_at_source();
}

/// The guest goes first, and its QEMU dies before it has run, while its page faults were served and the source had asked:
/// the source has served, and let go of nothing.
#[test]
fn a_guest_that_went_first_and_never_ran_is_taken_back() {
    let mut doubt = Doubt::with("RunGuest", DIRTIES, &["--mode", "postcopy"]);
    doubt.world.net.cut();
    doubt.wait_in_doubt();
    doubt.world.net.mend();
    doubt.world.daemon(Side::B).assert_logs(&[
        "a source asks",
        "asked=Serve",
        "standing=Committed",
    ]);
    doubt.destination.kill();
    doubt.held.take().unwrap().go();
    doubt.wait_state(Side::B, "in-doubt");
    assert_eq!(doubt.state(Side::A), "in-doubt");
    let done = doubt.resolve(Side::B, &["--abandon"]).unwrap();
    assert_says(&done, &["never will run here"]);
    doubt.wait_state(Side::A, "failed");
    doubt.assert_runs_only_at_source();
}

/// The same, and nothing is the matter but the link: it runs there.
#[test]
fn a_guest_that_went_first_runs_when_its_source_serves_in_doubt() {
    let mut doubt = Doubt::with("RunGuest", DIRTIES, &["--mode", "postcopy"]);
    doubt.world.net.cut();
    doubt.wait_in_doubt();
    doubt.world.net.mend();
    doubt.held.take().unwrap().go();
    doubt.wait_state(Side::B, "completed");
    doubt.wait_state(Side::A, "completed");
    doubt.assert_runs_only_at_destination();
}

/// It is committed to a destination that is killed before it runs it, and the source comes back without its RAM file: nothing is
/// run with what is there. The source's QEMU still has all of it.
#[test]
fn a_guest_that_went_first_and_never_ran_is_taken_back_though_its_file_is_gone() {
    let mut doubt = Doubt::committed_without_its_file();
    doubt.refused(Side::B, &["--abandon"], &["end this host's QEMU"]);
    doubt.refused(Side::B, &["--run-here"], &["--peer-fenced"]);
    doubt.destination.kill();
    let done = doubt.resolve(Side::B, &["--abandon"]).unwrap();
    assert_says(&done, &["never will run here"]);
    doubt.wait_state(Side::A, "failed");
    doubt.assert_runs_only_at_source();
}

/// All of its memory has come, though nobody has recorded that: nothing is needed of the source, and nobody has to decide.
#[test]
fn a_guest_that_has_all_of_its_memory_is_run_though_its_source_has_lost_it() {
    let mut doubt = Doubt::without_its_file(&[], |doubt| doubt.wait_received(100));
    doubt.wait_state(Side::B, "completed");
    doubt.wait_state(Side::A, "completed");
    doubt.assert_runs_only_at_destination();
}

/// What is as above but lacks memory, and the source's QEMU is gone, too: the operators go on with what there is.
#[test]
fn a_guest_that_went_first_and_whose_source_is_gone_is_run_by_the_operators_word() {
    let mut doubt = Doubt::committed_without_its_file();
    doubt.source.kill();
    doubt.world.daemon_mut(Side::A).kill();
    let done = doubt
        .resolve(Side::B, &["--run-here", "--peer-fenced"])
        .unwrap();
    assert_says(&done, &["the guest runs here"]);
    doubt.wait_state(Side::B, "paused");
    let done = doubt
        .resolve(Side::B, &["--poison", "--peer-fenced"])
        .unwrap();
    assert_says(&done, &["goes on without"]);
    doubt.wait_state(Side::B, "completed");
}

/// It lacks what QEMU needs to say that it runs: it was told to, and that is what can be done.
#[test]
fn a_guest_that_waits_as_soon_as_it_runs_is_run_by_the_operators_word() {
    let mut doubt = Doubt::lacking_without_its_file("1B/s", 0);
    doubt.source.kill();
    doubt.world.daemon_mut(Side::A).kill();
    let done = doubt
        .resolve(Side::B, &["--run-here", "--peer-fenced"])
        .unwrap();
    assert_says(&done, &["the guest runs here"]);
    doubt.wait_state(Side::B, "paused");
}

#[test]
fn a_destination_that_is_gone_for_good_needs_the_operators_word_and_is_told_if_it_comes_back() {
    let mut doubt = Doubt::at("Journaled(Committed)");
    doubt.world.daemon_mut(Side::B).kill();
    doubt.destination.kill();
    doubt.wait_in_doubt();
    doubt.refused(
        Side::A,
        &["--resume-here"],
        &["does not answer", "--peer-fenced"],
    );
    let done = doubt
        .resolve(Side::A, &["--resume-here", "--peer-fenced"])
        .unwrap();
    assert_says(&done, &["taken back here"]);
    doubt.wait_state(Side::A, "failed");
    doubt.source.serial.wait_beats(100);
    doubt.source.serial.verify();
    doubt.refused(Side::A, &["--abandon"], &["is not in doubt, it is failed"]);
    doubt.world.restart(Side::B);
    doubt
        .world
        .daemon(Side::A)
        .assert_logs(&["the destination knows that the guest was taken back"]);
    doubt.wait_state(Side::B, "failed");
}

#[test]
fn both_operators_wrong_at_once() {
    let mut doubt = Doubt::committed_and_killed();
    // Not fenced: only its daemon is dead, and the network.
    doubt
        .resolve(Side::A, &["--resume-here", "--peer-fenced"])
        .unwrap();
    doubt.wait_state(Side::A, "failed");
    doubt.world.restart(Side::B);
    doubt.wait_state(Side::B, "in-doubt");
    doubt.refused(Side::B, &["--run-here"], &["two would run"]);
    // Another daemon goes on telling.
    doubt.world.restart(Side::A);
    doubt.world.net.mend();
    doubt.wait_state(Side::B, "failed");
    doubt.refused(
        Side::B,
        &["--run-here", "--peer-fenced"],
        &["is not in doubt, it is failed"],
    );
    doubt.assert_runs_only_at_source();
}
