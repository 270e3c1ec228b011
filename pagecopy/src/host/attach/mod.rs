//! Attaching to a running QEMU: one `userfaultfd`, made by QEMU's own main thread and taken over by this process.
//!
//! A userfaultfd acts on the address space that created it, so QEMU has to make it. Its main thread is stopped with
//! `ptrace` for some tens of microseconds, executes `userfaultfd` and `close` in place of what it was about to do, gets its
//! registers back exactly, and goes on; in between, the descriptor is taken with `pidfd_getfd`. The main thread is chosen
//! because it is not a vCPU: it waits for events nearly all the time, so the guest notices nothing.
//!
//! *A system call that the stop interrupted* restarts: the kernel decides that from the saved registers when the thread
//! returns to user mode for good. The injected calls run with `orig_rax = -1`, so that nothing is restarted on top of them.
//!
//! *A signal* that comes in between is delivered with the thread's own registers in place, and the injection is tried again.
//!
//! # When a process is killed in between
//!
//! A guest must not be lost with the daemon, and a thread whose tracer dies goes on with the registers that it has.
//!
//! *This process* may die at any moment: a child that does not depend on it does all of the above (`sys::survivor`). It
//! puts the registers back, closes the descriptor inside QEMU and lets go.
//!
//! *The child*, too, may be killed: by hand, or by systemd, which ends what is left in the control group (at once with
//! `systemctl kill -s KILL`, else after TimeoutStopSec, thousands of times longer than the child lives). For that there is
//! a net (the file `net.rs`): a frame on the thread's stack from which it restores itself. What remains then is a
//! descriptor inside QEMU if the moment was between making and closing it, with which nothing can be registered (in
//! `/proc/PID/fdinfo` its `API` line has no features), and at worst an EINTR, which QEMU is used to.
//!
//! *What is not covered* is a kill of exactly that child, within the microseconds in which the thread has other registers,
//! where no net can be spread: a main thread that is just in a coroutine, or has a shadow stack, or a QEMU without a C
//! library's code.

#[cfg(target_arch = "x86_64")]
mod code;
#[cfg(target_arch = "x86_64")]
mod fault;
#[cfg(target_arch = "x86_64")]
mod injected;
#[cfg(target_arch = "x86_64")]
mod net;
#[cfg(target_arch = "x86_64")]
mod run;

use std::time::Duration;

pub use super::sys::uffd::Uffd;
use super::{AttachFigures, TrackError};

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
    #[cfg(target_arch = "x86_64")]
    return run::run(pid, options);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (pid, options);
        Err(TrackError::Kernel(
            "attaching to QEMU is written for x86-64 only".into(),
        ))
    }
}
