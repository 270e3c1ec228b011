//! The part of the downtime that does not depend on bytes, as measured on this host by the migrations before.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::files::{read_json, write_json};

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
    path: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    milliseconds: f64,
}

impl FixedDowntime {
    /// Kept in `path`.
    pub fn open(path: PathBuf) -> FixedDowntime {
        FixedDowntime { path }
    }

    /// What to expect.
    pub fn get(&self) -> Duration {
        let measured = read_json::<Measured>(&self.path).ok().flatten();
        let plausible =
            measured.filter(|measured| (0.0..60_000.0).contains(&measured.milliseconds));
        plausible.map_or(FIRST_GUESS, |measured| {
            Duration::from_secs_f64(measured.milliseconds / 1e3)
        })
    }

    /// A migration has measured `measured`.
    pub fn learn(&self, measured: Duration) {
        let old = read_json::<Measured>(&self.path)
            .ok()
            .flatten()
            .map(|old| old.milliseconds);
        let new = measured.max(LEAST).as_secs_f64() * 1e3;
        let milliseconds = old.map_or(new, |old| old + (new - old) * NEW_SHARE);
        if let Err(error) = write_json(&self.path, &Measured { milliseconds }) {
            tracing::warn!(%error, "the measured downtime was not kept");
        }
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
        let path = dir.join("fixed-downtime.json");
        let downtime = FixedDowntime::open(path.clone());
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
