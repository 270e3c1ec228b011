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
//! The same way has QEMU do what the kernel lets nobody else do to its memory: drop page tables (`madvise`), close what was
//! left open.
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
mod device;
#[cfg(target_arch = "x86_64")]
mod fault;
#[cfg(target_arch = "x86_64")]
mod injected;
#[cfg(target_arch = "x86_64")]
mod net;
#[cfg(target_arch = "x86_64")]
mod run;

use std::time::Duration;

pub use self::device::{find_device, may_see_kernel_faults};
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use self::nowhere::Injector;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::run::Injector;
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
    /// CAP_SYS_PTRACE, which a QEMU started by libvirt does not, or be given a `device`.
    pub kernel_faults: bool,
    /// Leaves the descriptor open inside QEMU, where a restarted daemon finds it again (post-copy).
    pub leave_open: bool,
    /// The number that an open `/dev/userfaultfd` has inside QEMU (passed to it with QMP's `getfd`, for example). The
    /// userfaultfd is then made from it, and sees faults in the kernel whatever QEMU itself is allowed. Since Linux 6.1.
    pub device: Option<i32>,
}

/// A userfaultfd that acts on another process's memory.
#[derive(Debug)]
pub struct Attached {
    /// The descriptor.
    pub uffd: Uffd,
    /// How the stop went.
    pub figures: AttachFigures,
    /// The number that it has inside the process; with `leave_open` only.
    pub inside: Option<i32>,
}

/// Makes a userfaultfd for dirty tracking in process `pid` and takes it over; nothing is left behind there.
///
/// # Errors
/// What is in the way, and what to do about it.
pub fn attach(pid: i32) -> Result<(Uffd, AttachFigures), TrackError> {
    let attached = attach_with(pid, AttachOptions::default())?;
    Ok((attached.uffd, attached.figures))
}

/// Makes a userfaultfd in process `pid` and takes it over.
///
/// # Errors
/// What is in the way, and what to do about it.
pub fn attach_with(pid: i32, options: AttachOptions) -> Result<Attached, TrackError> {
    Injector::of(pid)?.attach(options, &[], 0)
}

#[cfg(not(target_arch = "x86_64"))]
mod nowhere {
    //! In place of [`run`](super): attaching is written for x86-64 only.

    use std::ops::Range;

    use super::{AttachOptions, Attached, TrackError};

    /// There is none.
    #[derive(Debug)]
    pub(crate) enum Injector {}

    impl Injector {
        /// Refuses.
        pub(crate) fn of(_pid: i32) -> Result<Injector, TrackError> {
            Err(TrackError::Kernel(
                "attaching to QEMU is written for x86-64 only".into(),
            ))
        }

        /// Never called.
        pub(crate) fn attach(
            &self,
            _options: AttachOptions,
            _ranges: &[Range<u64>],
            _advice: i32,
        ) -> Result<Attached, TrackError> {
            match *self {}
        }

        /// Never called.
        pub(crate) fn advise(&self, _range: &Range<u64>, _advice: i32) -> Result<(), TrackError> {
            match *self {}
        }

        /// Never called.
        pub(crate) fn close(&self, _inside: i32) -> Result<(), TrackError> {
            match *self {}
        }
    }
}
