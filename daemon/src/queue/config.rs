//! What the configuration says about many migrations.

use serde::{Deserialize, Deserializer};

use crate::units::parse_rate;

/// Migrations that may leave at a time, unless the configuration says otherwise.
pub(crate) fn default_concurrent() -> usize {
    2
}

/// Migrations that may wait, unless the configuration says otherwise: a few hundred guests of a large host.
pub(crate) fn default_pending() -> usize {
    1000
}

/// A rate, such as `"10GB/s"`.
pub(crate) fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    parse_rate(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

/// How many migrations may leave at a time.
pub(crate) fn concurrent<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    between(from, 1, 256)
}

/// How many may wait.
pub(crate) fn pending<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    between(from, 0, 10_000)
}

fn between<'de, D: Deserializer<'de>>(from: D, least: i64, most: i64) -> Result<usize, D::Error> {
    let number = i64::deserialize(from)?;
    let wrong = || serde::de::Error::custom(format!("use a number from {least} to {most}"));
    if !(least..=most).contains(&number) {
        return Err(wrong());
    }
    usize::try_from(number).map_err(|_| wrong())
}
