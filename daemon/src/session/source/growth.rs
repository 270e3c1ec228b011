//! Data channels that come and go at the source's session: what they do is measured, more of them are dialled where the engine wants them,
//! and one that has said `Leave` is closed in order.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::source::{ChannelLoad, Input, Load};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId};
use pagecopy::wire::{Message, Secret};
use transport::{Address, Channel, Error, Regions};

use super::{Incoming, Session};
use crate::dial::{Target, dial, fresh_secret};
use crate::failure::host;
use crate::lane::Lane;
use crate::lane::source::{Command, SourceData};
use crate::log;
use crate::session::link_failure;
use crate::session::telling::ask_on;

/// How long the destination may take to say whether it keeps them.
const PATIENCE: Duration = Duration::from_secs(5);

/// Channels that the destination keeps, and what it knows them by.
pub(super) type Joined = (Vec<Box<dyn Channel>>, Secret);

/// Data channels that do not carry pages yet. The end of one is nobody's failure until it shall.
#[derive(Default)]
pub(super) struct Coming {
    lanes: Vec<Lane<Command>>,
    ended: Option<Error>,
}

impl Coming {
    /// Takes those with the numbers from `first` on.
    pub(super) fn take(&mut self, first: u16) -> Vec<Lane<Command>> {
        self.ended = None;
        self.lanes
            .extract_if(.., |lane| lane.id().0 >= first)
            .collect()
    }

    /// Those are not wanted. Joining their threads may block for a moment.
    pub(super) fn close(&mut self, first: u16) {
        let lanes = self.take(first);
        if !lanes.is_empty() {
            drop(log::spawn_blocking(move || drop(lanes)));
        }
    }

    /// A channel has ended, perhaps one of these.
    fn lost(&mut self, channel: ChannelId, error: Error) {
        if self.lanes.iter().any(|lane| lane.id() == channel) {
            self.ended = Some(error);
        }
    }
}

impl Session {
    /// Of a connection that was just made.
    pub(super) fn start_data(
        &mut self,
        channels: impl IntoIterator<Item = Box<dyn Channel>>,
    ) -> Result<(), Failure> {
        let lanes = self.lanes(channels, 1)?;
        self.data.extend(lanes);
        Ok(())
    }

    /// Lanes of data channels with the numbers from `first` on.
    fn lanes(
        &mut self,
        channels: impl IntoIterator<Item = Box<dyn Channel>>,
        first: u16,
    ) -> Result<Vec<Lane<Command>>, Failure> {
        let mut lanes = Vec::new();
        let (Some(served), Some((ram, _))) = (&self.served, self.ram.clone()) else {
            return Ok(lanes);
        };
        let specs = Arc::clone(&served.specs);
        for (channel, number) in channels.into_iter().zip(first..) {
            let id = ChannelId(number);
            let handler = SourceData::new(
                id,
                Arc::clone(&specs),
                Arc::clone(&ram),
                self.encoding.clone(),
                Arc::clone(&self.share),
            );
            let lane = Lane::start("data", id, channel, handler, (), self.tell())?;
            self.teller.add_data(&lane);
            lanes.push(lane);
        }
        Ok(lanes)
    }

    /// What the data channels have done.
    pub(super) fn measure(&self) -> Input {
        let load = |lane: &Lane<Command>| {
            let moved = lane.moved();
            let (busy, held) = moved.busy_and_held();
            ChannelLoad {
                channel: lane.id(),
                sent: moved.sent(),
                busy,
                held,
                cpu: moved.cpu(),
            }
        };
        Input::Measured(Load {
            channels: self.data.iter().map(load).collect(),
            idle: idle_time(),
        })
    }

    /// Dials for more, beside everything else.
    pub(super) fn open_channels(&self, first: u16, channels: u16) {
        let mut target = self.target.clone();
        // The number is fixed where pages go over RDMA.
        target.rdma = None;
        let (regions, sender) = (self.regions.clone(), self.sender.clone());
        let (connection, id) = (self.connection, self.id);
        log::spawn(async move {
            let joined = join(&target, &regions, id, first, channels).await;
            // A session that has ended needs none.
            let _ = sender.send(Incoming::Joined(connection, first, joined));
        });
    }

    /// They are there, or not.
    pub(super) fn joined(
        &mut self,
        in_time: bool,
        first: u16,
        joined: Result<Joined, Failure>,
    ) -> Input {
        let lanes = match joined {
            Ok((channels, key)) if in_time => self.lanes(channels, first).map(|it| (it, key)),
            Ok(_) => Err(host("the connection that they were for is gone", "")),
            Err(failure) => Err(failure),
        };
        match lanes {
            Ok((lanes, key)) => {
                self.coming.lanes.extend(lanes);
                Input::ChannelsOpened { first, key }
            }
            Err(failure) => Input::ChannelsRefused {
                first,
                reason: failure.what,
            },
        }
    }

    /// From now on they are as the others: one that has ended meanwhile is a cut.
    pub(super) fn use_channels(&mut self, first: u16) {
        if let Some(error) = self.coming.ended.take() {
            self.broken.set(&error);
        }
        let lanes = self.coming.take(first);
        self.data.extend(lanes);
    }

    /// A channel has ended. One that was let go of is nobody's any more.
    pub(super) fn lost(&mut self, channel: ChannelId, error: Error) {
        if self.data.iter().any(|lane| lane.id() == channel) {
            self.broken.set(&error);
        } else {
            self.coming.lost(channel, error);
        }
    }

    /// All that was given to the channel has left, `Leave` last: its thread waits for the peer to close, by itself.
    pub(super) fn left(&mut self, channel: ChannelId) {
        let left = self.data.extract_if(.., |lane| lane.id() == channel);
        for lane in left.collect::<Vec<_>>() {
            lane.close();
        }
    }
}

/// Makes a connection whose data channels the destination keeps for the migration.
async fn join(
    target: &Target,
    regions: &Regions,
    id: MigrationId,
    first: u16,
    channels: u16,
) -> Result<Joined, Failure> {
    let with_control = move |_: &Address| channels.saturating_add(1);
    let dialled = dial(target, with_control, regions).await?;
    let mut made = dialled.channels.into_iter();
    let control = made
        .next()
        .ok_or_else(|| link_failure(&Error::Misuse("no channel was made".to_owned())))?;
    let key = Secret(fresh_secret());
    match ask_on(control, Message::Join { id, first, key }, PATIENCE).await? {
        Message::ChannelsTaken {
            first: of,
            taken: true,
            ..
        } if of == first => Ok((made.collect(), key)),
        Message::ChannelsTaken { reason, .. } | Message::Abort { reason, .. } => {
            Err(Failure::new(Fault::PeerHost, reason, ""))
        }
        other => Err(Failure::new(
            Fault::PeerHost,
            format!("the destination answers Join with {}", other.name()),
            "",
        )),
    }
}

/// How long the processors of this host have had nothing to do in all, since it was started.
fn idle_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    idle_in(&text, rustix::param::clock_ticks_per_second())
}

/// The same, of what the kernel says: user, nice, system, idle, iowait, and more, in ticks.
fn idle_in(text: &str, ticks_a_second: u64) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let mut figures = line
        .split_whitespace()
        .map(|figure| figure.parse::<u64>().ok());
    let (idle, waiting) = (figures.nth(3)??, figures.next()??);
    let ticks = idle.saturating_add(waiting);
    Some(Duration::from_secs_f64(
        ticks as f64 / ticks_a_second.max(1) as f64,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_long_processors_were_idle() {
        let text = "cpu  10 20 30 400 50 6 7 0 0 0\ncpu0 5 10 15 200 25 3 3 0 0 0\n";
        assert_eq!(idle_in(text, 100), Some(Duration::from_millis(4500)));
        assert_eq!(idle_in("cpu  10 20", 100), None);
        assert_eq!(idle_in("intr 1", 100), None);
        assert!(idle_time().is_some_and(|idle| idle > Duration::ZERO));
    }
}
