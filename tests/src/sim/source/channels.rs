//! What comes in on the source's channels.

use pagecopy::engine::ChannelId;
use pagecopy::engine::Fault as Blame;
use pagecopy::engine::source::Input;
use pagecopy::wire::{AbortCode, Message};
use transport::Error;

use super::super::driver::Driver;
use super::super::env::{Env, failure};
use super::super::lane::{Report, next_report};
use super::{DataLane, SourceSide};

impl SourceSide {
    /// Takes all that the channels report now, from a different channel first each time.
    pub(in crate::sim) fn poll(&mut self, env: &mut Env) {
        while let Some((channel, report)) = self.next_report(env) {
            match report {
                Err(error) => self.link_lost(env, &error),
                Ok(Report::BatchSent(batch)) => self.batch_sent(env, batch),
                Ok(Report::Fetched(_)) => env.checker.violate("the source has read".into()),
                Ok(Report::Message(bytes)) if channel == 0 => match Message::decode(&bytes) {
                    Ok(message) => {
                        // Both come about once a second.
                        if matches!(message, Message::Lacks { .. }) {
                            let bytes = self.sent();
                            self.input(env, Input::Read { bytes });
                        }
                        self.input(env, self.input_of(message));
                    }
                    Err(error) => env
                        .checker
                        .violate(format!("the source cannot read a message: {error}")),
                },
                Ok(Report::Message(_)) => env
                    .checker
                    .violate("the source got a message on a data channel".into()),
            }
        }
    }

    /// What the engine is told of a message.
    fn input_of(&self, message: Message) -> Input {
        match message {
            Message::Abort {
                code: AbortCode::Qemu,
                reason,
            } if self.said_lost => Input::GuestEnded { reason },
            message => Input::Message(message),
        }
    }

    /// What has gone out on this connection's data channels.
    fn sent(&self) -> u64 {
        let data = self.daemon.iter().flat_map(|daemon| &daemon.data);
        data.map(|data| data.lane.sent()).sum()
    }

    fn next_report(&mut self, env: &mut Env) -> Option<(usize, Result<Report, Error>)> {
        let daemon = self.daemon.as_mut()?;
        let data = daemon.data.iter_mut().map(|data| &mut data.lane);
        next_report(&mut env.rng, &mut daemon.control, data)
    }

    fn link_lost(&mut self, env: &mut Env, error: &Error) {
        if let Some(daemon) = &mut self.daemon {
            daemon.control = None;
            daemon.data.clear();
            daemon.batches.clear();
        }
        env.checker.pushes_lost();
        self.input(
            env,
            Input::LinkLost(failure(Blame::Network, &error.to_string())),
        );
    }

    pub(super) fn data_lane(&mut self, channel: ChannelId) -> Option<&mut DataLane> {
        let index = usize::from(channel.0).checked_sub(1)?;
        self.daemon.as_mut()?.data.get_mut(index)
    }
}
