//! The part of the downtime that does not depend on bytes, as measured on this host by the migrations before.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::files::Folder;

/// The file.
const NAME: &str = "fixed-downtime.json";
/// Before anything was measured.
const FIRST_GUESS: Duration = Duration::from_millis(15);
/// Stopping, saving, loading and starting never take less; a measurement below it says that the bytes were counted for
/// more time than they took.
const LEAST: Duration = Duration::from_millis(5);
/// Share of a new measurement in the kept figure: one odd migration does not spoil the next prediction.
const NEW_SHARE: f64 = 0.5;

/// The measured figure.
#[derive(Debug)]
pub struct FixedDowntime {
    folder: Arc<Folder>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    milliseconds: f64,
}

impl FixedDowntime {
    /// Kept in `folder`.
    pub(crate) fn open(folder: Arc<Folder>) -> FixedDowntime {
        FixedDowntime { folder }
    }

    /// What to expect.
    pub fn get(&self) -> Duration {
        let measured = self.read();
        let plausible =
            measured.filter(|measured| (0.0..60_000.0).contains(&measured.milliseconds));
        plausible.map_or(FIRST_GUESS, |measured| {
            Duration::from_secs_f64(measured.milliseconds / 1e3)
        })
    }

    /// A migration has measured `measured`.
    pub fn learn(&self, measured: Duration) {
        let old = self.read().map(|old| old.milliseconds);
        let new = measured.max(LEAST).as_secs_f64() * 1e3;
        let milliseconds = old.map_or(new, |old| old + (new - old) * NEW_SHARE);
        if let Err(error) = self.folder.write_json(NAME, &Measured { milliseconds }) {
            tracing::warn!(%error, "the measured downtime was not kept");
        }
    }

    fn read(&self) -> Option<Measured> {
        self.folder.read_json(NAME).ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::test_dir;
    use super::*;

    #[test]
    fn it_learns_and_forgives_a_bad_file() {
        let dir = test_dir("downtime");
        let path = dir.join(NAME);
        let downtime = FixedDowntime::open(Arc::new(Folder::open(&dir).unwrap()));
        assert_eq!(downtime.get(), FIRST_GUESS);
        downtime.learn(Duration::from_millis(10));
        assert_eq!(downtime.get(), Duration::from_millis(10));
        downtime.learn(Duration::from_millis(20));
        assert_eq!(downtime.get(), Duration::from_millis(15));
        (0..20).for_each(|_| downtime.learn(Duration::ZERO));
        assert!(downtime.get() >= LEAST);
        std::fs::write(&path, "no JSON").unwrap();
        assert_eq!(downtime.get(), FIRST_GUESS);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
