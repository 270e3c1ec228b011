//! In which order migrations begin, and how many run at a time. Pure: nothing here waits or writes.
//!
//! The most urgent begins first, and among those of one priority the oldest. Whoever has begun is not stopped for another, and
//! a smaller limit ends nobody: it only lets nobody else begin.

use std::collections::BTreeSet;

use uuid::Uuid;

/// Who waits, and who runs.
#[derive(Debug)]
pub(super) struct Order {
    /// So many may run at a time.
    most: usize,
    /// So many may wait.
    room: usize,
    /// No more begin.
    closed: bool,
    waiting: Vec<Waiting>,
    running: BTreeSet<Uuid>,
    next: u64,
}

/// One that waits.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: Uuid,
    priority: i32,
    age: u64,
}

/// As many wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// How many that are.
    pub(crate) waiting: usize,
}

impl Order {
    pub(super) fn new(most: usize, room: usize) -> Order {
        Order {
            most,
            room,
            closed: false,
            waiting: Vec::new(),
            running: BTreeSet::new(),
            next: 0,
        }
    }

    /// Other limits, from now on.
    pub(super) fn limit(&mut self, most: usize, room: usize) {
        (self.most, self.room) = (most, room);
    }

    /// Nobody begins any more.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// One more wants to begin. It waits only if it must.
    ///
    /// # Errors
    /// As many wait as may.
    pub(super) fn enter(&mut self, id: Uuid, priority: i32) -> Result<(), Full> {
        let waiting = self.waiting.len();
        if !self.has_room() && waiting >= self.room {
            return Err(Full { waiting });
        }
        self.enter_again(id, priority);
        Ok(())
    }

    /// The same for one that was let in before the daemon was started anew.
    pub(super) fn enter_again(&mut self, id: Uuid, priority: i32) {
        self.next += 1;
        self.waiting.push(Waiting {
            id,
            priority,
            age: self.next,
        });
        self.sort();
    }

    /// One that waits is more urgent now, or less; it is as old as it was.
    pub(super) fn prioritise(&mut self, id: Uuid, priority: i32) {
        if let Some(one) = self.waiting.iter_mut().find(|one| one.id == id) {
            one.priority = priority;
        }
        self.sort();
    }

    fn sort(&mut self) {
        self.waiting
            .sort_by_key(|one| (std::cmp::Reverse(one.priority), one.age));
    }

    /// The next whose turn it is. It runs from now on.
    pub(super) fn call(&mut self) -> Option<Uuid> {
        if self.waiting.is_empty() || !self.has_room() {
            return None;
        }
        let id = self.waiting.remove(0).id;
        self.running.insert(id);
        Some(id)
    }

    /// It waits and runs no more.
    pub(super) fn leave(&mut self, id: Uuid) {
        self.waiting.retain(|one| one.id != id);
        self.running.remove(&id);
    }

    /// Those that wait, the next first.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Uuid> {
        self.waiting.iter().map(|one| one.id)
    }

    fn has_room(&self) -> bool {
        !self.closed && self.running.len() < self.most
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn id(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn all(order: &mut Order) -> Vec<u128> {
        std::iter::from_fn(|| order.call())
            .map(|id| id.as_u128())
            .collect()
    }

    #[test]
    fn the_most_urgent_first_and_then_the_oldest() {
        let mut order = Order::new(10, 10);
        for (n, priority) in [(1, 0), (2, 5), (3, -5), (4, 5), (5, 0)] {
            order.enter(id(n), priority).unwrap();
        }
        let waiting: Vec<u128> = order.waiting().map(|id| id.as_u128()).collect();
        assert_eq!(waiting, [2, 4, 1, 5, 3]);
        assert_eq!(all(&mut order), waiting);
    }

    #[test]
    fn one_that_waits_may_become_more_urgent() {
        let mut order = Order::new(1, 10);
        for n in 1..=4 {
            order.enter(id(n), 0).unwrap();
        }
        assert_eq!(all(&mut order), [1]);
        order.prioritise(id(4), 1);
        order.prioritise(id(3), 1);
        order.prioritise(id(1), -1);
        let waiting: Vec<u128> = order.waiting().map(|id| id.as_u128()).collect();
        assert_eq!(waiting, [3, 4, 2], "who runs is not among them");
    }

    #[test]
    fn as_many_run_as_may_and_who_runs_goes_on() {
        let mut order = Order::new(2, 10);
        for n in 1..=5 {
            order.enter(id(n), 0).unwrap();
        }
        assert_eq!(all(&mut order), [1, 2]);
        order.enter(id(6), 100).unwrap();
        assert_eq!(order.call(), None, "the urgent one waits, too");
        order.leave(id(1));
        assert_eq!(all(&mut order), [6]);
        order.limit(1, 10);
        order.leave(id(2));
        assert_eq!(order.call(), None, "one runs");
        order.limit(3, 10);
        assert_eq!(all(&mut order), [3, 4]);
    }

    #[test]
    fn the_queue_is_bounded_and_who_need_not_wait_is_not_turned_away() {
        let mut order = Order::new(1, 2);
        order.enter(id(1), 0).unwrap();
        assert_eq!(all(&mut order), [1]);
        order.enter(id(2), 0).unwrap();
        order.enter(id(3), 0).unwrap();
        assert_eq!(order.enter(id(4), 100), Err(Full { waiting: 2 }));
        // What was accepted once is not lost because the limit is smaller now.
        order.enter_again(id(5), 0);
        assert_eq!(order.waiting().count(), 3);
        order.leave(id(2));
        order.leave(id(3));
        order.enter(id(4), 0).unwrap();
        let mut none = Order::new(1, 0);
        none.enter(id(1), 0).unwrap();
        assert_eq!(all(&mut none), [1]);
        assert_eq!(none.enter(id(2), 0), Err(Full { waiting: 0 }));
    }

    #[test]
    fn nobody_begins_once_it_is_closed() {
        let mut order = Order::new(1, 10);
        order.enter(id(1), 0).unwrap();
        assert_eq!(all(&mut order), [1]);
        order.enter(id(2), 0).unwrap();
        order.close();
        order.leave(id(1));
        assert_eq!(order.call(), None);
        assert_eq!(order.waiting().count(), 1, "it is there at the next start");
    }
}
