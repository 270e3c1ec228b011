//! Counts the barriers of a round: it is over when every data channel has brought one.
//!
//! A channel that joins belongs to the round under way, which is not over before it has brought its barrier, too. One that leaves has
//! brought the last: for the round under way, and for all that follow.

use crate::engine::ChannelId;
use crate::limits::MAX_DATA_CHANNELS;

/// The barriers of all data channels.
#[derive(Debug)]
pub(super) struct Barriers {
    /// The round that is under way.
    round: u32,
    /// Per data channel: whether its barrier of this round has come.
    here: Vec<(ChannelId, bool)>,
    /// The highest number that a channel has had.
    last: u16,
}

impl Barriers {
    pub(super) fn new(channels: u16) -> Barriers {
        Barriers {
            round: 0,
            here: (1..=channels)
                .map(|number| (ChannelId(number), false))
                .collect(),
            last: channels,
        }
    }

    /// The round that is under way; all before it are in place.
    pub(super) fn round(&self) -> u32 {
        self.round
    }

    /// How many channels there are.
    pub(super) fn channels(&self) -> u16 {
        u16::try_from(self.here.len()).unwrap_or(u16::MAX)
    }

    /// A barrier came. Returns the round if it is over now.
    ///
    /// # Errors
    /// In words: it is not the barrier that must come on that channel.
    pub(super) fn arrived(
        &mut self,
        channel: ChannelId,
        round: u32,
    ) -> Result<Option<u32>, String> {
        let here = self.due(channel, round)?;
        *here = true;
        self.over()
    }

    /// So many channels more, with the numbers from `first` on.
    ///
    /// # Errors
    /// In words: there cannot be such channels.
    pub(super) fn add(&mut self, first: u16, channels: u16) -> Result<(), String> {
        let last = channels
            .checked_sub(1)
            .and_then(|more| first.checked_add(more));
        let fits = channels <= MAX_DATA_CHANNELS.saturating_sub(self.channels());
        let Some(last) = last.filter(|_| fits && first > self.last) else {
            return Err(format!(
                "{channels} channels from number {first} on cannot join {}, of which {} is the last",
                self.channels(),
                self.last
            ));
        };
        self.last = last;
        let joined = (first..=last).map(|number| (ChannelId(number), false));
        self.here.extend(joined);
        Ok(())
    }

    /// The channels with the numbers from `first` on do not come after all. Returns the round if it is over now.
    ///
    /// # Errors
    /// In words: there are too many rounds.
    pub(super) fn remove(&mut self, first: u16) -> Result<Option<u32>, String> {
        self.here.retain(|(channel, _)| channel.0 < first);
        self.over()
    }

    /// A channel brings nothing more. Returns the round if it is over now.
    ///
    /// # Errors
    /// In words: it may not leave now.
    pub(super) fn left(&mut self, channel: ChannelId, round: u32) -> Result<Option<u32>, String> {
        self.due(channel, round)?;
        if self.here.len() < 2 {
            return Err("the last channel left".to_owned());
        }
        self.here.retain(|(here, _)| *here != channel);
        self.over()
    }

    /// Whether the channel's barrier has come: it has not, and `round` is what it must be for.
    fn due(&mut self, channel: ChannelId, round: u32) -> Result<&mut bool, String> {
        let lane = self.here.iter_mut().find(|(here, _)| *here == channel);
        let Some((_, here)) = lane else {
            return Err(format!(
                "a barrier came on channel {}, which carries no pages",
                channel.0
            ));
        };
        if round != self.round || *here {
            let (due, next) = (
                self.round,
                if *here { " on the other channels" } else { "" },
            );
            return Err(format!(
                "channel {} brought the barrier of round {round}, due is {due}{next}",
                channel.0
            ));
        }
        Ok(here)
    }

    fn over(&mut self) -> Result<Option<u32>, String> {
        if !self.here.iter().all(|(_, here)| *here) {
            return Ok(None);
        }
        for (_, here) in &mut self.here {
            *here = false;
        }
        let round = self.round;
        self.round = round.checked_add(1).ok_or("there are too many rounds")?;
        Ok(Some(round))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_over_when_every_channel_says_so() {
        let mut barriers = Barriers::new(2);
        assert_eq!(barriers.arrived(ChannelId(2), 0), Ok(None));
        assert_eq!(barriers.arrived(ChannelId(1), 0), Ok(Some(0)));
        assert_eq!(barriers.arrived(ChannelId(1), 1), Ok(None));
        assert_eq!(barriers.round(), 1);
    }

    #[test]
    fn a_barrier_out_of_order_is_refused() {
        let mut barriers = Barriers::new(2);
        assert!(
            barriers.arrived(ChannelId(0), 0).is_err(),
            "the control channel"
        );
        assert!(
            barriers.arrived(ChannelId(3), 0).is_err(),
            "no such channel"
        );
        assert!(
            barriers.arrived(ChannelId(1), 1).is_err(),
            "a round that was skipped"
        );
        assert_eq!(barriers.arrived(ChannelId(1), 0), Ok(None));
        assert!(barriers.arrived(ChannelId(1), 0).is_err(), "twice");
        assert!(
            barriers.arrived(ChannelId(1), 1).is_err(),
            "ahead of the others"
        );
    }

    #[test]
    fn one_that_joins_belongs_to_the_round_under_way() {
        let mut barriers = Barriers::new(1);
        assert_eq!(barriers.arrived(ChannelId(1), 0), Ok(Some(0)));
        assert_eq!(barriers.add(2, 2), Ok(()));
        assert_eq!(barriers.channels(), 3);
        assert_eq!(barriers.arrived(ChannelId(1), 1), Ok(None));
        assert_eq!(barriers.arrived(ChannelId(3), 1), Ok(None));
        assert_eq!(barriers.arrived(ChannelId(2), 1), Ok(Some(1)));
        // Some that do not come after all were what the round waited for.
        assert_eq!(barriers.add(4, 1), Ok(()));
        for channel in [1, 2, 3] {
            assert_eq!(barriers.arrived(ChannelId(channel), 2), Ok(None));
        }
        assert_eq!(barriers.remove(4), Ok(Some(2)));
        assert_eq!(barriers.channels(), 3);
    }

    #[test]
    fn one_that_leaves_has_brought_the_last_barrier() {
        let mut barriers = Barriers::new(3);
        assert_eq!(barriers.arrived(ChannelId(1), 0), Ok(None));
        assert!(barriers.left(ChannelId(1), 0).is_err(), "behind a barrier");
        assert!(barriers.left(ChannelId(3), 1).is_err(), "of another round");
        assert_eq!(barriers.left(ChannelId(3), 0), Ok(None));
        assert_eq!(barriers.left(ChannelId(2), 0), Ok(Some(0)));
        assert!(barriers.arrived(ChannelId(2), 1).is_err(), "it has left");
        assert!(barriers.left(ChannelId(1), 1).is_err(), "the last one");
        assert_eq!(barriers.arrived(ChannelId(1), 1), Ok(Some(1)));
    }

    #[test]
    fn numbers_count_on_and_there_are_not_too_many() {
        let mut barriers = Barriers::new(2);
        assert!(barriers.add(2, 1).is_err(), "there is one");
        assert!(barriers.add(3, 0).is_err(), "none");
        assert!(barriers.add(3, MAX_DATA_CHANNELS - 1).is_err(), "too many");
        assert!(barriers.add(u16::MAX, 2).is_err(), "no such number");
        assert_eq!(barriers.add(3, 1), Ok(()));
        assert_eq!(barriers.left(ChannelId(3), 0), Ok(None));
        assert!(barriers.add(3, 1).is_err(), "there has been one");
        assert_eq!(barriers.add(9, MAX_DATA_CHANNELS - 2), Ok(()));
        assert_eq!(barriers.channels(), MAX_DATA_CHANNELS);
        assert!(barriers.add(u16::MAX, 1).is_err(), "full");
    }
}
