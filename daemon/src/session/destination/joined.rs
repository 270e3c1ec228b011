//! Data channels that come and go at the destination's session. What has joined is kept for a moment, gives access to nothing, and is
//! taken only if the source asks for it with the right key on the migration's own control channel.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pagecopy::engine::ChannelId;
use pagecopy::engine::channels::Bounds;
use pagecopy::engine::destination::Input;
use pagecopy::wire::Secret;

use super::Session;
use crate::limits::JOIN_LIMIT;
use crate::log;
use crate::nic::cores;
use crate::session::Joining;
use crate::session::joining::Kept;

/// Channels that may join.
pub(super) struct Waiting {
    since: Instant,
    kept: Kept,
}

impl Session {
    /// The source has made channels. One `Join` at a time: it comes again only if it has given up the one before.
    pub(super) fn join(&mut self, joining: Joining) {
        let most = usize::from(Bounds::of(0, cores()).most);
        let there = self.data.len();
        let receives = self.memory.is_some() && !self.fetch.armed && there > 0;
        if !receives {
            return joining.refuse("this host receives no pages at this moment".to_owned());
        }
        if joining.channels() == 0 || there + joining.channels() > most {
            let all = there + joining.channels();
            return joining.refuse(format!(
                "this host takes {most} data channels, by its cores, and not {all}"
            ));
        }
        self.waiting = Some(Waiting {
            since: Instant::now(),
            kept: joining.keep(),
        });
    }

    /// Nobody has asked for them in time.
    pub(super) fn forget_old(&mut self) {
        self.waiting
            .take_if(|waiting| waiting.since.elapsed() > JOIN_LIMIT);
    }

    /// The source asks for them: from now on what comes on them is placed.
    pub(super) fn take_channels(&mut self, first: u16, channels: u16, key: Secret, round: u32) {
        let refused = self.start_joined(first, channels, key, round).err();
        self.answer(Input::ChannelsTaken { first, refused });
    }

    fn start_joined(
        &mut self,
        first: u16,
        channels: u16,
        key: Secret,
        round: u32,
    ) -> Result<(), String> {
        let are_meant = |waiting: &mut Waiting| {
            let kept = &waiting.kept;
            (kept.first, kept.key, kept.channels.len()) == (first, key, usize::from(channels))
        };
        let Waiting { kept, .. } = self
            .waiting
            .take_if(are_meant)
            .ok_or("they are not there any more")?;
        let memory = self.memory.clone().ok_or("there is no memory for them")?;
        kept.regions.follow(&self.regions);
        let ready = Arc::new(AtomicBool::new(true));
        let had = self.data.len();
        self.start_lanes(kept.channels, first, &memory, &ready, round)
            .map_err(|failure| {
                // Not some of them.
                self.drop_lanes_from(had);
                failure.what
            })
    }

    /// A channel has brought all that it will.
    pub(super) fn left(&mut self, channel: ChannelId) {
        if let Some(at) = self.data.iter().position(|lane| lane.id() == channel) {
            let lane = self.data.remove(at);
            // Joining its thread, which ends at this moment.
            drop(log::spawn_blocking(move || drop(lane)));
        }
    }

    fn drop_lanes_from(&mut self, had: usize) {
        let lanes = self.data.split_off(had.min(self.data.len()));
        drop(log::spawn_blocking(move || drop(lanes)));
    }
}
