//! Post-copy at the destination: serves the guest's page faults and fetches what it lacks.
//!
//! ```text
//!  page fault ──▶ fault thread ──▶ puller ──▶ data channel 1 ─┐   read into the RAM file
//!                                     │                       ├──▶ marked as received ──▶ mapped ──▶ who waited goes on
//!                                     └─────▶ the others ─────┘
//! ```
//!
//! Which page is where is decided by the [`Puller`]; here are the threads and the kernel's side. Page faults are served
//! whether there is a connection or not: without one, what lacks waits. Nothing here ever lets go of QEMU's memory by
//! itself: a dropped `Pull` leaves the page faults waiting, for a successor that takes them over.

mod ahead;
mod lane;
mod latency;
mod shared;
#[cfg(test)]
mod tests;
mod unread;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pagecopy::engine::bitmap::Bitmap;
use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::pull::Puller;
use pagecopy::engine::{Failure, Fault};
use pagecopy::host::PagerError;
use pagecopy::host::pager::{Stretch, UffdPager};
use pagecopy::host::ram::MappedRam;
use pagecopy::host::received::Received;
use pagecopy::memory::{BlockId, BlockSpec, Run};
use tokio::sync::mpsc::UnboundedSender;
use transport::{Channel, Error};

use self::lane::{Lane, Role};
pub use self::latency::{FaultReport, Stage, ThreadFaults, VcpuFaults};
pub(crate) use self::latency::{Vcpu, Vcpus};
use self::shared::Shared;
use crate::failure::host;
use crate::log;

/// How often a thread looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the threads tell their session.
#[derive(Debug)]
pub(crate) enum PullEvent {
    /// Every page is here.
    AllHere,
    /// A channel is broken.
    Broken(Error),
    /// This host cannot go on.
    Failed(Failure),
}

/// A guest's memory, as it is fetched.
pub(crate) struct Pull {
    shared: Arc<Shared>,
    specs: Arc<[BlockSpec]>,
    /// These run without a connection, too.
    threads: Vec<JoinHandle<()>>,
    lanes: Vec<JoinHandle<Option<Box<dyn Channel>>>>,
    stop: Arc<AtomicBool>,
}

impl Pull {
    /// Makes page faults in QEMU's RAM wait, and begins to serve them. `shares` has the stretches of each pager, `device` is
    /// the number of `/dev/userfaultfd` inside a QEMU that needs it.
    ///
    /// # Errors
    /// What is in the way; nothing is left behind.
    pub(crate) fn arm(
        (pid, device): (i32, Option<i32>),
        shares: Vec<Vec<Stretch>>,
        guest: Guest,
        lacking: Bitmap,
        events: UnboundedSender<PullEvent>,
    ) -> Result<Pull, Failure> {
        mark_all_but(&guest.received, &guest.specs, &lacking)?;
        let mut pagers = Vec::new();
        for stretches in shares {
            match UffdPager::arm(pid, stretches, device) {
                Ok(pager) => pagers.push(pager),
                Err(error) => {
                    let failure = pager_failure(&error);
                    release(pagers);
                    return Err(failure);
                }
            }
        }
        Pull::serve(pagers, guest, |specs| Puller::of(specs, lacking), events)
    }

    /// Takes over from a daemon that has ended: by the numbers of its userfaultfds inside QEMU, with the same stretches.
    ///
    /// # Errors
    /// They cannot be taken; the guest goes on to wait.
    pub(crate) fn adopt(
        pid: i32,
        shares: Vec<Vec<Stretch>>,
        inside: &[i32],
        guest: Guest,
        events: UnboundedSender<PullEvent>,
    ) -> Result<Pull, Failure> {
        if shares.len() != inside.len() {
            return Err(host(
                "the guest's memory was shared out in another way before",
                "report this",
            ));
        }
        let mut missing = Vec::new();
        guest.received.missing(&mut missing);
        let puller = Puller::new(&guest.specs, &missing)
            .map_err(|outside| host(outside.to_string(), "report this"))?;
        let mut pagers = Vec::new();
        for (stretches, inside) in shares.into_iter().zip(inside) {
            match UffdPager::adopt(pid, stretches, *inside) {
                Ok(pager) => pagers.push(pager),
                // The daemon before had let go of it, since everything was here.
                Err(PagerError::NotThere { .. }) if missing.is_empty() => {}
                Err(error) => return Err(pager_failure(&error)),
            }
        }
        Pull::serve(pagers, guest, |_| puller, events)
    }

    fn serve(
        pagers: Vec<UffdPager>,
        guest: Guest,
        puller: impl FnOnce(&[BlockSpec]) -> Puller,
        events: UnboundedSender<PullEvent>,
    ) -> Result<Pull, Failure> {
        let Guest {
            specs,
            ram,
            received,
            background,
        } = guest;
        let puller = puller(&specs);
        let shared = Arc::new(Shared::new(
            &specs, puller, received, pagers, ram, background, events,
        ));
        let mut pull = Pull {
            shared: Arc::clone(&shared),
            specs,
            threads: Vec::new(),
            lanes: Vec::new(),
            stop: Arc::new(AtomicBool::new(false)),
        };
        for number in 0..shared.pagers.len() {
            let shared = Arc::clone(&shared);
            let serve = move || {
                if let Some(pager) = shared.pagers.get(number) {
                    shared.serve_faults(pager);
                }
            };
            pull.threads
                .push(thread(format!("faults-{number}"), serve)?);
        }
        let specs = Arc::clone(&pull.specs);
        let allocate = {
            let shared = Arc::clone(&shared);
            move || shared.allocate_ahead(&specs)
        };
        pull.threads.push(thread("allocate".to_owned(), allocate)?);
        shared.tell_if_whole();
        Ok(pull)
    }

    /// The numbers of the userfaultfds inside QEMU.
    pub(crate) fn inside(&self) -> Vec<i32> {
        self.shared.pagers.iter().map(UffdPager::inside).collect()
    }

    /// Fetches over these data channels, of which there are two at least.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(crate) fn start(&mut self, channels: Vec<Box<dyn Channel>>) -> Result<(), Failure> {
        self.stop();
        self.stop = Arc::new(AtomicBool::new(false));
        if let Some(first) = channels.first() {
            self.shared.connected(first.waker(), channels.len() - 1);
        }
        for (number, channel) in channels.into_iter().enumerate() {
            let lane = Lane {
                shared: Arc::clone(&self.shared),
                specs: Arc::clone(&self.specs),
                channel,
                role: if number == 0 {
                    Role::Demand
                } else {
                    Role::Rest
                },
                stop: Arc::clone(&self.stop),
            };
            self.lanes
                .push(thread(format!("fetch-{}", number + 1), move || lane.run())?);
        }
        Ok(())
    }

    /// Stops fetching, and gives the channels back that are not broken. What was on its way is asked for anew on the next
    /// ones.
    pub(crate) fn stop(&mut self) -> Vec<Box<dyn Channel>> {
        self.stop.store(true, Ordering::Relaxed);
        // A panic in a thread has been told already.
        let ended = self.lanes.drain(..).filter_map(|lane| lane.join().ok());
        let channels = ended.flatten().collect();
        self.shared.lost();
        channels
    }

    /// Lets go of QEMU's memory: every page is here, or the guest never runs here. Gives back what is left of it.
    pub(crate) fn release(mut self) -> Released {
        let channels = self.end();
        let (faults, report) = (self.progress().1, self.report());
        let shared = Arc::clone(&self.shared);
        drop(self);
        if let Some(shared) = Arc::into_inner(shared) {
            release(shared.pagers);
        }
        Released {
            channels,
            faults,
            report,
        }
    }

    /// Poisons what lacks. Returns bytes.
    ///
    /// # Errors
    /// It cannot be poisoned; page faults go on to wait.
    pub(crate) fn poison(&self) -> Result<u64, Failure> {
        self.shared.poison().map_err(|error| pager_failure(&error))
    }

    fn end(&mut self) -> Vec<Box<dyn Channel>> {
        let channels = self.stop();
        self.shared.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic in the thread has been told already.
            let _ = thread.join();
        }
        channels
    }

    /// Bytes that lack, and what waited for them.
    pub(crate) fn progress(&self) -> (u64, FaultFigures) {
        (self.shared.lacks(), self.shared.figures())
    }

    /// To say whose faults are whose.
    pub(crate) fn vcpus(&self) -> Vcpus {
        self.shared.vcpus()
    }

    /// What the faults cost so far.
    pub(crate) fn report(&self) -> FaultReport {
        self.shared.report()
    }
}

impl Drop for Pull {
    /// The threads end; QEMU's memory is not let go of.
    fn drop(&mut self) {
        self.end();
    }
}

/// What is left of fetching.
pub(crate) struct Released {
    /// Those that are not broken.
    pub(crate) channels: Vec<Box<dyn Channel>>,
    /// All page faults.
    pub(crate) faults: FaultFigures,
    /// What they cost.
    pub(crate) report: FaultReport,
}

/// What is fetched into, and where that is recorded.
pub(crate) struct Guest {
    /// RAMBlocks, as the source numbers them.
    pub(crate) specs: Arc<[BlockSpec]>,
    /// Their files, mapped.
    pub(crate) ram: MappedRam,
    /// What has come.
    pub(crate) received: Received,
    /// Bytes a second of what nobody waits for; none is unlimited.
    pub(crate) background: Option<u64>,
}

/// Everything has come but what lacks.
fn mark_all_but(received: &Received, specs: &[BlockSpec], lacking: &Bitmap) -> Result<(), Failure> {
    let mut lacking = lacking.clone();
    let mut runs = Vec::new();
    while !lacking.is_empty() {
        lacking.take(usize::MAX, u64::MAX, &mut runs);
    }
    let mut runs = runs.into_iter().peekable();
    for (block, spec) in (0..).map(BlockId).zip(specs) {
        let mut first = 0;
        loop {
            let lacks = runs.next_if(|run| run.block == block);
            let end = lacks.map_or(spec.pages(), |run| run.first);
            if first < end {
                let here = Run {
                    block,
                    first,
                    pages: end - first,
                };
                received
                    .insert(here)
                    .map_err(|error| host(error.to_string(), "report this"))?;
            }
            match lacks {
                Some(run) => first = run.end(),
                None => break,
            }
        }
    }
    Ok(())
}

fn release(pagers: Vec<UffdPager>) {
    for pager in pagers {
        if let Err(error) = pager.release() {
            tracing::warn!(%error, "a userfaultfd stays open inside QEMU, without use");
        }
    }
}

fn thread<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Failure> {
    let spawned: io::Result<_> = std::thread::Builder::new()
        .name(name)
        .spawn(log::inherited(work));
    spawned.map_err(|error| {
        host(
            format!("no thread for the guest's memory: {error}"),
            "raise the limit of processes",
        )
    })
}

pub(crate) fn pager_failure(error: &PagerError) -> Failure {
    let (fault, remedy) = match error {
        PagerError::Attach(_) => (
            Fault::ThisHost,
            "run QEMU with CAP_SYS_PTRACE or set vm.unprivileged_userfaultfd=1, so that its page faults can be served also \
             in the kernel; or migrate with --mode precopy",
        ),
        PagerError::Kernel(_) => (
            Fault::ThisHost,
            "run Linux 6.7 or later, or migrate with --mode precopy",
        ),
        PagerError::Gone(_) => (Fault::Qemu, "see QEMU's log for why it ended"),
        PagerError::NotThere { .. } => (
            Fault::ThisHost,
            "end this host's QEMU: its memory cannot be trusted any more; report this",
        ),
        PagerError::NotInFile(_) | PagerError::System { .. } => (
            Fault::ThisHost,
            "see the kernel's log and this host's memory: the guest waits for the page",
        ),
    };
    Failure::new(fault, error.to_string(), remedy)
}
