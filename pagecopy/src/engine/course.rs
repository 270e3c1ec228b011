//! How long a post-copy takes, and how long of that the hosts are not connected: each side counts for itself.

use std::time::Duration;

use super::Time;

/// A post-copy, from the guest's first moment at the destination until it lacks nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course {
    since: Time,
    /// Since when the other side is away.
    away: Option<Time>,
    paused: Duration,
    over: Option<Time>,
}

/// What it took so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Took {
    pub(super) postcopy: Duration,
    pub(super) paused: Duration,
}

impl Course {
    /// The guest runs, and the hosts are connected.
    pub(super) fn begin(now: Time) -> Course {
        Course {
            since: now,
            away: None,
            paused: Duration::ZERO,
            over: None,
        }
    }

    pub(super) fn lost(&mut self, now: Time) {
        if self.over.is_none() {
            self.away.get_or_insert(now);
        }
    }

    pub(super) fn restored(&mut self, now: Time) {
        if let Some(since) = self.away.take() {
            self.paused += now.since(since);
        }
    }

    pub(super) fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// It lacks nothing. What comes later does not count.
    pub(super) fn end(&mut self, now: Time) {
        self.restored(now);
        self.over.get_or_insert(now);
    }

    pub(super) fn took(&self, now: Time) -> Took {
        let now = self.over.unwrap_or(now);
        let pause = self.away.map_or(Duration::ZERO, |since| now.since(since));
        Took {
            postcopy: now.since(self.since),
            paused: self.paused + pause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn pauses_count_also_while_they_last_and_nothing_counts_behind_the_end() {
        let took = |course: &Course, now| {
            let Took { postcopy, paused } = course.took(at(now));
            (postcopy.as_secs(), paused.as_secs())
        };
        let mut course = Course::begin(at(10));
        course.lost(at(12));
        course.lost(at(13));
        assert!(course.is_away());
        assert_eq!(took(&course, 15), (5, 3));
        course.restored(at(16));
        course.restored(at(17));
        assert_eq!(took(&course, 20), (10, 4));
        course.lost(at(21));
        course.end(at(23));
        course.lost(at(24));
        assert_eq!(took(&course, 30), (13, 6));
    }
}
