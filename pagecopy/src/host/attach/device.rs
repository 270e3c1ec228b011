//! Who may make a userfaultfd that sees faults in the kernel, which post-copy needs: a process that may by itself, and any
//! process that was given an open `/dev/userfaultfd`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::process::PidfdGetfdFlags;

use crate::host::TrackError;
use crate::host::process::{self, Process};

/// `CAP_SYS_PTRACE`, as `/proc/PID/status` counts capabilities.
const SYS_PTRACE: u64 = 1 << 19;
/// What the first user namespace is called (`PROC_USER_INIT_INO`): capabilities in another one do not count here.
const FIRST_NAMESPACE: &str = "user:[4026531837]";
/// Where the kernel says whether every process may.
const EVERYBODY: &str = "/proc/sys/vm/unprivileged_userfaultfd";
/// The last part of the device's path.
const NAME: &str = "userfaultfd";

/// Whether process `pid` may make a userfaultfd that sees faults in the kernel by itself.
///
/// # Errors
/// It is gone, or may not be looked at.
pub fn may_see_kernel_faults(pid: i32) -> Result<bool, TrackError> {
    // A kernel that does not say refuses.
    if std::fs::read_to_string(EVERYBODY).is_ok_and(|all| all.trim() == "1") {
        return Ok(true);
    }
    let failed = |error| process::proc_error(pid, "looking at what QEMU may do", error);
    let status = process::open_proc(pid, "status")
        .and_then(io::read_to_string)
        .map_err(failed)?;
    if capabilities(&status).is_none_or(|effective| effective & SYS_PTRACE == 0) {
        return Ok(false);
    }
    let namespace = std::fs::read_link(format!("/proc/{pid}/ns/user")).map_err(failed)?;
    Ok(namespace == Path::new(FIRST_NAMESPACE))
}

/// The capabilities that are in effect, by the text of `/proc/PID/status`.
fn capabilities(status: &str) -> Option<u64> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(effective.trim(), 16).ok()
}

/// The number under which process `pid` has the same device open as `device` is: what
/// [`AttachOptions::device`](super::AttachOptions::device) takes.
///
/// # Errors
/// The process is gone, or may not be looked at.
pub fn find_device(pid: i32, device: BorrowedFd<'_>) -> Result<Option<i32>, TrackError> {
    let failed = |error| process::proc_error(pid, "looking for /dev/userfaultfd in QEMU", error);
    let process = Process::open(pid)?;
    let wanted = number(device).map_err(failed)?;
    let open = process::descriptors(pid).map_err(failed)?;
    for one in open.iter().filter(|one| one.target.ends_with(NAME)) {
        let none = PidfdGetfdFlags::empty();
        match rustix::process::pidfd_getfd(process.handle(), one.number, none) {
            Ok(taken) if number(taken.as_fd()).map_err(failed)? == wanted => {
                return Ok(Some(one.number));
            }
            // Closed in the meantime.
            Ok(_) | Err(Errno::BADF) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    Ok(None)
}

/// The number of the device behind a descriptor, and of its file system's entry.
fn number(device: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let data = fstat(device)?;
    Ok((data.st_rdev, data.st_ino))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_kernels_text() {
        let status =
            "Name:\tqemu\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000080000\nCapBnd:\t0\n";
        assert_eq!(capabilities(status), Some(SYS_PTRACE));
        assert_eq!(capabilities("Name:\tqemu\n"), None);
        assert_eq!(capabilities("CapEff:\tnone\n"), None);
    }
}
