//! What `/proc/PID` tells about a QEMU: where its RAM files are mapped, who else writes them, which devices it has.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use super::TrackError;
use crate::limits::MAX_PAGE_SIZE;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

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

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses.
    pub addresses: Range<u64>,
    /// Whether it can be written.
    pub writable: bool,
    /// Whether it can be executed.
    pub executable: bool,
    /// Whether writes go to the file.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// The file's device number, as `st_dev` has it; 0 without a file.
    pub device: u64,
    /// The file's inode number; 0 without a file.
    pub inode: u64,
    /// The file, or a name in brackets; empty for anonymous memory.
    pub name: PathBuf,
    /// Whether the file has been deleted.
    pub deleted: bool,
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

/// All mappings of process `pid`, by address.
///
/// # Errors
/// `/proc/PID/maps` cannot be read, or is not as this program knows it.
pub fn maps(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = fs::read(format!("/proc/{pid}/maps"))?;
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_mapping(line).ok_or_else(|| {
                let line = String::from_utf8_lossy(line);
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("/proc/{pid}/maps: {line}"),
                )
            })
        })
        .collect()
}

/// A line of maps: `7f00-7f10 rw-s 00000000 00:1a 1234      /dev/shm/ram (deleted)`.
fn parse_mapping(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|byte| *byte != b' ')?;
        let end = rest[start..]
            .iter()
            .position(|byte| *byte == b' ')
            .map_or(rest.len(), |at| start + at);
        let field = std::str::from_utf8(&rest[start..end]).ok()?;
        rest = &rest[end..];
        Some(field)
    };
    let (addresses, access, offset, device, inode) =
        (field()?, field()?.as_bytes(), field()?, field()?, field()?);
    let (start, end) = addresses.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let device = libc::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let name = rest
        .iter()
        .position(|byte| *byte != b' ')
        .map_or(&rest[..0], |at| &rest[at..]);
    let (name, deleted) = match name.strip_suffix(b" (deleted)") {
        Some(name) => (name, true),
        None => (name, false),
    };
    Some(Mapping {
        addresses: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        writable: access.get(1) == Some(&b'w'),
        executable: access.get(2) == Some(&b'x'),
        shared: access.get(3) == Some(&b's'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        device,
        inode: inode.parse().ok()?,
        name: PathBuf::from(OsString::from_vec(name.to_vec())),
        deleted,
    })
}

/// Finds where process `pid` has the RAM file `path` (as the process itself names it) mapped: the whole file of `size`
/// bytes, shared, in one range.
///
/// # Errors
/// `Memory` says what is wrong with the file or the mapping and which setting helps; `Gone`; `Permission`.
pub fn find_mapping(pid: i32, path: &Path, size: u64) -> Result<RamMapping, TrackError> {
    let inside = path_inside(pid, path);
    let shown = path.display();
    let file = fs::metadata(&inside).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if !Path::new(&format!("/proc/{pid}")).exists() => TrackError::Gone(pid),
        io::ErrorKind::NotFound => TrackError::Memory(format!(
            "its RAM file {shown} is not there any more; a guest can be moved while its file has its name"
        )),
        _ => proc_error(pid, "looking at QEMU's RAM file", error),
    })?;
    if !file.is_file() {
        return Err(TrackError::Memory(format!(
            "{shown} is not a file; give memory-backend-file a mem-path that names a file (not a directory) on tmpfs or \
             hugetlbfs"
        )));
    }
    let page_size = page_size_of(&inside, path)?;
    let mappings =
        maps(pid).map_err(|error| proc_error(pid, "reading QEMU's memory map", error))?;
    let address = whole_mapping(&mappings, (file.dev(), file.ino()), size, path)?;
    // The plain path is the better name where it means the same file here.
    let same_here =
        fs::metadata(path).is_ok_and(|here| (here.dev(), here.ino()) == (file.dev(), file.ino()));
    Ok(RamMapping {
        address,
        len: size,
        page_size,
        path: if path.is_absolute() && same_here {
            path.to_owned()
        } else {
            inside
        },
        device: file.dev(),
        inode: file.ino(),
    })
}

/// `path` as process `pid` means it, for this process.
pub(crate) fn path_inside(pid: i32, path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(below_root) => Path::new(&format!("/proc/{pid}/root")).join(below_root),
        Err(_) => Path::new(&format!("/proc/{pid}/cwd")).join(path),
    }
}

/// Page size of a file that can be tracked.
fn page_size_of(inside: &Path, shown: &Path) -> Result<u64, TrackError> {
    let system = rustix::fs::statfs(inside).map_err(|error| TrackError::System {
        what: "asking for the RAM file's file system",
        source: error.into(),
    })?;
    let page_size = match u64::try_from(system.f_type) {
        Ok(TMPFS_MAGIC) => 4096,
        Ok(HUGETLBFS_MAGIC) => u64::try_from(system.f_bsize).unwrap_or(0),
        _ => {
            return Err(TrackError::Memory(format!(
                "its RAM file {} is neither on tmpfs nor on hugetlbfs, and the kernel tracks writes only there; put it in \
                 /dev/shm or on a hugetlbfs mount",
                shown.display()
            )));
        }
    };
    if page_size == 0 || page_size > MAX_PAGE_SIZE {
        return Err(TrackError::Memory(format!(
            "its RAM file {} has pages of {page_size} bytes; the largest that can be moved are 2 MiB",
            shown.display()
        )));
    }
    Ok(page_size)
}

/// Address of the one range in which all of the file is mapped, shared.
fn whole_mapping(
    mappings: &[Mapping],
    (device, inode): (u64, u64),
    size: u64,
    path: &Path,
) -> Result<u64, TrackError> {
    let shown = path.display();
    // The kernel splits a range where flags differ (by madvise, say); what touches in memory and file is one again.
    let mut ranges: Vec<Mapping> = Vec::new();
    for mapping in mappings
        .iter()
        .filter(|mapping| (mapping.device, mapping.inode) == (device, inode))
    {
        match ranges.last_mut() {
            Some(last)
                if last.addresses.end == mapping.addresses.start
                    && last.offset + (last.addresses.end - last.addresses.start)
                        == mapping.offset
                    && last.shared == mapping.shared =>
            {
                last.addresses.end = mapping.addresses.end;
            }
            _ => ranges.push(mapping.clone()),
        }
    }
    let [range] = ranges.as_slice() else {
        return Err(TrackError::Memory(if ranges.is_empty() {
            format!(
                "QEMU has not mapped {shown}; the file of that name is not (or no longer) its RAM"
            )
        } else {
            format!(
                "QEMU has mapped {shown} in {} ranges where one is expected",
                ranges.len()
            )
        }));
    };
    if !range.shared {
        return Err(TrackError::Memory(format!(
            "QEMU has mapped {shown} privately; start it with share=on at that memory-backend-file"
        )));
    }
    let len = range.addresses.end - range.addresses.start;
    if range.offset != 0 || len != size {
        return Err(TrackError::Memory(format!(
            "QEMU has mapped {len} bytes of {shown} from offset {}; {size} bytes from its start are expected",
            range.offset
        )));
    }
    Ok(range.addresses.start)
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
    let mut devices = open_files(pid)?;
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
    Ok(open_files(pid)?
        .iter()
        .filter(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
        .count())
}

/// Where the descriptors of process `pid` lead to.
fn open_files(pid: i32) -> io::Result<Vec<PathBuf>> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        match fs::read_link(entry?.path()) {
            Ok(target) => targets.push(target),
            // Closed in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(targets)
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
            "{what} was refused ({error}); the daemon needs CAP_SYS_PTRACE in QEMU's user namespace"
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
    fn lines_of_maps_are_understood() {
        let line = b"7f5c40000000-7f5c60000000 rw-s 00200000 00:1a 1234                       /dev/shm/a b (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!(mapping.addresses, 0x7f5c_4000_0000..0x7f5c_6000_0000);
        assert!(mapping.writable && mapping.shared && mapping.deleted && !mapping.executable);
        assert_eq!(
            (mapping.offset, mapping.device, mapping.inode),
            (0x20_0000, 0x1a, 1234)
        );
        assert_eq!(mapping.name, Path::new("/dev/shm/a b"));

        let vdso =
            parse_mapping(b"7ffc12345000-7ffc12347000 r-xp 00000000 00:00 0   [vdso]").unwrap();
        assert!(vdso.executable && !vdso.shared && vdso.inode == 0);
        assert_eq!(vdso.name, Path::new("[vdso]"));

        let anonymous = parse_mapping(b"1000-2000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!(anonymous.name, Path::new(""));
        for broken in [
            &b"1000-2000"[..],
            b"10-zz rw-p 0 00:00 0",
            b"1000 rw-p 0 00:00 0",
            b"1-2 rw-p 0 0000 0",
        ] {
            assert_eq!(parse_mapping(broken), None);
        }
    }

    fn part(addresses: Range<u64>, offset: u64, shared: bool) -> Mapping {
        Mapping {
            addresses,
            writable: true,
            executable: false,
            shared,
            offset,
            device: 1,
            inode: 2,
            name: PathBuf::from("/ram"),
            deleted: false,
        }
    }

    #[test]
    fn only_one_whole_shared_range_is_guest_memory() {
        let find = |parts: &[Mapping]| whole_mapping(parts, (1, 2), 0x4000, Path::new("/ram"));
        assert_eq!(find(&[part(0x1000..0x5000, 0, true)]).ok(), Some(0x1000));
        let split = [
            part(0x1000..0x2000, 0, true),
            part(0x2000..0x5000, 0x1000, true),
        ];
        assert_eq!(find(&split).ok(), Some(0x1000));

        let wrong = [
            (vec![], "has not mapped"),
            (vec![part(0x1000..0x5000, 0, false)], "share=on"),
            (vec![part(0x1000..0x4000, 0, true)], "12288 bytes"),
            (vec![part(0x1000..0x5000, 0x1000, true)], "offset 4096"),
            (
                vec![part(0x1000..0x5000, 0, true), part(0x9000..0xd000, 0, true)],
                "2 ranges",
            ),
        ];
        for (parts, word) in wrong {
            let error = find(&parts).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
