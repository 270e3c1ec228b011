//! What the configuration says about many migrations.

use serde::{Deserialize, Deserializer};

use crate::units::parse_rate;

/// A rate, such as `"10GB/s"`.
pub(crate) fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    parse_rate(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}
