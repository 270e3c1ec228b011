//! Plays a cell: to the step, the fault, the healing, the end, the checks, and the next attempt.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::cell::{Cell, End, Fault, Moment, Way, role};
use super::checks;
use super::scene::{Scene, machine};
use crate::real::{Qemu, Side, eventually, let_it_last, waited_for_processor};

/// Longer than the 10 s for which each side bears the other's silence.
const LONGER_THAN_SILENCE: Duration = Duration::from_millis(11_500);
/// Within this, everybody has noticed a fault that lasts.
const NOTICED: Duration = Duration::from_secs(40);
/// Within this after the fault is healed, all is decided: the source asks at least every 30 s.
const DECIDED: Duration = Duration::from_secs(90);

/// Runs `cell`, and says in words what came of it. Panics when anything is not as it must be.
pub fn run(cell: Cell) -> String {
    let mut scene = Scene::set(cell);
    let held = scene.come_to_the_step();
    let accepted = scene.inflict();
    let inflicted = Inflicted {
        at: Instant::now(),
        daemon: scene.world.daemon(Side::A).pid(),
        waited: scene.waited(),
    };
    held.go();
    scene.heal();
    let end = scene.wait_end();
    let allowed = cell.allows(accepted);
    assert!(
        allowed.contains(&end),
        "it ended as {end:?}, where {allowed:?} is right; the source says {:?}, the destination {:?}",
        scene.state(Side::A),
        scene.state(Side::B),
    );
    let words = checks::check(&mut scene, end, &inflicted);
    scene.attempt_again(end);
    words
}

/// The moment of the harm.
pub(super) struct Inflicted {
    pub(super) at: Instant,
    /// The source's daemon of then.
    pub(super) daemon: u32,
    /// How long it and its QEMU had waited for a processor.
    pub(super) waited: [Duration; 2],
}

impl Scene {
    /// How long the source's daemon and its QEMU have waited for a processor so far.
    pub(super) fn waited(&self) -> [Duration; 2] {
        [self.world.daemon(Side::A).pid(), self.source.pid()].map(waited_for_processor)
    }

    /// Does the harm. False when it was an order that the daemon refused.
    fn inflict(&mut self) -> bool {
        let world = &mut self.world;
        match self.cell.fault {
            Fault::KillDaemon(side) => world.daemon_mut(side).kill(),
            Fault::KillBothDaemons => {
                world.daemon_mut(Side::A).kill();
                world.daemon_mut(Side::B).kill();
            }
            Fault::KillQemu(side) => self.qemu(side).kill(),
            Fault::LinkDown => world.net.cut(),
            Fault::DropBriefly | Fault::DropLong => {
                world.net.drop_arriving(Side::A);
                world.net.drop_arriving(Side::B);
            }
            Fault::MemoryFull => self.memory.iter().for_each(|memory| memory.fill()),
            Fault::DiskFull => self.disk.iter().for_each(|disk| disk.fill()),
            Fault::Cancel(side) => {
                return match self.cancel(side) {
                    Ok(()) => true,
                    Err(words) => {
                        assert!(words.contains("what to do"), "{words}");
                        false
                    }
                };
            }
            Fault::Restart(side) => {
                world.daemon(side).signal(Signal::TERM);
                // The sessions are told right after; only then may they go on.
                world.daemon(side).assert_logs(&["daemon::service: ending"]);
            }
            Fault::Pause(side) => world.daemon(side).pause(),
        }
        true
    }

    /// Lets the fault last as long as it should, and mends it.
    fn heal(&mut self) {
        match self.cell.fault {
            Fault::KillDaemon(side) => {
                self.wait_noticed();
                self.world.restart(side);
            }
            Fault::KillBothDaemons => {
                self.world.restart(Side::A);
                self.wait_noticed();
                self.world.restart(Side::B);
            }
            Fault::KillQemu(_) | Fault::Cancel(_) => {}
            Fault::LinkDown => {
                self.wait_noticed();
                self.world.net.mend();
            }
            Fault::DropBriefly => {
                let_it_last(Duration::from_secs(1));
                self.stop_dropping();
            }
            Fault::DropLong => {
                self.wait_noticed();
                self.stop_dropping();
            }
            Fault::MemoryFull => {
                self.wait_noticed();
                self.memory.iter().for_each(|memory| memory.empty());
            }
            Fault::DiskFull => {
                self.wait_noticed();
                self.disk.iter().for_each(|disk| disk.empty());
            }
            Fault::Restart(side) => {
                assert!(
                    self.world.daemon_mut(side).wait_end(),
                    "SIGTERM ends the {} daemon in order",
                    role(side)
                );
                self.world.restart(side);
            }
            Fault::Pause(side) => {
                let_it_last(LONGER_THAN_SILENCE);
                self.world.daemon(side).signal(Signal::CONT);
            }
        }
    }

    fn stop_dropping(&self) {
        self.world.net.accept_arriving(Side::A);
        self.world.net.accept_arriving(Side::B);
    }

    /// While the fault lasts: waits until every daemon that is there has come to an end, to a pause or into doubt, and checks that the
    /// guest runs where it may already.
    fn wait_noticed(&mut self) {
        for side in [Side::A, Side::B] {
            if self.world.daemon_mut(side).is_running() {
                self.wait_until(NOTICED, "to notice", side, |state| {
                    state.is_none_or(|state| settled(state) || in_doubt(state) || paused(state))
                });
            }
        }
        // A QEMU whose guest waits for pages may not answer on its monitor before they come.
        let destination = if self.cell.step.way == Way::First {
            self.destination.serial.beats() > 0
        } else {
            self.runs(Side::B)
        };
        let both = self.runs(Side::A) && destination;
        assert!(!both, "both QEMUs run the guest");
        if !self.world.daemon_mut(Side::A).is_running() {
            return;
        }
        let told = self.state(Side::A);
        let doubt = told.as_ref().is_some_and(in_doubt);
        if doubt {
            let words = text(told.as_ref());
            assert!(words.contains("pagecopy resolve"), "no remedy: {words}");
        }
        assert!(
            doubt || !self.cell.must_be_in_doubt(),
            "the source cannot know what became of the guest: {told:?}"
        );
        if !doubt && self.cell.step.moment < Moment::Sent && self.cell.allows(true) == [End::Source]
        {
            assert!(
                self.runs(Side::A),
                "no guest runs while the fault lasts, and nobody is in doubt: {told:?}"
            );
        }
    }

    /// Waits until the migration has ended for good, with an operator's help where nobody else can decide.
    fn wait_end(&mut self) -> End {
        let resolved = self.cell.allows(true) == [End::Resolved];
        if resolved {
            self.abandon();
        }
        for side in [Side::A, Side::B] {
            if self.world.daemon_mut(side).is_running() {
                self.wait_until(DECIDED, "to end", side, |state| state.is_none_or(settled));
            }
        }
        match [Side::A, Side::B].map(|side| self.runs(side)) {
            [true, true] => panic!("both QEMUs run the guest"),
            [true, false] if resolved => End::Resolved,
            [true, false] => End::Source,
            [false, true] => End::Destination,
            [false, false] => End::Lost,
        }
    }

    /// The destination's QEMU died when the guest was its own, and nobody knows whether it had run: both sides are in doubt
    /// and say what to do. The destination's operator says that it never will run there.
    fn abandon(&mut self) {
        for side in [Side::B, Side::A] {
            let doubt = self.wait_until(DECIDED, "to be in doubt", side, |state| {
                state.is_some_and(in_doubt)
            });
            let words = text(doubt.as_ref());
            assert!(words.contains("pagecopy resolve"), "no remedy: {words}");
        }
        let cli = self.world.cli(Side::B);
        let output = cli.run(&["resolve", &self.id, "--abandon"]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn wait_until(
        &self,
        limit: Duration,
        what: &str,
        side: Side,
        reached: impl Fn(Option<&Value>) -> bool,
    ) -> Option<Value> {
        let looked = eventually(limit, || {
            let state = self.state(side);
            if reached(state.as_ref()) {
                Ok(state)
            } else {
                Err(format!("{state:?}"))
            }
        });
        looked.unwrap_or_else(|state| {
            let side = role(side);
            panic!("the {side} does not come {what} within {limit:?}: {state}")
        })
    }

    /// What the daemon of `side` says of the migration, if it knows it.
    pub(super) fn state(&self, side: Side) -> Option<Value> {
        self.world.cli(side).find(&self.id)
    }

    pub(super) fn qemu(&mut self, side: Side) -> &mut Qemu {
        match side {
            Side::A => &mut self.source,
            Side::B => &mut self.destination,
        }
    }

    pub(super) fn runs(&mut self, side: Side) -> bool {
        let qemu = self.qemu(side);
        qemu.is_running() && qemu.qmp.status() == "running"
    }

    /// The next attempt: the same guest where there is one, to the same waiting QEMU where that was not used; from where
    /// the guest is now.
    fn attempt_again(self, end: End) {
        let Scene {
            vm,
            mut source,
            mut destination,
            world,
            ..
        } = self;
        match end {
            End::Destination => {
                source.kill();
                let mut back = world.waiting("back", &machine());
                world.moves_next(Side::B, &vm, &mut destination, &mut back);
            }
            End::Source | End::Resolved | End::Lost => {
                let reusable = destination.is_running()
                    && destination.qmp.status() == "inmigrate"
                    && !has_failed_to_load(&mut destination);
                if !reusable {
                    destination.kill();
                    destination = world.waiting("destination-2", &machine());
                }
                if end == End::Lost {
                    source.kill();
                    source = world.guest("source-2", &machine());
                }
                world.moves_next(Side::A, &vm, &mut source, &mut destination);
            }
        }
    }
}

/// Whether it has ended for good. The state is told a moment before the end with its words, which may still be those of a
/// doubt.
fn settled(state: &Value) -> bool {
    let ends = ["completed", "failed", "cancelled"];
    ends.iter().any(|end| state["state"] == *end) && state["finished"]["status"] == state["state"]
}

fn in_doubt(state: &Value) -> bool {
    state["state"] == "in-doubt" && state["finished"]["status"] == "in-doubt"
}

/// Whether QEMU says that it waits, and was given a guest whose migration was given up while it loaded: as a post-copy may
/// be, whose pages are fetched meanwhile.
pub(super) fn has_failed_to_load(qemu: &mut Qemu) -> bool {
    let told = qemu.qmp.execute("query-migrate", json!({}));
    told.is_ok_and(|told| told["status"] == "failed")
}

/// The guest lacks pages, and the other side is away.
fn paused(state: &Value) -> bool {
    state["state"] == "paused"
}

/// How a migration ended, in the words for the operator.
pub(super) fn text(state: Option<&Value>) -> String {
    let finished = state.map(|state| &state["finished"]);
    let word = |key: &str| {
        let value = finished.and_then(|finished| finished[key].as_str());
        value.unwrap_or_default().to_owned()
    };
    format!("{} {}", word("error"), word("remedy"))
}
