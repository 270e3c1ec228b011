//! `/metrics`, for Prometheus: what is counted as migrations end, and what is looked at when somebody asks.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pagecopy::engine::event::State as MigrationState;
use pagecopy::engine::journal::Side;
use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, Result, TextEncoder,
};
use std::sync::Arc;

use super::problem::Problems;
use crate::failure::{Failure, host};
use crate::migrations::{Finished, Migration, Shown};
use crate::service::Service;
use crate::sys;

/// Seconds of a guest's downtime.
const DOWNTIMES: [f64; 12] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 30.0,
];
/// Seconds of a whole migration.
const DURATIONS: [f64; 12] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0,
];
const SIDES: [Side; 2] = [Side::Source, Side::Destination];
const RESULTS: [MigrationState; 3] = [
    MigrationState::Completed,
    MigrationState::Failed,
    MigrationState::Cancelled,
];
const UNFINISHED: [MigrationState; 6] = [
    MigrationState::Pending,
    MigrationState::Preparing,
    MigrationState::Migrating,
    MigrationState::Completing,
    MigrationState::Paused,
    MigrationState::InDoubt,
];

/// What adds up for as long as the daemon runs.
#[derive(Debug)]
pub struct Counters {
    registry: Registry,
    migrations: IntCounterVec,
    duration: HistogramVec,
    downtime: Histogram,
    predicted: Histogram,
    postcopy: Histogram,
    wire_bytes: IntCounterVec,
    pages: IntCounterVec,
    page_faults: IntCounterVec,
}

impl Counters {
    /// All at nothing.
    pub(crate) fn new() -> Counters {
        Counters::registered().unwrap_or_else(|error| unreachable!("names are distinct: {error}"))
    }

    fn registered() -> Result<Counters> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = Histogram::with_opts(options)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let options = HistogramOpts::new(
            "pagecopy_migration_duration_seconds",
            "From the start to the end of migrations that completed.",
        );
        let duration = HistogramVec::new(options.buckets(DURATIONS.to_vec()), &["side"])?;
        registry.register(Box::new(duration.clone()))?;
        let build = IntGaugeVec::new(
            Opts::new("pagecopy_build_info", "Which pagecopyd this is."),
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        let all = Counters {
            migrations: counters(
                "pagecopy_migrations_total",
                "Migrations that have ended, by side and result.",
                &["side", "result"],
            )?,
            downtime: histogram(
                "pagecopy_downtime_seconds",
                "How long guests that left stood still, as their source measured it.",
                &DOWNTIMES,
            )?,
            predicted: histogram(
                "pagecopy_predicted_downtime_seconds",
                "The same as predicted at the moment of the switchover.",
                &DOWNTIMES,
            )?,
            postcopy: histogram(
                "pagecopy_postcopy_duration_seconds",
                "How long guests that arrived first lacked memory.",
                &DURATIONS,
            )?,
            wire_bytes: counters(
                "pagecopy_wire_bytes_total",
                "Bytes on all channels of migrations that have ended, both ways.",
                &["side"],
            )?,
            pages: counters(
                "pagecopy_pages_total",
                "Pages sent by migrations from here that have ended.",
                &["kind"],
            )?,
            page_faults: counters(
                "pagecopy_page_faults_total",
                "Page faults that waited for pages from their source, of migrations that have ended.",
                &["side"],
            )?,
            duration,
            registry,
        };
        // A rate needs a beginning: what has not happened yet is nothing, and not absent.
        for side in SIDES {
            for result in RESULTS {
                let _ = all
                    .migrations
                    .with_label_values(&[side.word(), result.word()]);
            }
            let _ = all.duration.with_label_values(&[side.word()]);
            let _ = all.wire_bytes.with_label_values(&[side.word()]);
            let _ = all.page_faults.with_label_values(&[side.word()]);
        }
        for kind in ["data", "zero"] {
            let _ = all.pages.with_label_values(&[kind]);
        }
        Ok(all)
    }

    /// A migration has ended so. One that is in doubt ends once more.
    pub(crate) fn finished(&self, side: Side, finished: &Finished) {
        if !RESULTS.contains(&finished.status) {
            return;
        }
        let figures = &finished.figures;
        let (here, result) = (side.word(), finished.status.word());
        self.migrations.with_label_values(&[here, result]).inc();
        self.wire_bytes
            .with_label_values(&[here])
            .inc_by(finished.bytes_on_wire);
        let faults = figures.faults.map_or(0, |faults| faults.faults);
        self.page_faults.with_label_values(&[here]).inc_by(faults);
        if side == Side::Source {
            self.pages
                .with_label_values(&["data"])
                .inc_by(figures.pages_sent);
            self.pages
                .with_label_values(&["zero"])
                .inc_by(figures.pages_zero);
        }
        if finished.status != MigrationState::Completed {
            return;
        }
        let seconds = |ms: f64| ms / 1e3;
        self.duration
            .with_label_values(&[here])
            .observe(seconds(figures.total_ms));
        let observe = |histogram: &Histogram, ms: Option<f64>| {
            ms.into_iter().for_each(|ms| histogram.observe(seconds(ms)));
        };
        match side {
            Side::Source => {
                observe(&self.downtime, figures.downtime_ms);
                observe(&self.predicted, figures.predicted_downtime_ms);
            }
            Side::Destination => observe(&self.postcopy, figures.postcopy_ms),
        }
    }
}

/// What is so now, of migrations that have not ended.
fn now(migrations: &[Arc<Migration>]) -> Result<Vec<Box<dyn Collector>>> {
    let states = IntGaugeVec::new(
        Opts::new(
            "pagecopy_migrations",
            "Migrations that have not ended, by side and state.",
        ),
        &["side", "state"],
    )?;
    for side in SIDES {
        for state in UNFINISHED {
            states
                .with_label_values(&[side.word(), state.word()])
                .set(0);
        }
    }
    let gauge = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["vm", "side"]);
    // Each with the member of a progress event that it shows.
    let gauges = [
        (
            gauge(
                "pagecopy_migration_memory_bytes",
                "Memory of a guest that is being migrated.",
            )?,
            "total_bytes",
        ),
        (
            gauge(
                "pagecopy_migration_remaining_bytes",
                "What is still to be sent before the switchover.",
            )?,
            "remaining_bytes",
        ),
        (
            gauge(
                "pagecopy_migration_goodput_bytes_per_second",
                "Pages that leave.",
            )?,
            "goodput_bytes_s",
        ),
        (
            gauge(
                "pagecopy_migration_dirty_bytes_per_second",
                "Pages that the guest writes.",
            )?,
            "dirty_bytes_s",
        ),
        (
            gauge(
                "pagecopy_migration_lacking_bytes",
                "What a guest that has gone first lacks: it would be lost with its source.",
            )?,
            "lacking_bytes",
        ),
        (
            gauge(
                "pagecopy_migration_waiting_page_faults",
                "Page faults that wait now.",
            )?,
            "faults_waiting",
        ),
    ];
    for migration in migrations.iter().filter(|migration| !migration.is_over()) {
        let Shown {
            vm,
            side,
            state,
            progress,
            ..
        } = migration.shown();
        states.with_label_values(&[side.word(), state.word()]).inc();
        for (gauge, member) in &gauges {
            let value = progress
                .as_ref()
                .and_then(|progress| progress.get(member)?.as_f64());
            if let Some(value) = value {
                gauge
                    .with_label_values(&[vm.as_str(), side.word()])
                    .set(value);
            }
        }
    }
    let gauges = gauges
        .into_iter()
        .map(|(gauge, _)| Box::new(gauge) as Box<dyn Collector>);
    Ok(std::iter::once(Box::new(states) as Box<dyn Collector>)
        .chain(gauges)
        .collect())
}

/// What this process has allocated, where the C library says so. What is kept of migrations that have ended is bounded: this stays
/// level, and what does not is a leak.
fn allocated() -> Result<Option<IntGauge>> {
    let gauge = IntGauge::new(
        "pagecopy_allocated_bytes",
        "Memory that pagecopyd has allocated and not freed.",
    )?;
    Ok(sys::allocated_bytes().map(|bytes| {
        gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        gauge
    }))
}

fn text(service: &Service) -> Result<Vec<u8>> {
    let mut families = service.migrations.counters().registry.gather();
    for collector in now(&service.migrations.list())? {
        families.extend(
            collector
                .collect()
                .into_iter()
                .filter(|family| !family.get_metric().is_empty()),
        );
    }
    families.extend(allocated()?.iter().flat_map(Collector::collect));
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(text)
}

/// Everything that Prometheus can be told.
#[utoipa::path(
    get, path = "/metrics", tag = "daemon", operation_id = "metrics",
    responses((status = 200, description = "Prometheus' text format.", body = String, content_type = "text/plain"), Problems)
)]
pub(super) async fn metrics(
    State(service): State<Arc<Service>>,
) -> std::result::Result<impl IntoResponse, super::problem::ApiError> {
    let text = text(&service).map_err(|error| -> Failure {
        host(
            format!("the metrics cannot be written: {error}"),
            "report this",
        )
    })?;
    Ok(([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text))
}
