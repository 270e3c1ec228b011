//! Whether a guest writes as fast as the link carries, or faster: not for a moment, but so that its migration will not converge.
//!
//! A page that is written twice in a round counts once. So of a guest that writes far too fast little more is seen than what the
//! link carries, and from nine tenths of that on it is told.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Milliseconds for which it must have been so.
const LASTS_MS: u64 = 2000;

/// What is known of each migration that leaves from here.
#[derive(Debug, Default)]
pub(super) struct Outpaced(BTreeMap<String, Since>);

/// Since when a guest has been too fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    At(u64),
    /// It was told, once a migration.
    Told,
}

impl Outpaced {
    /// Takes a progress event; what is to be told of it.
    pub(super) fn progress(&mut self, event: &Value) -> Option<Value> {
        let number = |name: &str| event[name].as_u64();
        let (id, at_ms) = (event["id"].as_str()?.to_owned(), number("at_ms")?);
        let (dirty, goodput) = (number("dirty_bytes_s")?, number("goodput_bytes_s")?);
        match self.0.get(&id) {
            Some(Since::Told) => return None,
            // Before the first scan nothing is known of what it writes, and that is shown as nothing.
            _ if goodput == 0 || u128::from(dirty) * 10 < u128::from(goodput) * 9 => {
                self.0.remove(&id);
                return None;
            }
            None => {
                self.0.insert(id, Since::At(at_ms));
                return None;
            }
            Some(Since::At(since)) if at_ms.saturating_sub(*since) < LASTS_MS => return None,
            Some(Since::At(_)) => {}
        }
        let told = json!({
            "event": "outpaced", "id": id, "vm": event["vm"], "side": event["side"], "at_ms": at_ms, "dirty_bytes_s": dirty,
            "goodput_bytes_s": goodput, "round": event["round"], "remaining_bytes": event["remaining_bytes"],
        });
        self.0.insert(id, Since::Told);
        Some(told)
    }

    /// Its migration has ended.
    pub(super) fn ended(&mut self, event: &Value) {
        if let Some(id) = event["id"].as_str() {
            self.0.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn progress(at_ms: u64, dirty: u64, goodput: u64) -> Value {
        json!({ "event": "progress", "id": "x", "vm": "web", "side": "source", "at_ms": at_ms, "round": 2,
            "dirty_bytes_s": dirty, "goodput_bytes_s": goodput, "remaining_bytes": 7 })
    }

    #[test]
    fn it_is_told_once_when_it_lasts() {
        let mut outpaced = Outpaced::default();
        for at in [0, 500, 1999] {
            assert_eq!(outpaced.progress(&progress(at, 9, 5)), None, "{at}");
        }
        let told = outpaced.progress(&progress(2000, 9, 5)).unwrap();
        assert_eq!(
            (&told["event"], &told["vm"], &told["dirty_bytes_s"]),
            (&"outpaced".into(), &"web".into(), &9.into())
        );
        assert_eq!(outpaced.progress(&progress(9000, 9, 5)), None);
        outpaced.ended(&progress(0, 0, 0));
        assert!(outpaced.0.is_empty());
    }

    #[test]
    fn a_moment_is_nothing() {
        let mut outpaced = Outpaced::default();
        for (at, dirty) in [(0, 9), (1500, 4), (1600, 9), (3000, 9)] {
            assert_eq!(outpaced.progress(&progress(at, dirty, 5)), None, "{at}");
        }
        // Without a goodput nothing is compared.
        assert_eq!(outpaced.progress(&progress(9000, 9, 0)), None);
        assert_eq!(outpaced.progress(&json!({ "event": "progress" })), None);
    }
}
