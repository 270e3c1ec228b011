//! Data channels that come and go in the pair's world: what is measured of them is chance, so that trials begin and end in every way, and
//! so is how long they take to come, and on which of them what is sent first comes first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pagecopy::engine::channels::Bounds;
use pagecopy::engine::source::{ChannelLoad, Load};
use pagecopy::engine::{ChannelId, Time, destination, source};
use pagecopy::wire::Secret;

use super::{Event, LATENCY, Pair};

/// The channels of before any came.
const FIRST: u16 = 2;
/// The driver looks so often.
const EVERY: Duration = Duration::from_millis(100);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Channels {
    chance: u64,
    /// Opened at the source, by the number of the first, with what they are known by.
    opened: BTreeMap<u16, (u16, Secret)>,
    /// What the source's driver has of them; no more than that is used.
    used: BTreeSet<ChannelId>,
    /// What the destination's driver reads.
    taken: BTreeSet<ChannelId>,
    /// How much later than its own network what goes over a channel is.
    late: BTreeMap<ChannelId, Duration>,
    load: Load,
    /// Channels that have joined, and left.
    pub joined: u32,
    pub left: u32,
    pub refused: u32,
}

impl Channels {
    fn random(&mut self, below: u64) -> u64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance >> 20) % below
    }

    pub(super) fn used(&mut self, first: u16) {
        let (channels, _) = self.opened.remove(&first).unwrap();
        self.used
            .extend((first..).take(usize::from(channels)).map(ChannelId));
        self.joined += u32::from(channels);
    }

    pub(super) fn closed(&mut self, first: u16) {
        self.opened.remove(&first);
    }

    pub(super) fn check_used(&self, channel: ChannelId) {
        assert!(
            channel.0 <= FIRST || self.used.contains(&channel),
            "{channel:?} is used before it is there: {self:?}"
        );
    }

    /// Something comes on that channel.
    pub(super) fn carry(&self, channel: ChannelId) {
        assert!(
            channel.0 <= FIRST || self.taken.contains(&channel),
            "pages come on {channel:?}, which nobody reads: {self:?}"
        );
    }

    /// What the destination's driver makes of `TakeChannels`: why not.
    pub(super) fn take(&mut self, first: u16, channels: u16, key: Secret) -> Option<String> {
        assert_eq!(self.opened.get(&first), Some(&(channels, key)));
        if self.random(6) == 0 {
            self.refused += 1;
            return Some("no core is left".to_owned());
        }
        self.taken
            .extend((first..).take(usize::from(channels)).map(ChannelId));
        None
    }
}

impl Pair {
    /// The number of channels is open from now on.
    pub fn growing(chance: u64, pages: usize, change: impl FnOnce(&mut source::Setup)) -> Pair {
        let mut pair = Pair::new(pages, |setup| {
            setup.options.channels = Some(Bounds { least: 1, most: 6 });
            change(setup);
        });
        pair.channels.chance = chance.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        pair.after(EVERY, Event::Measure);
        pair
    }

    pub(super) fn measure(&mut self) {
        if self.source.as_ref().is_some_and(source::Source::measures) {
            let numbers: Vec<ChannelId> = (1..=FIRST)
                .map(ChannelId)
                .chain(self.channels.used.iter().copied())
                .collect();
            let tenth =
                |of: &mut Channels, most: u64| EVERY * u32::try_from(of.random(most)).unwrap() / 10;
            // Now and then all wait for the limit.
            let held = self.channels.random(4) == 0;
            for channel in numbers {
                let known = self.channels.load.channels.iter();
                let found = known.clone().position(|it| it.channel == channel);
                let mut load = found.map_or(
                    ChannelLoad {
                        channel,
                        sent: 0,
                        busy: Duration::ZERO,
                        held: Duration::ZERO,
                        cpu: Duration::ZERO,
                    },
                    |at| self.channels.load.channels.remove(at),
                );
                load.sent += self.channels.random(2_000_000);
                load.busy += EVERY;
                load.held += if held { EVERY * 7 / 10 } else { Duration::ZERO };
                load.cpu += tenth(&mut self.channels, 8);
                self.channels.load.channels.push(load);
            }
            let load = self.channels.load.clone();
            self.tell_source(source::Input::Measured(load));
        }
        if !self.ended() {
            self.after(EVERY, Event::Measure);
        }
    }

    /// When what has left a channel at that time is there.
    pub(super) fn arrival(&mut self, channel: ChannelId, left: Time) -> Time {
        let late = match self.channels.late.get(&channel) {
            Some(late) => *late,
            // Not in a world without chance.
            None if self.channels.chance == 0 => Duration::ZERO,
            None => {
                let late = Duration::from_micros(self.channels.random(20_000));
                self.channels.late.insert(channel, late);
                late
            }
        };
        left.after(LATENCY).after(late)
    }

    pub(super) fn open_channels(&mut self, first: u16, channels: u16) {
        let delay = Duration::from_micros(self.channels.random(400_000));
        let key = Secret([u8::try_from(first % 251).unwrap(); 32]);
        let answer = if self.channels.random(8) == 0 || !self.link {
            self.channels.refused += 1;
            source::Input::ChannelsRefused {
                first,
                reason: "no route".to_owned(),
            }
        } else {
            self.channels.opened.insert(first, (channels, key));
            source::Input::ChannelsOpened { first, key }
        };
        self.after(delay, Event::ToSource(answer));
    }

    pub(super) fn leave(&mut self, channel: ChannelId, round: u32) {
        let at = self.lane(channel);
        let at = self.arrival(channel, at);
        self.channels.left += 1;
        if self.link {
            let left = destination::Input::Left { channel, round };
            self.at(at, Event::ToDestination(left));
        }
    }
}
