//! One stop of QEMU's main thread from end to end: what is prepared before, what the child does, and what is made of its
//! answer.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::code::{self, Code};
use super::fault::{self, Fault};
use super::injected::StoppedThread;
use super::net::Net;
use super::{AttachOptions, Attached, STOP_LIMIT, Uffd};
use crate::host::process::Process;
use crate::host::sys::survivor::{Outcome, Survivor};
use crate::host::sys::uffd::{NEW_FROM_DEVICE, USER_MODE_ONLY};
use crate::host::{AttachFigures, TrackError};

/// How much longer than the thread's stop may take the child is waited for: it starts, and makes some system calls.
const GRACE: Duration = Duration::from_secs(2);

/// Makes a userfaultfd in process `pid` and takes it over.
pub(super) fn attach(pid: i32, options: AttachOptions) -> Result<Attached, TrackError> {
    let process = Process::open(pid)?;
    let ((descriptor, inside), figures) = stopped(&process, options, &mut |thread| {
        make_descriptor(thread, &process, options)
    })?;
    Ok(Attached {
        uffd: Uffd::from(descriptor),
        figures,
        inside: options.leave_open.then_some(inside),
    })
}

/// Has process `pid` give `advice` (`MADV_…`) about `range` of its memory.
pub(super) fn advise(pid: i32, range: &Range<u64>, advice: i32) -> Result<(), TrackError> {
    let arguments = [
        range.start,
        range.end - range.start,
        u64::from(advice.unsigned_abs()),
    ];
    call(pid, libc::SYS_madvise, arguments)
}

/// Has process `pid` close a descriptor.
pub(super) fn close(pid: i32, inside: i32) -> Result<(), TrackError> {
    call(
        pid,
        libc::SYS_close,
        [u64::from(inside.unsigned_abs()), 0, 0],
    )
}

/// Has process `pid` execute a system call that answers 0.
fn call(pid: i32, call: i64, arguments: [u64; 3]) -> Result<(), TrackError> {
    let process = Process::open(pid)?;
    let (answer, _) = stopped(&process, AttachOptions::default(), &mut |thread| {
        thread.call(call, arguments)
    })?;
    if answer != 0 {
        return Err(Fault::Answer(answer).explain(pid, AttachOptions::default()));
    }
    Ok(())
}

/// What the child does with the thread, by the rules of a [`survivor`](crate::host::sys::survivor).
type Work<'a, T> = dyn FnMut(&mut StoppedThread<'_>) -> Result<T, Fault> + 'a;

/// Stops the main thread of `process` for `work`; its answer, and how long the thread stood still.
fn stopped<T>(
    process: &Process,
    options: AttachOptions,
    work: &mut Work<'_, T>,
) -> Result<(T, AttachFigures), TrackError> {
    let pid = process.pid();
    let code = code::find(pid)?;
    if let Some(busy) = fault::traced_already(pid) {
        return Err(busy);
    }
    let mut net = Net::new();
    let child = Survivor::start(&mut || inject(process, code, &mut net, work));
    let child = child.map_err(|source| TrackError::System {
        what: "starting a process to attach with",
        source,
    })?;
    match child.wait(STOP_LIMIT + GRACE) {
        Outcome::Done(Ok(done)) => Ok(done),
        Outcome::Done(Err(fault)) => Err(fault.explain(pid, options)),
        Outcome::Late => Err(fault::blocked(pid)),
        Outcome::Killed => Err(TrackError::Busy(
            "the process that was attaching to QEMU was killed; see that QEMU still runs, then try again".into(),
        )),
    }
}

/// What the child does, by the rules of a [`survivor`](crate::host::sys::survivor).
fn inject<T>(
    process: &Process,
    code: Code,
    net: &mut Net,
    work: &mut Work<'_, T>,
) -> Result<(T, AttachFigures), Fault> {
    net.touch();
    let deadline = Instant::now() + STOP_LIMIT;
    let mut thread = StoppedThread::seize(process, code, net, deadline)?;
    // Everything slow is done; from here to `release` every microsecond is QEMU's.
    let started = Instant::now();
    thread.stop()?;
    let done = work(&mut thread);
    thread.release()?;
    let stopped = started.elapsed();
    Ok((done?, AttachFigures { stopped }))
}

/// Has the stopped thread make the descriptor, takes it, and has it closed there unless it is to stay; what was taken, and
/// its number inside.
fn make_descriptor(
    thread: &mut StoppedThread<'_>,
    process: &Process,
    options: AttachOptions,
) -> Result<(OwnedFd, i32), Fault> {
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs());
    let made = match options.device {
        Some(device) => thread.call(
            libc::SYS_ioctl,
            [u64::from(device.unsigned_abs()), NEW_FROM_DEVICE, flags],
        )?,
        None => {
            let mode = if options.kernel_faults {
                0
            } else {
                USER_MODE_ONLY
            };
            thread.call(libc::SYS_userfaultfd, [flags | mode, 0, 0])?
        }
    };
    let Ok(inside) = i32::try_from(made) else {
        return Err(Fault::Answer(made));
    };
    if inside < 0 {
        return Err(Fault::Refused(inside.wrapping_neg()));
    }
    let taken = rustix::process::pidfd_getfd(
        process.handle(),
        inside,
        rustix::process::PidfdGetfdFlags::empty(),
    );
    if taken.is_err() || !options.leave_open {
        let closed = thread.call(libc::SYS_close, [u64::from(inside.unsigned_abs()), 0, 0])?;
        if closed != 0 {
            return Err(Fault::Answer(closed));
        }
    }
    match taken {
        Ok(taken) => Ok((taken, inside)),
        Err(error) => Err(Fault::Take(error.raw_os_error())),
    }
}
