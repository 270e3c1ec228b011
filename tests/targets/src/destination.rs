//! The destination's engine against any source, any host and any QEMU.
//!
//! The rules that this target holds it to, whatever comes: the guest is run only when `Commit` has come and `Committed` is
//! on disk, and never once it has been given up; `Aborted` is final; device state is loaded once, and only when RAM and
//! state are whole, or the page faults of what lacks wait and that is on disk; the source hears that nothing more is needed
//! only when that was so and the disk was asked; an input leads to a bounded number of outputs; nothing follows the end.

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use pagecopy::engine::destination::{Destination, Input, Output, Setup};
use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::journal::Record;
use pagecopy::engine::{ChannelId, Time, Timeouts};
use pagecopy::limits::{DIGEST_CHUNK, MAX_DEVICE_STATE};
use pagecopy::wire::{AbortCode, Message};

use crate::orders::Orders;
use crate::words::{self, blocks, digests, failure, message, pause};

const CHANNELS: u16 = 2;
/// Inputs of one run, at most.
const STEPS: usize = 400;
/// Outputs that one input may lead to.
const OUTPUTS: usize = 12;

/// What the engine waits for.
#[derive(Clone, Debug)]
enum Order {
    Prepare,
    TakeChannels(u16),
    Digest,
    PageDigests { block: u16, chunk: u64 },
    Arm,
    Poison,
    Load,
    Run,
    Journal(Record),
}

/// What has happened so far.
#[derive(Debug, Default)]
struct Facts {
    commit_came: bool,
    committed: bool,
    commit_failed: bool,
    aborted: bool,
    loads: u32,
    runs: u32,
    guest_running: bool,
    said_running: bool,
    finished: bool,
    round: u32,
    stopped: Option<u32>,
    barriers: [u64; CHANNELS as usize],
    state_bytes: u64,
    state_crc: u32,
    kept: u64,
    state_whole: bool,
    recovered: bool,
    /// Words that said what lacks, by block and first page.
    lacking: BTreeMap<(u16, u64), u64>,
    lacking_ended: bool,
    arms: u32,
    armed: bool,
    armed_recorded: bool,
    pulls: bool,
    /// Nothing more is needed of the source: it is whole, poisoned, or gone with its QEMU.
    needs_nothing: bool,
    qemu_failed: bool,
    /// The disk was asked for `Whole`, and has answered.
    whole_asked: bool,
    whole_answered: bool,
}

impl Facts {
    /// Whether the guest runs, or is being started; one that was taken over ran before.
    fn started(&self) -> bool {
        self.runs > 0 || self.guest_running
    }
}

struct World {
    engine: Destination,
    now: Time,
    orders: Orders<Order>,
    facts: Facts,
}

/// Any sequence of inputs.
///
/// # Panics
/// A rule is broken.
pub fn destination(data: &[u8]) {
    // An input that ends early is a short run.
    let _ = run(&mut Unstructured::new(data));
}

fn setup() -> Setup {
    let mut blocks = blocks();
    blocks.reverse();
    Setup {
        host: "here".to_owned(),
        vm: "vm".to_owned(),
        blocks,
        data_channels: CHANNELS,
        id: words::ID,
        postcopy: Ok(()),
        timeouts: Timeouts::default(),
    }
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let recovered = input.ratio(1, 16)?;
    let now = Time(1);
    let (engine, armed, resumed) = match recovered {
        true => match u8::arbitrary(input)? % 3 {
            0 => (Destination::recover(setup(), false, now), false, false),
            1 => (Destination::recover(setup(), true, now), true, false),
            _ => (Destination::resume(setup(), 1 << 20, now), true, true),
        },
        false => (Destination::new(setup(), now), false, false),
    };
    let mut world = World {
        engine,
        now,
        orders: Orders::new(),
        facts: Facts {
            recovered,
            commit_came: recovered,
            committed: recovered,
            armed,
            armed_recorded: armed,
            guest_running: resumed,
            ..Facts::default()
        },
    };
    world.take_outputs();
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
            0..=4 => match self.orders.take(input)? {
                Some(order) => Some(self.answer(input, order)?),
                None => None,
            },
            5..=9 => Some(self.honest(input)?),
            10..=11 => Some(Input::Message(message(input, self.facts.round)?)),
            12 => Some(Input::Barrier {
                channel: ChannelId(u16::from(u8::arbitrary(input)?) % (CHANNELS + 2)),
                round: self.facts.round + u32::from(u8::arbitrary(input)? % 2),
                zero_bytes: 0,
            }),
            13 => {
                self.now = self.now.after(pause(input)?);
                Some(Input::Tick)
            }
            14 => Some(match u8::arbitrary(input)? {
                choice @ 192.. => self.of_postcopy(input, choice % 6)?,
                choice => self.sudden(input, choice % 8)?,
            }),
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

    fn sudden(&mut self, input: &mut Unstructured<'_>, choice: u8) -> Result<Input> {
        Ok(match choice {
            0 => Input::Cancel,
            1 | 2 => Input::LinkLost(failure("cut")),
            3 => Input::PeerMisbehaved("outside".to_owned()),
            4 => Input::HostFailed(failure("host")),
            5 => Input::QemuFailed(failure("QEMU")),
            6 => Input::GuestRunning,
            _ => Input::Digests(vec![digests(input)?]),
        })
    }

    /// What the driver says while pages are fetched, at its time or not.
    fn of_postcopy(&mut self, input: &mut Unstructured<'_>, choice: u8) -> Result<Input> {
        Ok(match choice {
            0 => Input::Lacks {
                bytes: u64::arbitrary(input)?,
                faults: FaultFigures::default(),
            },
            1 => Input::Whole {
                faults: words::faults(input)?,
            },
            2 => Input::PullFailed(failure("fetching")),
            3 => Input::Served,
            4 => Input::Poison {
                peer_fenced: bool::arbitrary(input)?,
            },
            _ => Input::Poisoned { bytes: 4096 },
        })
    }

    /// What an honest source could say at this point.
    fn honest(&mut self, input: &mut Unstructured<'_>) -> Result<Input> {
        let facts = &self.facts;
        // Most often what it has to say now, so that inputs get far.
        let whole = facts
            .stopped
            .is_some_and(|last| facts.barriers.iter().all(|count| *count > u64::from(last)));
        let next = match u8::arbitrary(input)? {
            choice @ 0..=95 => choice % 10,
            248.. if facts.stopped.is_some() => 10,
            240..=247 if facts.stopped.is_some() => 11,
            _ if facts.loads > 0 => 8,
            _ if whole => 6 + u8::from(bool::arbitrary(input)?),
            choice @ 96..=159 => [1, 5, 2, 2][usize::from(choice % 4)],
            _ => 2,
        };
        Ok(Input::Message(match next {
            0 => Message::Hello {
                version_min: 1,
                version_max: 1,
                capabilities: 3,
                id: words::ID,
                vm: "vm".to_owned(),
                host: "peer".to_owned(),
                verify: bool::arbitrary(input)?,
                blocks: blocks(),
            },
            1 => Message::Populate(words::runs(input, true)?),
            2..=4 => {
                let lane = facts
                    .barriers
                    .iter()
                    .position(|count| *count <= u64::from(facts.round))
                    .unwrap_or(0);
                return Ok(Input::Barrier {
                    channel: ChannelId(u16::try_from(lane + 1).unwrap_or(1)),
                    round: facts.round,
                    zero_bytes: 0,
                });
            }
            5 => Message::Stopped {
                final_round: facts.round,
            },
            6 => Message::DeviceState(Bytes::from(vec![3; 1 + usize::from(u8::arbitrary(input)?)])),
            7 => Message::DeviceStateEnd {
                bytes: facts.state_bytes,
                crc: facts.state_crc,
            },
            8 => Message::Commit,
            10 => Message::Lacking {
                block: 0,
                first: u64::from(u8::arbitrary(input)? % 16) * 64,
                words: vec![u64::arbitrary(input)? | 1],
            },
            11 => Message::LackingEnd {
                pages: facts
                    .lacking
                    .values()
                    .map(|word| u64::from(word.count_ones()))
                    .sum(),
                background: 0,
                sent: 0,
            },
            _ => {
                let block = u16::from(u8::arbitrary(input)? % 2);
                let chunks = blocks()[usize::from(block)].size.div_ceil(DIGEST_CHUNK);
                Message::Digests {
                    block,
                    first: 0,
                    digests: vec![[2; 16]; usize::try_from(chunks).unwrap_or(0)],
                }
            }
        }))
    }

    fn answer(&mut self, input: &mut Unstructured<'_>, order: Order) -> Result<Input> {
        let fails = input.ratio(1, 8)?;
        Ok(match order {
            Order::Prepare if fails => Input::HostFailed(failure("full")),
            Order::Prepare => Input::Prepared,
            Order::Digest if fails => Input::HostFailed(failure("digests")),
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
            Order::TakeChannels(first) => Input::ChannelsTaken {
                first,
                refused: fails.then(|| "they are not there".to_owned()),
            },
            Order::Arm if fails => Input::HostFailed(failure("arm")),
            Order::Arm => Input::Armed {
                pid: 1,
                ram: Vec::new(),
                inside: vec![7],
            },
            Order::Poison if fails => Input::HostFailed(failure("poison")),
            Order::Poison => Input::Poisoned { bytes: 4096 },
            Order::Load if fails => Input::QemuFailed(failure("load")),
            Order::Load => Input::DeviceStateLoaded,
            Order::Run if fails => Input::QemuFailed(failure("cont")),
            Order::Run => Input::GuestRunning,
            Order::Journal(record) if fails => Input::JournalFailed(record, failure("disk")),
            Order::Journal(record) => Input::Journaled(record),
        })
    }

    fn handle(&mut self, input: Input) {
        self.note(&input);
        self.engine.handle(self.now, input);
        self.take_outputs();
        // Woken when it wants to be, it does not want to be woken again at once, for ever.
        let mut ticks = 0;
        while let Some(at) = self.engine.poll_timeout().filter(|at| *at <= self.now) {
            ticks += 1;
            assert!(
                ticks < 8,
                "the engine wants to be woken at {at:?} again and again"
            );
            self.engine.handle(self.now, Input::Tick);
            self.take_outputs();
        }
    }

    fn note(&mut self, input: &Input) {
        let facts = &mut self.facts;
        match input {
            Input::Message(Message::Commit) => facts.commit_came = true,
            Input::Message(Message::Stopped { final_round }) => {
                facts.stopped.get_or_insert(*final_round);
            }
            Input::Message(Message::DeviceStateEnd { bytes, crc }) => {
                facts.state_whole |= (*bytes, *crc) == (facts.state_bytes, facts.state_crc);
            }
            Input::Journaled(Record::Committed) => facts.committed = true,
            Input::JournalFailed(Record::Committed, _) => facts.commit_failed = true,
            Input::GuestRunning => facts.guest_running = true,
            Input::Message(Message::Lacking {
                block,
                first,
                words,
            }) => {
                for (at, word) in (0..).zip(words) {
                    *facts.lacking.entry((*block, first + at * 64)).or_default() |= word;
                }
            }
            Input::Message(Message::LackingEnd { .. }) => facts.lacking_ended = true,
            Input::Armed { .. } => facts.armed |= facts.arms > 0,
            Input::Journaled(Record::Armed { .. }) => facts.armed_recorded |= facts.armed,
            Input::Journaled(Record::Whole { .. })
            | Input::JournalFailed(Record::Whole { .. }, _) => {
                facts.whole_answered |= facts.whole_asked;
            }
            Input::Whole { .. } | Input::Poisoned { .. } => facts.needs_nothing = true,
            Input::QemuFailed(_) => {
                facts.needs_nothing = true;
                facts.qemu_failed = true;
            }
            Input::Barrier { channel, round, .. } => {
                let lane = usize::from(channel.0).checked_sub(1);
                let count = lane.and_then(|lane| facts.barriers.get_mut(lane));
                if let Some(count) = count.filter(|count| **count == u64::from(*round)) {
                    *count += 1;
                }
            }
            _ => {}
        }
    }

    fn take_outputs(&mut self) {
        let mut count = 0;
        while let Some(output) = self.engine.poll() {
            count += 1;
            assert!(
                count <= OUTPUTS,
                "one input led to more than {OUTPUTS} outputs"
            );
            assert!(!self.facts.finished, "{output:?} after the end");
            self.output(output);
        }
    }

    fn output(&mut self, output: Output) {
        let facts = &mut self.facts;
        match output {
            Output::Send(Message::BarrierReached { round }) => {
                let least = facts.barriers.iter().min();
                assert!(
                    least.is_some_and(|least| *least > u64::from(round)),
                    "round {round} is said to be in place: {facts:?}"
                );
                facts.round = round + 1;
            }
            Output::Send(Message::Loaded) => assert_eq!(facts.loads, 1, "{facts:?}"),
            Output::Send(Message::Running) => {
                // One that a daemon before this one has run is said to run, too.
                let was_run = facts.runs > 0 || facts.recovered;
                assert!(facts.guest_running && was_run, "{facts:?}");
                // In post-copy it is said again to a source that comes again.
                assert!(
                    !facts.said_running || facts.armed,
                    "said twice that the guest runs"
                );
                facts.said_running = true;
            }
            Output::Send(Message::Abort { code, .. }) => {
                let lost = facts.armed && facts.qemu_failed && facts.whole_answered;
                assert!(
                    facts.runs == 0 || lost,
                    "given up after the guest was run: {facts:?}"
                );
                // After `Commit` came only the record, or the refusal of a late `Commit`, lets it say so.
                assert!(
                    !facts.committed || facts.aborted || lost,
                    "given up with Committed on disk: {code:?} {facts:?}"
                );
                if code != AbortCode::Aborted && !lost {
                    facts.aborted |= !facts.commit_came;
                }
            }
            Output::Send(Message::Whole { .. }) => {
                assert!(facts.needs_nothing && facts.whole_answered, "{facts:?}");
            }
            Output::Send(Message::Resumed) => assert!(facts.started(), "{facts:?}"),
            Output::Send(_) | Output::Report(_) | Output::Allocate(_) | Output::Decided(_) => {}
            Output::TakeChannels { first, .. } => self.orders.add(Order::TakeChannels(first)),
            Output::Arm { .. } => {
                facts.arms += 1;
                assert_eq!((facts.arms, facts.loads), (1, 0), "{facts:?}");
                let last = facts.stopped.map(u64::from);
                assert!(
                    facts.lacking_ended
                        && last
                            .is_some_and(|last| facts.barriers.iter().all(|count| *count > last)),
                    "armed before all that comes is in place: {facts:?}"
                );
                facts.pulls = true;
                self.orders.add(Order::Arm);
            }
            Output::StopPulling => assert!(std::mem::take(&mut facts.pulls), "{facts:?}"),
            Output::Pull => {
                assert!(facts.started() && facts.armed, "{facts:?}");
                facts.pulls = true;
            }
            Output::Poison => {
                assert!(
                    !facts.pulls && facts.guest_running && facts.armed,
                    "{facts:?}"
                );
                self.orders.add(Order::Poison);
            }
            Output::Journal(record) => self.journal(record),
            Output::Prepare { order, .. } => {
                assert_eq!(order, [1, 0], "the source's order");
                self.orders.add(Order::Prepare);
            }
            Output::KeepDeviceState(bytes) => {
                facts.state_crc = crc32c::crc32c_append(facts.state_crc, &bytes);
                facts.state_bytes += bytes.len() as u64;
                facts.kept += bytes.len() as u64;
                assert!(facts.kept <= MAX_DEVICE_STATE);
                assert_eq!(facts.loads, 0, "device state after it was loaded");
            }
            Output::Digest => self.orders.add(Order::Digest),
            Output::PageDigests { block, chunk } => {
                self.orders.add(Order::PageDigests { block, chunk });
            }
            Output::LoadDeviceState => {
                facts.loads += 1;
                assert_eq!(facts.loads, 1, "loaded twice");
                assert!(facts.state_whole, "loaded before it was whole: {facts:?}");
                let last = facts.stopped.map(u64::from);
                assert!(
                    last.is_some_and(|last| facts.barriers.iter().all(|count| *count > last)),
                    "loaded before RAM was whole: {facts:?}"
                );
                assert!(!facts.aborted);
                assert!(
                    facts.arms == 0 || facts.armed_recorded,
                    "loaded before page faults wait: {facts:?}"
                );
                self.orders.add(Order::Load);
            }
            Output::RunGuest => {
                assert!(
                    facts.commit_came && facts.committed && !facts.commit_failed,
                    "run without Committed on disk: {facts:?}"
                );
                assert!(!facts.aborted, "run after it was given up: {facts:?}");
                assert!(facts.recovered || facts.loads == 1, "{facts:?}");
                facts.runs += 1;
                self.orders.add(Order::Run);
            }
            Output::Finished { .. } => facts.finished = true,
        }
    }

    fn journal(&mut self, record: Record) {
        let facts = &mut self.facts;
        match record {
            Record::Committed => {
                assert!(facts.commit_came && facts.loads == 1, "{facts:?}");
                assert!(!facts.aborted, "committed after it was given up: {facts:?}");
            }
            Record::Aborted => {
                assert_eq!(facts.runs, 0, "aborted after the guest was run: {facts:?}");
                facts.aborted = true;
            }
            Record::Running => assert!(facts.guest_running, "{facts:?}"),
            Record::Closed => assert!(facts.guest_running, "{facts:?}"),
            Record::Armed { .. } => assert!(facts.armed && facts.loads == 0, "{facts:?}"),
            Record::Whole { ref failure } => {
                assert!(facts.needs_nothing && facts.guest_running, "{facts:?}");
                // A guest is said to be lost only with its QEMU.
                assert!(failure.is_none() || facts.qemu_failed, "{facts:?}");
                facts.whole_asked = true;
            }
            ref other => panic!("the destination writes {other:?}"),
        }
        self.orders.add(Order::Journal(record));
    }
}
