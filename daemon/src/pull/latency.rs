//! How long page faults waited: from the moment the kernel's report was read until the page was mapped, in all and by
//! stage.

use std::time::Duration;

use hdrhistogram::Histogram;
use pagecopy::engine::event::{FaultFigures, Quantiles};
use serde::{Deserialize, Serialize};

/// Digits that a figure is right to.
const DIGITS: u8 = 2;

/// Where the time went. Half of all, and 99 of 100, took no longer; microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Half of them.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
}

/// What the faults of a post-copy cost, in more detail than [`FaultFigures`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Of the wait, until the page was asked for.
    pub queue_us: Stage,
    /// Of that, until its bytes were here.
    pub wire_us: Stage,
    /// Of that, until it was mapped.
    pub place_us: Stage,
    /// How many took so long: the first up to 1 us, the second up to 2, then 4, and so on.
    pub fault_us_log2: Vec<u64>,
    /// Windows of neighbours that were fetched around faults or ahead of them.
    pub prefetch_windows: u64,
    /// Those of them that the guest then got to.
    pub prefetch_hits: u64,
}

/// The moments of one fault.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waited {
    pub(super) queue: Duration,
    pub(super) wire: Duration,
    pub(super) place: Duration,
}

/// All faults so far.
#[derive(Debug)]
pub(super) struct Latency {
    all: Histogram<u64>,
    queue: Histogram<u64>,
    wire: Histogram<u64>,
    place: Histogram<u64>,
}

impl Latency {
    pub(super) fn new() -> Latency {
        // It grows with the values; these digits are in its range.
        let empty = Histogram::new(DIGITS).unwrap_or_else(|_| unreachable!("{DIGITS} digits"));
        Latency {
            all: empty.clone(),
            queue: empty.clone(),
            wire: empty.clone(),
            place: empty,
        }
    }

    pub(super) fn record(&mut self, waited: Waited) {
        let Waited { queue, wire, place } = waited;
        for (histogram, time) in [
            (&mut self.all, queue + wire + place),
            (&mut self.queue, queue),
            (&mut self.wire, wire),
            (&mut self.place, place),
        ] {
            // A time beyond the range of u64 has no room anywhere.
            let _ = histogram.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        }
    }

    pub(super) fn figures(&self, waiting: u64) -> FaultFigures {
        FaultFigures {
            faults: self.all.len(),
            faults_waiting: waiting,
            fault_us: quantiles(&self.all),
        }
    }

    pub(super) fn report(&self) -> FaultReport {
        let stage = |histogram: &Histogram<u64>| Stage {
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
        };
        FaultReport {
            queue_us: stage(&self.queue),
            wire_us: stage(&self.wire),
            place_us: stage(&self.place),
            fault_us_log2: self
                .all
                .iter_log(1, 2.0)
                .map(|step| step.count_since_last_iteration())
                .collect(),
            prefetch_windows: 0,
            prefetch_hits: 0,
        }
    }
}

fn quantiles(histogram: &Histogram<u64>) -> Quantiles {
    let at = |quantile| histogram.value_at_quantile(quantile);
    Quantiles {
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: histogram.max(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up() {
        let mut latency = Latency::new();
        for us in 1..=1000 {
            latency.record(Waited {
                queue: Duration::from_micros(us),
                wire: Duration::from_micros(2 * us),
                place: Duration::from_micros(1),
            });
        }
        let figures = latency.figures(3);
        assert_eq!((figures.faults, figures.faults_waiting), (1000, 3));
        // Two digits: within a hundredth.
        assert!((1490..=1520).contains(&figures.fault_us.p50), "{figures:?}");
        assert!((2960..=3000).contains(&figures.fault_us.p99), "{figures:?}");
        let report = latency.report();
        assert!((495..=505).contains(&report.queue_us.p50), "{report:?}");
        assert_eq!(report.fault_us_log2.iter().sum::<u64>(), 1000);
    }
}
