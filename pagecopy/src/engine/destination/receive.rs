//! Receiving: pages land on the data channels by themselves; rounds, device state and digests are counted and checked
//! here, until the guest is whole.

use super::barriers::Barriers;
use super::core::Core;
use super::interface::{Input, Output};
use super::load::Loading;
use super::verify::Verify;
use super::{Phase, Step};
use crate::engine::ChannelId;
use crate::engine::bitmap::Bitmap;
use crate::engine::end::End;
use crate::engine::event::{Report, State, Switch};
use crate::engine::journal::Record;
use crate::limits::MAX_DEVICE_STATE;
use crate::memory::{BlockId, BlockSpec, Run};
use crate::wire::{Message, Secret};

/// Rounds of pre-copy and the switchover.
#[derive(Debug)]
pub(super) struct Receive {
    barriers: Barriers,
    /// The first of the channels that are being taken: they count already.
    taking: Option<u16>,
    /// Set when the guest stands still at the source.
    final_round: Option<u32>,
    device_state: DeviceState,
    lacking: Lacking,
    /// None without `--verify`.
    verify: Option<Verify>,
    digest_ordered: bool,
}

/// The pages of a post-copy that will not come.
#[derive(Debug)]
enum Lacking {
    /// Nothing was said of any.
    None,
    /// Some were named.
    Some(Bitmap),
    /// All were named.
    All(Bitmap),
    /// Page faults are being made to wait for them.
    Arming,
    /// That they wait is being recorded.
    Recording,
    /// They do.
    Armed,
}

/// QEMU's device state as it comes.
#[derive(Debug, Default)]
struct DeviceState {
    bytes: u64,
    crc: u32,
    whole: bool,
}

impl DeviceState {
    fn is_not_begun(&self) -> bool {
        self.bytes == 0 && !self.whole
    }
}

impl Receive {
    pub(super) fn new(core: &Core) -> Receive {
        Receive {
            barriers: Barriers::new(core.setup.data_channels),
            taking: None,
            final_round: None,
            device_state: DeviceState::default(),
            lacking: Lacking::None,
            verify: core.verify.then(|| Verify::new(&core.blocks)),
            digest_ordered: false,
        }
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Message(message) => self.message(core, message)?,
            Input::Barrier {
                channel,
                round,
                zero_bytes: _,
            } => {
                // Data channels are a sign of life, too: the control channel may be behind a long queue.
                core.link.heard(core.now);
                if self.ram_whole() {
                    return Err(End::protocol(format!(
                        "a barrier of round {round} came after the last round"
                    )));
                }
                if let Some(round) = self
                    .barriers
                    .arrived(channel, round)
                    .map_err(End::protocol)?
                {
                    core.send(Message::BarrierReached { round });
                }
            }
            Input::Left { channel, round } => self.left(core, channel, round)?,
            Input::ChannelsTaken { first, refused } if self.taking == Some(first) => {
                self.taken(core, first, refused)?;
            }
            Input::Digests(digests) => {
                if let Some(verify) = &mut self.verify {
                    verify.ours(core, digests)?;
                }
            }
            Input::PageDigests {
                block,
                chunk,
                digests,
            } => {
                if let Some(verify) = &mut self.verify {
                    verify.pages(core, false, (block, chunk), digests)?;
                }
            }
            Input::Armed { pid, inside, ram } if matches!(self.lacking, Lacking::Arming) => {
                self.lacking = Lacking::Recording;
                core.journal(Record::Armed {
                    pid,
                    inside,
                    ram,
                    blocks: core.blocks.clone(),
                    background: core.background,
                    switched: core.switch,
                });
            }
            Input::Journaled(Record::Armed { .. }) => self.lacking = Lacking::Armed,
            _ => return Ok(Phase::Receive(self)),
        }
        self.load_if_whole(core)
    }

    fn message(&mut self, core: &mut Core, message: Message) -> Result<(), End> {
        match (message, self.final_round, &mut self.verify) {
            // Nothing orders it against the barriers on the data channels: those of round 0 may all come first.
            (Message::Populate(runs), None, _) => {
                if let Some(run) = runs.iter().find(|run| !inside(run, &core.blocks)) {
                    return Err(End::protocol(format!(
                        "pages {} to {} of RAMBlock {} do not exist",
                        run.first,
                        run.end(),
                        run.block.0
                    )));
                }
                core.out.push(Output::Allocate(runs));
            }
            (
                Message::AddChannels {
                    first,
                    channels,
                    key,
                },
                None,
                _,
            ) if core.channels && self.taking.is_none() => {
                self.add_channels(core, first, channels, key)?;
            }
            (Message::Stopped { final_round }, None, _) => self.stopped(core, final_round)?,
            (
                Message::Lacking {
                    block,
                    first,
                    words,
                },
                Some(_),
                None,
            ) if core.postcopy => self.lacks(core, BlockId(block), first, &words)?,
            (
                Message::LackingEnd {
                    pages,
                    background,
                    sent,
                },
                Some(_),
                None,
            ) if core.postcopy => {
                core.background = Some(background).filter(|limit| *limit > 0);
                self.lacks_no_more(core, pages, sent)?;
            }
            (Message::DeviceState(bytes), Some(_), _)
                if !self.device_state.whole && !matches!(self.lacking, Lacking::Some(_)) =>
            {
                self.device_state.bytes += bytes.len() as u64;
                if self.device_state.bytes > MAX_DEVICE_STATE {
                    return Err(End::protocol("the device state is larger than its limit"));
                }
                self.device_state.crc = crc32c::crc32c_append(self.device_state.crc, &bytes);
                core.out.push(Output::KeepDeviceState(bytes));
            }
            (Message::DeviceStateEnd { bytes, crc }, Some(_), _)
                if !self.device_state.whole && !matches!(self.lacking, Lacking::Some(_)) =>
            {
                if (bytes, crc) != (self.device_state.bytes, self.device_state.crc) {
                    return Err(End::protocol(format!(
                        "the device state arrived changed: {} bytes with checksum {:08x}, sent were {bytes} with {crc:08x}",
                        self.device_state.bytes, self.device_state.crc
                    )));
                }
                self.device_state.whole = true;
            }
            (
                Message::Digests {
                    block,
                    first,
                    digests,
                },
                Some(_),
                Some(verify),
            ) => {
                verify.theirs(core, block, first, &digests)?;
            }
            (
                Message::PageDigests {
                    block,
                    chunk,
                    digests,
                },
                Some(_),
                Some(verify),
            ) => {
                verify.pages(core, true, (block, chunk), digests)?;
            }
            (message, _, _) => {
                return Err(core.out_of_place(&message, "the guest was being received"));
            }
        }
        Ok(())
    }

    /// More channels for the round under way. It is not over before they have brought its barrier, or were refused.
    fn add_channels(
        &mut self,
        core: &mut Core,
        first: u16,
        channels: u16,
        key: Secret,
    ) -> Result<(), End> {
        self.barriers.add(first, channels).map_err(End::protocol)?;
        self.taking = Some(first);
        let round = self.barriers.round();
        core.out.push(Output::TakeChannels {
            first,
            channels,
            key,
            round,
        });
        Ok(())
    }

    /// They carry pages, or never will.
    fn taken(&mut self, core: &mut Core, first: u16, refused: Option<String>) -> Result<(), End> {
        self.taking = None;
        let taken = refused.is_none();
        let decision = match &refused {
            None => "more of them, as the source wants it".to_owned(),
            Some(reason) => format!("no more of them: {reason}"),
        };
        core.send(Message::ChannelsTaken {
            first,
            taken,
            reason: refused.unwrap_or_default(),
        });
        if !taken && let Some(round) = self.barriers.remove(first).map_err(End::protocol)? {
            core.send(Message::BarrierReached { round });
        }
        self.tell_channels(core, decision);
        Ok(())
    }

    /// A channel brings nothing more.
    fn left(&mut self, core: &mut Core, channel: ChannelId, round: u32) -> Result<(), End> {
        core.link.heard(core.now);
        if !core.channels || self.ram_whole() {
            return Err(End::protocol(format!(
                "channel {} left, which it may not",
                channel.0
            )));
        }
        let over = self.barriers.left(channel, round).map_err(End::protocol)?;
        if let Some(round) = over {
            core.send(Message::BarrierReached { round });
        }
        self.tell_channels(core, "one fewer, as the source wants it".to_owned());
        Ok(())
    }

    fn tell_channels(&self, core: &mut Core, decision: String) {
        core.out.push(Output::Report(Report::Channels {
            channels: self.barriers.channels(),
            decision,
        }));
    }

    fn lacks(&mut self, core: &Core, block: BlockId, first: u64, words: &[u64]) -> Result<(), End> {
        if matches!(self.lacking, Lacking::None) && self.device_state.is_not_begun() {
            self.lacking = Lacking::Some(Bitmap::new(&core.blocks));
        }
        let Lacking::Some(bitmap) = &mut self.lacking else {
            return Err(End::protocol(
                "Lacking came after LackingEnd or DeviceState",
            ));
        };
        bitmap
            .insert_words(block, first, words)
            .map_err(|outside| End::protocol(format!("what lacks: {outside}")))
    }

    fn lacks_no_more(&mut self, core: &mut Core, pages: u64, sent: u64) -> Result<(), End> {
        let bitmap = match std::mem::replace(&mut self.lacking, Lacking::None) {
            Lacking::None if self.device_state.is_not_begun() => Bitmap::new(&core.blocks),
            Lacking::Some(bitmap) => bitmap,
            _ => return Err(End::protocol("LackingEnd came twice or after DeviceState")),
        };
        if bitmap.pages() != pages {
            return Err(End::protocol(format!(
                "{} pages were said to lack, and then that it is {pages}",
                bitmap.pages()
            )));
        }
        core.switch_over(Switch {
            sent_bytes: sent,
            lacking_bytes: bitmap.bytes(),
        });
        self.lacking = Lacking::All(bitmap);
        Ok(())
    }

    /// The guest stands still at the source. The last round's barriers may have overtaken this message.
    fn stopped(&mut self, core: &mut Core, final_round: u32) -> Result<(), End> {
        let round = self.barriers.round();
        if final_round != round && final_round.checked_add(1) != Some(round) {
            return Err(End::protocol(format!(
                "the last round is said to be {final_round}, under way is {round}"
            )));
        }
        core.out.enter(State::Completing);
        self.final_round = Some(final_round);
        Ok(())
    }

    /// Whether the last round is in place.
    fn ram_whole(&self) -> bool {
        self.final_round
            .is_some_and(|last| self.barriers.round() > last)
    }

    /// Everything that comes is in place: from here on the guest's memory is fetched.
    fn arm(&mut self, core: &mut Core) {
        if matches!(self.lacking, Lacking::All(_))
            && let Lacking::All(lacking) = std::mem::replace(&mut self.lacking, Lacking::Arming)
        {
            core.armed = true;
            core.pulls = true;
            core.lacks = lacking.bytes();
            let background = core.background;
            core.out.push(Output::Arm {
                lacking,
                background,
            });
        }
    }

    fn load_if_whole(mut self, core: &mut Core) -> Step {
        if !self.ram_whole() {
            return Ok(Phase::Receive(self));
        }
        if let Some(verify) = &self.verify {
            if !self.digest_ordered {
                self.digest_ordered = true;
                core.out.push(Output::Digest);
            }
            if !verify.agreed() {
                return Ok(Phase::Receive(self));
            }
        }
        self.arm(core);
        let ready = matches!(self.lacking, Lacking::None | Lacking::Armed);
        if !ready || !self.device_state.whole {
            return Ok(Phase::Receive(self));
        }
        Ok(Loading::begin(core))
    }
}

fn inside(run: &Run, blocks: &[BlockSpec]) -> bool {
    let pages = blocks
        .get(usize::from(run.block.0))
        .map_or(0, BlockSpec::pages);
    run.first
        .checked_add(run.pages)
        .is_some_and(|end| end <= pages)
}
