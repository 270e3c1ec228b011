//! Carrying out what the destination's engine asks for.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::Fault as Blame;
use pagecopy::engine::destination::{Input, Output};
use pagecopy::engine::event::State;
use pagecopy::host::Placer;
use pagecopy::host::decode::Decoder;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use pagecopy::wire::Message;
use transport::{Access, Op};

use super::super::driver::Driver;
use super::super::env::{DestinationEvent, DestinationStep, Env, Event, failure};
use super::super::mistake::Mistake;
use super::super::plan::Side;
use super::super::qemu::{DestinationState, ram_of};
use super::pull::armed;
use super::{DestinationSide, LINGER};

impl DestinationSide {
    pub(super) fn carry_out_one(&mut self, env: &mut Env, output: Output) {
        match output {
            Output::Send(message) => self.send(env, &message),
            Output::Journal(record) => self.journal(env, record),
            Output::Prepare { order, encodings } => {
                let specs: Arc<[BlockSpec]> = env.plan.blocks.clone().into();
                let lanes = self.daemon.iter_mut().flat_map(|daemon| &mut daemon.data);
                for data in lanes {
                    data.decoder = Some(Decoder::new(encodings, Arc::clone(&specs)));
                }
                if order != env.plan.order {
                    env.checker.violate(format!(
                        "the blocks are {:?} and were taken as {order:?}",
                        env.plan.order
                    ));
                }
                let delay = env.operation(Side::Destination);
                self.event_after(env, delay, DestinationEvent::Prepare);
            }
            Output::TakeChannels { .. } => env
                .checker
                .violate("channels are taken that nobody has offered".into()),
            Output::Allocate(_) => {
                if env.operation_fails(Side::Destination) {
                    let delay = env.operation(Side::Destination) * 10;
                    let full = failure(Blame::ThisHost, "there is no memory left");
                    self.answer_after(env, delay, Input::HostFailed(full));
                }
            }
            Output::KeepDeviceState(bytes) => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.device_state.extend_from_slice(&bytes);
                }
            }
            Output::Digest => self.digest(env),
            Output::PageDigests { block, chunk } => self.page_digests(env, block, chunk),
            Output::LoadDeviceState => self.load_device_state(env),
            Output::RunGuest => self.run_guest(env),
            Output::Report(_) => {}
            Output::Arm { lacking, .. } => {
                let delay = env.operation(Side::Destination);
                if env.errs(Mistake::LateArm) {
                    self.answer_after(env, delay, armed());
                    let late = DestinationEvent::Arm(lacking);
                    return self.event_after(env, delay + Duration::from_millis(30), late);
                }
                self.event_after(env, delay, DestinationEvent::Arm(lacking));
            }
            Output::StopPulling => self.stop_pulling(env),
            Output::Pull => self.pull_again(env),
            Output::Poison => self.poison(env),
            Output::Decided(result) => env.note("operator", format_args!("is told: {result:?}")),
            Output::Finished { state, .. } => self.finished(env, state),
        }
    }

    fn send(&mut self, env: &mut Env, message: &Message) {
        let Some(control) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.control.as_mut())
        else {
            return;
        };
        if let Err(why) = control.enqueue(Op::Send(message.encode()), None) {
            env.checker.violate(format!(
                "the destination's control message is refused: {why}"
            ));
        }
    }

    pub(super) fn prepare(&mut self, env: &mut Env) {
        if env.operation_fails(Side::Destination) {
            return self.input(
                env,
                Input::HostFailed(failure(Blame::ThisHost, "the RAM cannot be cleared")),
            );
        }
        if !env.errs(Mistake::NoClear) {
            // Simulated RAM can always be cleared.
            let _ = self.ram.clear();
        }
        env.checker.cleared();
        let access = Access {
            peer_writes: true,
            peer_reads: false,
        };
        self.ram.register(&self.regions, &env.plan.order, access);
        self.input(env, Input::Prepared);
    }

    /// The index of our block that the source numbers `block`.
    fn block(&self, env: &Env, block: u16) -> BlockId {
        let index = env
            .plan
            .order
            .get(usize::from(block))
            .copied()
            .unwrap_or(usize::MAX);
        BlockId(u16::try_from(index).unwrap_or(u16::MAX))
    }

    pub(super) fn place_zeroes(&mut self, env: &mut Env, runs: &[Run]) {
        for run in runs {
            let ours = Run {
                block: self.block(env, run.block.0),
                ..*run
            };
            if let Err(error) = self.ram.zero(ours) {
                env.checker
                    .violate(format!("a zero run is out of bounds: {error}"));
            }
        }
    }

    fn digest(&mut self, env: &mut Env) {
        let delay = env.operation(Side::Destination);
        if env.operation_fails(Side::Destination) {
            let failed = failure(Blame::ThisHost, "the RAM cannot be read");
            return self.answer_after(env, delay, Input::HostFailed(failed));
        }
        let digests = (0..)
            .take(env.plan.order.len())
            .map(|block| self.ram.chunk_digests(self.block(env, block)))
            .collect();
        self.answer_after(env, delay, Input::Digests(digests));
    }

    fn page_digests(&mut self, env: &mut Env, block: u16, chunk: u64) {
        let ours = self.block(env, block);
        let digests = self.ram.digests_in_chunk(ours, chunk);
        let delay = env.operation(Side::Destination);
        self.answer_after(
            env,
            delay,
            Input::PageDigests {
                block,
                chunk,
                digests,
            },
        );
    }

    fn load_device_state(&mut self, env: &mut Env) {
        let first = self.pager.is_some();
        if !first {
            self.regions.revoke_all();
        }
        let delay = env.qemu_delay(Side::Destination);
        if env.errs(Mistake::LateWrite) {
            let late = DestinationEvent::LateZero(vec![Run {
                block: BlockId(0),
                first: 0,
                pages: 1,
            }]);
            self.event_after(env, delay / 2, late);
        }
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        daemon.closed = !first;
        if self.qemu.state != DestinationState::InMigrate {
            let failed = failure(Blame::Qemu, "QEMU does not wait for a guest");
            return self.answer_after(env, delay, Input::QemuFailed(failed));
        }
        match ram_of(&daemon.device_state) {
            Ok(_) if first => {}
            Ok(ram) => env.checker.load_begins(ram),
            Err(error) => env.checker.violate(format!(
                "QEMU is given something else than device state: {error}"
            )),
        }
        let step = if env.qemu_fails(Side::Destination) {
            DestinationStep::Fails { dies: true }
        } else {
            DestinationStep::Loaded
        };
        let command = self.qemu.enter(DestinationState::Loading);
        env.agenda
            .after(delay, Event::DestinationQemu(command, step));
    }

    pub(super) fn run_guest(&mut self, env: &mut Env) {
        if env.errs(Mistake::EarlyRunning) {
            self.send(env, &Message::Running);
        }
        let delay = env.qemu_delay(Side::Destination);
        match self.qemu.state {
            // `cont` of a running guest is no error.
            DestinationState::Running => return self.answer_after(env, delay, Input::GuestRunning),
            DestinationState::Paused if self.memory_gone => env.checker.violate(
                "a guest that has not run is run without its memory, and nobody decided that"
                    .to_owned(),
            ),
            DestinationState::Paused => {}
            other => {
                let failed = failure(Blame::Qemu, &format!("QEMU cannot run a guest: {other:?}"));
                return self.answer_after(env, delay, Input::QemuFailed(failed));
            }
        }
        let step = if env.qemu_fails(Side::Destination) {
            DestinationStep::Fails {
                dies: env.rng.chance(300),
            }
        } else {
            DestinationStep::Runs
        };
        let command = self.qemu.enter(DestinationState::Paused);
        env.agenda
            .after(delay, Event::DestinationQemu(command, step));
    }

    fn finished(&mut self, env: &mut Env, state: State) {
        if self.ended.is_some() {
            env.checker.violate("the destination finished twice".into());
        }
        if state == State::Completed {
            let lost = env.qemu_lost[Side::Destination as usize];
            env.checker.told_completed("the destination", lost);
        }
        self.ended = Some(state);
        if self.never_runs_here() {
            // Zeroes hurt nobody.
            self.release(env);
        }
        let close = DestinationEvent::Close {
            session: self.session,
        };
        self.event_after(env, LINGER, close);
    }
}
