//! The policy in worlds of its own: a link, what a stream of it carries, what a thread can do, and noise.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// Figures are taken so often.
const EVERY: Duration = Duration::from_millis(100);

/// Rates in bytes a second.
#[derive(Clone, Copy, Debug)]
struct World {
    link: f64,
    stream: f64,
    /// What one thread can send on a whole core.
    one_thread: f64,
    cores: f64,
    limit: f64,
    /// Each figure is off by up to this share.
    noise: f64,
    bounds: Bounds,
    first: u16,
    chance: u64,
}

const GBIT: f64 = 125e6;

fn world(link: f64, stream: f64) -> World {
    World {
        link: link * GBIT,
        stream: stream * GBIT,
        one_thread: 20.0 * GBIT,
        cores: 64.0,
        limit: f64::INFINITY,
        noise: 0.02,
        bounds: Bounds {
            least: 1,
            most: MOST,
        },
        first: 1,
        chance: 1,
    }
}

/// What it led to.
#[derive(Debug, Default)]
struct Seen {
    /// Number of channels after each decision, and when.
    course: Vec<(f64, u16)>,
    /// Bytes that left.
    bytes: f64,
    last: u16,
}

impl Seen {
    /// How many decisions there were after so many seconds.
    fn decided_after(&self, second: f64) -> usize {
        let late = self.course.iter().filter(|(when, _)| *when > second);
        late.count()
    }
}

impl World {
    /// Begins with so many channels, and goes on with as few as such a migration may.
    fn begun_with(self, first: u16) -> World {
        let bounds = Bounds {
            least: first.min(2),
            most: MOST,
        };
        World {
            first,
            bounds,
            ..self
        }
    }

    fn random(&mut self) -> f64 {
        // xorshift
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// What so many channels carry in all.
    fn carries(&self, channels: u16) -> f64 {
        let n = f64::from(channels);
        let threads = self.one_thread * n.min(self.cores);
        (n * self.stream)
            .min(self.link)
            .min(threads)
            .min(self.limit)
    }

    fn sample(&mut self, channels: u16) -> Sample {
        let n = f64::from(channels);
        let carries = self.carries(channels);
        let limited = self.limit <= carries;
        let cpu = (carries / n / self.one_thread).min(1.0);
        let off = 1.0 + self.noise * (2.0 * self.random() - 1.0);
        Sample {
            rate: carries * off,
            busy: if limited { 0.5 } else { 1.0 },
            held: if limited { 0.5 } else { 0.0 },
            cpu,
            idle: Some((self.cores - cpu * n).max(0.0)),
        }
    }

    fn run(mut self, seconds: f64) -> Seen {
        let mut policy = Policy::new(self.bounds, self.first, Time(0));
        let mut seen = Seen::default();
        let (mut now, mut there) = (Time(0), self.first);
        let mut opening = None;
        while now.since(Time(0)).as_secs_f64() < seconds {
            now = now.after(EVERY);
            if let Some(count) = opening.take() {
                policy.opened(count, now);
                there += count;
            }
            seen.bytes += self.carries(there) * EVERY.as_secs_f64();
            let sample = self.sample(there);
            match policy.sample(now, sample) {
                Some(Decision::Add(count, _)) => opening = Some(count),
                Some(Decision::Drop(count, _)) => there -= count,
                Some(Decision::Keep(_)) | None => continue,
            }
            let after = there + opening.unwrap_or(0);
            seen.course.push((now.since(Time(0)).as_secs_f64(), after));
            assert!((self.bounds.least..=self.bounds.most).contains(&after));
        }
        assert_eq!(policy.channels(), there);
        seen.last = there;
        seen
    }
}

/// How many there were at that moment.
fn at(seen: &Seen, first: u16, second: f64) -> u16 {
    let before = seen.course.iter().take_while(|(when, _)| *when <= second);
    before.last().map_or(first, |(_, channels)| *channels)
}

#[test]
fn ten_gigabits_by_streams_of_three_settle_at_four_within_seconds() {
    let seen = world(10.0, 3.0).run(60.0);
    assert_eq!(at(&seen, 1, 5.0), 4, "{seen:?}");
    assert_eq!(seen.last, 4, "{seen:?}");
    // Of the link: what a trial of three instead of four, and of six, has cost.
    let share = seen.bytes / (60.0 * 10.0 * GBIT);
    assert!(share > 0.95, "{share}");
}

#[test]
fn a_link_that_one_stream_fills_stays_at_one_or_two() {
    for first in [1, 2] {
        let seen = world(1.0, 1.0).begun_with(first).run(300.0);
        assert!(seen.last <= 2, "{seen:?}");
        // Trials are over in a second, and rare.
        assert!(seen.course.len() <= 16, "{seen:?}");
    }
}

#[test]
fn a_link_that_nobody_knew_is_left_with_two() {
    assert_eq!(world(1.0, 1.0).begun_with(4).run(60.0).last, 2);
}

#[test]
fn a_hundred_gigabits_have_as_many_as_it_takes() {
    let seen = world(100.0, 12.0).run(30.0);
    let carried = seen.bytes / (30.0 * 100.0 * GBIT);
    assert!((8..=12).contains(&seen.last) && carried > 0.8, "{seen:?}");
    // From the ten that the link's speed asks for.
    let seen = world(100.0, 12.0).begun_with(10).run(30.0);
    assert!(seen.bytes / (30.0 * 100.0 * GBIT) > 0.95, "{seen:?}");
}

#[test]
fn none_is_tried_where_there_is_no_core_for_it() {
    let start = World {
        one_thread: 10.0 * GBIT,
        cores: 2.0,
        first: 2,
        bounds: Bounds::of(2, 2),
        ..world(100.0, 50.0)
    };
    let seen = start.run(60.0);
    assert_eq!(seen.course, [], "{seen:?}");
}

#[test]
fn under_a_limit_there_are_as_few_as_it_takes() {
    let start = World {
        limit: 1.0 * GBIT,
        ..world(10.0, 3.0).begun_with(6)
    };
    let seen = start.run(60.0);
    assert_eq!(seen.last, 2, "{seen:?}");
}

#[test]
fn a_noisy_measurement_does_not_flap() {
    for chance in 1..200 {
        let start = World {
            noise: 0.25,
            chance: u64::wrapping_mul(chance, 0x9e37_79b9_7f4a_7c15),
            ..world(1.0, 1.0).begun_with(2)
        };
        let seen = start.run(120.0);
        assert!(
            seen.course.len() <= 24 && seen.last <= 4,
            "{chance}: {seen:?}"
        );
        // After the first pauses it is quiet.
        assert!(seen.decided_after(60.0) <= 10, "{chance}: {seen:?}");
    }
}

#[test]
fn what_is_refused_is_not_asked_for_again_soon() {
    let mut world = world(10.0, 3.0);
    let mut policy = Policy::new(world.bounds, 1, Time(0));
    let mut asked = 0;
    for tenth in 1..600 {
        let now = Time(0).after(EVERY * tenth);
        let sample = world.sample(1);
        if let Some(Decision::Add(..)) = policy.sample(now, sample) {
            asked += 1;
            policy.refused(now);
        }
    }
    assert_eq!((asked, policy.channels()), (1, 1));
}

#[test]
fn a_trial_that_nothing_is_heard_of_is_over_some_time() {
    let mut world = world(10.0, 3.0);
    let mut policy = Policy::new(world.bounds, 1, Time(0));
    let mut now = Time(0);
    while !matches!(policy.stage, Stage::Opening(_)) {
        now = now.after(EVERY);
        let sample = world.sample(1);
        let _ = policy.sample(now, sample);
    }
    policy.opened(1, now);
    assert_eq!(policy.channels(), 2);
    now = now.after(LONGEST * 2);
    let decision = policy.sample(now, world.sample(2));
    assert!(
        matches!(decision, Some(Decision::Drop(1, _))),
        "{decision:?}"
    );
    assert_eq!(policy.channels(), 1);
}

proptest! {
    /// Whatever is measured: within the bounds, and nothing is dropped or asked for that is not there or on its way.
    #[test]
    fn it_keeps_to_its_bounds(
        least in 1_u16..4, room in 0_u16..13, start in 0_u16..13,
        samples in prop::collection::vec((prop_oneof![0.0..1e10_f64, Just(f64::NAN), Just(f64::INFINITY)],
            0.0..1.5_f64, 0.0..1.0_f64, 0.0..1.5_f64, 0.0..8.0_f64, 0_u8..8, 1_u64..3000), 1..400),
    ) {
        let bounds = Bounds { least, most: least + room };
        let first = least + start.min(room);
        let mut policy = Policy::new(bounds, first, Time(0));
        let (mut now, mut there, mut asked) = (Time(0), first, None);
        for (rate, busy, held, cpu, idle, answer, ms) in samples {
            now = now.after(Duration::from_millis(ms));
            if let Some(count) = asked {
                if answer == 0 {
                    policy.refused(now);
                    asked = None;
                } else if answer < 4 {
                    policy.opened(count, now);
                    there += count;
                    asked = None;
                }
            }
            let sample = Sample { rate, busy, held, cpu, idle: (answer != 7).then_some(idle) };
            match policy.sample(now, sample) {
                Some(Decision::Add(count, _)) => {
                    prop_assert!(asked.is_none() && count > 0);
                    asked = Some(count);
                }
                Some(Decision::Drop(count, _)) => there -= count,
                _ => {}
            }
            prop_assert!(there >= bounds.least && there + asked.unwrap_or(0) <= bounds.most);
            prop_assert_eq!(policy.channels(), there);
        }
    }

    /// It settles near the best that the world has to offer, and stays there.
    #[test]
    fn it_settles_near_the_best(
        link in 1.0..100.0_f64, stream in 1.0..20.0_f64, noise in 0.0..0.05_f64, chance in 1_u64..,
    ) {
        let start = World { noise, chance, ..world(link, stream) };
        let best = start.carries(MOST);
        let seen = start.run(120.0);
        prop_assert!(start.carries(seen.last) > 0.8 * best, "{seen:?} of {best}");
        prop_assert!(seen.decided_after(60.0) <= 10, "{seen:?}");
    }
}
