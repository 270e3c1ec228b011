//! What `/proc/PID` tells about a QEMU: where its RAM files are mapped, who else writes them, which devices it has.

mod maps;
mod opened;
mod ram_file;
mod storage;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

pub use self::maps::{Mapping, maps};
pub use self::opened::open_ram_file;
pub(crate) use self::opened::{Descriptor, descriptors, open_proc, take_file};
pub use self::ram_file::{RamMapping, find_mapping};
pub use self::storage::opened_storage;
use super::TrackError;

/// A process, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessName {
    /// Its id.
    pub pid: i32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
}

/// A process that is held on to: its id cannot come to mean another one unnoticed.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    handle: OwnedFd,
}

impl Process {
    /// Takes hold of process `pid`.
    ///
    /// # Errors
    /// `Gone` when there is none.
    pub fn open(pid: i32) -> Result<Process, TrackError> {
        let id = Pid::from_raw(pid.max(0)).ok_or(TrackError::Gone(pid))?;
        match rustix::process::pidfd_open(id, PidfdFlags::empty()) {
            Ok(handle) => Ok(Process { pid, handle }),
            Err(rustix::io::Errno::SRCH) => Err(TrackError::Gone(pid)),
            Err(error) => Err(TrackError::System {
                what: "taking hold of QEMU's process",
                source: error.into(),
            }),
        }
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its pidfd.
    pub(crate) fn handle(&self) -> &OwnedFd {
        &self.handle
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.handle, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A pidfd becomes readable when its process ends. A failing poll tells nothing; what is done next will.
        !matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(ready) if ready > 0)
    }
}

/// Other processes (not `pid`, not this one) that have the file mapped writable, such as vhost-user back ends. What they
/// write is not seen through QEMU's page table. A process that this one may not look into, although it may trace QEMU, is
/// another tenant's (of an outer container, say) and left out.
///
/// # Errors
/// `/proc` cannot be read.
pub fn other_writers(pid: i32, mapping: &RamMapping) -> io::Result<Vec<ProcessName>> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut writers = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(other) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if other == pid || other == own {
            continue;
        }
        let mappings = match maps(other) {
            Ok(mappings) => mappings,
            Err(error) if is_gone(&error) => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::debug!(pid = other, "not looked into for mappings of guest memory");
                continue;
            }
            Err(error) => return Err(error),
        };
        let writes = |found: &Mapping| {
            found.shared
                && found.writable
                && (found.device, found.inode) == (mapping.device, mapping.inode)
        };
        if mappings.iter().any(writes) {
            writers.push(ProcessName {
                pid: other,
                name: name_of(other),
            });
        }
    }
    Ok(writers)
}

/// The name of process `pid`, for messages.
pub fn name_of(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".into(), |name| name.trim_end().into())
}

/// Devices open in process `pid` that write guest memory on their own (`/dev/vfio/*`, `/dev/iommu`,
/// `/dev/vhost-vdpa-*`).
///
/// # Errors
/// `/proc` cannot be read.
pub fn assigned_devices(pid: i32) -> io::Result<Vec<PathBuf>> {
    let mut devices: Vec<PathBuf> = descriptors(pid)?
        .into_iter()
        .map(|descriptor| descriptor.target)
        .collect();
    devices.retain(|target| {
        let target = target.as_os_str().as_encoded_bytes();
        target.starts_with(b"/dev/vfio/")
            || target.starts_with(b"/dev/vhost-vdpa")
            || target == b"/dev/iommu"
    });
    devices.sort();
    devices.dedup();
    Ok(devices)
}

/// How many userfaultfds process `pid` has open itself.
///
/// # Errors
/// `/proc` cannot be read.
pub fn userfaultfds(pid: i32) -> io::Result<usize> {
    Ok(descriptors(pid)?
        .iter()
        .filter(|descriptor| descriptor.target.as_os_str() == "anon_inode:[userfaultfd]")
        .count())
}

/// How many userfaultfds process `pid` has open that can hold memory. One on which the handshake was never done holds
/// nothing: an attach whose own process was killed may leave such a one behind, and it must not keep a guest from moving
/// ever after.
///
/// # Errors
/// `/proc` cannot be read.
pub fn userfaultfds_in_use(pid: i32) -> io::Result<usize> {
    let mut in_use = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        match fs::read_to_string(entry?.path()) {
            Ok(info) => in_use += usize::from(has_shaken_hands(&info)),
            // Closed in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(in_use)
}

/// Whether this is the `fdinfo` of a userfaultfd after `UFFDIO_API`: its second figure is the features asked for, with a
/// bit of the kernel's own for the handshake (`userfaultfd_show_fdinfo` in `fs/userfaultfd.c`).
fn has_shaken_hands(info: &str) -> bool {
    info.lines()
        .filter_map(|line| line.strip_prefix("API:"))
        .filter_map(|figures| figures.split(':').nth(1))
        .any(|features| u64::from_str_radix(features.trim(), 16) != Ok(0))
}

/// The process that traces `pid`, if any.
pub(crate) fn tracer_of(pid: i32) -> Option<ProcessName> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?
        .trim()
        .parse()
        .ok()?;
    (tracer != 0).then(|| ProcessName {
        pid: tracer,
        name: name_of(tracer),
    })
}

/// Whether an error of `/proc/PID/…` means that the process has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// An error of `/proc/PID/…` in words.
pub(crate) fn proc_error(pid: i32, what: &'static str, error: io::Error) -> TrackError {
    if is_gone(&error) {
        return TrackError::Gone(pid);
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => TrackError::Permission(format!(
            "{what} was refused ({error}); the daemon needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH in QEMU's user namespace"
        )),
        _ => TrackError::System {
            what,
            source: error,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_userfaultfd_is_in_use_once_the_handshake_is_done() {
        let info =
            |api: &str| format!("pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\t{api}\n");
        assert!(!has_shaken_hands(&info("aa:0:1ffff")));
        assert!(has_shaken_hands(&info("aa:80000000:1ffff")));
        assert!(!has_shaken_hands("pos:\t0\nflags:\t02004002\n"));
    }
}
