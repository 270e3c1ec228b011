//! Data channels that come and go in the rounds of pre-copy: makes samples of what the driver measures, and sees to what the
//! [policy](crate::engine::channels) decides of them.
//!
//! A channel comes in two steps. The driver opens it and the destination keeps it; then `AddChannels` asks for it to count. The destination
//! makes it part of the round that is under way before it answers, so it owes a barrier of that round, and a barrier of this side that has
//! left the other channels meanwhile goes over it, too. One that goes says `Leave` behind its last batch, in a round whose barriers have not
//! been sent. Neither is ever waited for: what does not come is a decision for the journal of events, and no more.

use std::time::Duration;

use super::core::Core;
use super::interface::{Load, Output};
use crate::engine::channels::{Bounds, Decision, Policy, Sample};
use crate::engine::end::End;
use crate::engine::event::{Report, State};
use crate::engine::{ChannelId, Time};
use crate::wire::{Message, Secret};

/// The data channels, as far as their number is open.
#[derive(Debug)]
pub(super) struct Growth {
    /// None: it is fixed.
    policy: Option<Policy>,
    /// The number that the next channel gets.
    next: u16,
    coming: Option<Coming>,
    /// What was measured last, and in which round.
    before: Option<(Time, u32, Load)>,
}

/// Channels that do not carry pages yet.
#[derive(Debug)]
struct Coming {
    first: u16,
    channels: u16,
    /// `AddChannels` was sent.
    asked: bool,
    /// Why they are wanted.
    words: String,
}

impl Growth {
    pub(super) fn new(channels: u16, bounds: Option<Bounds>, now: Time) -> Growth {
        Growth {
            policy: bounds.map(|bounds| Policy::new(bounds, channels, now)),
            next: channels.saturating_add(1),
            coming: None,
            before: None,
        }
    }

    /// The number of channels stays as it is.
    pub(super) fn stop(&mut self) {
        self.policy = None;
    }

    /// Whether their number is open.
    pub(super) fn is_on(&self) -> bool {
        self.policy.is_some()
    }

    /// What is measured next does not go on from what was measured last.
    pub(super) fn interrupt(&mut self) {
        self.before = None;
    }

    /// What the channels that `count` have done since they were measured last, in the same round.
    fn sample(
        &mut self,
        now: Time,
        round: u32,
        load: Load,
        count: impl Fn(ChannelId) -> bool,
    ) -> Option<Sample> {
        let (since, of, before) = self.before.replace((now, round, load))?;
        let (_, _, after) = self.before.as_ref()?;
        let took = now.since(since).as_secs_f64();
        if of != round || took <= 0.0 {
            return None;
        }
        let mut sample = Sample {
            rate: 0.0,
            busy: f64::INFINITY,
            held: 0.0,
            cpu: 0.0,
            idle: None,
        };
        let mut channels = 0.0;
        let share = |to: Duration, from| to.saturating_sub(from).as_secs_f64() / took;
        for to in after.channels.iter().filter(|it| count(it.channel)) {
            let from = before.channels.iter().find(|it| it.channel == to.channel);
            let Some(from) = from else { continue };
            channels += 1.0;
            sample.rate += to.sent.saturating_sub(from.sent) as f64 / took;
            sample.busy = sample.busy.min(share(to.busy, from.busy));
            sample.held += share(to.held, from.held);
            sample.cpu += share(to.cpu, from.cpu);
        }
        if channels < 1.0 {
            return None;
        }
        sample.held /= channels;
        sample.cpu /= channels;
        let idle = after.idle.zip(before.idle);
        sample.idle = idle.map(|(to, from)| share(to, from));
        Some(sample)
    }
}

impl Core {
    /// What the channels have done, while pages of `round` are being sent.
    pub(super) fn measured(&mut self, round: u32, load: Load) {
        let sender = &self.sender;
        let counts = |channel| sender.channels().any(|it| it == channel);
        let sample = self.growth.sample(self.now, round, load, counts);
        let (Some(sample), Some(policy)) = (sample, &mut self.growth.policy) else {
            return;
        };
        match policy.sample(self.now, sample) {
            None => {}
            Some(Decision::Keep(words)) => self.decided_on_channels(words),
            Some(Decision::Add(channels, words)) => self.open_channels(channels, words),
            Some(Decision::Drop(channels, words)) => {
                for channel in self.sender.leave(channels) {
                    self.out
                        .push(Output::SendOn(channel, Message::Leave { round }));
                }
                self.decided_on_channels(words);
            }
        }
    }

    fn decided_on_channels(&mut self, decision: String) {
        self.out.push(Output::Report(Report::Channels {
            channels: self.sender.count(),
            decision,
        }));
    }

    fn open_channels(&mut self, channels: u16, words: String) {
        let first = self.growth.next;
        let Some(next) = first.checked_add(channels) else {
            return self.no_channels("their numbers have run out");
        };
        self.growth.next = next;
        self.growth.coming = Some(Coming {
            first,
            channels,
            asked: false,
            words,
        });
        self.out.push(Output::OpenChannels { first, channels });
    }

    /// They are there. Once the guest is to be switched over none is added any more.
    pub(super) fn channels_opened(&mut self, first: u16, key: Secret) {
        let wanted = self.out.state() == State::Migrating && !self.cut;
        let coming = self.growth.coming.as_mut();
        let coming = coming.filter(|it| it.first == first && !it.asked && wanted);
        let Some(coming) = coming else {
            self.growth.coming.take_if(|it| it.first == first);
            return self.out.push(Output::CloseChannels { first });
        };
        coming.asked = true;
        let channels = coming.channels;
        self.send(Message::AddChannels {
            first,
            channels,
            key,
        });
    }

    /// They cannot be had.
    pub(super) fn channels_refused(&mut self, first: u16, reason: &str) {
        let refused = |it: &mut Coming| it.first == first && !it.asked;
        if self.growth.coming.take_if(refused).is_some() {
            self.no_channels(reason);
        }
    }

    /// The destination's answer to `AddChannels`.
    pub(super) fn channels_taken(
        &mut self,
        first: u16,
        taken: bool,
        reason: &str,
    ) -> Result<(), End> {
        let asked = |it: &mut Coming| it.first == first && it.asked;
        let Some(coming) = self.growth.coming.take_if(asked) else {
            return Err(End::protocol(
                "the destination takes channels that it was not asked to take",
            ));
        };
        if !taken {
            self.out.push(Output::CloseChannels { first });
            self.no_channels(reason);
            return Ok(());
        }
        self.out.push(Output::UseChannels { first });
        self.sender.add(first, coming.channels);
        if let Some(policy) = &mut self.growth.policy {
            policy.opened(coming.channels, self.now);
        }
        self.growth.interrupt();
        if let Some(round) = self.closing {
            // Those of the other channels have left.
            let barriers = (first..).take(usize::from(coming.channels));
            self.out.extend(
                barriers.map(|it| Output::SendOn(ChannelId(it), Message::Barrier { round })),
            );
        }
        self.decided_on_channels(coming.words);
        Ok(())
    }

    fn no_channels(&mut self, reason: &str) {
        if let Some(policy) = &mut self.growth.policy {
            policy.refused(self.now);
        }
        self.decided_on_channels(format!("no more of them can be had: {reason}"));
    }
}
