//! The switchover: the guest stops, what remains goes, QEMU's device state goes beside it, the destination loads.
//!
//! Before the guest is stopped, it is looked at once more: what has come since the start and writes where no scan sees it
//! ends the migration. Once it is stopped, three strands run at once and meet before `Commit`: the last pages (scan, push, barrier), the device
//! state, which QEMU saves while the last scan is made, and the journal's `CommitIntent`, which is written while the destination loads. With
//! `--verify`, digests are the fourth.

use std::time::Duration;

use super::commit::Commit;
use super::core::{Core, Intent, millis};
use super::interface::{Input, Output, Populated};
use super::reasons::outside;
use super::{Phase, Step};
use crate::engine::bitmap::Bitmap;
use crate::engine::end::End;
use crate::engine::event::{State, Switch};
use crate::engine::journal::Record;
use crate::engine::{Failure, Fault, Time};
use crate::limits::{MAX_DEVICE_STATE, MAX_DEVICE_STATE_CHUNK, MAX_DIGESTS, MAX_WORDS};
use crate::memory::Run;
use crate::wire::{AbortCode, Message};

/// With post-copy the destination gets ready and QEMU loads while it fetches pages: it has this much more time.
const POSTCOPY_GRACE: Duration = Duration::from_secs(7);

/// The guest is being looked at, and then told to stop.
#[derive(Debug)]
pub(super) struct Switchover {
    final_round: u32,
    /// The guest goes first, and fetches what remains.
    postcopy: bool,
    pages: Pages,
    bytes: u64,
    device_state: DeviceState,
    /// Set while digests are still to be sent; none without `--verify`.
    digests_owed: bool,
    /// The destination has asked for the digests of a chunk's pages.
    pages_asked: bool,
    loaded: bool,
    ordered: Time,
    moved: Time,
    /// What the deadlines are stretched by, for digests and for a limit that allows more.
    grace: Duration,
}

/// Where the last pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// The guest runs, and is being looked at.
    Looking,
    /// The guest is stopping: QEMU finishes and flushes its disks' requests, and answers nobody meanwhile.
    Stopping,
    /// The last scan.
    Scanning,
    /// They leave.
    Sending { since: Time },
    /// Barriers are on their way.
    Closing { since: Time },
    /// The destination has them all.
    InPlace { at: Time },
}

/// Where QEMU's device state is.
#[derive(Debug, Default)]
struct DeviceState {
    bytes: u64,
    crc: u32,
    /// What came before the last scan was over: the destination hears `Stopped` first.
    early: Vec<bytes::Bytes>,
    /// All of it has come.
    saved: bool,
    /// All of it has been sent.
    sent: bool,
}

impl Switchover {
    pub(super) fn begin(core: &mut Core, final_round: u32, postcopy: bool) -> Phase {
        core.out.enter(State::Completing);
        core.cut = false;
        core.serves = postcopy;
        core.figures.predicted_downtime_ms = core.convergence.predicted().map(millis);
        core.out.push(Output::LookAgain);
        Phase::Switchover(Switchover {
            final_round,
            postcopy,
            pages: Pages::Looking,
            bytes: 0,
            device_state: DeviceState::default(),
            digests_owed: core.setup.options.verify,
            pages_asked: false,
            loaded: false,
            ordered: core.now,
            moved: core.now,
            grace: core
                .setup
                .options
                .downtime_limit
                .saturating_add(core.convergence.verify().saturating_mul(4))
                .saturating_add(if postcopy {
                    POSTCOPY_GRACE
                } else {
                    Duration::ZERO
                }),
        })
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Unchanged if self.pages == Pages::Looking => {
                self.pages = Pages::Stopping;
                self.ordered = core.now;
                core.stop_ordered = Some(core.now);
                core.out.push(Output::StopGuest);
            }
            Input::GuestStopped if self.pages == Pages::Stopping => {
                self.pages = Pages::Scanning;
                // Not before: what it wrote at full speed until it stood still would be downtime.
                core.throttle(0);
                core.out.push(Output::Scan { holes: true });
                // It takes about as long as the scan, and no device writes the guest's memory any more.
                core.out.push(Output::SaveDeviceState);
            }
            Input::Scanned {
                dirty, populated, ..
            } if self.pages == Pages::Scanning && populated != Populated::NotAsked => {
                core.pages.stopped(&dirty, &populated).map_err(outside)?;
                self.send_the_rest(core, &dirty, &populated)?;
            }
            Input::Pushed {
                channel,
                batch,
                pushed,
            } => {
                if !core.sender.pushed(channel, batch, pushed) {
                    return Ok(Phase::Switchover(self));
                }
                self.send_on(core);
            }
            Input::DeviceState(bytes) => self.device_state(core, bytes)?,
            Input::DeviceStateSaved => self.device_state_saved(core),
            Input::Digests(digests) => self.send_digests(core, digests)?,
            Input::PageDigests {
                block,
                chunk,
                digests,
            } => {
                core.send(Message::PageDigests {
                    block,
                    chunk,
                    digests,
                });
            }
            Input::Journaled(Record::CommitIntent) => core.intent = Intent::Written,
            Input::Message(message) => self.message(core, message)?,
            _ => return Ok(Phase::Switchover(self)),
        }
        self.moved = core.now;
        Ok(self.commit_if_ready(core))
    }

    fn message(&mut self, core: &mut Core, message: Message) -> Result<(), End> {
        match (message, self.pages) {
            (Message::BarrierReached { round }, Pages::Closing { since })
                if round == self.final_round =>
            {
                let took = core.now.since(since);
                if core.sender.round().raw_bytes > 0 {
                    core.sending_time += took;
                }
                core.closing = None;
                self.pages = Pages::InPlace { at: core.now };
            }
            (Message::ChunkDiffers { block, chunk }, Pages::InPlace { .. })
                if core.setup.options.verify && !self.pages_asked =>
            {
                self.pages_asked = true;
                self.page_digests(core, block, chunk)?;
            }
            (Message::Loaded, Pages::InPlace { at })
                if self.device_state.sent && !self.digests_owed =>
            {
                if core.setup.options.verify {
                    core.figures.verify_ms = Some(millis(core.now.since(at)));
                }
                self.loaded = true;
            }
            (message, _) => {
                return Err(core.out_of_place(&message, "the guest was being switched over"));
            }
        }
        Ok(())
    }

    /// The last scan is in: everything goes, or is said to lack, and QEMU saves its devices meanwhile.
    fn send_the_rest(
        &mut self,
        core: &mut Core,
        dirty: &[Run],
        populated: &Populated,
    ) -> Result<(), End> {
        self.pages = Pages::Sending { since: core.now };
        let stopped = Message::Stopped {
            final_round: self.final_round,
        };
        if self.postcopy {
            let lacking = core.pages.take_populated(dirty, populated);
            let lacking = lacking.map_err(outside)?;
            core.out.push(Output::OpenReads);
            core.send(stopped);
            say_what_lacks(core, &lacking);
        } else {
            core.send(stopped);
        }
        self.bytes = core.pages.send_bytes();
        // Not earlier: digests are answered at once, and mean nothing to the destination before `Stopped`.
        if self.digests_owed {
            core.out.push(Output::Digest);
        }
        core.sender.begin_round(self.final_round);
        self.send_on(core);
        for bytes in std::mem::take(&mut self.device_state.early) {
            send_device_state(core, bytes);
        }
        if self.device_state.saved {
            self.device_state_saved(core);
        }
        Ok(())
    }

    fn send_on(&mut self, core: &mut Core) {
        let Pages::Sending { since } = self.pages else {
            return;
        };
        core.fill_channels();
        core.progress(self.final_round, since, self.bytes);
        if core.all_sent() {
            self.pages = Pages::Closing { since };
            core.send_barriers(self.final_round);
        }
    }

    fn device_state(&mut self, core: &mut Core, bytes: bytes::Bytes) -> Result<(), End> {
        self.device_state.bytes += bytes.len() as u64;
        if self.device_state.bytes > MAX_DEVICE_STATE {
            return Err(End::new(
                AbortCode::Qemu,
                Failure::new(
                    Fault::Qemu,
                    format!(
                        "QEMU's device state is larger than {} MiB",
                        MAX_DEVICE_STATE >> 20
                    ),
                    "put all RAM on memory-backend-file with share=on, so that only devices are in QEMU's own stream",
                ),
            ));
        }
        self.device_state.crc = crc32c::crc32c_append(self.device_state.crc, &bytes);
        if self.pages == Pages::Scanning {
            self.device_state.early.push(bytes);
        } else {
            send_device_state(core, bytes);
        }
        Ok(())
    }

    /// The stream is whole. The intent is written while the destination loads.
    fn device_state_saved(&mut self, core: &mut Core) {
        self.device_state.saved = true;
        if self.device_state.sent || self.pages == Pages::Scanning {
            return;
        }
        let DeviceState { bytes, crc, .. } = self.device_state;
        self.device_state.sent = true;
        core.figures.device_state_bytes = bytes;
        core.send(Message::DeviceStateEnd { bytes, crc });
        if self.postcopy {
            let (blocks, ram) = (core.setup.blocks.clone(), core.setup.ram.clone());
            let switched = core.switch;
            core.journal(Record::Serving {
                blocks,
                ram,
                switched,
            });
        }
        core.intent = Intent::Ordered;
        core.journal(Record::CommitIntent);
    }

    fn send_digests(&mut self, core: &mut Core, blocks: Vec<Vec<[u8; 16]>>) -> Result<(), End> {
        if !self.digests_owed {
            return Ok(());
        }
        self.digests_owed = false;
        for (block, digests) in blocks.iter().enumerate() {
            let mut first = 0;
            for part in digests.chunks(MAX_DIGESTS) {
                let block = u16::try_from(block)
                    .map_err(|_| End::protocol("too many RAMBlocks".to_owned()))?;
                core.send(Message::Digests {
                    block,
                    first,
                    digests: part.to_vec(),
                });
                first += part.len() as u64;
            }
        }
        Ok(())
    }

    fn page_digests(&mut self, core: &mut Core, block: u16, chunk: u64) -> Result<(), End> {
        let spec = core.setup.blocks.get(usize::from(block));
        let chunks = spec.map_or(0, |spec| spec.size.div_ceil(crate::limits::DIGEST_CHUNK));
        if chunk >= chunks {
            return Err(End::protocol(format!(
                "the destination asked for chunk {chunk} of RAMBlock {block}"
            )));
        }
        core.out.push(Output::PageDigests { block, chunk });
        Ok(())
    }

    /// From `Commit` on the guest is the destination's: its answer `Loaded` and the record of our intent come first.
    fn commit_if_ready(self, core: &mut Core) -> Phase {
        if self.loaded && core.intent == Intent::Written {
            Commit::begin(core)
        } else {
            Phase::Switchover(self)
        }
    }

    pub(super) fn next(&self, core: &Core) -> Time {
        let work = match self.pages {
            Pages::Sending { .. } => core.sender.next(&core.pages),
            _ => None,
        };
        work.into_iter().fold(self.deadline(core), Time::min)
    }

    fn deadline(&self, core: &Core) -> Time {
        let timeouts = core.setup.timeouts;
        let whole = self.ordered.after(timeouts.switchover).after(self.grace);
        // A slow disk is no fault of the peer, and to give up earlier would help nobody: QEMU could not even be told.
        if self.pages == Pages::Stopping {
            return whole;
        }
        whole.min(self.moved.after(timeouts.progress).after(self.grace))
    }

    pub(super) fn on_time(mut self, core: &mut Core) -> Step {
        if core.now >= self.deadline(core) {
            let waited = millis(core.now.since(self.ordered));
            let what = format!(
                "the switchover did not end within {waited:.0} ms: {}",
                self.waits_for(core)
            );
            let (fault, remedy) = match self.pages {
                Pages::Looking | Pages::Scanning => (
                    Fault::ThisHost,
                    "see what keeps this host busy, then migrate again",
                ),
                Pages::Stopping => (
                    Fault::Qemu,
                    "see to the guest's disks and the storage behind them; the guest runs on when its requests are done",
                ),
                _ => (
                    Fault::PeerHost,
                    "see what keeps the hosts or the network busy, then migrate again",
                ),
            };
            return Err(End::new(
                AbortCode::TimedOut,
                Failure::new(fault, what, remedy),
            ));
        }
        if core
            .sender
            .next(&core.pages)
            .is_some_and(|next| core.now >= next)
        {
            self.send_on(core);
        }
        Ok(Phase::Switchover(self))
    }

    fn waits_for(&self, core: &Core) -> &'static str {
        match self.pages {
            Pages::Looking => "the guest's devices could not be looked at",
            Pages::Stopping => {
                "QEMU did not stop the guest, whose disks have a request or a flush that takes so long"
            }
            Pages::Scanning => "the last scan did not end",
            Pages::Sending { .. } => "the last pages did not leave",
            Pages::Closing { .. } => "the destination did not confirm the last pages",
            Pages::InPlace { .. } if !self.device_state.sent => {
                "QEMU did not save its device state"
            }
            Pages::InPlace { .. } if self.digests_owed => "the digests were not ready",
            Pages::InPlace { .. } if !self.loaded => {
                "the destination did not load the device state"
            }
            Pages::InPlace { .. } if core.intent == Intent::Ordered => {
                "the journal was not written"
            }
            Pages::InPlace { .. } => "everything was ready",
        }
    }
}

fn send_device_state(core: &mut Core, mut bytes: bytes::Bytes) {
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(MAX_DEVICE_STATE_CHUNK));
        core.send(Message::DeviceState(piece));
    }
}

/// The pages that do not come: the destination fetches them.
fn say_what_lacks(core: &mut Core, lacking: &Bitmap) {
    let switch = Switch {
        sent_bytes: core.sender.total().raw_bytes,
        lacking_bytes: lacking.bytes(),
    };
    core.switch_over(switch);
    for (block, first, words) in lacking.pieces(MAX_WORDS) {
        core.send(Message::Lacking {
            block: block.0,
            first,
            words,
        });
    }
    core.send(Message::LackingEnd {
        pages: lacking.pages(),
        background: core.setup.options.background_limit.unwrap_or(0),
        sent: switch.sent_bytes,
    });
}
