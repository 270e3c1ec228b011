//! Telling people: the API's readers and the log.

use std::sync::Arc;

use pagecopy::engine::MigrationId;
use pagecopy::engine::event::{Figures, Finished as EngineEnd, Report, State};

use super::Clock;
use crate::failure::Failure;
use crate::lane::{Lane, Moved};
use crate::migrations::{Finished, Migration};
use crate::pull::FaultReport;
use crate::units::millis;

/// Tells people: the API's readers and the log.
pub(crate) fn tell(migration: &Migration, report: &Report) {
    let id = migration.shown().id;
    match report {
        Report::State { state } => tracing::info!(%id, ?state, "migration"),
        Report::Round {
            round,
            ms,
            pages_sent,
            pages_zero,
            pages_dirty,
            pages_held,
            encoded,
            scan_us,
            predicted_downtime_ms,
            throttle_percent,
            decision,
        } => {
            let (ms, predicted_ms) = (tenths(*ms), tenths(*predicted_downtime_ms));
            tracing::info!(
                %id, round, ms, pages_sent, pages_zero, pages_dirty, pages_held,
                saved = encoded.saved(), scan_us, predicted_ms, throttle_percent, decision, "round"
            );
        }
        Report::Paused { reason } => tracing::warn!(%id, reason, "paused"),
        Report::Switched { mode, switch } => tracing::info!(
            %id, mode = mode.word(), sent_bytes = switch.sent_bytes, lacking_bytes = switch.lacking_bytes, "switched over"
        ),
        Report::Throttle { throttle_percent } => {
            tracing::info!(%id, throttle_percent, "the guest is kept from writing");
        }
        Report::Channels { channels, decision } => {
            tracing::info!(%id, channels, decision, "data channels");
        }
        Report::Notice { text } => tracing::info!(%id, text, "notice"),
        Report::Progress { .. } | Report::Postcopy { .. } => {}
    }
    migration.report(report);
}

/// Tells the end of a migration that failed before its engine began.
pub(crate) fn end_early(id: MigrationId, migration: &Migration, failure: &Failure) {
    let state = if failure.what == CANCELLED {
        State::Cancelled
    } else {
        State::Failed
    };
    let finished = Finished::new(id, state, Some(failure), Figures::default());
    tracing::warn!(id = %finished.id, error = finished.error, "migration ended");
    migration.finish(finished);
}

/// What a migration that is cancelled before its engine began says.
pub(crate) const CANCELLED: &str = "the operator cancelled the migration";

/// Tells the end of a migration with its figures.
pub(crate) struct Teller {
    id: MigrationId,
    migration: Arc<Migration>,
    clock: Clock,
    moved: Vec<Arc<Moved>>,
    /// Where in `moved` the channels of the last connection begin, its control channel first.
    connection: usize,
    began_over: Option<&'static str>,
    ended_over: Option<&'static str>,
}

impl Teller {
    pub(crate) fn new(id: MigrationId, migration: Arc<Migration>, clock: Clock) -> Teller {
        Teller {
            id,
            migration,
            clock,
            moved: Vec::new(),
            connection: 0,
            began_over: None,
            ended_over: None,
        }
    }

    /// Counts the bytes of a connection's control channel from now on.
    pub(crate) fn add_control<C: Send>(&mut self, lane: &Lane<C>) {
        self.connection = self.moved.len();
        self.moved.push(lane.moved());
    }

    /// The same for one of its data channels.
    pub(crate) fn add_data<C: Send>(&mut self, lane: &Lane<C>) {
        self.began_over.get_or_insert(lane.kind());
        self.moved.push(lane.moved());
    }

    /// What the data channels went over when they were given up, where no lane has seen that.
    pub(crate) fn ended_over(&mut self, kinds: impl Iterator<Item = &'static str>) {
        self.ended_over = least(kinds).or(self.ended_over);
    }

    /// What the migration began over and ended over: its data channels, or the control channel where it came to no others.
    fn over(&self) -> [Option<&'static str>; 2] {
        let mut last = self.moved.iter().skip(self.connection);
        let control = last.next().map(|moved| moved.kind());
        let data = least(last.map(|moved| moved.kind()));
        [
            self.began_over.or(control),
            self.ended_over.or(data).or(control),
        ]
    }

    pub(crate) fn publish(&self, end: &EngineEnd) {
        self.publish_with_faults(end, None);
    }

    /// The same, of a destination that fetched pages.
    pub(crate) fn publish_with_faults(&self, end: &EngineEnd, faults: Option<FaultReport>) {
        let figures = Figures {
            total_ms: millis(self.clock.elapsed()),
            ..end.figures.clone()
        };
        let mut finished = Finished::new(self.id, end.state, end.failure.as_ref(), figures);
        finished.faults = faults;
        [finished.transport, finished.transport_at_end] =
            self.over().map(|kind| kind.map(str::to_owned));
        finished.bytes_on_wire = self.moved.iter().map(|moved| moved.bytes()).sum();
        log_end(&finished);
        self.migration.finish(finished);
    }
}

/// RDMA is what they go over when it is so for all of them.
fn least(mut kinds: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let first = kinds.next()?;
    Some(match first {
        "rdma" => kinds.find(|kind| *kind != "rdma").unwrap_or(first),
        other => other,
    })
}

fn log_end(end: &Finished) {
    let (id, status, figures) = (end.id, end.status, &end.figures);
    let [downtime_ms, predicted_ms, fixed_ms] = [
        figures.downtime_ms,
        figures.predicted_downtime_ms,
        figures.fixed_downtime_ms,
    ]
    .map(|ms| ms.map(tenths));
    let (total_ms, rounds, bytes_on_wire) =
        (tenths(figures.total_ms), figures.rounds, end.bytes_on_wire);
    match &end.error {
        None => tracing::info!(
            %id, ?status, total_ms, downtime_ms, predicted_ms, fixed_ms, rounds, bytes_on_wire,
            goodput_mbit_s = tenths(figures.goodput_mbit_s), attach_stop_us = figures.attach_stop_us, "migration ended"
        ),
        Some(error) => {
            tracing::warn!(%id, ?status, total_ms, downtime_ms, rounds, bytes_on_wire, error, "migration ended");
        }
    }
}

/// For people: a tenth is enough.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_go_over_rdma_when_all_of_them_do() {
        let over = |kinds: &[&'static str]| least(kinds.iter().copied());
        assert_eq!(over(&[]), None);
        assert_eq!(over(&["rdma", "rdma"]), Some("rdma"));
        assert_eq!(over(&["rdma", "tls"]), Some("tls"));
        assert_eq!(over(&["tls", "rdma"]), Some("tls"));
        assert_eq!(over(&["tcp", "tcp"]), Some("tcp"));
    }
}
