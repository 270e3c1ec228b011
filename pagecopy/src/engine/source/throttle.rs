//! For how much of its time the guest is kept from writing, so that the rounds of pre-copy can follow it.
//!
//! What matters of a round is how much of what it has sent is dirty again when it is over: the guest's dirty rate over the
//! goodput. Where that is more than three quarters twice in a row, pre-copy has fallen behind. From then on the share of its
//! time in which the guest may write is multiplied after each round by what would have left one half,
//!
//! ```text
//! share := share · 0.5 / (dirty rate / goodput)       at most a quarter more, at least a quarter of it
//! ```
//!
//! so each round is half as long as the one before, and the guest is slowed no more than that takes. It is a product and no
//! step, because a guest with time to spare, or with a working set that it goes through several times in a round, is not slower for
//! losing some of its time: the share shrinks until it bites, and grows again when it bites too much.
//!
//! Rounds that are much shorter than the downtime may be say nothing: pages that are written all the time are dirty again at once.

/// What a round may leave dirty of what it sends, over that: from there on pre-copy falls behind.
const BEHIND: f64 = 0.75;
/// Rounds in a row that must fall behind before the guest is slowed.
const PATIENCE: u32 = 2;
/// What a round shall leave.
const AIM: f64 = 0.5;
/// From one round to the next the share becomes no smaller than this part of it…
const STEEPEST: f64 = 0.25;
/// …and no larger than this.
const EASIEST: f64 = 1.25;
/// The guest always keeps this share of its time…
const LEAST: f64 = 0.01;
/// …and is let go of when it would have more than this.
const NEARLY_ALL: f64 = 0.95;

/// The share of its time that the guest keeps.
#[derive(Debug)]
pub(super) struct Throttle {
    wanted: bool,
    share: f64,
    behind: u32,
}

impl Throttle {
    pub(super) fn new(wanted: bool) -> Throttle {
        Throttle {
            wanted,
            share: 1.0,
            behind: 0,
        }
    }

    /// A round that says something is over; `left` is what is dirty again of what was sent, over that.
    pub(super) fn round(&mut self, left: f64) {
        if !self.wanted {
            return;
        }
        if self.percent() == 0 {
            self.behind = if left > BEHIND { self.behind + 1 } else { 0 };
            if self.behind < PATIENCE {
                return;
            }
        }
        let change = (AIM / left.max(f64::MIN_POSITIVE)).clamp(STEEPEST, EASIEST);
        self.share = (self.share * change).max(LEAST);
        if self.share > NEARLY_ALL {
            *self = Throttle::new(true);
        }
    }

    /// Percent of its time for which the guest is kept from writing: 0, or 5 to 99.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 99"
    )]
    pub(super) fn percent(&self) -> u32 {
        ((1.0 - self.share) * 100.0).round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that could write `could` and wants to write `wants`, over what arrives; what each of `rounds` rounds left.
    fn rounds(throttle: &mut Throttle, could: f64, wants: f64, rounds: u32) -> Vec<f64> {
        let round = |_| {
            let kept = f64::from(100 - throttle.percent()) / 100.0;
            let left = wants.min(could * kept);
            throttle.round(left);
            left
        };
        (0..rounds).map(round).collect()
    }

    #[test]
    fn a_guest_that_converges_is_left_alone() {
        let mut throttle = Throttle::new(true);
        assert_eq!(rounds(&mut throttle, 8.0, 0.74, 50).last(), Some(&0.74));
        assert_eq!(throttle.percent(), 0);
        // Once is no trend.
        for left in [3.0, 0.1, 3.0, 0.7, 3.0] {
            throttle.round(left);
            assert_eq!(throttle.percent(), 0, "{left}");
        }
    }

    #[test]
    fn it_is_slowed_to_what_lets_rounds_shrink_by_half_and_no_further() {
        for (could, wants) in [
            (0.8, 0.8),
            (2.0, 2.0),
            (8.0, 8.0),
            (20.0, 20.0),
            (16.0, 1.0),
        ] {
            let mut throttle = Throttle::new(true);
            let left = rounds(&mut throttle, could, wants, 12);
            let settled = &left[9..];
            assert!(
                settled.iter().all(|left| (0.39..0.61).contains(left)),
                "{could} {wants}: {left:?}"
            );
        }
    }

    #[test]
    fn it_keeps_a_hundredth_of_its_time() {
        let mut throttle = Throttle::new(true);
        rounds(&mut throttle, 1000.0, 1000.0, 20);
        assert_eq!(throttle.percent(), 99);
    }

    #[test]
    fn it_is_let_go_of_when_it_writes_less_by_itself() {
        let mut throttle = Throttle::new(true);
        rounds(&mut throttle, 4.0, 4.0, 8);
        let slowed = throttle.percent();
        assert!((80..95).contains(&slowed), "{slowed}");
        let mut percents = vec![slowed];
        for _ in 0..12 {
            throttle.round(0.1);
            percents.push(throttle.percent());
        }
        assert!(percents.is_sorted_by(|a, b| a >= b), "{percents:?}");
        assert_eq!(throttle.percent(), 0);
        // And must fall behind twice again.
        throttle.round(2.0);
        assert_eq!(throttle.percent(), 0);
        throttle.round(2.0);
        assert_eq!(throttle.percent(), 75);
    }

    #[test]
    fn nothing_is_slowed_that_nobody_wants_slowed() {
        let mut throttle = Throttle::new(false);
        rounds(&mut throttle, 1000.0, 1000.0, 20);
        assert_eq!(throttle.percent(), 0);
    }

    #[test]
    fn strange_figures_do_no_harm() {
        let mut throttle = Throttle::new(true);
        for left in [
            f64::INFINITY,
            0.0,
            f64::NAN,
            -1.0,
            f64::INFINITY,
            f64::INFINITY,
        ] {
            throttle.round(left);
            assert!(throttle.percent() <= 99, "{left}");
        }
    }
}
