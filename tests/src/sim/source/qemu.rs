//! Driving the source's QEMU, and what it does by itself.

use std::time::Duration;

use pagecopy::engine::Fault as Blame;
use pagecopy::engine::source::Input;
use pagecopy::limits::MAX_DEVICE_STATE_CHUNK;

use super::super::driver::Driver;
use super::super::env::{Env, Event, SourceStep, failure};
use super::super::mistake::Mistake;
use super::super::plan::Side;
use super::super::qemu::{SourceState, device_state};
use super::super::tally::Happened;
use super::SourceSide;

impl SourceSide {
    fn command(&mut self, env: &mut Env, state: SourceState, delay: Duration, step: SourceStep) {
        let command = self.qemu.enter(state);
        env.agenda.after(delay, Event::SourceQemu(command, step));
    }

    fn qemu_failed(&mut self, env: &mut Env, what: &str) {
        self.input(env, Input::QemuFailed(failure(Blame::Qemu, what)));
    }

    /// QMP `migrate`: the guest stands at once, and its disk I/O is waited for.
    pub(super) fn stop_guest(&mut self, env: &mut Env) {
        if self.qemu.state != SourceState::Running {
            let delay = env.qemu_delay(Side::Source);
            let what = failure(Blame::Qemu, "there is no running guest to stop");
            return self.answer_after(env, delay, Input::QemuFailed(what));
        }
        env.checker.stopped(Side::Source);
        let drained = self
            .guest
            .reads_end()
            .filter(|_| !env.errs(Mistake::NoDrain));
        let wait = drained.map_or(Duration::ZERO, |end| end.since(env.now()));
        let delay = wait + env.qemu_delay(Side::Source);
        let step = if env.qemu_fails(Side::Source) {
            SourceStep::Fails {
                goes_on: env.rng.chance(500),
            }
        } else {
            SourceStep::AtPreSwitchover
        };
        self.command(env, SourceState::Stopping, delay, step);
    }

    /// QMP `migrate-continue`: the device state comes out in pieces.
    pub(super) fn save_device_state(&mut self, env: &mut Env) {
        if self.qemu.state != SourceState::PreSwitchover {
            let delay = env.qemu_delay(Side::Source);
            let what = failure(Blame::Qemu, "QEMU is not at pre-switchover");
            return self.answer_after(env, delay, Input::QemuFailed(what));
        }
        let order: Vec<usize> = (0..env.plan.blocks.len()).collect();
        self.device_state = device_state(
            self.qemu.stops,
            self.ram.version_digest(&order),
            env.plan.device_state,
        );
        let delay = env.qemu_delay(Side::Source);
        let step = if env.qemu_fails(Side::Source) {
            SourceStep::Fails {
                goes_on: env.rng.chance(500),
            }
        } else {
            SourceStep::DeviceState { from: 0 }
        };
        self.command(env, SourceState::Saving, delay, step);
    }

    /// QMP `migrate_cancel` or `cont`.
    pub(super) fn resume_guest(&mut self, env: &mut Env) {
        if self.guest.throttled > 0 {
            env.checker
                .violate("the guest is taken back, and is slowed".into());
        }
        let delay = env.qemu_delay(Side::Source);
        if self.qemu.state == SourceState::Gone {
            let gone = failure(Blame::Qemu, "QEMU is gone");
            return self.answer_after(env, delay, Input::ResumeFailed(gone));
        }
        if self.qemu.running() {
            // `cont` of a running guest is no error.
            return self.answer_after(env, delay, Input::GuestResumed);
        }
        let step = if env.qemu_fails(Side::Source) {
            SourceStep::ResumeFails
        } else {
            SourceStep::Resumed
        };
        self.command(env, self.qemu.state, delay, step);
    }

    /// QMP `quit`.
    pub(super) fn quit_guest(&mut self, env: &mut Env) {
        let delay = env.qemu_delay(Side::Source);
        self.command(env, self.qemu.state, delay, SourceStep::Quits);
    }

    /// The daemon's end of the device state's stream is closed. QEMU lets its guest run on if it was not done.
    pub(super) fn stream_breaks(&mut self, env: &mut Env) {
        if self.qemu.state == SourceState::Saving {
            let delay = env.qemu_delay(Side::Source);
            self.command(
                env,
                SourceState::Saving,
                delay,
                SourceStep::Fails { goes_on: true },
            );
        }
    }

    /// The process dies.
    pub(in crate::sim) fn qemu_dies(&mut self, env: &mut Env) {
        if self.qemu.state == SourceState::Gone {
            return;
        }
        env.note("source", format_args!("QEMU dies"));
        env.tally.note(Happened::QemuDied(Side::Source));
        self.qemu.enter(SourceState::Gone);
        env.checker.stopped(Side::Source);
        env.checker.rollback_excused();
        env.qemu_lost[Side::Source as usize] = true;
        self.qemu_failed(env, "QEMU was made to die");
    }

    /// A step of QEMU's, if its command still counts.
    pub(in crate::sim) fn qemu_steps(&mut self, env: &mut Env, command: u32, step: SourceStep) {
        if command != self.qemu.command {
            return;
        }
        env.note("source", format_args!("QEMU: {step:?}"));
        match step {
            SourceStep::AtPreSwitchover => {
                self.qemu.stops += 1;
                self.qemu.enter(SourceState::PreSwitchover);
                self.input(env, Input::GuestStopped);
            }
            SourceStep::Fails { goes_on } => {
                if goes_on {
                    self.runs(env);
                } else {
                    self.qemu.enter(SourceState::Stopped);
                }
                self.qemu_failed(env, "the command was made to fail");
            }
            SourceStep::DeviceState { from } => self.device_state_piece(env, from),
            SourceStep::Resumed => {
                self.runs(env);
                self.input(env, Input::GuestResumed);
            }
            SourceStep::ResumeFails => {
                self.resume_failed = true;
                env.checker.rollback_excused();
                self.input(
                    env,
                    Input::ResumeFailed(failure(Blame::Qemu, "resuming was made to fail")),
                );
            }
            SourceStep::Quits => {
                self.qemu.enter(SourceState::Gone);
                if !env.checker.arrived() {
                    env.checker
                        .violate("QEMU is quit with the only copy of the guest".into());
                }
                if env.checker.runs(Side::Source) {
                    env.checker.stopped(Side::Source);
                    env.checker
                        .violate("QEMU is quit while the guest runs in it".into());
                }
            }
        }
    }

    fn runs(&mut self, env: &mut Env) {
        self.qemu.enter(SourceState::Running);
        env.checker.started(Side::Source);
    }

    fn device_state_piece(&mut self, env: &mut Env, from: usize) {
        let len = env.rng.index(MAX_DEVICE_STATE_CHUNK) + 1;
        let to = (from + len).min(self.device_state.len());
        let piece = bytes::Bytes::copy_from_slice(&self.device_state[from..to]);
        if to == self.device_state.len() {
            self.qemu.enter(SourceState::PostMigrate);
            self.input(env, Input::DeviceState(piece));
            self.input(env, Input::DeviceStateSaved);
        } else {
            let delay = env.qemu_delay(Side::Source) / 4;
            self.command(
                env,
                SourceState::Saving,
                delay,
                SourceStep::DeviceState { from: to },
            );
            self.input(env, Input::DeviceState(piece));
        }
    }
}
