//! How fast a guest writes its memory: attaches to its QEMU, tracks and scans for a while, and lets go.
//!
//! The same tracking as a migration's, and nothing else of one: QEMU's settings are not touched and no peer is asked. The
//! thread that samples ends, and detaches, as soon as nobody waits for it any more.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::engine::bitmap::Bitmap;
use pagecopy::host::track::UffdTracker;
use pagecopy::host::{Ram, Tracker};
use pagecopy::memory::{BlockSpec, Run};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::failure::{Failure, host, operator};
use crate::log;
use crate::qemu::discover::{self, map_ram, track_failure};
use crate::qemu::{Block, Guest};
use crate::qmp::Qmp;
use crate::service::Service;
use crate::session::begin::{check_name, tracked};
use crate::units::millis;

/// The shortest sampling: what is written in less says little.
pub const SHORTEST: Duration = Duration::from_millis(100);
/// The longest: the guest pays a fault for each page that it writes meanwhile.
pub const LONGEST: Duration = Duration::from_secs(600);
/// How often it is scanned: a tenth of the whole, within these.
const INTERVALS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// `POST /v1/dirty-rate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DirtyRateRequest {
    /// The guest's name.
    pub vm: String,
    /// QMP socket of the QEMU that runs it.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// How long to sample, in milliseconds: 100 to 600,000.
    pub for_ms: u64,
}

/// The answer to `POST /v1/dirty-rate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DirtyRate {
    /// The guest's name.
    pub vm: String,
    /// How long it was sampled, in milliseconds.
    pub sampled_ms: f64,
    /// How long QEMU's main thread stood still for the attach, in microseconds.
    pub attach_stop_us: f64,
    /// Its memory, in bytes.
    pub ram_bytes: u64,
    /// Of it, what its files really hold.
    pub populated_bytes: u64,
    /// Bytes of pages written, each counted once an interval, for each second.
    pub dirty_bytes_per_s: u64,
    /// The same in the busiest interval.
    pub peak_bytes_per_s: u64,
    /// Bytes of pages written, each counted once for the whole time.
    pub working_set_bytes: u64,
    /// Whether a disk does direct I/O: what it reads into the guest's memory is not counted then.
    pub direct_io: bool,
    /// The intervals, in order.
    pub intervals: Vec<Interval>,
}

/// The time between two scans.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Interval {
    /// How long it was, in milliseconds.
    pub ms: f64,
    /// Bytes of pages written in it.
    pub dirty_bytes: u64,
}

impl Interval {
    fn bytes_per_s(&self) -> u64 {
        per_second(self.dirty_bytes, self.ms)
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss
)] // Of a measured rate the last digit says nothing, and `as` saturates.
fn per_second(bytes: u64, ms: f64) -> u64 {
    (bytes as f64 / (ms / 1e3).max(1e-6)) as u64
}

/// The QEMUs that are sampled just now: the kernel lets one at a time track a process, and whoever comes second shall hear why.
#[derive(Debug, Default)]
pub(crate) struct Sampled(Mutex<BTreeSet<i32>>);

impl Sampled {
    /// Refuses what would have to track the QEMU `pid`, too.
    pub(crate) fn refuse(&self, pid: i32) -> Result<(), Failure> {
        match self.lock().contains(&pid) {
            true => Err(sampled_already()),
            false => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<i32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sampled_already() -> Failure {
    operator(
        "the guest's dirty rate is being sampled just now (`pagecopy dirty-rate`), which tracks its memory",
        "wait until the sampling has ended, or end it (Ctrl-C)",
    )
}

/// A QEMU's place among those that are sampled.
struct Place(Arc<Service>, i32);

impl Place {
    fn take(service: &Arc<Service>, pid: i32) -> Result<Place, Failure> {
        match service.sampled.lock().insert(pid) {
            true => Ok(Place(Arc::clone(service), pid)),
            false => Err(sampled_already()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.sampled.lock().remove(&self.1);
    }
}

/// Samples a guest. When the future is dropped, the sampling ends and QEMU is left as it was.
///
/// # Errors
/// The request is wrong, the guest cannot be tracked, or is being moved; each with what to do.
pub(crate) async fn sample(
    service: &Arc<Service>,
    request: DirtyRateRequest,
) -> Result<DirtyRate, Failure> {
    let length = Duration::from_millis(request.for_ms);
    check_name(&request.vm)?;
    if !(SHORTEST..=LONGEST).contains(&length) {
        return Err(operator(
            format!("{} ms is no time to sample for", request.for_ms),
            "use 100ms to 10min",
        ));
    }
    service.refuse_if_moving(&request.vm)?;
    let guest = discover::running(&Qmp::connect(&request.qmp).await?).await?;
    let place = Place::take(service, guest.pid)?;
    tracing::info!(
        vm = request.vm,
        pid = guest.pid,
        ms = request.for_ms,
        "the dirty rate is sampled"
    );
    let (waits, ended) = channel();
    let sampled = log::spawn_blocking(move || {
        // Held until QEMU is let go of.
        let _place = place;
        Sampler::arm(&guest)?.run(length, &ended)
    });
    let mut rate = sampled
        .await
        .unwrap_or_else(|error| Err(host(error.to_string(), "report this")))?;
    let _: Sender<Infallible> = waits;
    rate.vm = request.vm;
    Ok(rate)
}

/// A guest whose writes are tracked.
struct Sampler {
    tracker: UffdTracker,
    specs: Vec<BlockSpec>,
    /// All that is known before the first interval.
    known: DirtyRate,
    /// What was written so far.
    written: Bitmap,
}

impl Sampler {
    fn arm(guest: &Guest) -> Result<Sampler, Failure> {
        let specs: Vec<BlockSpec> = guest
            .blocks
            .iter()
            .map(|block| block.spec.clone())
            .collect();
        let blocks = guest.blocks.iter().zip(0..);
        let blocks = blocks
            .map(|(block, number)| tracked(block, number))
            .collect();
        let mut tracker = UffdTracker::new(guest.pid, blocks).map_err(track_failure)?;
        tracker.arm().map_err(track_failure)?;
        let stopped = tracker.attach_figures().map(|figures| figures.stopped);
        let known = DirtyRate {
            vm: String::new(),
            sampled_ms: 0.0,
            attach_stop_us: stopped.map_or(0.0, |stopped| millis(stopped) * 1e3),
            ram_bytes: specs.iter().map(|spec| spec.size).sum(),
            populated_bytes: populated(&guest.blocks, &specs)?,
            dirty_bytes_per_s: 0,
            peak_bytes_per_s: 0,
            working_set_bytes: 0,
            direct_io: guest.direct_io,
            intervals: Vec::new(),
        };
        Ok(Sampler {
            tracker,
            written: Bitmap::new(&specs),
            specs,
            known,
        })
    }

    /// Samples for `length`, or until `ended` has no sender any more.
    fn run(mut self, length: Duration, ended: &Receiver<Infallible>) -> Result<DirtyRate, Failure> {
        let pause = (length / 10).clamp(INTERVALS.0, INTERVALS.1);
        // Forgets what was written while the attach was finished.
        self.scan()?;
        self.written.clear();
        let begun = Instant::now();
        let mut last = begun;
        while begun.elapsed() < length {
            let left = length.saturating_sub(begun.elapsed());
            match ended.recv_timeout(pause.min(left)) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(operator("nobody waits for the dirty rate any more", ""));
                }
                Ok(never) => match never {},
            }
            let dirty_bytes = self.scan()?;
            let now = Instant::now();
            let interval = Interval {
                ms: millis(now - last),
                dirty_bytes,
            };
            self.known.intervals.push(interval);
            last = now;
        }
        self.tracker.disarm();
        Ok(self.result(last - begun))
    }

    /// The bytes that were written since the scan before.
    fn scan(&mut self) -> Result<u64, Failure> {
        let mut dirty: Vec<Run> = Vec::new();
        self.tracker.scan(&mut dirty).map_err(track_failure)?;
        for run in &dirty {
            self.written
                .insert(*run)
                .map_err(|outside| host(outside.to_string(), "report this"))?;
        }
        Ok(bytes(&dirty, &self.specs))
    }

    fn result(self, sampled: Duration) -> DirtyRate {
        let mut rate = self.known;
        let dirty = rate
            .intervals
            .iter()
            .map(|interval| interval.dirty_bytes)
            .sum();
        rate.sampled_ms = millis(sampled);
        rate.dirty_bytes_per_s = per_second(dirty, rate.sampled_ms);
        let rates = rate.intervals.iter().map(Interval::bytes_per_s);
        rate.peak_bytes_per_s = rates.max().unwrap_or_default();
        rate.working_set_bytes = self.written.bytes();
        rate
    }
}

/// The bytes of `runs`.
fn bytes(runs: &[Run], specs: &[BlockSpec]) -> u64 {
    let page_size = |run: &Run| {
        specs
            .get(usize::from(run.block.0))
            .map_or(0, |spec| spec.page_size)
    };
    runs.iter().map(|run| run.pages * page_size(run)).sum()
}

/// The bytes that the RAM files of `blocks` really hold.
///
/// # Errors
/// A file cannot be mapped, or asked.
pub(crate) fn populated(blocks: &[Block], specs: &[BlockSpec]) -> Result<u64, Failure> {
    let ram = map_ram(blocks, false)?;
    let mut runs = Vec::new();
    ram.populated(&mut runs).map_err(|error| {
        host(
            format!("the guest's RAM file cannot be asked what it holds: {error}"),
            "put it on tmpfs or hugetlbfs",
        )
    })?;
    Ok(bytes(&runs, specs))
}
