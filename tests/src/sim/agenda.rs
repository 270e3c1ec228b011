//! Virtual time: what will happen, in the order in which it will.

use std::collections::BTreeMap;
use std::time::Duration;

use pagecopy::engine::Time;

/// Events to come. Two of the same instant happen in the order in which they were entered.
#[derive(Debug)]
pub(super) struct Agenda<E> {
    now: Time,
    entered: u64,
    entries: BTreeMap<(Time, u64), E>,
}

impl<E> Agenda<E> {
    /// Nothing to come; the time is `start`.
    pub(super) fn new(start: Time) -> Agenda<E> {
        Agenda {
            now: start,
            entered: 0,
            entries: BTreeMap::new(),
        }
    }

    /// The instant of the event taken last.
    pub(super) fn now(&self) -> Time {
        self.now
    }

    /// Enters `event` for `delay` from now.
    pub(super) fn after(&mut self, delay: Duration, event: E) {
        self.at(self.now.after(delay), event);
    }

    /// Enters `event` for the instant `when`, or for now if that has passed.
    pub(super) fn at(&mut self, when: Time, event: E) {
        self.entered += 1;
        self.entries
            .insert((when.max(self.now), self.entered), event);
    }

    /// When the next event happens.
    pub(super) fn next(&self) -> Option<Time> {
        self.entries.keys().next().map(|(when, _)| *when)
    }

    /// Takes the next event and moves the time to it.
    pub(super) fn take(&mut self) -> Option<E> {
        let ((when, _), event) = self.entries.pop_first()?;
        self.now = when;
        Some(event)
    }

    /// Lets time pass to `when` without an event of the agenda's own (the network has events, too).
    pub(super) fn pass_to(&mut self, when: Time) {
        self.now = self.now.max(when);
    }
}
