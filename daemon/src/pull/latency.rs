//! How long page faults waited: until the page was mapped, in all, by stage, and by the vCPU that waited.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hdrhistogram::Histogram;
use pagecopy::engine::event::{FaultFigures, Quantiles};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::shared::lock;

/// Digits that a figure is right to.
const DIGITS: u8 = 2;
/// Most vCPUs that are counted each for itself.
const MAX_VCPUS: usize = 256;

/// Where the time went. Half of all, and 99 of 100, took no longer; microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stage {
    /// Half of them.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
}

/// What the faults of a post-copy cost, in more detail than [`FaultFigures`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FaultReport {
    /// Of the wait, until the kernel's report was read, as far as that is known.
    pub read_us: Stage,
    /// Of that, until the page was asked for.
    pub queue_us: Stage,
    /// Of that, until its bytes were here.
    pub wire_us: Stage,
    /// Of that, until it was mapped.
    pub place_us: Stage,
    /// How many took so long: the first up to 1 us, the second up to 2, then 4, and so on.
    pub fault_us_log2: Vec<u64>,
    /// Of each vCPU that has waited, up to 256 of them.
    pub vcpu_faults: Vec<VcpuFaults>,
    /// Of all other threads: QEMU's own, the kernel's, and vCPUs that QEMU has not named.
    pub other_faults: ThreadFaults,
    /// Windows of neighbours that were fetched around faults or ahead of them.
    pub prefetch_windows: u64,
    /// Those of them that the guest then got to.
    pub prefetch_hits: u64,
}

/// What one vCPU waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuFaults {
    /// Its index.
    pub vcpu: u32,
    /// How often, and how long.
    #[serde(flatten)]
    pub waited: ThreadFaults,
}

/// What a thread waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ThreadFaults {
    /// How often.
    pub faults: u64,
    /// How long, in microseconds.
    pub fault_us: Quantiles,
}

/// A vCPU and the thread that runs it, in QEMU's pid namespace: so QEMU names it, and so do its page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vcpu {
    pub(crate) index: u32,
    pub(crate) thread: u32,
}

/// The faults of a post-copy, to say whose they are: what came before is counted among the others'.
#[derive(Clone, Debug)]
pub(crate) struct Vcpus(Arc<Mutex<Latency>>);

impl Vcpus {
    pub(crate) fn name(&self, vcpus: Vec<Vcpu>) {
        lock(&self.0).name(vcpus);
    }
}

/// Shared by the threads that fetch.
#[derive(Debug)]
pub(super) struct Latencies(Arc<Mutex<Latency>>);

impl Latencies {
    pub(super) fn new() -> Latencies {
        Latencies(Arc::new(Mutex::new(Latency::new())))
    }

    pub(super) fn vcpus(&self) -> Vcpus {
        Vcpus(Arc::clone(&self.0))
    }

    pub(super) fn record(&self, served: impl IntoIterator<Item = Waited>) {
        let mut latency = lock(&self.0);
        for waited in served {
            latency.record(waited);
        }
    }

    pub(super) fn figures(&self, waiting: u64) -> FaultFigures {
        lock(&self.0).figures(waiting)
    }

    pub(super) fn report(&self) -> FaultReport {
        lock(&self.0).report()
    }
}

/// The stages of one fault.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waited {
    pub(super) thread: u32,
    pub(super) read: Duration,
    pub(super) queue: Duration,
    pub(super) wire: Duration,
    pub(super) place: Duration,
}

/// All faults so far.
#[derive(Debug)]
struct Latency {
    all: Histogram<u64>,
    read: Histogram<u64>,
    queue: Histogram<u64>,
    wire: Histogram<u64>,
    place: Histogram<u64>,
    vcpus: Vec<(Vcpu, Histogram<u64>)>,
    other: Histogram<u64>,
}

/// It grows with the values.
fn empty() -> Histogram<u64> {
    Histogram::new(DIGITS).unwrap_or_else(|_| unreachable!("{DIGITS} digits are in its range"))
}

impl Latency {
    fn new() -> Latency {
        Latency {
            all: empty(),
            read: empty(),
            queue: empty(),
            wire: empty(),
            place: empty(),
            vcpus: Vec::new(),
            other: empty(),
        }
    }

    fn name(&mut self, vcpus: Vec<Vcpu>) {
        self.vcpus = vcpus
            .into_iter()
            .take(MAX_VCPUS)
            .map(|vcpu| (vcpu, empty()))
            .collect();
    }

    fn record(&mut self, waited: Waited) {
        let Waited {
            thread,
            read,
            queue,
            wire,
            place,
        } = waited;
        let all = read + queue + wire + place;
        let vcpu = self
            .vcpus
            .iter_mut()
            .find(|(vcpu, _)| vcpu.thread == thread);
        let who = vcpu.map_or(&mut self.other, |(_, histogram)| histogram);
        for (histogram, time) in [
            (who, all),
            (&mut self.all, all),
            (&mut self.read, read),
            (&mut self.queue, queue),
            (&mut self.wire, wire),
            (&mut self.place, place),
        ] {
            // A time beyond the range of u64 has no room anywhere.
            let _ = histogram.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        }
    }

    fn figures(&self, waiting: u64) -> FaultFigures {
        FaultFigures {
            faults: self.all.len(),
            faults_waiting: waiting,
            fault_us: quantiles(&self.all),
        }
    }

    fn report(&self) -> FaultReport {
        let stage = |histogram: &Histogram<u64>| Stage {
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
        };
        let thread = |histogram: &Histogram<u64>| ThreadFaults {
            faults: histogram.len(),
            fault_us: quantiles(histogram),
        };
        let waited = self.vcpus.iter().filter(|(_, one)| !one.is_empty());
        FaultReport {
            read_us: stage(&self.read),
            queue_us: stage(&self.queue),
            wire_us: stage(&self.wire),
            place_us: stage(&self.place),
            fault_us_log2: self
                .all
                .iter_log(1, 2.0)
                .map(|step| step.count_since_last_iteration())
                .collect(),
            vcpu_faults: waited
                .map(|(vcpu, histogram)| VcpuFaults {
                    vcpu: vcpu.index,
                    waited: thread(histogram),
                })
                .collect(),
            other_faults: thread(&self.other),
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

    fn waited(thread: u32, us: u64) -> Waited {
        Waited {
            thread,
            read: Duration::from_micros(us),
            queue: Duration::from_micros(us),
            wire: Duration::from_micros(2 * us),
            place: Duration::from_micros(1),
        }
    }

    #[test]
    fn stages_add_up() {
        let mut latency = Latency::new();
        for us in 1..=1000 {
            latency.record(waited(0, us));
        }
        let figures = latency.figures(3);
        assert_eq!((figures.faults, figures.faults_waiting), (1000, 3));
        // Two digits: within a hundredth.
        let Quantiles { p50, p99, .. } = figures.fault_us;
        assert!((1980..=2030).contains(&p50), "{figures:?}");
        assert!((3940..=4000).contains(&p99), "{figures:?}");
        let report = latency.report();
        for stage in [report.read_us, report.queue_us] {
            assert!((495..=505).contains(&stage.p50), "{report:?}");
        }
        assert_eq!(report.fault_us_log2.iter().sum::<u64>(), 1000);
    }

    #[test]
    fn each_vcpu_has_its_own_figures_and_all_else_has_some_together() {
        let mut latency = Latency::new();
        latency.record(waited(11, 1));
        let named = |index| Vcpu {
            index,
            thread: 10 + index,
        };
        // More than are counted, and one that never waits.
        latency.name((0..300).map(named).collect());
        for us in [10, 20] {
            latency.record(waited(12, us));
        }
        for thread in [10, 0, 10 + 299] {
            latency.record(waited(thread, 100));
        }
        let report = latency.report();
        let [first, third] = &report.vcpu_faults[..] else {
            panic!("{report:?}")
        };
        assert_eq!((first.vcpu, first.waited.faults), (0, 1));
        assert_eq!((third.vcpu, third.waited.faults), (2, 2));
        assert_eq!(third.waited.fault_us.max, 81);
        assert_eq!(report.other_faults.faults, 3);
        assert_eq!(latency.figures(0).faults, 6);
    }
}
