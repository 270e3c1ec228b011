//! `pagecopy dirty-rate`: what is looked at before a guest moves.

use std::path::PathBuf;
use std::time::Duration;

use super::client::{CliError, Client};
use super::migrate::misunderstood;
use crate::preflight::dirty_rate::{DirtyRate, DirtyRateRequest};
use crate::units::{show_bytes, show_rate};

/// Samples a guest and prints what came of it.
pub(super) async fn dirty_rate(
    client: &Client,
    vm: String,
    qmp: PathBuf,
    length: Duration,
    json: bool,
) -> Result<(), CliError> {
    let request = DirtyRateRequest {
        vm,
        qmp: std::path::absolute(&qmp).unwrap_or(qmp),
        for_ms: u64::try_from(length.as_millis()).unwrap_or(u64::MAX),
    };
    let answer = client.post("/v1/dirty-rate", &request).await?;
    if json {
        println!("{answer}");
        return Ok(());
    }
    let rate: DirtyRate = serde_json::from_value(answer).map_err(|error| misunderstood(&error))?;
    print!("{}", rate_as_text(&rate));
    Ok(())
}

fn rate_as_text(rate: &DirtyRate) -> String {
    let unseen = if rate.direct_io {
        "  not counted      what its disks read into its memory by direct I/O\n"
    } else {
        ""
    };
    format!(
        "{} writes {} of its memory\n  \
           busiest          {}\n  \
           working set      {} in {:.1} s\n  \
           memory           {}, of which {} hold something\n\
         {unseen}",
        rate.vm,
        show_rate(rate.dirty_bytes_per_s),
        show_rate(rate.peak_bytes_per_s),
        show_bytes(rate.working_set_bytes),
        rate.sampled_ms / 1e3,
        show_bytes(rate.ram_bytes),
        show_bytes(rate.populated_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_told_with_what_it_is_of() {
        let mut rate = DirtyRate {
            vm: "web".to_owned(),
            sampled_ms: 2000.0,
            attach_stop_us: 80.0,
            ram_bytes: 512 << 20,
            populated_bytes: 96 << 20,
            dirty_bytes_per_s: 52_400_000,
            peak_bytes_per_s: 60_000_000,
            working_set_bytes: 64 << 20,
            direct_io: false,
            intervals: Vec::new(),
        };
        let text = rate_as_text(&rate);
        for part in [
            "web writes 52.4 MB/s",
            "60.0 MB/s",
            "64.0 MiB in 2.0 s",
            "512.0 MiB, of which 96.0 MiB",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.lines().count(), 4, "{text}");
        rate.direct_io = true;
        assert!(rate_as_text(&rate).contains("direct I/O"));
    }
}
