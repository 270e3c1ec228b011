//! Attaching to a running QEMU: one `userfaultfd`, made by QEMU's own main thread and taken over by this process.
//!
//! A userfaultfd acts on the address space that created it, so QEMU has to make it. Its main thread is stopped with
//! `ptrace` for some tens of microseconds, executes `userfaultfd` and `close` in place of what it was about to do, gets its
//! registers back exactly, and goes on; in between, this process takes the descriptor with `pidfd_getfd`. The main thread is
//! chosen because it is not a vCPU: it waits for events nearly all the time, so the guest notices nothing.
//!
//! *A system call that the stop interrupted* restarts: the kernel decides that from the saved registers when the thread
//! returns to user mode for good. The injected calls run with `orig_rax = -1`, so that nothing is restarted on top of them.
//!
//! *A signal* that comes in between is delivered with the thread's own registers in place, and the injection is tried again.
//!
//! *If this process is killed* while the thread stands still, the kernel detaches and the thread goes on (no
//! `PTRACE_O_EXITKILL`). Only between setting and restoring the registers, two system calls on either side of one
//! single-stepped call, would it go on in the wrong place; nothing can be done about that, so nothing else happens there.

#[cfg(target_arch = "x86_64")]
mod injected;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::process::{self, Process};
pub use super::sys::uffd::Uffd;
use super::{AttachFigures, TrackError, sys};

/// How long the thread may take to come to a stop. It is in the kernel without a way out (on a dead NFS server, say) if
/// it takes longer.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// What is wanted of an attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachOptions {
    /// Faults in the kernel on the guest's behalf (vhost, KVM, QEMU's system calls) are delivered, too. Post-copy needs
    /// that; asynchronous write-protection does not. Where `vm.unprivileged_userfaultfd` is 0, QEMU itself must then have
    /// CAP_SYS_PTRACE, which a QEMU started by libvirt does not.
    pub kernel_faults: bool,
    /// Leaves the descriptor open inside QEMU, where a restarted daemon finds it again (post-copy).
    pub leave_open: bool,
}

/// Makes a userfaultfd for dirty tracking in process `pid` and takes it over; nothing is left behind there.
///
/// # Errors
/// What is in the way, and what to do about it.
pub fn attach(pid: i32) -> Result<(Uffd, AttachFigures), TrackError> {
    attach_with(pid, AttachOptions::default())
}

/// Makes a userfaultfd in process `pid` and takes it over.
///
/// # Errors
/// What is in the way, and what to do about it.
pub fn attach_with(pid: i32, options: AttachOptions) -> Result<(Uffd, AttachFigures), TrackError> {
    let (sender, receiver) = mpsc::channel();
    let abandoned = Arc::new(AtomicBool::new(false));
    let given_up = Arc::clone(&abandoned);
    // The kernel ties a tracee to the tracing thread and lets go of it when that thread ends, however it ends.
    thread::Builder::new()
        .name("attach".into())
        .spawn(move || {
            // Nobody listens any more when the caller has given up; the result is dropped, and the descriptor with it.
            let _ = sender.send(inject(pid, options, &given_up));
        })
        .map_err(|source| TrackError::System {
            what: "starting a thread to attach with",
            source,
        })?;
    receiver.recv_timeout(STOP_LIMIT).unwrap_or_else(|_| {
        abandoned.store(true, Ordering::Relaxed);
        Err(TrackError::Busy(format!(
            "QEMU's main thread (process {pid}) did not come to a stop within {} s; it is blocked in the kernel, usually by \
             storage that does not answer",
            STOP_LIMIT.as_secs()
        )))
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn inject(_: i32, _: AttachOptions, _: &AtomicBool) -> Result<(Uffd, AttachFigures), TrackError> {
    Err(TrackError::Kernel(
        "attaching to QEMU is written for x86-64 only".into(),
    ))
}

/// The whole attach, on one thread.
#[cfg(target_arch = "x86_64")]
fn inject(
    pid: i32,
    options: AttachOptions,
    abandoned: &AtomicBool,
) -> Result<(Uffd, AttachFigures), TrackError> {
    let process = Process::open(pid)?;
    let instruction = injected::find_syscall(pid)?;
    let mut thread = injected::StoppedThread::seize(&process)?;
    // Everything slow is done; from here to `release` every microsecond is QEMU's.
    let started = Instant::now();
    thread.stop()?;
    if abandoned.load(Ordering::Relaxed) {
        return Err(TrackError::Busy("given up".into()));
    }
    let made = make_descriptor(&mut thread, &process, instruction, options);
    thread.release()?;
    let stopped = started.elapsed();
    Ok((Uffd::from(made?), AttachFigures { stopped }))
}

/// Has the stopped thread make the descriptor, takes it, and has it closed there.
#[cfg(target_arch = "x86_64")]
fn make_descriptor(
    thread: &mut injected::StoppedThread<'_>,
    process: &Process,
    instruction: u64,
    options: AttachOptions,
) -> Result<OwnedFd, TrackError> {
    let mode = if options.kernel_faults {
        0
    } else {
        sys::uffd::USER_MODE_ONLY
    };
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | mode;
    let made = thread.call(instruction, libc::SYS_userfaultfd, flags)?;
    let Ok(remote) = i32::try_from(made) else {
        return Err(number_error(made));
    };
    if remote < 0 {
        return Err(refused(io::Error::from_raw_os_error(-remote), options));
    }
    let taken = rustix::process::pidfd_getfd(
        process.handle(),
        remote,
        rustix::process::PidfdGetfdFlags::empty(),
    );
    if taken.is_err() || !options.leave_open {
        let closed = thread.call(
            instruction,
            libc::SYS_close,
            u64::from(remote.unsigned_abs()),
        )?;
        if closed != 0 {
            return Err(number_error(closed));
        }
    }
    taken.map_err(|error| {
        process::proc_error(
            process.pid(),
            "taking over the descriptor made in QEMU",
            error.into(),
        )
    })
}

/// An answer of a system call that it cannot give.
#[cfg(target_arch = "x86_64")]
fn number_error(answer: i64) -> TrackError {
    TrackError::System {
        what: "a system call made by QEMU's main thread",
        source: io::Error::other(format!("it answered {answer}")),
    }
}

/// QEMU was refused a userfaultfd.
#[cfg(target_arch = "x86_64")]
fn refused(error: io::Error, options: AttachOptions) -> TrackError {
    match error.raw_os_error() {
        Some(libc::EPERM) if options.kernel_faults => TrackError::Permission(
            "QEMU may not make a userfaultfd that sees faults in the kernel; set the sysctl vm.unprivileged_userfaultfd to 1"
                .into(),
        ),
        Some(libc::EPERM | libc::EACCES) => TrackError::Permission(
            "QEMU was refused a userfaultfd by a security policy (a seccomp filter or SELinux); allow it userfaultfd".into(),
        ),
        Some(libc::ENOSYS) => TrackError::Kernel("it was built without userfaultfd (CONFIG_USERFAULTFD)".into()),
        Some(libc::EMFILE) => TrackError::Busy("QEMU has no file descriptor left; raise its limit (LimitNOFILE)".into()),
        _ => TrackError::System { what: "making a userfaultfd in QEMU", source: error },
    }
}
