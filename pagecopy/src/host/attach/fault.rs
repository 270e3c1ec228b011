//! Why an attach failed, as plain numbers that a [`survivor`](crate::host::sys::survivor) can hand over, and in words.

use std::io;

use super::AttachOptions;
use crate::host::TrackError;
use crate::host::process;

/// Why an attach failed. Error numbers are the system's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The thread has ended.
    Gone,
    /// It could not be traced.
    Seize(i32),
    /// Tracing it failed.
    Trace(i32),
    /// It is not a 64-bit program's.
    Not64Bit,
    /// It does not come to rest between signals.
    Signals,
    /// Its process was stopped by this signal.
    Halted(i32),
    /// It did not stop in time.
    Blocked,
    /// It was refused a userfaultfd.
    Refused(i32),
    /// A system call gave an answer that it cannot give.
    Answer(i64),
    /// The descriptor could not be taken over.
    Take(i32),
}

impl Fault {
    /// In words, about process `pid`.
    pub(super) fn explain(self, pid: i32, options: AttachOptions) -> TrackError {
        let system = |what, number| TrackError::System {
            what,
            source: io::Error::from_raw_os_error(number),
        };
        match self {
            Fault::Gone | Fault::Seize(libc::ESRCH) | Fault::Trace(libc::ESRCH) => {
                TrackError::Gone(pid)
            }
            Fault::Seize(libc::EPERM) => {
                traced_already(pid).unwrap_or_else(|| TrackError::Permission(not_permitted(pid)))
            }
            Fault::Seize(number) | Fault::Trace(number) => {
                system("tracing QEMU's main thread", number)
            }
            Fault::Not64Bit => TrackError::Memory("QEMU is not a 64-bit program".into()),
            Fault::Signals => {
                TrackError::Busy("QEMU's main thread is flooded with signals; try again".into())
            }
            Fault::Halted(signal) => TrackError::Busy(format!(
                "QEMU's process was stopped by signal {signal}; let it go on with SIGCONT, then try again"
            )),
            Fault::Blocked => blocked(pid),
            Fault::Refused(number) => refused(number, options),
            Fault::Answer(answer) => TrackError::System {
                what: "a system call made by QEMU's main thread",
                source: io::Error::other(format!("it answered {answer}")),
            },
            Fault::Take(number) => process::proc_error(
                pid,
                "taking over the descriptor made in QEMU",
                io::Error::from_raw_os_error(number),
            ),
        }
    }
}

/// QEMU's main thread does not stop.
pub(super) fn blocked(pid: i32) -> TrackError {
    TrackError::Busy(format!(
        "QEMU's main thread (process {pid}) did not come to a stop within {} s; it is blocked in the kernel, usually by \
         storage that does not answer",
        super::STOP_LIMIT.as_secs()
    ))
}

/// Who else traces QEMU, if anyone does.
pub(super) fn traced_already(pid: i32) -> Option<TrackError> {
    process::tracer_of(pid).map(|tracer| {
        TrackError::Busy(format!(
            "QEMU (process {pid}) is traced by {} (process {}); end that first",
            tracer.name, tracer.pid
        ))
    })
}

/// Why tracing may be refused.
fn not_permitted(pid: i32) -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let yama = match scope.trim() {
        "3" => {
            "; kernel.yama.ptrace_scope is 3, which forbids tracing altogether until the next boot"
        }
        "1" | "2" => "; kernel.yama.ptrace_scope asks for that capability, too",
        _ => "",
    };
    format!(
        "tracing process {pid} was refused; the daemon needs CAP_SYS_PTRACE in QEMU's user namespace, and no security policy \
         (SELinux, AppArmor) against it{yama}"
    )
}

/// QEMU was refused a userfaultfd.
fn refused(number: i32, options: AttachOptions) -> TrackError {
    match number {
        libc::EPERM if options.kernel_faults => TrackError::Permission(
            "QEMU may not make a userfaultfd that sees faults in the kernel; let pagecopyd open /dev/userfaultfd, or set the \
             sysctl vm.unprivileged_userfaultfd to 1"
                .into(),
        ),
        libc::EPERM | libc::EACCES => TrackError::Permission(
            "QEMU was refused a userfaultfd by a security policy (a seccomp filter or SELinux); allow it userfaultfd".into(),
        ),
        libc::ENOSYS => TrackError::Kernel("it was built without userfaultfd (CONFIG_USERFAULTFD)".into()),
        libc::EMFILE => TrackError::Busy("QEMU has no file descriptor left; raise its limit (LimitNOFILE)".into()),
        _ => TrackError::System {
            what: "making a userfaultfd in QEMU",
            source: io::Error::from_raw_os_error(number),
        },
    }
}
