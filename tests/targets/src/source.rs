//! The source's engine against any destination, any host and any QEMU.
//!
//! The rules that this target holds it to, whatever comes: `Commit` is sent once, and only with `CommitIntent` on disk,
//! every page in place and `Loaded` heard; after it the guest is resumed only when the destination has given it up or the
//! operator has taken it back; a migration that ends otherwise than completed has ordered a guest that it stopped to be
//! resumed; no page leaves before the round before is in place; what is under way is bounded, and so is what one input
//! leads to; memory that the guest may lack at the destination is recorded as served before `Commit` and let go of only when
//! the destination or the operator says so, and that is on disk; limits that the operator changes are answered at once, taken only before
//! the guest is stopped, and kept from then on; nothing follows the end.

mod facts;

use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use pagecopy::engine::encoding::policy::Compress;
use pagecopy::engine::journal::{Outcome, Postcopy, Record};
use pagecopy::engine::pacing::Ledger;
use pagecopy::engine::source::{
    After, Batch, Change, Input, Mode, Options, Output, Populated, Pushed, Resolution, Setup,
    Source,
};
use pagecopy::engine::{ChannelId, Time, Timeouts};
use pagecopy::limits::{
    DIGEST_CHUNK, MAX_BATCH_BYTES, MAX_BATCHES_PER_CHANNEL, MAX_DEVICE_STATE_CHUNK, MAX_RUNS,
};
use pagecopy::wire::{Message, Standing};

use self::facts::Facts;
use crate::orders::Orders;
use crate::words::{self, blocks, digests, failure, message, pause, sudden};

const CHANNELS: u16 = 2;
/// Inputs of one run, at most.
const STEPS: usize = 400;
/// Of the numbers that say what comes suddenly, so many are the operator's who changes limits.
const CHANGES: u8 = 6;
/// What the operator may limit the bandwidth to.
const LIMITS: [Option<u64>; 4] = [None, Some(100 << 20), Some(1 << 20), Some(1)];
/// Outputs that one input may lead to: batches for every channel, and the orders of a change of phase.
const OUTPUTS: usize = CHANNELS as usize * MAX_BATCHES_PER_CHANNEL + 16;

/// What the engine waits for.
#[derive(Clone, Debug)]
enum Order {
    Attach,
    Scan { holes: bool },
    DrainIo,
    Look,
    Push { channel: ChannelId, batch: Batch },
    Stop,
    Save { pieces: u8 },
    Digest,
    PageDigests { block: u16, chunk: u64 },
    Journal(Record),
    Resume,
    Connect,
    ConnectAll,
}

struct World {
    engine: Source,
    now: Time,
    orders: Orders<Order>,
    facts: Facts,
}

/// Any sequence of inputs.
///
/// # Panics
/// A rule is broken.
pub fn source(data: &[u8]) {
    // An input that ends early is a short run.
    let _ = run(&mut Unstructured::new(data));
}

fn setup(flags: u8, mode: Mode) -> Setup {
    Setup {
        id: words::ID,
        vm: "vm".to_owned(),
        host: "here".to_owned(),
        blocks: blocks(),
        ram: Vec::new(),
        direct_io: flags & 1 != 0,
        data_channels: CHANNELS,
        fixed_downtime: Duration::from_millis(20),
        options: Options {
            downtime_limit: Duration::from_millis(300),
            compress: Compress::Auto,
            bandwidth_limit: (flags & 2 != 0).then_some(100 << 20),
            background_limit: (flags & 2 != 0).then_some(1 << 20),
            max_rounds: 1 + u32::from(flags >> 5),
            timeout: (flags & 4 != 0).then_some(Duration::from_secs(20)),
            mode,
            throttle: flags & 1 != 0,
            verify: flags & 8 != 0,
            quit_source: flags & 16 != 0,
            channels: None,
        },
        timeouts: Timeouts::default(),
    }
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let flags = u8::arbitrary(input)?;
    let now = Time(1);
    let start = u8::arbitrary(input)?;
    let mode = match start % 5 {
        0 => Mode::Postcopy,
        1 => Mode::Hybrid(After::Rounds(2)),
        2 => Mode::Auto { postcopy: true },
        _ => Mode::Precopy,
    };
    let setup = setup(flags, mode);
    let ledger = Ledger::new(setup.options.bandwidth_limit, now);
    let (open, no) = (Postcopy::Open, Postcopy::No);
    let postcopy = if start.is_multiple_of(2) { open } else { no };
    let recovered = start < 48;
    let engine = match start {
        0..=15 => Source::recover(setup, Outcome::Open, postcopy, now),
        16..=31 => Source::recover(setup, Outcome::NotHere, Postcopy::No, now),
        32..=47 => Source::recover(setup, Outcome::Here, postcopy, now),
        _ => Source::new(setup, now),
    };
    let mut world = World {
        engine,
        now,
        orders: Orders::new(),
        facts: Facts {
            stop_ordered: recovered,
            commits: u32::from(recovered),
            given_back: (16..=31).contains(&start),
            gone: (32..=47).contains(&start),
            round_open: true,
            serves: start < 48 && !(16..=31).contains(&start) && postcopy == open,
            ..Facts::new(ledger)
        },
    };
    world.take_outputs(OUTPUTS);
    for _ in 0..STEPS {
        let Some(next) = world.next(input)? else {
            continue;
        };
        world.handle(next);
    }
    Ok(())
}

impl World {
    fn next(&mut self, input: &mut Unstructured<'_>) -> Result<Option<Input>> {
        Ok(match u8::arbitrary(input)? % 16 {
            0..=6 => match self.orders.take(input)? {
                Some(order) => Some(self.answer(input, order)?),
                None => None,
            },
            7..=10 => Some(Input::Message(self.honest(input)?)),
            11 => Some(Input::Message(message(input, self.facts.round)?)),
            12 => {
                self.now = self.now.after(pause(input)?);
                Some(Input::Tick)
            }
            13 => Some(self.sudden(input)?),
            14 => {
                let batch = self
                    .orders
                    .take_first(|order| matches!(order, Order::Push { .. }));
                match batch {
                    Some(order) => Some(self.answer(input, order)?),
                    None => None,
                }
            }
            _ => {
                // Time goes to where the engine wants to be woken.
                self.now = self
                    .engine
                    .poll_timeout()
                    .map_or(self.now, |at| self.now.max(at));
                Some(Input::Tick)
            }
        })
    }

    /// Something that nobody asked for.
    fn sudden(&self, input: &mut Unstructured<'_>) -> Result<Input> {
        let choice = u8::arbitrary(input)?;
        if choice > u8::MAX - CHANGES {
            let limits = u8::arbitrary(input)?;
            let downtime_limit = Duration::from_millis(1 + u64::from(limits));
            return Ok(Input::Change(Change {
                downtime_limit: (limits & 1 != 0).then_some(downtime_limit),
                bandwidth_limit: (limits & 2 != 0)
                    .then(|| LIMITS[usize::from(limits >> 2) % LIMITS.len()]),
            }));
        }
        Ok(match sudden(choice) {
            0 => Input::Cancel,
            1 | 2 => Input::LinkLost(failure("cut")),
            3 => Input::HostFailed(failure("host")),
            4 => Input::QemuFailed(failure("QEMU")),
            5 => Input::GuestResumed,
            6 => Input::Reconnected,
            7 => Input::Resolve(Resolution::ResumeHere {
                peer_fenced: bool::arbitrary(input)?,
            }),
            8 => Input::Resolve(Resolution::Abandon {
                peer_fenced: bool::arbitrary(input)?,
            }),
            10 => Input::StartPostcopy,
            11 => Input::Recover,
            _ => Input::Pushed {
                channel: ChannelId(u16::from(u8::arbitrary(input)? % 4)),
                // One that was never pushed.
                batch: u64::MAX - u64::from(u8::arbitrary(input)?),
                pushed: Pushed::default(),
            },
        })
    }

    /// What an honest destination could say at this point.
    fn honest(&self, input: &mut Unstructured<'_>) -> Result<Message> {
        let facts = &self.facts;
        // Most often what it has to say now, so that inputs get far.
        let next = match u8::arbitrary(input)? {
            choice @ 0..=63 => choice % 8,
            choice if facts.serves && facts.gone => 8 + choice % 3,
            _ if facts.commits > 0 => 6 + u8::from(bool::arbitrary(input)?),
            _ if facts.barriers_sent == CHANNELS && !facts.round_open => 2,
            _ if facts.stop_ordered => 5,
            _ => 0,
        };
        Ok(match next {
            0 | 1 => Message::Accept {
                version: 1,
                capabilities: if facts.offered { 3 } else { 1 },
                host: "peer".to_owned(),
                reason: "no".to_owned(),
            },
            2..=4 => Message::BarrierReached {
                round: self.facts.round,
            },
            5 => Message::Loaded,
            6 => Message::Running,
            8 => Message::Lacks {
                bytes: 4096,
                faults: words::faults(input)?,
            },
            9 => Message::Resumed,
            10 => Message::Whole {
                id: words::ID,
                cost: None,
            },
            _ => Message::Answer {
                id: words::ID,
                standing: *input.choose(&Standing::ALL)?,
            },
        })
    }

    fn answer(&mut self, input: &mut Unstructured<'_>, order: Order) -> Result<Input> {
        let fails = input.ratio(1, 16)?;
        Ok(match order {
            Order::Journal(record) if fails => Input::JournalFailed(record, failure("disk")),
            Order::Journal(record) => Input::Journaled(record),
            Order::Connect | Order::ConnectAll if fails && input.ratio(1, 2)? => {
                Input::ReconnectRefused("not now".to_owned())
            }
            Order::Connect | Order::ConnectAll if fails => {
                Input::ReconnectFailed("no route".to_owned())
            }
            Order::Connect | Order::ConnectAll => Input::Reconnected,
            Order::Resume if fails => Input::ResumeFailed(failure("cont")),
            Order::Resume => Input::GuestResumed,
            Order::Stop | Order::Save { .. } if fails => Input::QemuFailed(failure("QEMU")),
            Order::Push { channel, batch } => self.pushed(input, channel, &batch)?,
            _ if fails => Input::HostFailed(failure("host")),
            Order::Attach => Input::Attached {
                stopped: Duration::from_micros(200),
                populated: words::runs(input, true)?,
            },
            Order::Scan { holes } => {
                let inside = !input.ratio(1, 32)?;
                Input::Scanned {
                    dirty: words::runs(input, inside)?,
                    populated: match holes {
                        false => Populated::NotAsked,
                        true if input.ratio(1, 2)? => Populated::NothingTaken,
                        true => Populated::Runs(words::runs(input, true)?),
                    },
                    took: Duration::from_micros(500),
                }
            }
            Order::DrainIo => Input::IoDrained,
            Order::Look => Input::Unchanged,
            Order::Stop => Input::GuestStopped,
            Order::Save { pieces: 0 } => Input::DeviceStateSaved,
            Order::Save { pieces } => {
                self.orders.add(Order::Save { pieces: pieces - 1 });
                let len = usize::from(u16::arbitrary(input)?) * 5;
                Input::DeviceState(Bytes::from(vec![2; len]))
            }
            Order::Digest => Input::Digests(
                blocks()
                    .iter()
                    .map(|spec| {
                        let chunks = usize::try_from(spec.size.div_ceil(DIGEST_CHUNK)).unwrap_or(0);
                        vec![[2; 16]; chunks]
                    })
                    .collect(),
            ),
            Order::PageDigests { block, chunk } => Input::PageDigests {
                block,
                chunk,
                digests: digests(input)?,
            },
        })
    }

    fn pushed(
        &mut self,
        input: &mut Unstructured<'_>,
        channel: ChannelId,
        batch: &Batch,
    ) -> Result<Input> {
        self.facts.under_way[usize::from(channel.0) - 1] -= 1;
        let all = bytes(batch);
        let zero = if bool::arbitrary(input)? { all } else { 0 };
        Ok(Input::Pushed {
            channel,
            batch: batch.id,
            pushed: Pushed {
                raw_bytes: all - zero,
                zero_bytes: zero,
                ..Pushed::default()
            },
        })
    }

    fn handle(&mut self, input: Input) {
        self.facts.note(&input);
        // What the guest is asked to hold goes in pieces.
        let most = match &input {
            Input::DeviceState(bytes) => OUTPUTS + bytes.len() / MAX_DEVICE_STATE_CHUNK + 1,
            _ => OUTPUTS,
        };
        let before = self.engine.state();
        let is_change = matches!(input, Input::Change(_));
        self.engine.handle(self.now, input);
        self.take_outputs(most);
        assert_eq!(self.facts.change, None, "it was not answered");
        assert!(!is_change || self.engine.state() == before, "{before:?}");
        // Woken when it wants to be, it does not want to be woken again at once, for ever.
        let mut ticks = 0;
        while let Some(at) = self.engine.poll_timeout().filter(|at| *at <= self.now) {
            ticks += 1;
            assert!(
                ticks < 8,
                "the engine wants to be woken at {at:?} again and again"
            );
            self.engine.handle(self.now, Input::Tick);
            self.take_outputs(OUTPUTS);
        }
    }

    fn take_outputs(&mut self, most: usize) {
        let mut count = 0;
        while let Some(output) = self.engine.poll() {
            count += 1;
            assert!(count <= most, "one input led to more than {most} outputs");
            // Only an operator who asks too late is answered.
            let late = matches!(output, Output::Decided(Err(_)));
            assert!(!self.facts.finished || late, "{output:?} after the end");
            self.output(output);
        }
    }

    fn output(&mut self, output: Output) {
        let facts = &mut self.facts;
        match output {
            Output::Send(Message::Commit) => {
                facts.commits += 1;
                assert_eq!(facts.commits, 1, "Commit was sent twice");
                assert!(
                    facts.intent && facts.loaded && facts.stop_ordered,
                    "Commit was sent too early: {facts:?}"
                );
                assert!(facts.round_open && !facts.resume_ordered, "{facts:?}");
                assert!(!facts.serves || facts.serving_asked, "{facts:?}");
                // What was said before does not count for what became of the commit.
                facts.given_back = false;
            }
            Output::Send(Message::Closed) if facts.serves => assert!(facts.released, "{facts:?}"),
            Output::Send(Message::Closed) => assert!(facts.moved_recorded, "{facts:?}"),
            Output::Send(Message::Hello { capabilities, .. }) => {
                facts.offered = capabilities & 2 != 0;
            }
            Output::Send(Message::Lacking { .. } | Message::LackingEnd { .. }) => {
                assert!(facts.offered && facts.reads_open, "{facts:?}");
                facts.serves = true;
            }
            Output::Send(Message::Serve { .. }) => {
                assert!(facts.serves && facts.commits > 0, "{facts:?}");
            }
            Output::Detach => assert!(
                !(facts.serves && facts.gone) || facts.released || facts.resume_ordered,
                "memory is let go of: {facts:?}"
            ),
            Output::Decided(answer) => {
                if let Some(change) = facts.change.take() {
                    facts.changed(change, answer.is_ok(), self.now);
                }
            }
            Output::Send(_) | Output::Report(_) | Output::Throttle { .. } => {}
            Output::SendOn(channel, Message::Barrier { round }) => self.barrier(channel, round),
            Output::OpenReads => {
                assert!(facts.stop_ordered && facts.commits == 0, "{facts:?}");
                facts.reads_open = true;
            }
            Output::ConnectAll => {
                assert!(facts.serves && facts.commits > 0, "{facts:?}");
                // An attempt under way is given up.
                while self.orders.take_first(is_connect).is_some() {}
                self.orders.add(Order::ConnectAll);
            }
            Output::OpenChannels { .. }
            | Output::UseChannels { .. }
            | Output::CloseChannels { .. } => panic!("the number of channels is fixed"),
            Output::SendOn(_, other) => panic!("{other:?} on a data channel"),
            Output::Push { channel, batch } => self.push(channel, batch),
            Output::ResumeGuest => {
                assert!(
                    facts.stop_ordered,
                    "a guest that was not stopped is resumed"
                );
                assert!(
                    facts.commits == 0 || facts.given_back,
                    "the guest was resumed after Commit: {facts:?}"
                );
                assert!(!facts.resume_ordered, "resumed twice");
                facts.resume_ordered = true;
                self.orders.add(Order::Resume);
            }
            Output::QuitGuest => assert!(facts.gone, "QEMU is ended: {facts:?}"),
            Output::Attach => self.orders.add(Order::Attach),
            Output::Scan { holes } => self.orders.add(Order::Scan { holes }),
            Output::DrainIo => self.orders.add(Order::DrainIo),
            Output::LookAgain => self.orders.add(Order::Look),
            Output::StopGuest => {
                assert!(!facts.stop_ordered, "stopped twice");
                facts.stop_ordered = true;
                self.orders.add(Order::Stop);
            }
            Output::SaveDeviceState => self.orders.add(Order::Save { pieces: 2 }),
            Output::Digest => self.orders.add(Order::Digest),
            Output::PageDigests { block, chunk } => {
                self.orders.add(Order::PageDigests { block, chunk });
            }
            Output::Journal(record) => self.journal(record),
            Output::Connect => {
                assert!(facts.commits > 0, "reconnects before Commit");
                while self.orders.take_first(is_connect).is_some() {}
                self.orders.add(Order::Connect);
            }
            Output::Finished(end) => facts.ends(end.state),
        }
    }

    fn barrier(&mut self, channel: ChannelId, round: u32) {
        let facts = &mut self.facts;
        if facts.barriers_sent == CHANNELS {
            assert!(
                facts.round_open,
                "a barrier before the round before was in place"
            );
            facts.round += 1;
            facts.barriers_sent = 0;
        }
        facts.barriers_sent += 1;
        assert_eq!((round, channel.0), (facts.round, facts.barriers_sent));
        assert_eq!(
            facts.under_way, [0; CHANNELS as usize],
            "a barrier overtakes pages"
        );
        facts.round_open = false;
    }

    fn push(&mut self, channel: ChannelId, batch: Batch) {
        let facts = &mut self.facts;
        assert!(facts.round_open, "a page left before its round: {facts:?}");
        assert!(facts.commits == 0, "a page left after Commit");
        let lane = &mut facts.under_way[usize::from(channel.0) - 1];
        *lane += 1;
        assert!(*lane <= MAX_BATCHES_PER_CHANNEL);
        assert!((1..=MAX_RUNS).contains(&batch.runs.len()));
        assert!(bytes(&batch) <= MAX_BATCH_BYTES);
        assert!(
            facts.ledger.goes(bytes(&batch), self.now),
            "faster than the limit: {facts:?}"
        );
        let block = batch.runs[0].block;
        let pages = blocks()[usize::from(block.0)].pages();
        assert!(
            batch
                .runs
                .iter()
                .all(|run| run.block == block && run.end() <= pages)
        );
        self.orders.add(Order::Push { channel, batch });
    }

    fn journal(&mut self, record: Record) {
        let facts = &mut self.facts;
        match record {
            Record::CommitIntent => assert!(facts.stop_ordered, "{facts:?}"),
            Record::GuestMoved => assert!(facts.gone, "{facts:?}"),
            Record::RolledBack | Record::TakenBack => {
                assert!(facts.commits == 0 || facts.given_back, "{facts:?}");
            }
            Record::Serving { .. } => {
                assert!(facts.serves && facts.commits == 0, "{facts:?}");
                facts.serving_asked = true;
            }
            Record::Released { .. } => assert!(facts.serves && facts.may_release, "{facts:?}"),
            ref other => panic!("the source writes {other:?}"),
        }
        self.orders.add(Order::Journal(record));
    }
}

fn is_connect(order: &Order) -> bool {
    matches!(order, Order::Connect | Order::ConnectAll)
}

fn bytes(batch: &Batch) -> u64 {
    let size =
        |run: &pagecopy::memory::Run| blocks()[usize::from(run.block.0)].page_size * run.pages;
    batch.runs.iter().map(size).sum()
}
