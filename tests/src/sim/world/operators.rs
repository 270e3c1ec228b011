//! What operators do about a migration that is in doubt or paused, and when nothing can end it.

use std::time::Duration;

use pagecopy::engine::destination::Input as ToDestination;
use pagecopy::engine::doubt::Resolution;
use pagecopy::engine::event::State;

use super::super::driver::Driver;
use super::super::env::Event;
use super::super::fault::Wish;
use super::super::plan::Side;
use super::super::tally::Happened;
use super::World;

impl World {
    /// One side waits for the other, which will never come, and no operator looks after it.
    pub(super) fn paused_for_good(&self) -> bool {
        let there = self.destination.state() == Some(State::Paused) && self.never_serves();
        let here = self.source.state() == Some(State::Paused)
            && (self.never_comes() || self.source.files_gone());
        !self.env.plan.operator
            && (there || here)
            && (there || self.destination.settled())
            && (here || self.source.settled())
    }

    /// Nobody will ever read the guest's memory at the source again.
    fn never_serves(&self) -> bool {
        // In doubt, the word that its guest is at the destination may have been the operator's.
        let let_go = self.env.let_go_by_word && self.source.ended == Some(State::Completed);
        self.source.cannot_serve() || let_go || !self.env.wires.reachable()
    }

    /// The destination's daemon will never say that it needs nothing more.
    fn never_comes(&self) -> bool {
        self.destination.host.gone
            || self.destination.knows_nothing_of_its_guest()
            || !self.env.wires.reachable()
    }

    /// A pause is noticed, some time later.
    pub(super) fn call_the_operator(&mut self) {
        let paused = Some(State::Paused);
        let noticed = self.source.state() == paused || self.destination.state() == paused;
        if noticed && self.env.plan.operator && !self.operator_called {
            self.operator_called = true;
            let delay = self.env.rng.micros(1_000_000, 300_000_000);
            self.env.agenda.after(delay, Event::Operator);
        }
    }

    /// The operators of a pause: they wait, unless nothing will end it.
    fn operators_of_a_pause(&mut self) {
        self.operator_called = false;
        if self.destination.state() == Some(State::Paused) && self.never_serves() {
            self.give_pages_up(true);
        } else if self.source.state() == Some(State::Paused)
            && (self.never_comes() || self.source.files_gone())
        {
            let peer_fenced = !self.source.files_gone();
            if peer_fenced && !self.destination.host.gone {
                self.destination.fence(&mut self.env);
            }
            let word = Resolution::Abandon { peer_fenced };
            self.source.resolve(&mut self.env, word);
        }
    }

    /// The destination's operator wants the guest to go on without what it lacks.
    pub(super) fn give_pages_up(&mut self, fenced: bool) {
        if self.destination.state() != Some(State::Paused) {
            return;
        }
        if fenced {
            self.source.fence(&mut self.env);
        }
        let word = ToDestination::Poison {
            peer_fenced: fenced,
        };
        self.destination.input(&mut self.env, word);
    }

    /// In doubt, nobody who could end it will ever come back, and no operator looks after it, or can.
    pub(super) fn in_doubt_for_good(&self) -> bool {
        let looked_after = self.env.plan.operator && !self.source.host.disk.full_for_good();
        let forsaken = self.hopeless() || self.waits_for_lost_memory();
        self.source.ended == Some(State::InDoubt) && !looked_after && forsaken
    }

    /// A guest that has not run at the destination is not run there by itself, for the source's host has lost its memory.
    fn waits_for_lost_memory(&self) -> bool {
        self.source.files_gone() && self.destination.keeps_a_guest_that_lacks_pages()
    }

    /// The destination can never be asked again what became of the guest, or never tell.
    fn hopeless(&self) -> bool {
        !self.env.wires.reachable()
            || self.destination.cannot_help()
            || self.destination.host.disk.full_for_good()
    }

    /// An operator finds the migration in doubt. As long as the other host can help, time will; otherwise the operator
    /// makes sure of the other host's state and decides.
    pub(super) fn operator_looks(&mut self) {
        if self.source.state() != Some(State::InDoubt) {
            return self.operators_of_a_pause();
        }
        // What the operator wants may be refused, and time may be all that it takes: another look, later.
        self.env
            .agenda
            .after(Duration::from_secs(60), Event::Operator);
        if !self.hopeless() {
            // The host that was started anew has no QEMU any more, either.
            if self.waits_for_lost_memory() {
                self.operator_asks(Side::Destination, Wish::RunHere, true);
            }
            return;
        }
        if self.env.checker.runs(Side::Destination) {
            self.operator_asks(Side::Source, Wish::LetGo, false);
        } else {
            self.operator_asks(Side::Source, Wish::RunHere, true);
        }
    }

    /// The operator of a side asks for something; `fenced`: having ended the other side's QEMU and daemon for good.
    pub(super) fn operator_asks(&mut self, side: Side, wish: Wish, fenced: bool) {
        let open = match side {
            Side::Source => {
                self.source.ended == Some(State::InDoubt)
                    && self.source.state() == Some(State::InDoubt)
            }
            Side::Destination => self.destination.holds(),
        };
        let env = &mut self.env;
        if fenced {
            // Nobody does that to a host without a reason.
            if !open {
                return;
            }
            match side {
                Side::Source => self.destination.fence(env),
                Side::Destination => self.source.fence(env),
            }
        }
        if open {
            env.tally.note(if fenced {
                Happened::AskedFenced(side, wish)
            } else {
                Happened::AskedUnfenced(side, wish)
            });
        }
        let resolution = match (side, wish) {
            (_, Wish::LetGo) => Resolution::Abandon {
                peer_fenced: fenced,
            },
            (Side::Source, Wish::RunHere) => Resolution::ResumeHere {
                peer_fenced: fenced,
            },
            (Side::Destination, Wish::RunHere) => Resolution::RunHere {
                peer_fenced: fenced,
            },
        };
        match side {
            Side::Source => self.source.resolve(env, resolution),
            Side::Destination => self.destination.resolve(env, resolution),
        }
    }
}
