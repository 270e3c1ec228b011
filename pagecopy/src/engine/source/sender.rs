//! Keeps the data channels busy: batches under way, and what went how.

use super::heat::Pages;
use super::interface::{Batch, Output, Pushed};
use crate::engine::encoding::{Encoded, Encodings};
use crate::engine::pacing::Pacer;
use crate::engine::{ChannelId, Time};
use crate::limits::{MAX_BATCH_BYTES, MAX_BATCHES_PER_CHANNEL, MAX_RUNS};
use crate::memory::{BlockSpec, Run};

/// A batch is not made smaller than this to spread few pages over the channels.
const MIN_BATCH_BYTES: u64 = 128 << 10;

/// The data channels as the engine knows them.
#[derive(Debug)]
pub(super) struct Sender {
    lanes: Vec<Lane>,
    next_id: u64,
    pacer: Pacer,
    /// How pages may be encoded.
    encodings: Encodings,
    /// The round under way.
    number: u32,
    /// Since [`Sender::begin_round`].
    round: Sent,
    /// In the rounds before.
    before: Sent,
}

/// A data channel.
#[derive(Debug)]
struct Lane {
    channel: ChannelId,
    /// Batches under way.
    in_flight: Vec<InFlight>,
    /// Nothing more goes over it.
    leaves: bool,
}

impl Lane {
    fn new(number: u16) -> Lane {
        Lane {
            channel: ChannelId(number),
            in_flight: Vec::new(),
            leaves: false,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    id: u64,
    page_size: u64,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes of pages that were not zero, however they went.
    pub(super) raw_bytes: u64,
    pub(super) raw_pages: u64,
    pub(super) zero_bytes: u64,
    pub(super) zero_pages: u64,
    /// Of `raw_bytes`: what went encoded.
    pub(super) encoded: Encoded,
}

impl Sender {
    pub(super) fn new(channels: u16, bandwidth_limit: Option<u64>, now: Time) -> Sender {
        Sender {
            lanes: (1..=channels).map(Lane::new).collect(),
            next_id: 0,
            pacer: Pacer::new(bandwidth_limit, now),
            encodings: Encodings::default(),
            number: 0,
            round: Sent::default(),
            before: Sent::default(),
        }
    }

    /// Another limit, from now on.
    pub(super) fn limit(&mut self, bandwidth_limit: Option<u64>, now: Time) {
        self.pacer = Pacer::new(bandwidth_limit, now);
    }

    /// The destination takes pages encoded like this.
    pub(super) fn encode(&mut self, encodings: Encodings) {
        self.encodings = encodings;
    }

    /// Counts anew: the rounds before `number` are in place.
    pub(super) fn begin_round(&mut self, number: u32) {
        self.number = number;
        self.before = self.total();
        self.round = Sent::default();
    }

    /// What was sent in all rounds.
    pub(super) fn total(&self) -> Sent {
        Sent {
            raw_bytes: self.before.raw_bytes + self.round.raw_bytes,
            raw_pages: self.before.raw_pages + self.round.raw_pages,
            zero_bytes: self.before.zero_bytes + self.round.zero_bytes,
            zero_pages: self.before.zero_pages + self.round.zero_pages,
            encoded: self.before.encoded.and(self.round.encoded),
        }
    }

    /// What was sent since the round began.
    pub(super) fn round(&self) -> Sent {
        self.round
    }

    /// The data channels that carry pages.
    pub(super) fn channels(&self) -> impl Iterator<Item = ChannelId> {
        let stay = self.lanes.iter().filter(|lane| !lane.leaves);
        stay.map(|lane| lane.channel)
    }

    /// How many there are.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.channels().count()).unwrap_or(u16::MAX)
    }

    /// So many more from now on, with the numbers from `first` on.
    pub(super) fn add(&mut self, first: u16, channels: u16) {
        self.lanes
            .extend((first..).take(usize::from(channels)).map(Lane::new));
    }

    /// The last of them, so many, carry nothing more; one stays.
    pub(super) fn leave(&mut self, channels: u16) -> Vec<ChannelId> {
        let most = usize::from(self.count().saturating_sub(1).min(channels));
        let stay = self.lanes.iter_mut().rev().filter(|lane| !lane.leaves);
        let left = stay.take(most).map(|lane| {
            lane.leaves = true;
            lane.channel
        });
        let left = left.collect();
        self.forget_left();
        left
    }

    fn forget_left(&mut self) {
        self.lanes
            .retain(|lane| !lane.leaves || !lane.in_flight.is_empty());
    }

    /// Puts as many batches under way as there is room, pages, and bandwidth for; the emptiest channel first.
    pub(super) fn fill(
        &mut self,
        now: Time,
        pages: &mut Pages,
        specs: &[BlockSpec],
    ) -> Vec<Output> {
        let mut outputs = Vec::new();
        while !pages.nothing_to_send() && self.pacer.may_send(now) {
            let Some(free) = self.free_lane() else { break };
            let runs = pages.take(MAX_RUNS, self.batch_bytes(pages));
            let Some(spec) = runs
                .first()
                .and_then(|run| specs.get(usize::from(run.block.0)))
            else {
                break;
            };
            self.pacer.spend(bytes(&runs, spec));
            self.next_id += 1;
            let id = self.next_id;
            let lane = &mut self.lanes[free];
            lane.in_flight.push(InFlight {
                id,
                page_size: spec.page_size,
            });
            let channel = lane.channel;
            outputs.push(Output::Push {
                channel,
                batch: Batch {
                    id,
                    round: self.number,
                    encodings: self.encodings,
                    runs,
                },
            });
        }
        outputs
    }

    /// The channel with the fewest batches under way, if it has room.
    fn free_lane(&self) -> Option<usize> {
        let stay = self
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, lane)| !lane.leaves);
        let (free, lane) = stay.min_by_key(|(_, lane)| lane.in_flight.len())?;
        (lane.in_flight.len() < MAX_BATCHES_PER_CHANNEL).then_some(free)
    }

    /// Few pages are spread over all channels; many go in the largest batches that the limit leaves.
    fn batch_bytes(&self, pages: &Pages) -> u64 {
        let share = pages.send_bytes() / u64::from(self.count().max(1));
        share
            .clamp(MIN_BATCH_BYTES, MAX_BATCH_BYTES)
            .min(self.pacer.batch_bytes())
    }

    /// A batch went. False: it is not one of those under way.
    pub(super) fn pushed(&mut self, channel: ChannelId, batch: u64, pushed: Pushed) -> bool {
        let Some(page_size) = self.land(channel, batch) else {
            return false;
        };
        self.pacer
            .refund(pushed.zero_bytes + pushed.encoded.saved());
        let bytes = pushed.raw_bytes + pushed.encoded.bytes();
        self.round.raw_bytes += bytes;
        self.round.raw_pages += bytes / page_size;
        self.round.encoded = self.round.encoded.and(pushed.encoded);
        self.round.zero_bytes += pushed.zero_bytes;
        self.round.zero_pages += pushed.zero_bytes / page_size;
        true
    }

    /// Takes a batch out of those under way, and returns its page size.
    fn land(&mut self, channel: ChannelId, batch: u64) -> Option<u64> {
        let lane = self.lanes.iter_mut().find(|lane| lane.channel == channel)?;
        let in_flight = &mut lane.in_flight;
        let at = in_flight.iter().position(|it| it.id == batch)?;
        let page_size = in_flight.remove(at).page_size;
        self.forget_left();
        Some(page_size)
    }

    /// Whether nothing is under way.
    pub(super) fn idle(&self) -> bool {
        self.lanes.iter().all(|lane| lane.in_flight.is_empty())
    }

    /// When the next batch may go, if only the bandwidth limit holds it back.
    pub(super) fn next(&self, pages: &Pages) -> Option<Time> {
        self.free_lane()?;
        if pages.nothing_to_send() {
            None
        } else {
            self.pacer.next()
        }
    }
}

fn bytes(runs: &[Run], spec: &BlockSpec) -> u64 {
    runs.iter().map(|run| run.pages * spec.page_size).sum()
}
