//! `pagecopy set`: other limits, or another priority, for a migration that waits or is under way.

use std::time::Duration;

use super::client::{CliError, Client};
use crate::api::types::ChangeRequest;
use crate::units::{millis, parse_duration, parse_rate};

/// What `set` changes: at least one of these.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Changes {
    /// Bytes a second for pages, such as 500MB/s, or unlimited
    #[arg(long, value_name = "RATE", value_parser = parse_limit)]
    pub bandwidth_limit: Option<RateLimit>,
    /// Longest downtime, such as 50ms
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// From -100 to 100, as for migrate
    #[arg(long, value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-100..=100))]
    pub priority: Option<i32>,
}

impl Changes {
    /// The request to the daemon.
    pub fn request(self) -> ChangeRequest {
        ChangeRequest {
            bandwidth_limit: self.bandwidth_limit.map(|RateLimit(limit)| limit),
            downtime_limit_ms: self.downtime_limit.map(millis),
            priority: self.priority,
        }
    }
}

/// Bytes a second; none is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit(pub Option<u64>);

fn parse_limit(text: &str) -> Result<RateLimit, String> {
    if text == "unlimited" {
        return Ok(RateLimit(None));
    }
    let rate = parse_rate(text).map_err(|error| format!("{error}, or unlimited"))?;
    Ok(RateLimit(Some(rate)))
}

/// Has the daemon change it.
pub(super) async fn set(client: &Client, id: &str, change: Changes) -> Result<(), CliError> {
    let path = format!("/v1/migrations/{id}");
    let answer = client.patch(&path, &change.request()).await?;
    println!("{}", answer["done"].as_str().unwrap_or("changed"));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::super::{Arguments, Command};

    #[test]
    fn set_changes_something() {
        let set = |words: &[&str]| {
            let words = [&["pagecopy", "set", "ID"], words].concat();
            match Arguments::try_parse_from(words).map(|arguments| arguments.command) {
                Ok(Command::Set { change, .. }) => Ok(change.request()),
                Ok(other) => Err(format!("{other:?}")),
                Err(error) => Err(error.to_string()),
            }
        };
        let all = set(&[
            "--bandwidth-limit",
            "5MB/s",
            "--downtime-limit",
            "20ms",
            "--priority",
            "-3",
        ]);
        let all = all.unwrap();
        assert_eq!(all.bandwidth_limit, Some(Some(5_000_000)));
        assert_eq!(
            (all.downtime_limit_ms, all.priority),
            (Some(20.0), Some(-3))
        );
        let unlimited = set(&["--bandwidth-limit", "unlimited"]).unwrap();
        assert_eq!(unlimited.bandwidth_limit, Some(None));
        assert!(set(&[]).is_err());
        assert!(
            set(&["--bandwidth-limit", "fast"])
                .unwrap_err()
                .contains("unlimited")
        );
    }
}
