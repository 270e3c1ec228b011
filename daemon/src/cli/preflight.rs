//! `pagecopy preflight` and `dirty-rate`: what is looked at before a guest moves.

use std::path::PathBuf;
use std::time::Duration;

use pagecopy::preflight::{Line, Predicted, Verdict};

use super::absolute;
use super::client::{CliError, Client};
use super::migrate::misunderstood;
use crate::preflight::dirty_rate::{DirtyRate, DirtyRateRequest};
use crate::preflight::{Preflight, PreflightRequest};
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
        qmp: absolute(&qmp),
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

/// Exit status where something is warned of and nothing fails.
const WARNED: u8 = 5;

/// Looks at both hosts and prints what was found; returns the exit status.
pub(super) async fn preflight(
    client: &Client,
    vm: String,
    qmp: PathBuf,
    to: String,
    spawn: bool,
    json: bool,
) -> u8 {
    let request = PreflightRequest {
        vm,
        qmp: absolute(&qmp),
        to,
        spawn,
    };
    match looked_at(client, &request, json).await {
        Ok(Verdict::Pass) => 0,
        Ok(Verdict::Warn) => WARNED,
        Ok(Verdict::Fail) => 1,
        Err(error) => {
            eprintln!("pagecopy: {error}");
            1
        }
    }
}

/// Has the daemon look.
pub(super) async fn ask(
    client: &Client,
    request: &PreflightRequest,
) -> Result<Preflight, CliError> {
    let answer = client.post("/v1/preflight", request).await?;
    serde_json::from_value(answer).map_err(|error| CliError {
        // It has answered.
        status: Some(200),
        ..misunderstood(&error)
    })
}

async fn looked_at(
    client: &Client,
    request: &PreflightRequest,
    json: bool,
) -> Result<Verdict, CliError> {
    let answer = client.post("/v1/preflight", request).await?;
    let text = answer.to_string();
    let found: Preflight = serde_json::from_value(answer).map_err(|error| misunderstood(&error))?;
    if json {
        println!("{text}");
    } else {
        print!("{}", preflight_as_text(&found));
    }
    Ok(found.verdict)
}

fn preflight_as_text(found: &Preflight) -> String {
    let mut text = format!("{} to {}\n", found.vm, found.to);
    for line in &found.lines {
        text.push_str(&line_as_text(line));
    }
    if let Some(predicted) = &found.predicted {
        text.push_str(&prediction_as_text(predicted));
    }
    text.push_str(match found.verdict {
        Verdict::Pass => "nothing is in the way\n",
        Verdict::Warn => "nothing fails; see what is warned of\n",
        Verdict::Fail => "a migration would fail\n",
    });
    text
}

fn line_as_text(line: &Line) -> String {
    let Line {
        check,
        side,
        verdict,
        found,
        remedy,
    } = line;
    let mut text = format!(
        "  {}  {:<11}  {check:<12}  {found}\n",
        verdict.word(),
        side.word()
    );
    if !remedy.is_empty() {
        text.push_str(&format!("{:35}what to do: {remedy}\n", ""));
    }
    text
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // For people.
fn prediction_as_text(predicted: &Predicted) -> String {
    let Predicted {
        total_ms,
        downtime_ms,
        bytes,
        converges,
    } = predicted;
    let bytes = [bytes.likely, bytes.low, bytes.high].map(|bytes| show_bytes(bytes as u64));
    let head = if *converges {
        "predicted, by pre-copy"
    } else {
        "predicted, where pre-copy is given up"
    };
    format!(
        "{head}\n  \
           total            {:.2} s ({:.2} to {:.2})\n  \
           downtime         {:.1} ms ({:.1} to {:.1})\n  \
           pages            {} ({} to {})\n",
        total_ms.likely / 1e3,
        total_ms.low / 1e3,
        total_ms.high / 1e3,
        downtime_ms.likely,
        downtime_ms.low,
        downtime_ms.high,
        bytes[0],
        bytes[1],
        bytes[2],
    )
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
    fn each_line_says_whose_it_is_and_what_to_do() {
        use pagecopy::preflight::{Span, Whose};
        let span = |likely: f64| Span {
            low: likely / 2.0,
            likely,
            high: likely * 2.0,
        };
        let found = Preflight {
            vm: "web".to_owned(),
            to: "b:7070".to_owned(),
            verdict: Verdict::Fail,
            lines: vec![
                Line::pass("machine", Whose::Both, "pc-q35-10.0 on both sides"),
                Line::fail("memory", Whose::Destination, "none is free", "free some"),
            ],
            predicted: Some(Predicted {
                total_ms: span(1200.0),
                downtime_ms: span(20.0),
                bytes: span(1048576.0),
                converges: true,
            }),
            round_trip_us: None,
            goodput_bytes_per_s: None,
            dirty_rate: None,
        };
        let text = preflight_as_text(&found);
        for part in [
            "web to b:7070",
            "  pass  both         machine       pc-q35",
            "  FAIL  destination  memory        none is free",
            "what to do: free some",
            "1.20 s (0.60 to 2.40)",
            "20.0 ms (10.0 to 40.0)",
            "1.0 MiB (512.0 KiB to 2.0 MiB)",
            "a migration would fail",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

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
