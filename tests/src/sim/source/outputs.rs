//! Carrying out what the source's engine asks for.

use std::time::Duration;

use pagecopy::engine::encoding::policy::Choice;
use pagecopy::engine::event::{Finished, State};
use pagecopy::engine::journal::Record;
use pagecopy::engine::source::{Batch, Input, Output, Populated, Pushed};
use pagecopy::engine::split::{Split, split};
use pagecopy::engine::{ChannelId, Time};
use pagecopy::host::encode::{Part, chunks};
use pagecopy::host::{Ram, Tracker};
use pagecopy::limits::MAX_RUNS;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use pagecopy::wire::Message;
use transport::limits::{MAX_EXTENTS, MAX_PAYLOAD};
use transport::{Extent, Op, RegionId};

use super::super::driver::Driver;
use super::super::env::{DaemonEvent, Env, Event, SourceEvent};
use super::super::mistake::Mistake;
use super::super::plan::Side;
use super::super::ram::SimRam;
use super::super::tally::Happened;
use super::{LINGER, SourceSide, Work, host_failure};

impl SourceSide {
    pub(super) fn carry_out_one(&mut self, env: &mut Env, output: Output) {
        match output {
            Output::Send(message) => self.send(env, &message),
            Output::SendOn(channel, message) => self.send_on(env, channel, message),
            Output::Push { channel, batch } => self.push(env, channel, batch),
            Output::OpenChannels { .. }
            | Output::UseChannels { .. }
            | Output::CloseChannels { .. } => env
                .checker
                .violate("the number of channels is fixed, and was changed".into()),
            Output::Attach => {
                let delay = env.operation(Side::Source);
                self.event_after(env, delay, SourceEvent::Arm);
            }
            Output::Scan { holes } => {
                let delay = env.operation(Side::Source) / 2;
                self.event_after(env, delay, SourceEvent::Scan { holes });
            }
            Output::OpenReads => self.open_reads(env),
            Output::ConnectAll => {
                if let Some(daemon) = &mut self.daemon {
                    daemon.control = None;
                    daemon.data.clear();
                }
                self.will_connect(env, true);
            }
            Output::DrainIo => self.drain_io(env),
            Output::LookAgain => {
                self.list_again();
                let delay = env.operation(Side::Source);
                let answer = if env.operation_fails(Side::Source) {
                    Input::HostFailed(host_failure())
                } else {
                    Input::Unchanged
                };
                self.answer_after(env, delay, answer);
            }
            Output::Throttle { percent } => self.throttle(env, percent),
            Output::StopGuest => self.stop_guest(env),
            Output::SaveDeviceState => self.save_device_state(env),
            Output::Digest => self.digest(env),
            Output::PageDigests { block, chunk } => {
                let digests = self.ram.digests_in_chunk(BlockId(block), chunk);
                let delay = env.operation(Side::Source);
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
            Output::Journal(record) => {
                if record == Record::GuestMoved && env.errs(Mistake::DetachWhenMoved) {
                    self.close_reads();
                }
                self.journal(env, record);
            }
            Output::ResumeGuest => self.resume_guest(env),
            Output::Detach => self.detach(env),
            Output::QuitGuest => self.quit_guest(env),
            Output::Connect => self.will_connect(env, false),
            Output::Decided(result) => {
                env.note("operator", format_args!("is told: {result:?}"));
                self.limits.decided(env, result.is_ok(), self.commit_sent);
            }
            Output::Report(_) => {}
            Output::Finished(finished) => self.finished(env, finished),
        }
    }

    fn throttle(&mut self, env: &mut Env, percent: u32) {
        if percent > 99 || percent == self.guest.throttled {
            env.checker.violate(format!(
                "the guest is to be slowed by {percent} %, and is by {} %",
                self.guest.throttled
            ));
        }
        if percent > 0 {
            env.tally.note(Happened::Throttled);
            if self.state() != Some(State::Migrating) {
                env.checker
                    .violate(format!("the guest is slowed while {:?}", self.state()));
            }
        } else if env.errs(Mistake::ThrottledForGood) {
            return;
        }
        self.guest.throttled = percent;
    }

    pub(super) fn arm(&mut self, env: &mut Env) {
        if env.operation_fails(Side::Source) {
            return self.input(env, Input::HostFailed(host_failure()));
        }
        // A `Detach` that overtook the attaching finds it later: then there is nothing left to arm.
        if self.daemon.as_ref().is_none_or(|daemon| daemon.detached) {
            return;
        }
        if env.errs(Mistake::ServeOldCopy) {
            let old = SimRam::new(&env.plan.blocks);
            for (block, spec) in (0..).zip(&env.plan.blocks) {
                old.copy_from(&self.ram, BlockId(block), 0, spec.size);
            }
            self.old = Some(old);
        }
        self.listed = (self.ram.taken(), None);
        // The kernel's arming cannot fail here.
        let _ = self.tracker.arm();
        let delay = env.operation(Side::Source);
        self.event_after(env, delay, SourceEvent::ListAfterArm);
    }

    pub(super) fn list_after_arm(&mut self, env: &mut Env) {
        let populated = self.populated();
        let stopped = env.delay(900);
        self.input(env, Input::Attached { stopped, populated });
    }

    fn populated(&self) -> Vec<Run> {
        let mut populated = Vec::new();
        // Simulated RAM can always be asked.
        let _ = self.ram.populated(&mut populated);
        populated
    }

    /// With the guest still running: a list for the stop, if that of the start does not hold any more.
    fn list_again(&mut self) {
        let taken = self.ram.taken();
        if taken != self.listed.0 {
            self.listed = (taken, Some(self.populated()));
        }
    }

    /// With the guest stopped: the list that there is, if it still holds.
    fn populated_at_the_stop(&mut self, env: &Env) -> Populated {
        if self.ram.taken() != self.listed.0 && !env.errs(Mistake::OldHoles) {
            return Populated::Runs(self.populated());
        }
        let runs = self.listed.1.take();
        runs.map_or(Populated::NothingTaken, Populated::Runs)
    }

    pub(super) fn scan(&mut self, env: &mut Env, holes: bool) {
        let began = env.now();
        let mut dirty = Vec::new();
        let scanned = self.tracker.scan(&mut dirty);
        if scanned.is_err() || env.operation_fails(Side::Source) {
            return self.input(env, Input::HostFailed(host_failure()));
        }
        let delay = env.operation(Side::Source) / 2;
        self.event_after(
            env,
            delay,
            SourceEvent::ScanEnds {
                dirty,
                holes,
                began,
            },
        );
    }

    pub(super) fn scan_ends(&mut self, env: &mut Env, dirty: Vec<Run>, holes: bool, began: Time) {
        let populated = if holes {
            self.populated_at_the_stop(env)
        } else {
            Populated::NotAsked
        };
        let took = env.now().since(began);
        self.input(
            env,
            Input::Scanned {
                dirty,
                populated,
                took,
            },
        );
    }

    fn drain_io(&mut self, env: &mut Env) {
        let last = self
            .guest
            .reads_end()
            .filter(|_| !env.errs(Mistake::NoDrain));
        let drained = last
            .unwrap_or_default()
            .max(env.now())
            .after(env.operation(Side::Source));
        let answer = if env.operation_fails(Side::Source) {
            Input::HostFailed(host_failure())
        } else {
            Input::IoDrained
        };
        self.event_at(env, drained, DaemonEvent::Answer(Box::new(answer)));
    }

    fn digest(&mut self, env: &mut Env) {
        let delay = env.operation(Side::Source);
        if env.operation_fails(Side::Source) {
            return self.answer_after(env, delay, Input::HostFailed(host_failure()));
        }
        let digests = (0..)
            .take(env.plan.blocks.len())
            .map(|block| self.ram.chunk_digests(BlockId(block)))
            .collect();
        self.answer_after(env, delay, Input::Digests(digests));
    }

    fn detach(&mut self, env: &mut Env) {
        if env.guest_lacks && env.checker.runs(Side::Destination) {
            env.tally.note(Happened::LetGoOf);
            if !env.let_go_by_word {
                env.checker
                    .violate("memory that the guest lacks is let go of".into());
            }
        }
        self.tracker.disarm();
        self.close_reads();
        self.attempt += 1;
        env.checker.pushes_lost();
        if let Some(daemon) = &mut self.daemon {
            daemon.detached = true;
            daemon.data.clear();
            daemon.batches.clear();
        }
    }

    fn finished(&mut self, env: &mut Env, mut finished: Finished) {
        if let Some(failure) = self.lost.take() {
            (finished.state, finished.failure) = (State::Failed, Some(failure));
        }
        if self.ended.is_some_and(|state| state != State::InDoubt) {
            env.checker.violate("the source finished twice".into());
        }
        if finished.state == State::InDoubt && self.ended.is_none() {
            env.tally.note(Happened::Doubted);
            if env.plan.operator {
                let delay = env.rng.micros(1_000_000, 300_000_000);
                env.agenda.after(delay, Event::Operator);
            }
        }
        if self.guest.throttled > 0 {
            env.checker
                .violate("the migration is over, and the guest is slowed".into());
        }
        if finished.state == State::Completed {
            if finished.figures.throttle_percent > 0 {
                env.tally.note(Happened::ThrottledAndMoved);
            }
            let lost = env.qemu_lost[Side::Destination as usize];
            // The source may only repeat what its operator said.
            if !env.let_go_by_word {
                env.checker.told_completed("the source", lost);
            }
        }
        self.doubted |= finished.state == State::InDoubt;
        self.ended = Some(finished.state);
        self.failure = finished.failure;
        self.figures = finished.figures;
        if finished.state != State::InDoubt {
            self.event_after(env, LINGER, SourceEvent::Close);
        }
    }

    pub(super) fn send(&mut self, env: &mut Env, message: &Message) {
        let spoiled = self.forget_one(env, message);
        let message = spoiled.as_ref().unwrap_or(message);
        if *message == Message::Commit {
            self.commit_sent = true;
            env.checker.rollback_excused();
        }
        let Some(control) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.control.as_mut())
        else {
            return;
        };
        if let Err(why) = control.enqueue(Op::Send(message.encode()), None) {
            env.checker
                .violate(format!("the source's control message is refused: {why}"));
        }
    }

    fn send_on(&mut self, env: &mut Env, channel: ChannelId, message: Message) {
        if let (true, Message::Barrier { round }) = (env.errs(Mistake::EarlyBarrier), &message) {
            return env.early_barriers.push((channel, *round));
        }
        let Some(data) = self.data_lane(channel) else {
            return;
        };
        data.work.push_back(Work::Message(message));
        self.wake(env, channel);
    }

    fn push(&mut self, env: &mut Env, channel: ChannelId, batch: Batch) {
        self.limits.push(env, bytes(&batch, &env.plan.blocks));
        let Some(data) = self.data_lane(channel) else {
            return;
        };
        let early = env.errs(Mistake::EarlyPushed).then(|| Input::Pushed {
            channel,
            batch: batch.id,
            pushed: Pushed::default(),
        });
        env.checker.pushed(channel, bytes(&batch, &env.plan.blocks));
        data.work.push_back(Work::Batch(batch));
        self.wake(env, channel);
        if let Some(early) = early {
            self.answer_after(env, Duration::ZERO, early);
        }
    }

    fn wake(&mut self, env: &mut Env, channel: ChannelId) {
        let delay = env.delay(env.plan.work_us);
        self.event_after(env, delay, SourceEvent::Work(channel));
    }

    /// The channel's thread takes up the next thing in its queue.
    pub(super) fn work(&mut self, env: &mut Env, channel: ChannelId) {
        let Some(work) = self
            .data_lane(channel)
            .and_then(|data| data.work.pop_front())
        else {
            return;
        };
        let result = match work {
            Work::Message(message) => self.enqueue(channel, Op::Send(message.encode()), None),
            Work::Batch(batch) => self.send_batch(env, channel, batch),
        };
        if let Err(why) = result {
            env.checker
                .violate(format!("the source's transfer is refused: {why}"));
        }
    }

    fn send_batch(
        &mut self,
        env: &mut Env,
        channel: ChannelId,
        batch: Batch,
    ) -> Result<(), String> {
        let specs = &env.plan.blocks;
        let mut split = split(&batch.runs, specs, |block, offset, len| {
            self.ram.is_zero(block, offset, len)
        });
        let mut pushed = Pushed {
            raw_bytes: split.raw_bytes(),
            zero_bytes: split.zero_bytes(specs),
            ..Pushed::default()
        };
        if env.errs(Mistake::DroppedPage) && env.rng.chance(50) {
            split.raw.pop();
        }
        let id = batch.id;
        let operations = if batch.encodings.any() {
            self.encoded(env, &batch, &split, &mut pushed)
        } else {
            operations(&split.raw, &split.zero)
        };
        let count = operations.len();
        let daemon = self.daemon.as_mut().ok_or("the daemon is dead")?;
        daemon.batches.insert(id, (channel, batch, pushed));
        // A copied batch is handed over when it is copied; another one when the network has read the last of it.
        let counted = (!env.plan.buffered).then_some(id);
        for op in operations {
            self.copy_to_buffer(channel, &op);
            self.enqueue(channel, op, counted)?;
        }
        if count == 0 || env.plan.buffered {
            let delay = env.delay(env.plan.work_us);
            self.event_after(env, delay, SourceEvent::Handed(id));
        }
        Ok(())
    }

    /// The operations that carry a batch, some of its pages encoded. What does not go so is what the kernel reads later.
    fn encoded(
        &mut self,
        env: &mut Env,
        batch: &Batch,
        split: &Split,
        pushed: &mut Pushed,
    ) -> Vec<Op> {
        let Some(daemon) = &mut self.daemon else {
            return Vec::new();
        };
        let mut parts = Vec::new();
        for (block, pieces) in chunks(&split.raw) {
            let choice = Choice {
                zstd: env.rng.chance(250).then_some(1),
                delta: env.rng.chance(600) && batch.round > 0,
            };
            if choice == Choice::default() && env.errs(Mistake::StaleVersion) {
                parts.push(Part::AsItIs(block, pieces));
                continue;
            }
            let encoder = &mut daemon.encoder;
            let cost = encoder.encode(&*self.ram, batch.round, choice, block, pieces, &mut parts);
            pushed.encoded = pushed.encoded.and(cost.encoded);
        }
        pushed.raw_bytes -= pushed.encoded.bytes();
        daemon.encoder.forget(split.zero_pieces(&env.plan.blocks));
        let mut operations = operations(&[], &split.zero);
        for part in parts {
            match part {
                Part::AsItIs(block, pieces) => {
                    let extents: Vec<_> = pieces
                        .iter()
                        .map(|piece| (block, piece.offset, piece.len))
                        .collect();
                    operations.extend(self::operations(&extents, &[]));
                }
                Part::Message(message, _) => {
                    if matches!(message, Message::Deltas { .. }) {
                        env.tally.note(Happened::WentAsDelta);
                    }
                    if !(env.errs(Mistake::LostVersion) && env.rng.chance(50)) {
                        operations.push(Op::Send(message.encode()));
                    }
                }
            }
        }
        operations
    }

    fn copy_to_buffer(&self, channel: ChannelId, op: &Op) {
        let buffer = self.buffers.get(usize::from(channel.0).wrapping_sub(1));
        if let (Some(buffer), Op::Write { region, extents }) = (buffer, op) {
            let block = BlockId(u16::try_from(region.0).unwrap_or(u16::MAX));
            for extent in extents {
                buffer.copy_from(&self.ram, block, extent.offset, extent.len);
            }
        }
    }

    fn enqueue(&mut self, channel: ChannelId, op: Op, batch: Option<u64>) -> Result<(), String> {
        self.data_lane(channel)
            .map_or(Ok(()), |data| data.lane.enqueue(op, batch))
    }

    /// A batch's memory was read for the last time.
    pub(super) fn batch_sent(&mut self, env: &mut Env, id: u64) {
        let Some((channel, batch, pushed)) = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.batches.remove(&id))
        else {
            return;
        };
        if env.errs(Mistake::ClearAfterRead) {
            self.ram.protect(&batch.runs);
        }
        env.checker
            .push_ended(channel, bytes(&batch, &env.plan.blocks));
        self.input(
            env,
            Input::Pushed {
                channel,
                batch: id,
                pushed,
            },
        );
    }
}

/// Bytes of a batch's pages.
fn bytes(batch: &Batch, blocks: &[BlockSpec]) -> u64 {
    let size = |run: &Run| {
        blocks
            .get(usize::from(run.block.0))
            .map_or(0, |spec| run.pages * spec.page_size)
    };
    batch.runs.iter().map(size).sum()
}

/// The operations that carry a batch, each within the limits of one.
fn operations(raw: &[(BlockId, u64, u64)], zero: &[Run]) -> Vec<Op> {
    let mut operations: Vec<Op> = Vec::new();
    let mut room = 0;
    for (block, offset, len) in raw {
        let wanted = RegionId(u32::from(block.0));
        let extent = Extent {
            offset: *offset,
            len: *len,
        };
        match operations.last_mut() {
            Some(Op::Write { region, extents })
                if *region == wanted && extents.len() < MAX_EXTENTS && *len <= room =>
            {
                extents.push(extent);
                room -= len;
            }
            _ => {
                operations.push(Op::Write {
                    region: wanted,
                    extents: vec![extent],
                });
                room = MAX_PAYLOAD.saturating_sub(*len);
            }
        }
    }
    operations.extend(
        zero.chunks(MAX_RUNS)
            .map(|runs| Op::Send(Message::Zero(runs.to_vec()).encode())),
    );
    operations
}
