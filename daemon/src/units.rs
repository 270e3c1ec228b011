//! Sizes, rates and durations as people write and read them.

use std::time::Duration;

/// Parses a duration such as `50ms`, `1.5s`, `2min`. A bare number has no unit and is refused.
///
/// # Errors
/// Says what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let seconds = match unit {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "" => return Err(format!("{text:?} lacks a unit: write {text}ms or {text}s")),
        _ => {
            return Err(format!(
                "{unit:?} is not a unit of time: use us, ms, s, min or h, as in 50ms"
            ));
        }
    };
    let value: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a duration: write it like 50ms or 1.5s"))?;
    Duration::try_from_secs_f64(value * seconds)
        .map_err(|_| format!("{text:?} is not a duration that can be"))
}

/// Parses a size in bytes such as `32MiB`, `64MB`, or `0`.
///
/// # Errors
/// Says what would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    if text.trim() == "0" {
        return Ok(0);
    }
    if text.contains('/') || text.contains("bit") {
        return Err(format!("{text:?} is not a size: write it like 32MiB"));
    }
    parse_bytes(text, text, "size", "", "32MiB")
}

/// Parses a rate in bytes a second such as `500MB/s`, `1GiB/s`, `64k`; the `/s` may be left out.
/// `MB` is 10^6 bytes, `MiB` 2^20; `Mbit/s` is 10^6 bits.
///
/// # Errors
/// Says what would be right.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let per_second = text.strip_suffix("/s").unwrap_or(text);
    parse_bytes(text, per_second, "rate", "/s", "500MB/s")
}

/// What `text` says, without what stands for `per` in it: a `what`, which is written `like` this.
fn parse_bytes(text: &str, bytes: &str, what: &str, per: &str, like: &str) -> Result<u64, String> {
    let (number, unit) = split(bytes);
    let factor = match unit {
        "B" | "" => 1.0,
        "k" | "kB" | "KB" => 1e3,
        "M" | "MB" => 1e6,
        "G" | "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "Mbit" => 1e6 / 8.0,
        "Gbit" => 1e9 / 8.0,
        _ => {
            return Err(format!(
                "{unit:?} is not a unit of size: use kB, MB, GB, MiB, GiB, Mbit or Gbit, as in {like}"
            ));
        }
    };
    let value: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a {what}: write it like {like}"))?;
    let bytes = value * factor;
    if !(1.0..=1e15).contains(&bytes) {
        return Err(format!(
            "{text:?} is out of range: from 1B{per} to 1PB{per}"
        ));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // In range: checked above.
    Ok(bytes as u64)
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// Bytes for people: `512.0 MiB`.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[allow(clippy::cast_precision_loss)] // For people.
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A rate for people, in decimal units as links are sold: `123.4 MB/s`.
pub fn show_rate(bytes_per_second: u64) -> String {
    #[allow(clippy::cast_precision_loss)] // For people.
    let value = bytes_per_second as f64;
    if value >= 1e9 {
        format!("{:.2} GB/s", value / 1e9)
    } else {
        format!("{:.1} MB/s", value / 1e6)
    }
}

/// A duration as milliseconds with their fraction.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("50ms").unwrap(), Duration::from_millis(50));
        assert_eq!(parse_duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(parse_duration("2min").unwrap(), Duration::from_secs(120));
        assert!(parse_duration("50").unwrap_err().contains("50ms"));
        assert!(parse_duration("5parsec").unwrap_err().contains("parsec"));
        assert!(parse_duration("fast").is_err());
        assert!(parse_duration("-5s").is_err());
    }

    #[test]
    fn rates() {
        assert_eq!(parse_rate("500MB/s").unwrap(), 500_000_000);
        assert_eq!(parse_rate("1GiB/s").unwrap(), 1 << 30);
        assert_eq!(parse_rate("800Mbit/s").unwrap(), 100_000_000);
        assert_eq!(parse_rate("64k").unwrap(), 64_000);
        assert!(parse_rate("0").is_err());
        assert_eq!(
            (parse_size("0"), parse_size("32MiB")),
            (Ok(0), Ok(32 << 20))
        );
        for wrong in ["5MB/s", "8Mbit", "some", "3XB"] {
            assert!(parse_size(wrong).unwrap_err().contains("32MiB"), "{wrong}");
        }
        assert!(parse_rate("500XB/s").unwrap_err().contains("500MB/s"));
    }

    #[test]
    fn shown() {
        assert_eq!(show_bytes(512 << 20), "512.0 MiB");
        assert_eq!(show_bytes(17), "17 B");
        assert_eq!(show_rate(123_400_000), "123.4 MB/s");
        assert_eq!(show_rate(3_250_000_000), "3.25 GB/s");
    }
}
