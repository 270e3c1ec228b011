//! What is looked at before a guest moves, without moving it.
//!
//! `run` has the source look at itself (`own`), asks the destination to do the same (`probe`), samples how fast the guest
//! writes ([`dirty_rate`]), and has both compared and a prediction made in the pure half (`pagecopy::preflight`).

pub(crate) mod config;
pub mod dirty_rate;
mod guest;
mod host;
pub(crate) mod memory;
pub mod outcome;
pub(crate) mod own;
mod probe;
pub(crate) mod start;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::preflight::{Facts, Line, Predicted, Seen, Verdict, Whose, compare, predict};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::dial::{Target, check_host_port};
use crate::failure::Failure;
use crate::service::Service;
use crate::session::begin::{DOWNTIME_LIMIT, MAX_ROUNDS, check_name};
use crate::units::{millis, show_bytes, show_rate};
use dirty_rate::{DirtyRate, DirtyRateRequest};
use own::Own;
use probe::{Asked, Link};

/// How long the guest's writes are sampled, in milliseconds.
const SAMPLE_MS: u64 = 500;
/// What to do about a guest that writes too fast.
const TOO_FAST: &str = "allow post-copy (migrate --allow-postcopy), have it slowed (migrate --throttle auto), raise --downtime-limit, give it more \
    bandwidth, or move the guest when it writes less";

/// `POST /v1/preflight`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PreflightRequest {
    /// The guest's name, the same on both sides.
    pub vm: String,
    /// QMP socket of the QEMU that it would leave.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// The other daemon: `HOST:PORT`.
    pub to: String,
    /// No QEMU waits there: one would be started (`spawn` of a migration).
    #[serde(default)]
    pub spawn: bool,
}

/// The answer to `POST /v1/preflight`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Preflight {
    /// The guest's name.
    pub vm: String,
    /// The other daemon, as it was asked for.
    pub to: String,
    /// The worst of the lines.
    pub verdict: Verdict,
    /// What was looked at.
    pub lines: Vec<Line>,
    /// What a migration by pre-copy would likely take; none where something fails that it depends on.
    pub predicted: Option<Predicted>,
    /// There and back, in microseconds.
    pub round_trip_us: Option<f64>,
    /// Bytes a second that the link carried.
    pub goodput_bytes_per_s: Option<f64>,
    /// What was sampled of the guest.
    pub dirty_rate: Option<DirtyRate>,
}

/// Looks at everything.
///
/// # Errors
/// The request is wrong, or the guest is being moved. What is in the way of a migration is no error, but a line.
pub(crate) async fn run(
    service: &Arc<Service>,
    request: PreflightRequest,
) -> Result<Preflight, Failure> {
    check_name(&request.vm)?;
    if !request.to.starts_with("unix:") {
        check_host_port(&request.to)?;
    }
    service.refuse_in_doubt(&request.vm, &request.qmp)?;
    service.refuse_if_moving(&request.vm)?;
    tracing::info!(vm = request.vm, to = request.to, "preflight");
    let own = own::source(service, &request.qmp).await;
    let target = Target {
        to: request.to.clone(),
        security: service.security.clone(),
        rdma: None,
        names: Vec::new(),
    };
    let asked = probe::ask(&target, &request.vm, &service.config.name, own.ram()).await;
    let mut lines = own.facts.lines.clone();
    let sampled = sample(service, &request, &own).await;
    match &asked {
        Err(failure) => lines.push(Line::fail(
            "network",
            Whose::Network,
            failure.what.clone(),
            failure.remedy.clone(),
        )),
        Ok(asked) => lines.extend(of_both(&own.facts, asked, request.spawn)),
    }
    let link = asked.ok().map(|asked| asked.link);
    let mut predicted = None;
    match (sampled, &link) {
        (Some(Ok(rate)), Some(link)) => {
            let seen = seen(service, &rate, link);
            let prediction = predict(&seen);
            lines.push(told(&prediction, &rate));
            service.foreseen.keep(&request.vm, &request.to, prediction);
            predicted = Some((prediction, rate));
        }
        (Some(Err(failure)), Some(_)) => lines.push(Line::warn(
            "prediction",
            Whose::Source,
            format!("none: {}", failure.what),
            failure.remedy,
        )),
        // What keeps it from being made has a line of its own.
        _ => {}
    }
    let (predicted, dirty_rate) = predicted.unzip();
    Ok(Preflight {
        vm: request.vm,
        to: request.to,
        verdict: verdict(&lines),
        lines,
        predicted,
        round_trip_us: link.as_ref().map(|link| millis(link.round_trip) * 1e3),
        goodput_bytes_per_s: link.as_ref().map(|link| link.goodput.likely),
        dirty_rate,
    })
}

fn verdict(lines: &[Line]) -> Verdict {
    let verdicts = lines.iter().map(|line| line.verdict);
    verdicts.max().unwrap_or_default()
}

/// How fast the guest writes, if it is one that could move.
async fn sample(
    service: &Arc<Service>,
    request: &PreflightRequest,
    own: &Own,
) -> Option<Result<DirtyRate, Failure>> {
    if !own.is_fit() {
        return None;
    }
    let request = DirtyRateRequest {
        vm: request.vm.clone(),
        qmp: request.qmp.clone(),
        for_ms: SAMPLE_MS,
    };
    Some(dirty_rate::sample(service, request).await)
}

/// What the destination told, what both are compared in, and what is between them.
fn of_both(own: &Facts, asked: &Asked, spawn: bool) -> Vec<Line> {
    let mut lines = asked.facts.lines.clone();
    if spawn && asked.facts.qemu.is_none() {
        lines
            .iter_mut()
            .filter(|line| line.check == own::RECEIVER)
            .for_each(|line| *line = spawned());
    }
    // It speaks of itself, whatever it says.
    lines
        .iter_mut()
        .for_each(|line| line.side = Whose::Destination);
    lines.extend(compare(own, &asked.facts));
    let Link {
        kind,
        channels,
        round_trip,
        goodput,
        bytes,
        took,
    } = &asked.link;
    let found = format!(
        "{kind}, {channels} data channels: round trip {:.0} us, {} ({} sent in {:.0} ms)",
        millis(*round_trip) * 1e3,
        rate(goodput.likely),
        show_bytes(*bytes),
        millis(*took)
    );
    lines.push(Line::pass("network", Whose::Network, found));
    lines
}

/// What is said of a QEMU that is yet to be started.
fn spawned() -> Line {
    let found = "no QEMU waits; one would be started, if the spawn-policy there allows it, which is asked when the guest moves";
    Line::pass(own::RECEIVER, Whose::Destination, found)
}

#[allow(clippy::cast_precision_loss)] // As for every measured rate.
fn seen(service: &Service, rate: &DirtyRate, link: &Link) -> Seen {
    Seen {
        first: None,
        populated: rate.populated_bytes,
        dirty_bytes_s: rate.dirty_bytes_per_s as f64,
        peak_bytes_s: rate.peak_bytes_per_s as f64,
        working_set: rate.working_set_bytes,
        sampled: Duration::try_from_secs_f64(rate.sampled_ms / 1e3).unwrap_or_default(),
        goodput: link.goodput,
        round_trip: link.round_trip,
        fixed: service.store.downtime.get(),
        limit: DOWNTIME_LIMIT,
        max_rounds: MAX_ROUNDS,
    }
}

fn told(predicted: &Predicted, dirty: &DirtyRate) -> Line {
    let written = show_rate(dirty.dirty_bytes_per_s);
    if predicted.converges {
        let found = format!("the guest writes {written}, and the link carries it away");
        return Line::pass("prediction", Whose::Both, found);
    }
    Line::warn(
        "prediction",
        Whose::Both,
        format!(
            "the guest writes {written}, too fast for pre-copy: the downtime would stay at about {:.0} ms, the limit is {:.0} ms",
            predicted.downtime_ms.likely,
            millis(DOWNTIME_LIMIT)
        ),
        TOO_FAST,
    )
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // For people, and `as` saturates.
fn rate(bytes_per_s: f64) -> String {
    show_rate(bytes_per_s as u64)
}
