//! What was predicted of a migration, beside what became of it.
//!
//! When round 0 is over, it has shown what the link carries and how fast the guest writes: from there on the rest is predicted as a
//! preflight predicts the whole. Only of pre-copy: when a guest that goes first has all of its memory depends on what it touches.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::engine::event::{Figures, Report, Way};
use pagecopy::limits::MIN_PAGE_SIZE;
use pagecopy::memory::BlockSpec;
use pagecopy::preflight::{FirstRound, Predicted, Seen, Span, predict};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::types::{MigrationRequest, Mode};
use crate::service::Service;
use crate::session::begin::{DOWNTIME_LIMIT, MAX_ROUNDS};

/// How long what a preflight has predicted holds: a guest does something else after a while.
const FRESH: Duration = Duration::from_secs(600);
/// By how much rounds that follow may go slower and faster than the first.
const GOODPUT_ROOM: [f64; 2] = [0.6, 1.3];
/// How much faster than in the first round the guest may write.
const PEAK: f64 = 1.5;

/// When it was predicted, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Before the migration, by a sample of the guest and a probe of the link.
    Preflight,
    /// When round 0 was over, by what it had taken.
    FirstRound,
}

/// An amount as it was predicted, and as it was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Against {
    /// Hardly less, likely, hardly more.
    #[serde(flatten)]
    pub span: Span,
    /// As it was; none where it is not known, or the migration has not completed.
    pub actual: Option<f64>,
}

/// What was predicted of a migration, beside what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Outcome {
    /// When it was predicted, and by what.
    pub when: When,
    /// Milliseconds in all.
    pub total_ms: Against,
    /// Milliseconds in which the guest stood still.
    pub downtime_ms: Against,
    /// Bytes of pages that were sent, before they were encoded.
    pub bytes: Against,
}

/// What of a request, and of this host, a prediction depends on; and what was predicted.
#[derive(Debug)]
pub(crate) struct Foresight {
    begun: Instant,
    fixed: Duration,
    limit: Duration,
    max_rounds: u32,
    /// Bytes of each page that is counted.
    page: u64,
    predicted: Mutex<Option<(When, Predicted)>>,
}

impl Foresight {
    /// Of a migration that begins now. None of one that is not pre-copy.
    pub(crate) fn of(request: &MigrationRequest, service: &Service) -> Option<Foresight> {
        let foresight = Foresight::with(request, service.store.downtime.get())?;
        // A preflight predicts for these.
        if request.bandwidth_limit.is_none() && request.downtime_limit_ms.is_none() {
            let lately = service.foreseen.take(&request.vm, &request.to);
            *foresight.lock() = lately.map(|predicted| (When::Preflight, predicted));
        }
        Some(foresight)
    }

    /// `fixed` is the part of the downtime that no bytes cause.
    fn with(request: &MigrationRequest, fixed: Duration) -> Option<Foresight> {
        let limit = request.downtime_limit_ms.map(|ms| ms / 1e3);
        matches!(request.mode, Mode::Auto | Mode::Precopy).then(|| Foresight {
            begun: Instant::now(),
            fixed,
            limit: limit
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .unwrap_or(DOWNTIME_LIMIT),
            max_rounds: request.max_rounds.unwrap_or(MAX_ROUNDS),
            page: MIN_PAGE_SIZE,
            predicted: Mutex::default(),
        })
    }

    /// Of a guest with these RAMBlocks. None where pages of several sizes are counted as if they were alike.
    pub(crate) fn of_memory(self, specs: &[BlockSpec]) -> Option<Foresight> {
        let page = specs.first()?.page_size;
        let alike = specs.iter().all(|spec| spec.page_size == page);
        alike.then_some(Foresight { page, ..self })
    }

    /// Takes what the engine reports: the end of round 0 says what the rest will take, unless a preflight has said it.
    pub(crate) fn hear(&self, report: &Report) {
        if let Report::Round {
            round: 0,
            ms,
            pages_sent,
            pages_dirty,
            ..
        } = report
        {
            let mut predicted = self.lock();
            if predicted.is_none() {
                let seen = self.seen(*ms, *pages_sent, *pages_dirty);
                *predicted = Some((When::FirstRound, predict(&seen)));
            }
        }
    }

    #[allow(clippy::cast_precision_loss)] // Of a measured rate the last digit says nothing.
    fn seen(&self, ms: f64, pages_sent: u64, pages_dirty: u64) -> Seen {
        let seconds = (ms / 1e3).max(1e-6);
        let [slow, fast] = GOODPUT_ROOM;
        let [bytes, dirtied] =
            [pages_sent, pages_dirty].map(|pages| pages.saturating_mul(self.page));
        let [goodput, rate] = [bytes, dirtied].map(|bytes| bytes as f64 / seconds);
        Seen {
            first: Some(FirstRound {
                elapsed: self.begun.elapsed(),
                bytes,
                dirtied,
            }),
            populated: bytes,
            dirty_bytes_s: rate,
            peak_bytes_s: rate * PEAK,
            working_set: dirtied,
            sampled: Duration::try_from_secs_f64(seconds).unwrap_or_default(),
            goodput: Span {
                low: goodput * slow,
                likely: goodput,
                high: goodput * fast,
            },
            round_trip: Duration::ZERO,
            fixed: self.fixed,
            limit: self.limit,
            max_rounds: self.max_rounds,
        }
    }

    /// What was predicted beside `figures`, with which the migration ended; `completed` or not.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn outcome(&self, figures: &Figures, completed: bool) -> Option<Outcome> {
        // What has gone first after all was not predicted.
        let (when, predicted) = (*self.lock()).filter(|_| figures.way() == Way::Precopy)?;
        let against = |span, actual: Option<f64>| Against {
            span,
            actual: actual.filter(|_| completed),
        };
        let bytes = figures.pages_sent.saturating_mul(self.page) as f64;
        Some(Outcome {
            when,
            total_ms: against(predicted.total_ms, Some(figures.total_ms)),
            downtime_ms: against(predicted.downtime_ms, figures.downtime_ms),
            bytes: against(predicted.bytes, Some(bytes)),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(When, Predicted)>> {
        self.predicted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What preflights have predicted lately, by guest.
#[derive(Debug, Default)]
pub(crate) struct Lately(Mutex<BTreeMap<String, Prediction>>);

#[derive(Debug)]
struct Prediction {
    to: String,
    at: Instant,
    predicted: Predicted,
}

impl Lately {
    /// A preflight of a migration of `vm` to `to` has predicted this.
    pub(crate) fn keep(&self, vm: &str, to: &str, predicted: Predicted) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, one| one.at.elapsed() < FRESH);
        let (to, at) = (to.to_owned(), Instant::now());
        all.insert(vm.to_owned(), Prediction { to, at, predicted });
    }

    /// What was predicted of the same migration not long ago.
    fn take(&self, vm: &str, to: &str) -> Option<Predicted> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.remove(vm)?;
        (one.to == to && one.at.elapsed() < FRESH).then_some(one.predicted)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use pagecopy::engine::encoding::Encoded;

    fn foresight() -> Foresight {
        let request = serde_json::json!({ "vm": "v", "qmp": "/q", "to": "b:1" });
        let request = serde_json::from_value(request).unwrap();
        Foresight::with(&request, Duration::from_millis(20)).unwrap()
    }

    fn round(round: u32, pages_dirty: u64) -> Report {
        Report::Round {
            round,
            ms: 100.0,
            pages_sent: 25_600,
            pages_zero: 0,
            encoded: Encoded::default(),
            pages_dirty,
            pages_held: 0,
            scan_us: 100,
            predicted_downtime_ms: 20.0,
            throttle_percent: 0,
            decision: String::new(),
        }
    }

    fn figures() -> Figures {
        Figures {
            total_ms: 150.0,
            downtime_ms: Some(25.0),
            pages_sent: 25_700,
            ..Figures::default()
        }
    }

    #[test]
    fn the_first_round_predicts_the_rest() {
        let foresight = foresight();
        assert_eq!(foresight.outcome(&figures(), true), None);
        foresight.hear(&round(0, 256));
        foresight.hear(&round(1, 25_600));
        let outcome = foresight.outcome(&figures(), true).unwrap();
        assert_eq!(outcome.when, When::FirstRound);
        // 1 MiB at 1 GB/s, and the fixed part.
        let downtime = outcome.downtime_ms;
        assert!((20.0..23.0).contains(&downtime.span.likely), "{outcome:?}");
        assert_eq!(downtime.actual, Some(25.0));
        assert_eq!(outcome.bytes.actual, Some(25_700.0 * 4096.0));
        assert!(outcome.bytes.span.likely >= 25_600.0 * 4096.0);
        let failed = foresight.outcome(&figures(), false).unwrap();
        assert_eq!(failed.total_ms.actual, None);
    }

    #[test]
    fn huge_pages_are_counted_as_what_they_hold() {
        let spec = |page_size| BlockSpec {
            name: "ram".to_owned(),
            size: 1 << 30,
            page_size,
        };
        let huge = foresight().of_memory(&[spec(2 << 20)]).unwrap();
        huge.hear(&round(0, 256));
        let outcome = huge.outcome(&figures(), true).unwrap();
        let huge_page = f64::from(2 << 20);
        assert_eq!(outcome.bytes.actual, Some(25_700.0 * huge_page));
        assert!(outcome.bytes.span.likely >= 25_600.0 * huge_page);
        let both = [spec(4096), spec(2 << 20)];
        assert!(foresight().of_memory(&both).is_none());
    }

    #[test]
    fn a_preflight_comes_first_and_what_went_before_its_memory_was_not_predicted() {
        let foresight = foresight();
        let lately = Lately::default();
        lately.keep("v", "b:1", Predicted::default());
        assert_eq!(lately.take("v", "c:1"), None, "of another");
        lately.keep("v", "b:1", Predicted::default());
        let predicted = lately.take("v", "b:1").unwrap();
        assert_eq!(lately.take("v", "b:1"), None, "it holds once");
        *foresight.lock() = Some((When::Preflight, predicted));
        foresight.hear(&round(0, 256));
        let outcome = foresight.outcome(&figures(), true).unwrap();
        assert_eq!(outcome.when, When::Preflight);
        let mut first = figures();
        first.lacking_bytes = Some(4096);
        assert_eq!(foresight.outcome(&first, true), None);
        let request =
            serde_json::json!({ "vm": "v", "qmp": "/q", "to": "b:1", "mode": "postcopy" });
        let request = serde_json::from_value(request).unwrap();
        assert!(Foresight::with(&request, Duration::ZERO).is_none());
    }
}
