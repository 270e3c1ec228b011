//! Whether one more round is worth it although the guest could be switched over within the limit already.
//!
//! The limit says what downtime is tolerable, not what is wanted: a guest that dirties a quarter of what arrives would be
//! stopped for nearly the whole limit, where a few short rounds bring that down to the fixed part. Such rounds are few,
//! short, and end as soon as one of them does not help.

use std::time::Duration;

/// At most so many rounds are added.
const MOST_ROUNDS: u32 = 4;
/// None is added that would take longer than this.
const LONGEST_ROUND: Duration = Duration::from_secs(1);
/// None is added for less than this, or less than the fixed part of the downtime: nobody would notice.
const NOTICEABLE: Duration = Duration::from_millis(5);
/// A round helps if it leaves at most this share of the bytes before it.
const HELPS: f64 = 0.75;

/// The rounds added so far.
#[derive(Debug, Default)]
pub(super) struct Shortening {
    rounds: u32,
    before: Option<Duration>,
}

impl Shortening {
    /// The prediction is within the limit; `bytes` is the part of it that bytes cause. `dirtied` is the dirty rate over the
    /// goodput. True: send one more round.
    pub(super) fn worth_a_round(&mut self, bytes: Duration, fixed: Duration, dirtied: f64) -> bool {
        let helped = self
            .before
            .replace(bytes)
            .is_none_or(|before| bytes.as_secs_f64() <= before.as_secs_f64() * HELPS);
        let worth = helped
            && dirtied <= HELPS
            && bytes > fixed.max(NOTICEABLE)
            && bytes <= LONGEST_ROUND
            && self.rounds < MOST_ROUNDS;
        self.rounds += u32::from(worth);
        worth
    }

    /// The prediction is above the limit. If it was within it before, no round is added any more: the next chance counts.
    pub(super) fn above_the_limit(&mut self) {
        if self.before.is_some() {
            self.rounds = MOST_ROUNDS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn rounds_are_added_while_they_help() {
        let mut shortening = Shortening::default();
        for bytes in [200, 100, 50] {
            assert!(
                shortening.worth_a_round(bytes * MS, 20 * MS, 0.3),
                "{bytes}"
            );
        }
        assert!(
            !shortening.worth_a_round(45 * MS, 20 * MS, 0.3),
            "the last one did not help"
        );
    }

    #[test]
    fn none_is_added_where_it_cannot_help_much() {
        let worth = |bytes: u32, fixed: u32, dirtied| {
            Shortening::default().worth_a_round(bytes * MS, fixed * MS, dirtied)
        };
        assert!(worth(30, 20, 0.5));
        assert!(!worth(19, 20, 0.5), "the fixed part is larger");
        assert!(!worth(4, 1, 0.5), "nobody would notice");
        assert!(!worth(1001, 20, 0.5), "it would take long");
        assert!(!worth(30, 20, 0.8), "as much would be dirty again");
    }

    #[test]
    fn there_are_few_and_none_after_the_limit_was_passed() {
        let mut shortening = Shortening::default();
        let added = (0..10)
            .filter(|n| shortening.worth_a_round(1000 * MS / 2u32.pow(*n), MS, 0.1))
            .count();
        assert_eq!(added, 4);
        let mut shortening = Shortening::default();
        shortening.above_the_limit();
        assert!(shortening.worth_a_round(200 * MS, MS, 0.1));
        shortening.above_the_limit();
        assert!(!shortening.worth_a_round(100 * MS, MS, 0.1));
    }
}
