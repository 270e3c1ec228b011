//! Which encoding pays now, for one data channel: from the link's rate as the send queue shows it, and each encoder's rate and
//! ratio as measured on what is really sent. No clock: the figures come in.
//!
//! ```text
//! as it is                          1 / link               seconds a byte
//! compressed (foreseen)             1 / encoder + ratio / link
//! compressed (while it is done)     as measured
//! ```
//!
//! While pages go as they are, a sample is compressed now and then, and the less often the further that is from paying. While
//! they go compressed and the link is the limit, the link's rate is what left; a sample at a neighbouring level says whether
//! that would be better. Where the encoder is the limit nobody knows what the link could do: then a window goes as it is, the seldomer
//! the more compressing pays.

use std::time::Duration;

use super::Encodings;

/// zstd's levels to choose from, the fastest first.
const LEVELS: [i32; 4] = [-4, 1, 3, 5];
/// The level to begin with: an index.
const FIRST_LEVEL: usize = 1;
/// A change must promise to be better by so much.
const BETTER: f64 = 0.93;
/// Compressing begins only where a sample is compressed so many times faster than the link takes pages as they are: a sample
/// is quicker than what follows it, since the processors are then shared with the sending.
const FASTER: f64 = 3.0;
/// What a delta costs before it was measured, in bytes a second.
const DELTA_RATE: f64 = 1.5e9;
/// Windows between samples that did not pay: at most so many.
const MAX_PAUSE: u32 = 32;
/// Windows between trials: so many for each time that pages go faster than the link could carry them as they are.
const TRIAL_PAUSE: f64 = 8.0;
/// At most so many times.
const MAX_GAIN: f64 = 16.0;
/// A link that waits less than this share of the time is not the limit.
const LIMITS: f64 = 0.1;
/// How much a new figure counts.
const NEW: f64 = 0.4;

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// Pages go as they are.
    Off,
    /// Compressed, always.
    Zstd,
    /// As deltas where there is a version, as they are elsewhere.
    Delta,
    /// As it pays.
    Auto,
}

impl Compress {
    /// What may be used for it.
    pub fn encodings(self) -> Encodings {
        Encodings {
            zstd: matches!(self, Compress::Zstd | Compress::Auto),
            delta: matches!(self, Compress::Delta | Compress::Auto),
        }
    }
}

/// How the next pages go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Compressed, at this level of zstd.
    pub zstd: Option<i32>,
    /// As deltas where there is a version; what is sent is kept.
    pub delta: bool,
}

/// What was measured over some time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// How long, without the time in which there was nothing to send.
    pub busy: Duration,
    /// Of that: the send queue was full, and the channel had to wait for the link.
    pub waited: Duration,
    /// Of that: pages were being compressed.
    pub compressing: Duration,
    /// Bytes that were compressed in it, and to how many.
    pub compressed: (u64, u64),
    /// Of that: pages were compared with their versions.
    pub comparing: Duration,
    /// Bytes that were compared.
    pub compared: u64,
    /// Bytes of pages.
    pub bytes: u64,
    /// Bytes that left.
    pub sent: u64,
}

/// What is known of one level.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    /// Bytes a second.
    rate: f64,
    /// Bytes out for each one in.
    ratio: f64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Policy {
    compress: Compress,
    allowed: Encodings,
    /// The operator's limit for this channel, in bytes a second.
    cap: Option<f64>,
    link: Option<f64>,
    estimates: [Option<Estimate>; LEVELS.len()],
    delta_rate: f64,
    level: usize,
    on: bool,
    /// A window goes as it is, to learn the link's rate.
    trial: bool,
    /// Windows until the next trial may come.
    trial_pause: u32,
    /// Windows until the next sample.
    pause: u32,
    /// What `pause` is set to next.
    next_pause: u32,
    /// Whether the next sample is at a higher level.
    upwards: bool,
}

impl Policy {
    /// For a channel that may use `allowed` and at most `cap` bytes a second.
    pub fn new(compress: Compress, allowed: Encodings, cap: Option<u64>) -> Policy {
        Policy {
            compress,
            allowed,
            cap: cap.map(|cap| cap as f64),
            link: None,
            estimates: [None; LEVELS.len()],
            delta_rate: DELTA_RATE,
            level: FIRST_LEVEL,
            on: compress == Compress::Zstd,
            trial: false,
            trial_pause: 0,
            pause: 0,
            next_pause: 1,
            upwards: true,
        }
    }

    /// How pages of `round` go now.
    pub fn choice(&self, round: u32) -> Choice {
        let delta = match self.compress {
            Compress::Delta => true,
            Compress::Auto => self.link().is_some_and(|link| link * 2.0 < self.delta_rate),
            Compress::Off | Compress::Zstd => false,
        };
        Choice {
            zstd: (self.on && !self.trial && self.allowed.zstd).then(|| LEVELS[self.level]),
            // In the first round every page is new, and most are never sent again.
            delta: delta && self.allowed.delta && round > 0 && !self.trial,
        }
    }

    /// Whether the link's rate is being found out: pages are then not queued far ahead of it.
    pub fn learns(&self) -> bool {
        let may = self.compress == Compress::Auto && self.allowed.any();
        may && (self.trial || self.link().is_none())
    }

    /// The level at which a sample is wanted now.
    pub fn sample(&self) -> Option<i32> {
        let wanted = matches!(self.compress, Compress::Zstd | Compress::Auto) && self.allowed.zstd;
        if !wanted || self.pause > 0 || self.trial {
            return None;
        }
        Some(
            LEVELS[if self.on {
                self.neighbour()?
            } else {
                self.level
            }],
        )
    }

    /// A sample of so many bytes was compressed to `sent` in `took`. While pages go compressed, `current` is what the level in
    /// use made of the same bytes.
    pub fn sampled(
        &mut self,
        bytes: u64,
        sent: u64,
        took: Duration,
        current: Option<(u64, Duration)>,
    ) {
        let Some(found) = estimate(bytes, sent, took) else {
            return;
        };
        let index = if self.on {
            self.neighbour()
        } else {
            Some(self.level)
        };
        let Some(index) = index else { return };
        learn(&mut self.estimates[index], found);
        self.pause = self.next_pause;
        let Some(link) = self.link() else { return };
        if !self.on {
            self.consider(found, link);
            return;
        }
        let current = current.and_then(|(sent, took)| estimate(bytes, sent, took));
        if let Some(current) = current
            && overlapped(found, link) < BETTER * overlapped(current, link)
        {
            self.level = index;
            self.next_pause = 1;
        } else {
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        }
        self.upwards = !self.upwards;
    }

    /// A window ended.
    pub fn window(&mut self, window: &Window) {
        let busy = window.busy.as_secs_f64();
        if busy <= 0.0 || window.bytes == 0 {
            return;
        }
        self.pause = self.pause.saturating_sub(1);
        if let Some(found) = estimate(window.compared, window.compared, window.comparing) {
            mix(&mut self.delta_rate, found.rate);
        }
        let known = self.link().is_some();
        self.trial_pause = self.trial_pause.saturating_sub(1);
        let left = window.sent as f64 / busy;
        let raw = !self.on || self.trial;
        let link_limits = window.waited.as_secs_f64() > LIMITS * busy;
        if (raw && window.compared == 0) || link_limits {
            // A trial is short: what it shows counts whole.
            match &mut self.link {
                Some(link) if !self.trial => mix(link, left),
                link => *link = Some(left),
            }
        } else if self.link.is_none_or(|link| link < left) {
            self.link = Some(left);
        }
        if raw {
            // A sample that came before the link's rate was known counts now.
            let first = !self.on && !known;
            if let (true, Some(found), Some(link)) =
                (first, self.estimates[self.level], self.link())
            {
                self.consider(found, link);
            }
            self.trial = false;
            return;
        }
        let (bytes, sent) = window.compressed;
        if let Some(found) = estimate(bytes, sent, window.compressing) {
            learn(&mut self.estimates[self.level], found);
        }
        if self.compress != Compress::Auto {
            return;
        }
        let Some(link) = self.link() else { return };
        if window.bytes as f64 / busy < BETTER * link {
            // Slower than it would be as it is.
            self.on = false;
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        } else if !link_limits && self.trial_pause == 0 && !self.capped() {
            self.trial = true;
            self.trial_pause = trial_pause(window.bytes as f64 / busy / link);
        }
    }

    /// The link's rate, or the operator's limit where that is lower.
    fn link(&self) -> Option<f64> {
        match (self.link, self.cap) {
            (Some(link), Some(cap)) => Some(link.min(cap)),
            (link, cap) => link.or(cap),
        }
    }

    /// Whether compressing pays, by what a sample has shown.
    fn consider(&mut self, found: Estimate, link: f64) {
        let pays = foreseen(found, link) < BETTER / link && found.rate > FASTER * link;
        self.on = pays && self.compress == Compress::Auto && self.allowed.zstd;
        self.next_pause = if self.on {
            self.trial_pause = trial_pause(1.0 / (foreseen(found, link) * link));
            1
        } else {
            (self.next_pause * 2).min(MAX_PAUSE)
        };
    }

    /// Whether the operator's limit is what counts: a trial would show nothing then.
    fn capped(&self) -> bool {
        match (self.cap, self.link) {
            (Some(cap), Some(link)) => cap <= link,
            (cap, None) => cap.is_some(),
            (None, Some(_)) => false,
        }
    }

    /// The level to sample beside the one in use.
    fn neighbour(&self) -> Option<usize> {
        let (up, down) = (self.level + 1, self.level.checked_sub(1));
        let up = (up < LEVELS.len()).then_some(up);
        if self.upwards {
            up.or(down)
        } else {
            down.or(up)
        }
    }
}

/// Windows until the next trial, while pages go `gain` times as fast as the link could carry them as they are.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is clamped to small positive figures"
)]
fn trial_pause(gain: f64) -> u32 {
    (gain.clamp(1.0, MAX_GAIN) * TRIAL_PAUSE) as u32
}

/// Seconds a byte when compressing and sending take turns: what one can be sure of.
fn foreseen(estimate: Estimate, link: f64) -> f64 {
    1.0 / estimate.rate + estimate.ratio / link
}

/// Seconds a byte when the link works while the next is compressed.
fn overlapped(estimate: Estimate, link: f64) -> f64 {
    (1.0 / estimate.rate).max(estimate.ratio / link)
}

fn estimate(bytes: u64, sent: u64, took: Duration) -> Option<Estimate> {
    if bytes == 0 || took.is_zero() {
        return None;
    }
    Some(Estimate {
        rate: bytes as f64 / took.as_secs_f64(),
        ratio: sent as f64 / bytes as f64,
    })
}

fn learn(known: &mut Option<Estimate>, found: Estimate) {
    match known {
        Some(known) => {
            mix(&mut known.rate, found.rate);
            mix(&mut known.ratio, found.ratio);
        }
        None => *known = Some(found),
    }
}

fn mix(known: &mut f64, found: f64) {
    *known += NEW * (found - *known);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world of one channel: a link, and an encoder at each level.
    struct World {
        link: f64,
        /// By level: bytes a second, ratio.
        encoders: [(f64, f64); LEVELS.len()],
    }

    const FAST_GUEST: [(f64, f64); 4] = [(1.5e9, 0.5), (7e8, 0.35), (3e8, 0.3), (1e8, 0.28)];
    const RANDOM: [(f64, f64); 4] = [(3e9, 1.0), (1.5e9, 1.0), (8e8, 1.0), (2e8, 1.0)];

    const WINDOW: f64 = 8e6;

    impl World {
        fn encoder(&self, level: i32) -> (f64, f64) {
            let index = LEVELS.iter().position(|l| *l == level).unwrap_or(0);
            self.encoders[index]
        }

        /// Sends windows for `seconds`, and returns bytes of pages a second.
        fn run(&self, policy: &mut Policy, seconds: f64) -> f64 {
            let (mut now, mut bytes) = (0.0, 0.0);
            while now < seconds {
                if let Some(level) = policy.sample() {
                    now += self.sample(policy, level);
                }
                let window = self.window(policy.choice(0).zstd);
                policy.window(&window);
                now += window.busy.as_secs_f64();
                bytes += WINDOW;
            }
            bytes / now
        }

        fn sample(&self, policy: &mut Policy, level: i32) -> f64 {
            let of = |level| {
                let (rate, ratio) = self.encoder(level);
                (
                    as_bytes(65536.0 * ratio),
                    Duration::from_secs_f64(65536.0 / rate),
                )
            };
            let (sent, took) = of(level);
            let current = policy.choice(0).zstd.map(of);
            policy.sampled(65536, sent, took, current);
            (took + current.map_or(Duration::ZERO, |(_, took)| took)).as_secs_f64()
        }

        fn window(&self, zstd: Option<i32>) -> Window {
            let (rate, ratio) = zstd.map_or((f64::INFINITY, 1.0), |level| self.encoder(level));
            let (cpu, link) = (WINDOW / rate, WINDOW * ratio / self.link);
            let busy = cpu.max(link);
            let sent = as_bytes(WINDOW * ratio);
            Window {
                busy: Duration::from_secs_f64(busy),
                waited: Duration::from_secs_f64(busy - cpu),
                compressing: Duration::from_secs_f64(cpu),
                compressed: if zstd.is_some() {
                    (as_bytes(WINDOW), sent)
                } else {
                    (0, 0)
                },
                bytes: as_bytes(WINDOW),
                sent,
                ..Window::default()
            }
        }

        fn best(&self) -> f64 {
            let encoded = self
                .encoders
                .iter()
                .map(|(rate, ratio)| rate.min(self.link / ratio));
            encoded.fold(self.link, f64::max)
        }
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "figures of the tests"
    )]
    fn as_bytes(value: f64) -> u64 {
        value as u64
    }

    fn auto() -> Policy {
        Policy::new(Compress::Auto, Encodings::ALL, None)
    }

    #[test]
    fn a_slow_link_gets_what_compresses_best() {
        let world = World {
            link: 117e6,
            encoders: FAST_GUEST,
        };
        let mut policy = auto();
        world.run(&mut policy, 2.0);
        let rate = world.run(&mut policy, 10.0);
        assert!(
            rate > 0.9 * world.best(),
            "{rate:.3e} of {:.3e}",
            world.best()
        );
        assert!(rate > 2.5 * world.link, "{rate:.3e}");
    }

    #[test]
    fn a_fast_link_loses_less_than_two_in_a_hundred() {
        for encoders in [FAST_GUEST, RANDOM] {
            let world = World {
                link: 2.5e9,
                encoders,
            };
            let rate = world.run(&mut auto(), 2.0);
            assert!(rate > 0.98 * world.link, "{rate:.3e}");
        }
    }

    #[test]
    fn what_does_not_compress_goes_as_it_is() {
        let world = World {
            link: 117e6,
            encoders: RANDOM,
        };
        let mut policy = auto();
        let rate = world.run(&mut policy, 10.0);
        assert!(
            policy.choice(0).zstd.is_none() && rate > 0.98 * world.link,
            "{rate:.3e}"
        );
        assert!(policy.choice(1).delta && !policy.choice(0).delta);
    }

    #[test]
    fn where_the_encoder_is_the_limit_and_still_pays_it_stays() {
        let world = World {
            link: 150e6,
            encoders: [(6e8, 0.2); 4],
        };
        let mut policy = auto();
        let rate = world.run(&mut policy, 20.0);
        assert!(rate > 0.9 * 6e8, "{rate:.3e}");
    }

    #[test]
    fn a_link_that_changes_is_followed() {
        let mut policy = auto();
        let slow = World {
            link: 117e6,
            encoders: FAST_GUEST,
        };
        slow.run(&mut policy, 5.0);
        assert!(policy.choice(0).zstd.is_some());
        let fast = World {
            link: 3e9,
            encoders: FAST_GUEST,
        };
        fast.run(&mut policy, 5.0);
        assert_eq!(policy.choice(1), Choice::default());
        slow.run(&mut policy, 20.0);
        assert!(policy.choice(0).zstd.is_some());
    }

    #[test]
    fn the_operators_limit_is_a_slow_link() {
        let mut policy = Policy::new(Compress::Auto, Encodings::ALL, Some(50_000_000));
        World {
            link: 3e9,
            encoders: FAST_GUEST,
        }
        .run(&mut policy, 1.0);
        for _ in 0..100 {
            assert!(policy.choice(1).zstd.is_some() && policy.choice(1).delta);
            policy.window(
                &World {
                    link: 3e9,
                    encoders: FAST_GUEST,
                }
                .window(policy.choice(1).zstd),
            );
        }
    }

    #[test]
    fn what_was_not_agreed_on_or_not_asked_for_is_never_chosen() {
        let world = World {
            link: 117e6,
            encoders: FAST_GUEST,
        };
        for (compress, allowed) in [
            (Compress::Auto, Encodings::default()),
            (Compress::Off, Encodings::ALL),
        ] {
            let mut policy = Policy::new(compress, allowed, None);
            world.run(&mut policy, 3.0);
            assert_eq!(
                (policy.choice(1), policy.sample()),
                (Choice::default(), None)
            );
        }
        let delta = Policy::new(Compress::Delta, Encodings::ALL, None);
        assert_eq!(
            delta.choice(3),
            Choice {
                zstd: None,
                delta: true
            }
        );
        let mut zstd = Policy::new(Compress::Zstd, Encodings::ALL, None);
        World {
            link: 3e9,
            encoders: RANDOM,
        }
        .run(&mut zstd, 1.0);
        assert!(zstd.choice(3).zstd.is_some() && !zstd.choice(3).delta);
    }
}
