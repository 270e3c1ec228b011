//! What comes in on the destination's channels, as the threads that own them handle it.

use pagecopy::engine::destination::Input;
use pagecopy::engine::{ChannelId, Fault as Blame};
use pagecopy::memory::Run;
use pagecopy::wire::Message;
use transport::Error;
use transport::mem::MemChannel;

use super::super::driver::Driver;
use super::super::env::{DestinationEvent, Env, failure};
use super::super::lane::{Lane, Report, next_report};
use super::super::mistake::Mistake;
use super::super::ram::InOrder;
use super::super::tally::Happened;
use super::{DestinationSide, Question};

impl DestinationSide {
    /// Somebody connects who has no guest to send: a source in doubt, or one that serves.
    pub(in crate::sim) fn accept(&mut self, channels: Vec<MemChannel>) {
        let mut lanes = channels.into_iter().map(Lane::new);
        if let (Some(daemon), Some(control)) = (&mut self.daemon, lanes.next()) {
            let data = lanes.collect();
            daemon.questions.push(Question { control, data });
        }
    }

    /// Takes all that the channels report now, from a different channel first each time.
    pub(in crate::sim) fn poll(&mut self, env: &mut Env) {
        while let Some((channel, report)) = self.next_report(env) {
            match report {
                Err(error) => self.channel_lost(env, channel, &error),
                Ok(Report::BatchSent(_)) => {}
                Ok(Report::Fetched(request)) => self.fetched(env, request),
                Ok(Report::Message(bytes)) => match Message::decode(&bytes) {
                    Ok(message) if channel == 0 => self.input(env, Input::Message(message)),
                    Ok(message) => self.data_message(env, channel, message),
                    Err(error) => env
                        .checker
                        .violate(format!("the destination cannot read a message: {error}")),
                },
            }
        }
        for (channel, round) in std::mem::take(&mut env.early_barriers) {
            self.barrier(env, channel, round);
        }
        self.poll_questions(env);
    }

    fn barrier(&mut self, env: &mut Env, channel: ChannelId, round: u32) {
        env.checker.look_at_versions();
        let index = usize::from(channel.0).wrapping_sub(1);
        let lane = self
            .daemon
            .as_mut()
            .and_then(|daemon| daemon.data.get_mut(index));
        let zero_bytes = lane.map_or(0, |data| {
            if let Some(decoder) = &mut data.decoder {
                decoder.barrier(round);
            }
            std::mem::take(&mut data.zero_bytes)
        });
        self.note_order(env, channel, round);
        self.input(
            env,
            Input::Barrier {
                channel,
                round,
                zero_bytes,
            },
        );
    }

    /// Barriers leave in the order of the channels: whether this one shows that they may arrive in another.
    fn note_order(&mut self, env: &mut Env, channel: ChannelId, round: u32) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        let last = daemon.last_barrier.replace((round, channel));
        if last.is_some_and(|(of, last)| of == round && last > channel) {
            env.tally.note(Happened::ChannelsOvertook);
        }
    }

    fn next_report(&mut self, env: &mut Env) -> Option<(usize, Result<Report, Error>)> {
        let daemon = self.daemon.as_mut()?;
        let data = daemon.data.iter_mut().map(|data| &mut data.lane);
        next_report(&mut env.rng, &mut daemon.control, data)
    }

    fn channel_lost(&mut self, env: &mut Env, channel: usize, error: &Error) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        daemon.data.clear();
        if channel > 0 && daemon.closed && matches!(error, Error::Closed) {
            return;
        }
        daemon.control = None;
        self.input(
            env,
            Input::LinkLost(failure(Blame::Network, &error.to_string())),
        );
    }

    fn data_message(&mut self, env: &mut Env, channel: usize, message: Message) {
        match message {
            Message::Zero(runs) => {
                let bytes: u64 = runs.iter().map(|run| self.bytes(env, run)).sum();
                if env.errs(Mistake::LateZero) {
                    let delay = env.delay(20_000);
                    self.event_after(env, delay, DestinationEvent::LateZero(runs));
                } else {
                    self.place_zeroes(env, &runs);
                }
                let lane = self
                    .daemon
                    .as_mut()
                    .and_then(|daemon| daemon.data.get_mut(channel - 1));
                if let Some(data) = lane {
                    data.zero_bytes += bytes;
                }
            }
            message @ (Message::Copied { .. } | Message::Deltas { .. }) => {
                let placer = InOrder {
                    ram: &self.ram,
                    order: &env.plan.order,
                };
                let decoder = self
                    .daemon
                    .as_mut()
                    .and_then(|daemon| daemon.data.get_mut(channel - 1)?.decoder.as_mut());
                if let Some(Err(error)) = decoder.map(|decoder| decoder.take(&message, &placer)) {
                    env.checker
                        .violate(format!("encoded pages are refused: {error}"));
                }
            }
            Message::Barrier { round } => {
                let channel = ChannelId(u16::try_from(channel).unwrap_or(u16::MAX));
                self.barrier(env, channel, round);
            }
            other => env
                .checker
                .violate(format!("{} came on a data channel", other.name())),
        }
    }

    fn bytes(&self, env: &Env, run: &Run) -> u64 {
        run.pages
            * env
                .plan
                .blocks
                .get(usize::from(run.block.0))
                .map_or(0, |spec| spec.page_size)
    }
}
