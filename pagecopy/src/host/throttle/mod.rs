//! Keeping those threads of a process that write from running for a share of their time: a guest's vCPUs, so that pre-copy can
//! follow.
//!
//! A thread of this process stops them with `ptrace`, all at once, and lets them go on: a hundred times a second, so that none
//! stands still for more than about ten milliseconds at a time. Between the stops nobody traces them.
//!
//! *Which threads*: a write to a page that is protected for dirty tracking is a minor fault of the thread that writes, and the
//! kernel counts those for each thread (`writers`). KVM's faults for a vCPU are its thread's, too.
//!
//! *It ends with this process.* The kernel lets a stopped thread go on when the thread that traces it ends, for whatever reason;
//! so does the end of a throttle, in the same way. Nothing is left in the other process, in a control group or in the scheduler that somebody
//! would have to put back. A process that is stopped itself (SIGSTOP) lets go of nobody: who keeps a daemon from running must end it.
//!
//! *A signal* that comes in between is not lost: a stop is only looked at (`WNOWAIT`) and never taken, so that the kernel delivers
//! the signal whoever ends the tracing.

#[cfg(target_arch = "x86_64")]
mod stops;
mod writers;

use std::fs;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::TrackError;
use super::process::{Process, proc_error};

/// From one stop to the next.
#[cfg(target_arch = "x86_64")]
const PERIOD: Duration = Duration::from_millis(10);
/// The threads run so long between two stops at the least.
#[cfg(target_arch = "x86_64")]
const SHORTEST_RUN: Duration = Duration::from_micros(50);
/// Threads are counted for so long before it is said who writes, …
#[cfg(target_arch = "x86_64")]
const FIRST_LOOK: Duration = Duration::from_millis(50);
/// …and it is said anew so often.
#[cfg(target_arch = "x86_64")]
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A thread that had not stopped yet when it was to go on is looked at again so often.
#[cfg(target_arch = "x86_64")]
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// A share of time that somebody else's threads lose. Dropping it lifts it.
#[derive(Debug)]
pub struct Throttle(Arc<Shared>);

/// What brings a throttle about. It has no effect once that is lifted.
#[derive(Debug)]
pub struct Holder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// None when it is lifted, which is for good.
    percent: Mutex<Option<u32>>,
    lifted: Condvar,
}

impl Throttle {
    /// Of `percent` of the time, 1 to 99. Nobody is stopped before its [`holder`](Self::holder) has begun.
    pub fn new(percent: u32) -> Throttle {
        Throttle(Arc::new(Shared {
            percent: Mutex::new(Some(percent)),
            lifted: Condvar::new(),
        }))
    }

    /// Another share, within about ten milliseconds.
    pub fn set(&self, percent: u32) {
        *self.0.lock() = Some(percent);
    }

    /// What brings it about.
    pub fn holder(&self) -> Holder {
        Holder(Arc::clone(&self.0))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        *self.0.lock() = None;
        self.0.lifted.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<u32>> {
        self.percent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits; `None`, at once, when it is lifted.
    fn sleep(&self, time: Duration) -> Option<u32> {
        let until = Instant::now() + time;
        let mut percent = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if percent.is_none() || left.is_zero() {
                return *percent;
            }
            let waited = self.lifted.wait_timeout(percent, left);
            percent = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Holder {
    /// Slows those of `threads` of process `pid` that write, from a thread of its own, until it is lifted or the process ends. The
    /// threads go by their numbers in the pid namespace that the process is in.
    ///
    /// Blocks for a tenth of a second, until the first was stopped.
    ///
    /// # Errors
    /// None of them can be stopped, and why.
    pub fn start(self, pid: i32, threads: &[u32]) -> Result<(), TrackError> {
        let process = Process::open(pid)?;
        let threads =
            ours(pid, threads).map_err(|error| proc_error(pid, "looking for vCPUs", error))?;
        if threads.is_empty() {
            return Err(TrackError::System {
                what: "looking for the threads that run the guest",
                source: io::Error::other("QEMU has none of those that it names"),
            });
        }
        let (say, said) = sync_channel(1);
        let hold = move || {
            self.hold(&process, threads, &|first| {
                // Whoever has started it waits for this.
                let _ = say.send(first);
            })
        };
        let thread = thread::Builder::new().name("throttle".into()).spawn(hold);
        thread.map_err(|source| TrackError::System {
            what: "starting a thread that slows the guest",
            source,
        })?;
        // It says nothing where it was lifted before.
        said.recv().unwrap_or(Ok(()))
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn hold(&self, _: &Process, _: Vec<i32>, say: &dyn Fn(Result<(), TrackError>)) {
        say(Err(TrackError::Kernel(
            "slowing a guest is written for x86-64 only".into(),
        )));
    }

    /// The end of this thread is what lets go of whom it traces.
    #[cfg(target_arch = "x86_64")]
    fn hold(&self, process: &Process, threads: Vec<i32>, say: &dyn Fn(Result<(), TrackError>)) {
        let mut writers = writers::Writers::new(process.pid(), threads);
        let mut stops = stops::Stops::new(process);
        let Some(mut percent) = self.0.sleep(FIRST_LOOK) else {
            return;
        };
        let mut begun = false;
        // Seconds that they may run and have not; less than nothing when they had too much.
        let mut due = 0.0;
        while process.is_alive() {
            let stopped = Instant::now();
            let asked = stops.stop(writers.look(percent, stopped));
            if !begun && asked.is_err() {
                return say(asked);
            }
            let share = f64::from(percent) / 100.0;
            let Some(next) = self.0.sleep(PERIOD.mul_f64(share)) else {
                return;
            };
            stops.let_go();
            if !begun {
                begun = true;
                say(Ok(()));
            }
            let stood = stopped.elapsed().as_secs_f64();
            due = (due + stood * (1.0 - share) / share).clamp(-1.0, 1.0);
            let ran = Instant::now();
            let until = ran + Duration::from_secs_f64(due.max(0.0)).max(SHORTEST_RUN);
            while !stops.is_empty() && Instant::now() < until {
                if self.0.sleep(LOOK_AGAIN).is_none() {
                    return;
                }
                stops.let_go();
            }
            if self
                .0
                .sleep(until.saturating_duration_since(Instant::now()))
                .is_none()
            {
                return;
            }
            due -= ran.elapsed().as_secs_f64();
            percent = next;
        }
    }
}

/// The threads of process `pid` that have these numbers in its own pid namespace, by their numbers here.
fn ours(pid: i32, named: &[u32]) -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let Some(thread) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // It may have ended in the meantime.
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let innermost = numbers.and_then(|numbers| numbers.split_whitespace().last()?.parse().ok());
        if innermost.is_some_and(|number| named.contains(&number)) {
            threads.push(thread);
        }
    }
    threads.sort_unstable();
    Ok(threads)
}
