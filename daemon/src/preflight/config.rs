//! What the configuration says of preflight.

use serde::{Deserialize, Deserializer};

use crate::units::parse_size;

/// Memory that shall be left beside an arriving guest, where nothing is said.
pub(crate) fn default_margin() -> u64 {
    2 << 30
}

/// A size such as `2GiB`.
pub(crate) fn margin<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    parse_size(&String::deserialize(from)?).map_err(serde::de::Error::custom)
}
