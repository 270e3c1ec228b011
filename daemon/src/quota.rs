//! Shares of something that is limited: how many may have it in all, and how many of them may be one peer's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Something limited.
#[derive(Clone, Debug)]
pub struct Quota {
    most: usize,
    most_each: usize,
    taken: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A share, given back on drop.
#[derive(Debug)]
pub struct Share {
    quota: Quota,
    who: String,
}

impl Quota {
    /// `most` shares, `most_each` of them for one peer.
    pub fn new(most: usize, most_each: usize) -> Quota {
        Quota {
            most,
            most_each,
            taken: Arc::default(),
        }
    }

    /// A share for `who`, if there is one left for it.
    pub fn take(&self, who: &str) -> Option<Share> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = taken.values().sum();
        let own = taken.get(who).copied().unwrap_or(0);
        if all >= self.most || own >= self.most_each {
            return None;
        }
        taken.insert(who.to_owned(), own + 1);
        Some(Share {
            quota: self.clone(),
            who: who.to_owned(),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self
            .quota
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.who) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_peer_cannot_take_all() {
        let quota = Quota::new(3, 2);
        let first = quota.take("a").unwrap();
        let _second = quota.take("a").unwrap();
        assert!(quota.take("a").is_none(), "more than its part");
        let _third = quota.take("b").unwrap();
        assert!(quota.take("c").is_none(), "more than there is");
        drop(first);
        let _again = quota.take("c").unwrap();
        assert_eq!(quota.taken.lock().unwrap().len(), 3);
    }

    #[test]
    fn who_has_none_is_forgotten() {
        let quota = Quota::new(2, 1);
        drop(quota.take("a"));
        assert!(quota.taken.lock().unwrap().is_empty());
    }
}
