//! One attach from end to end: what is prepared before, what the child does, and what is made of its answer.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::code::{self, Code};
use super::fault::{self, Fault};
use super::injected::StoppedThread;
use super::net::Net;
use super::{AttachOptions, STOP_LIMIT, Uffd};
use crate::host::process::Process;
use crate::host::sys::survivor::{Outcome, Survivor};
use crate::host::sys::uffd::USER_MODE_ONLY;
use crate::host::{AttachFigures, TrackError};

/// How much longer than the thread's stop may take the child is waited for: it starts, and makes two system calls.
const GRACE: Duration = Duration::from_secs(2);

/// Makes a userfaultfd in process `pid` and takes it over.
pub(super) fn run(pid: i32, options: AttachOptions) -> Result<(Uffd, AttachFigures), TrackError> {
    let process = Process::open(pid)?;
    let code = code::find(pid)?;
    if let Some(busy) = fault::traced_already(pid) {
        return Err(busy);
    }
    let mut net = Net::new();
    let child = Survivor::start(&mut || inject(&process, code, &mut net, options));
    let child = child.map_err(|source| TrackError::System {
        what: "starting a process to attach with",
        source,
    })?;
    match child.wait(STOP_LIMIT + GRACE) {
        Outcome::Done(Ok((descriptor, figures))) => Ok((Uffd::from(descriptor), figures)),
        Outcome::Done(Err(fault)) => Err(fault.explain(pid, options)),
        Outcome::Late => Err(fault::blocked(pid)),
        Outcome::Killed => Err(TrackError::Busy(
            "the process that was attaching to QEMU was killed; see that QEMU still runs, then try again".into(),
        )),
    }
}

/// What the child does, by the rules of a [`survivor`](crate::host::sys::survivor).
fn inject(
    process: &Process,
    code: Code,
    net: &mut Net,
    options: AttachOptions,
) -> Result<(OwnedFd, AttachFigures), Fault> {
    net.touch();
    let deadline = Instant::now() + STOP_LIMIT;
    let mut thread = StoppedThread::seize(process, code, net, deadline)?;
    // Everything slow is done; from here to `release` every microsecond is QEMU's.
    let started = Instant::now();
    thread.stop()?;
    let made = make_descriptor(&mut thread, process, options);
    thread.release()?;
    let stopped = started.elapsed();
    Ok((made?, AttachFigures { stopped }))
}

/// Has the stopped thread make the descriptor, takes it, and has it closed there.
fn make_descriptor(
    thread: &mut StoppedThread<'_>,
    process: &Process,
    options: AttachOptions,
) -> Result<OwnedFd, Fault> {
    let mode = if options.kernel_faults {
        0
    } else {
        USER_MODE_ONLY
    };
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | mode;
    let made = thread.call(libc::SYS_userfaultfd, flags)?;
    let Ok(remote) = i32::try_from(made) else {
        return Err(Fault::Answer(made));
    };
    if remote < 0 {
        return Err(Fault::Refused(remote.wrapping_neg()));
    }
    let taken = rustix::process::pidfd_getfd(
        process.handle(),
        remote,
        rustix::process::PidfdGetfdFlags::empty(),
    );
    if taken.is_err() || !options.leave_open {
        let closed = thread.call(libc::SYS_close, u64::from(remote.unsigned_abs()))?;
        if closed != 0 {
            return Err(Fault::Answer(closed));
        }
    }
    taken.map_err(|error| Fault::Take(error.raw_os_error()))
}
