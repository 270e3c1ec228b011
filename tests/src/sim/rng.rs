//! The only source of chance in a simulated run: one seed, split into streams that do not disturb each other.

use std::time::Duration;

/// A stream of pseudo-random numbers (SplitMix64). The same seed gives the same stream on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of `seed`.
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(mix(seed ^ 0x7061_6765_636f_7079))
    }

    /// A stream of its own for one purpose. The parent's stream is not advanced, so that a purpose added later does not
    /// change what the others draw.
    #[must_use]
    pub(super) fn stream(&self, purpose: &str) -> Rng {
        Rng(purpose
            .bytes()
            .fold(self.0, |state, byte| mix(state ^ u64::from(byte))))
    }

    /// 64 random bits.
    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from 0 to `bound` - 1; 0 when `bound` is 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product is uniform enough for a simulation and needs no division.
        u64::try_from((u128::from(self.bits()) * u128::from(bound)) >> 64).unwrap_or(0)
    }

    /// A number from `low` to `high`, both included.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// An index into something of `len` elements.
    pub(super) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True `per_mille` times in a thousand.
    pub(super) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// One of `choices`.
    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// A number from `low` to `high` in which small ones are as likely as large ones: its logarithm is uniform.
    pub(super) fn spread(&mut self, low: u64, high: u64) -> u64 {
        let (low, high) = (low.max(1), high.max(1));
        let octaves = u64::from((high / low).max(1).ilog2()) + 1;
        let shift = self.below(octaves);
        let start = low << shift;
        self.between(start, (start * 2 - 1).min(high).max(start))
            .min(high)
    }

    /// A length of time from `low` to `high` microseconds, by [`spread`](Rng::spread).
    pub(super) fn micros(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_nanos(self.spread(low * 1000, high * 1000))
    }

    /// Brings `items` into a random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.index(last + 1);
            items.swap(last, other);
        }
    }
}

/// SplitMix64's finaliser.
pub(super) fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn streams_repeat_and_differ() {
        let draw = |seed: u64, purpose: &str| Rng::new(seed).stream(purpose).bits();
        assert_eq!(draw(1, "guest"), draw(1, "guest"));
        assert_ne!(draw(1, "guest"), draw(2, "guest"));
        assert_ne!(draw(1, "guest"), draw(1, "disk"));
    }

    #[test]
    fn numbers_stay_in_their_range() {
        let mut rng = Rng::new(3);
        for _ in 0..10_000 {
            assert!(rng.below(7) < 7);
            assert!((5..=9).contains(&rng.between(5, 9)));
            assert!((10..=1000).contains(&rng.spread(10, 1000)));
        }
        assert_eq!(rng.below(0), 0);
    }
}
