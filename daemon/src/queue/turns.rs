//! Turns: each migration has a place, waits there until it is called, and holds it while it runs. Who is called when is in
//! `order`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

use super::order::{Full, Order};

/// The migrations that leave this host, one after the other.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    order: Order,
    /// How those that wait are called.
    bells: BTreeMap<Uuid, Arc<Notify>>,
}

/// A migration's place. Whoever gives it up lets the next begin.
#[derive(Debug)]
pub(crate) struct Place {
    queue: Queue,
    id: Uuid,
    bell: Arc<Notify>,
}

impl Queue {
    /// So many may run at a time, and so many wait.
    pub(crate) fn new(most: usize, room: usize) -> Queue {
        Queue(Arc::new(Mutex::new(Inner {
            order: Order::new(most, room),
            bells: BTreeMap::new(),
        })))
    }

    /// A place for one more.
    ///
    /// # Errors
    /// As many wait as may.
    pub(crate) fn enter(&self, id: Uuid, priority: i32) -> Result<Place, Full> {
        self.change(|order| order.enter(id, priority))?;
        let place = self.place(id);
        self.call();
        Ok(place)
    }

    /// The same for one that was let in before the daemon was started anew. Nobody is called before all of them are here.
    pub(crate) fn enter_again(&self, id: Uuid, priority: i32) -> Place {
        self.change(|order| order.enter_again(id, priority));
        self.place(id)
    }

    /// Other limits, from now on.
    pub(crate) fn limit(&self, most: usize, room: usize) {
        self.change(|order| order.limit(most, room));
        self.call();
    }

    /// Nobody begins any more: the daemon ends.
    pub(crate) fn close(&self) {
        self.change(Order::close);
    }

    /// The places of those that wait, from 1.
    pub(crate) fn places(&self) -> BTreeMap<Uuid, u32> {
        self.lock().order.waiting().zip(1..).collect()
    }

    fn place(&self, id: Uuid) -> Place {
        let bell = Arc::new(Notify::new());
        self.lock().bells.insert(id, Arc::clone(&bell));
        Place {
            queue: self.clone(),
            id,
            bell,
        }
    }

    /// Calls everybody whose turn it is.
    pub(crate) fn call(&self) {
        let mut inner = self.lock();
        while let Some(id) = inner.order.call() {
            if let Some(bell) = inner.bells.remove(&id) {
                bell.notify_one();
            }
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Order) -> T) -> T {
        change(&mut self.lock().order)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Where it is among those that wait, from 1; `None` when it has been called.
    pub(crate) fn number(&self) -> Option<u32> {
        self.queue.places().get(&self.id).copied()
    }

    /// It is more urgent now, or less.
    pub(crate) fn prioritise(&self, priority: i32) {
        self.queue
            .change(|order| order.prioritise(self.id, priority));
    }

    /// Waits until it is called, which comes once. May be given up and waited for again.
    pub(crate) async fn turn(&self) {
        self.bell.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut inner = self.queue.lock();
            inner.order.leave(self.id);
            inner.bells.remove(&self.id);
        }
        self.queue.call();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn who_gives_up_a_place_lets_the_next_begin() {
        let queue = Queue::new(1, 10);
        let [first, second, third] = [1, 2, 3].map(|n| queue.enter(Uuid::from_u128(n), 0).unwrap());
        first.turn().await;
        assert_eq!(
            [first.number(), second.number(), third.number()],
            [None, Some(1), Some(2)]
        );
        // Gave up waiting.
        drop(second);
        assert_eq!(third.number(), Some(1));
        drop(first);
        third.turn().await;
        assert!(queue.places().is_empty());
        let fourth = queue.enter(Uuid::from_u128(4), 0).unwrap();
        queue.limit(2, 10);
        fourth.turn().await;
        queue.close();
        drop((third, fourth));
        let fifth = queue.enter(Uuid::from_u128(5), 0).unwrap();
        assert_eq!(fifth.number(), Some(1), "the daemon ends");
        assert!(queue.lock().bells.len() == 1);
    }

    #[tokio::test]
    async fn those_of_before_begin_in_their_order_whoever_is_named_first() {
        let queue = Queue::new(1, 10);
        let [low, high] = [(1, 0), (2, 9)].map(|(n, p)| queue.enter_again(Uuid::from_u128(n), p));
        assert_eq!([low.number(), high.number()], [Some(2), Some(1)]);
        queue.call();
        high.turn().await;
        assert_eq!([low.number(), high.number()], [Some(1), None]);
    }
}
