//! Counts the barriers of a round: it is over when every data channel has brought one.

use crate::engine::ChannelId;

/// The barriers of all data channels.
#[derive(Debug)]
pub(super) struct Barriers {
    /// The round that is under way.
    round: u32,
    /// Per data channel: whether its barrier of this round has come.
    here: Vec<bool>,
}

impl Barriers {
    pub(super) fn new(channels: u16) -> Barriers {
        Barriers {
            round: 0,
            here: vec![false; usize::from(channels)],
        }
    }

    /// The round that is under way; all before it are in place.
    pub(super) fn round(&self) -> u32 {
        self.round
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
        let lane = usize::from(channel.0)
            .checked_sub(1)
            .and_then(|lane| self.here.get_mut(lane));
        let Some(here) = lane else {
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
        *here = true;
        if !self.here.iter().all(|here| *here) {
            return Ok(None);
        }
        self.here.fill(false);
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
}
