//! Lets a guest run on RAM that has not all arrived: the kernel's side of post-copy at the destination.
//!
//! QEMU's RAM is registered with a userfaultfd for *missing* faults (the file lacks the page) and *minor* ones (the file has
//! it, the page table does not). Whoever touches such a page, a vCPU, QEMU itself or the kernel for either, waits. The
//! page's bytes are written through this process's own mapping of the file, and then `UFFDIO_CONTINUE` maps the page and
//! lets go on who waits.
//!
//! # Why the guest outlives this process
//!
//! When the last descriptor of a userfaultfd closes, the kernel unregisters its ranges and wakes every fault, which then
//! reads zeroes: a corrupt guest. So one descriptor stays open inside QEMU ([`UffdPager::inside`] is its number there). If
//! this process is killed, faults go on to wait; its successor takes the descriptor back with [`UffdPager::adopt`]. A fault
//! that the dead process had read already is not told again by itself, so adopting wakes everything once: what still lacks
//! its page faults anew.
//!
//! # What the kernel does not guard against
//!
//! Nothing stops a write through the file from overwriting what the guest has written since its page was mapped. Only one
//! writer may ever place a page, and never after it was mapped; [`Received`](super::received::Received) remembers that
//! across a crash.
//!
//! # Page tables that are there already
//!
//! A page that QEMU has mapped (preallocated memory, an early touch) would never fault. After registering, QEMU is made to
//! drop its page tables (`MADV_DONTNEED`, which keeps the file's pages), while its guest stands still.

mod share;

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::PidfdGetfdFlags;

pub use self::share::{Stretch, share_out};
use super::attach::{AttachOptions, Injector, Uffd};
use super::process::{self, Process};
use super::sys::uffd::{self, FaultEvent};
use super::{DemandFault, Pager, PagerError};
use crate::limits::MIN_PAGE_SIZE;
use crate::memory::Run;

/// Page tables are dropped, and ranges unregistered, in pieces of so many bytes: QEMU's thread stands still for each piece,
/// some 70 ms for a gibibyte that is all mapped.
const PIECE: u64 = 4 << 30;
/// `MADV_DONTNEED_LOCKED` (Linux 5.18): `MADV_DONTNEED` for memory that is locked (`-overcommit mem-lock=on`), too.
const DONTNEED_LOCKED: i32 = 24;
/// What every userfaultfd is called below `/proc/PID/fd`.
const NAME: &str = "anon_inode:[userfaultfd]";

/// Closes every userfaultfd of process `pid`, whose guest will never run: nothing waits any more, and what lacks reads as
/// zeroes. For a waiting QEMU, which had none before, whose pager was killed before it could say what its numbers are.
/// Returns how many there were.
///
/// # Errors
/// One could not be closed; touches of its memory go on to wait.
pub fn forsake(pid: i32) -> Result<usize, PagerError> {
    let open = process::descriptors(pid)
        .map_err(|error| process::proc_error(pid, "looking for userfaultfds in QEMU", error))?;
    let ours = open.iter().filter(|one| one.target == Path::new(NAME));
    let mut closed = 0;
    for one in ours {
        Injector::of(pid)?.close(one.number)?;
        closed += 1;
    }
    Ok(closed)
}

/// Serves the page faults of some of a QEMU's RAM. Several, with a share of the RAM each, serve them on several threads.
///
/// Dropped without [`release`](UffdPager::release), it leaves its ranges registered and its descriptor inside QEMU: faults
/// wait for a successor.
#[derive(Debug)]
pub struct UffdPager {
    process: Process,
    /// By address.
    stretches: Vec<Stretch>,
    uffd: Uffd,
    inside: i32,
}

impl UffdPager {
    /// Takes `stretches` of process `pid`'s memory: from the return on, every touch of a page of theirs waits for
    /// [`map`](Pager::map). The guest must stand still meanwhile.
    ///
    /// `device` is the number of an open `/dev/userfaultfd` inside QEMU; it is needed where QEMU itself may not make a
    /// userfaultfd that sees faults in the kernel (see [`AttachOptions::device`]).
    ///
    /// # Errors
    /// What is in the way. Nothing is registered then, and nothing left behind.
    pub fn arm(
        pid: i32,
        mut stretches: Vec<Stretch>,
        device: Option<i32>,
    ) -> Result<UffdPager, PagerError> {
        share::check(&mut stretches)?;
        let process = Process::open(pid)?;
        let injector = Injector::of(pid)?;
        // Not of huge pages' file system, which has only one size of page. A kernel without transparent huge pages refuses.
        let small = stretches.iter().filter(|stretch| !stretch.is_huge());
        let small: Vec<_> = small.map(Stretch::range).collect();
        let options = AttachOptions {
            kernel_faults: true,
            leave_open: true,
            device,
        };
        let attached = injector.attach(options, &small, libc::MADV_NOHUGEPAGE)?;
        let pager = UffdPager {
            process,
            stretches,
            uffd: attached.uffd,
            inside: attached.inside.unwrap_or(-1),
        };
        match pager.register(&injector) {
            Ok(()) => Ok(pager),
            Err(error) => {
                // Nobody waits yet. What cannot be taken back ends with the last descriptor.
                let _ = pager.release();
                Err(error)
            }
        }
    }

    /// Takes over from a pager whose process has ended: the descriptor that has the number `inside` in process `pid`, with
    /// the same stretches. Whoever waits faults anew.
    ///
    /// # Errors
    /// There is no such descriptor, or it cannot be taken; then the guest goes on to wait.
    pub fn adopt(
        pid: i32,
        mut stretches: Vec<Stretch>,
        inside: i32,
    ) -> Result<UffdPager, PagerError> {
        share::check(&mut stretches)?;
        let process = Process::open(pid)?;
        let open = process::descriptors(pid).map_err(|error| {
            process::proc_error(pid, "looking for the userfaultfd in QEMU", error)
        })?;
        let is_it =
            |one: &process::Descriptor| one.number == inside && one.target == Path::new(NAME);
        if !open.iter().any(is_it) {
            return Err(PagerError::NotThere {
                pid,
                descriptor: inside,
            });
        }
        let taken =
            rustix::process::pidfd_getfd(process.handle(), inside, PidfdGetfdFlags::empty());
        let taken = taken.map_err(|error| {
            process::proc_error(pid, "taking the userfaultfd back from QEMU", error.into())
        })?;
        let pager = UffdPager {
            process,
            stretches,
            uffd: Uffd::from(taken),
            inside,
        };
        pager.wake_all()?;
        Ok(pager)
    }

    /// The descriptor's number inside QEMU, by which a successor finds it.
    pub fn inside(&self) -> i32 {
        self.inside
    }

    /// Lets go of QEMU's memory: all pages are in the file, and the kernel maps the rest by itself from now on.
    ///
    /// # Errors
    /// The descriptor inside QEMU could not be closed; it holds nothing any more.
    pub fn release(self) -> Result<(), PagerError> {
        for stretch in &self.stretches {
            for piece in stretch.pieces(PIECE) {
                // Errors mean that QEMU or its mapping is gone, and the registration with it.
                let _ = self.uffd.unregister(&piece);
            }
        }
        let pid = self.process.pid();
        match Injector::of(pid).and_then(|injector| injector.close(self.inside)) {
            Err(super::TrackError::Gone(_)) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Registers every stretch, then drops what QEMU has mapped of it.
    fn register(&self, injector: &Injector) -> Result<(), PagerError> {
        self.enable()?;
        for stretch in &self.stretches {
            self.uffd
                .register(&stretch.range(), uffd::MODE_MISSING | uffd::MODE_MINOR)
                .map_err(|error| self.not_registered(error))?;
        }
        for piece in self
            .stretches
            .iter()
            .flat_map(|stretch| stretch.pieces(PIECE))
        {
            injector.advise(&piece, DONTNEED_LOCKED)?;
        }
        Ok(())
    }

    fn enable(&self) -> Result<(), PagerError> {
        let huge = self.stretches.iter().any(Stretch::is_huge);
        let memory = if huge {
            uffd::FEATURE_MISSING_HUGETLBFS | uffd::FEATURE_MINOR_HUGETLBFS
        } else {
            0
        };
        let features = uffd::FEATURE_MISSING_SHMEM
            | uffd::FEATURE_MINOR_SHMEM
            | uffd::FEATURE_THREAD_ID
            | uffd::FEATURE_POISON
            | memory;
        self.uffd
            .enable(features)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => PagerError::Kernel(
                    "it lacks a feature of userfaultfd that post-copy needs; Linux 6.6 has them all".into(),
                ),
                _ => system("asking the userfaultfd for its features", error),
            })
    }

    fn not_registered(&self, error: io::Error) -> PagerError {
        match error.raw_os_error() {
            Some(libc::EBUSY) => super::TrackError::Busy(
                "another userfaultfd is registered on it; end what uses that first".into(),
            )
            .into(),
            Some(libc::ESRCH) => PagerError::Gone(self.process.pid()),
            _ => system("registering the guest's memory for its page faults", error),
        }
    }

    fn wake_all(&self) -> Result<(), PagerError> {
        self.stretches
            .iter()
            .try_for_each(|stretch| self.uffd.wake(&stretch.range()))
            .map_err(|error| self.ioctl_failed("waking what waits for memory", None, error))
    }

    /// The stretch with that address. A binary search: faults are many.
    fn stretch_at(&self, address: u64) -> Option<&Stretch> {
        let after = self
            .stretches
            .partition_point(|stretch| stretch.address <= address);
        self.stretches
            .get(after.checked_sub(1)?)
            .filter(|stretch| stretch.range().contains(&address))
    }

    fn demand(&self, event: FaultEvent) -> Option<DemandFault> {
        let stretch = self.stretch_at(event.address)?;
        Some(DemandFault {
            block: stretch.run.block,
            page: stretch.run.first + (event.address - stretch.address) / stretch.page_size,
            thread: event.thread,
            present: event.minor,
        })
    }

    /// Calls `work` for each part of `run` that is in a stretch of this pager, with its addresses and the size of a page.
    fn each_part(
        &self,
        run: Run,
        what: &'static str,
        work: impl Fn(&Range<u64>, u64) -> io::Result<()>,
    ) -> Result<(), PagerError> {
        for stretch in &self.stretches {
            let Some(part) = stretch.part(run) else {
                continue;
            };
            work(&part, stretch.page_size)
                .map_err(|error| self.ioctl_failed(what, Some(run), error))?;
        }
        Ok(())
    }

    fn ioctl_failed(&self, what: &'static str, run: Option<Run>, error: io::Error) -> PagerError {
        if !self.process.is_alive() {
            return PagerError::Gone(self.process.pid());
        }
        match (error.raw_os_error(), run) {
            (Some(libc::ESRCH), _) => PagerError::Gone(self.process.pid()),
            (Some(libc::EFAULT), Some(run)) => PagerError::NotInFile(run),
            _ => system(what, error),
        }
    }
}

impl Pager for UffdPager {
    fn faults(&self, faults: &mut Vec<DemandFault>, limit: Duration) -> Result<(), PagerError> {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let mut polled = [PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {
                // The end of QEMU is no event.
                return if self.process.is_alive() {
                    Ok(())
                } else {
                    Err(PagerError::Gone(self.process.pid()))
                };
            }
            Ok(_) => {}
            Err(error) => return Err(system("waiting for page faults", error.into())),
        }
        let mut events = Vec::new();
        self.uffd
            .read_faults(&mut events)
            .map_err(|error| system("reading page faults", error))?;
        faults.extend(events.into_iter().filter_map(|event| self.demand(event)));
        Ok(())
    }

    fn map(&self, run: Run) -> Result<(), PagerError> {
        self.each_part(run, "mapping pages of the guest", |part, page| {
            self.uffd.map_range(part, page)
        })
    }

    fn poison(&self, run: Run) -> Result<(), PagerError> {
        self.each_part(run, "poisoning pages of the guest", |part, page| {
            self.uffd.poison_range(part, page)
        })
    }
}

impl Stretch {
    fn is_huge(&self) -> bool {
        self.page_size > MIN_PAGE_SIZE
    }
}

fn system(what: &'static str, source: io::Error) -> PagerError {
    PagerError::System { what, source }
}
