//! Finds a RAM file in a process's memory map, and says what is wrong with those that cannot be moved.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Mapping, Process, descriptors, maps, proc_error, take_file};
use crate::host::TrackError;
use crate::limits::MAX_PAGE_SIZE;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

/// Where a process has a RAM file mapped, and the file.
#[derive(Clone, Debug)]
pub struct RamMapping {
    /// First address in the process.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page: 4096 on tmpfs, the huge page's on hugetlbfs.
    pub page_size: u64,
    /// The file's name in that process, for messages.
    pub path: PathBuf,
    /// The file as the process has it open: never opened by its name.
    pub file: Arc<File>,
    /// The file's device number (`st_dev`).
    pub device: u64,
    /// The file's inode number.
    pub inode: u64,
}

/// Finds where process `pid` has the RAM file `path` (as the process itself names it) mapped: the whole file of `size`
/// bytes, shared, in one range. The file is taken from the process, which must have it open.
///
/// # Errors
/// `Memory` says what is wrong with the file or the mapping and which setting helps; `Gone`; `Permission`.
pub fn find_mapping(pid: i32, path: &Path, size: u64) -> Result<RamMapping, TrackError> {
    let process = Process::open(pid)?;
    let mappings =
        maps(pid).map_err(|error| proc_error(pid, "reading QEMU's memory map", error))?;
    let named = mappings
        .iter()
        .find(|mapping| mapping.name == path && mapping.inode != 0 && !mapping.deleted);
    let identity = match named {
        Some(mapping) => (mapping.device, mapping.inode),
        // A relative path, one with symbolic links in it, or one that is not mapped.
        None => identity_of_path(pid, path)?,
    };
    let Some(mapping) = mappings
        .iter()
        .find(|mapping| (mapping.device, mapping.inode) == identity)
    else {
        return Err(not_mapped(path));
    };
    let failed = |error| proc_error(pid, "taking QEMU's descriptor of its RAM file", error);
    let open = descriptors(pid).map_err(failed)?;
    let file = take_file(&process, &open, &mapping.name, identity).map_err(failed)?;
    let file = file.ok_or_else(|| {
        TrackError::Memory(format!(
            "QEMU has no descriptor of its RAM file {} open any more; start it as a memory-backend-file",
            path.display()
        ))
    })?;
    let page_size = page_size_of(&file, path)?;
    let address = whole_mapping(&mappings, identity, size, path)?;
    Ok(RamMapping {
        address,
        len: size,
        page_size,
        path: path.to_owned(),
        file: Arc::new(file),
        device: identity.0,
        inode: identity.1,
    })
}

fn not_mapped(path: &Path) -> TrackError {
    TrackError::Memory(format!(
        "QEMU has not mapped {}; the file of that name is not (or no longer) its RAM",
        path.display()
    ))
}

/// Device and inode number of what process `pid` calls `path`.
fn identity_of_path(pid: i32, path: &Path) -> Result<(u64, u64), TrackError> {
    let shown = path.display();
    let data = fs::metadata(path_inside(pid, path)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if !Path::new(&format!("/proc/{pid}")).exists() => TrackError::Gone(pid),
        io::ErrorKind::NotFound => TrackError::Memory(format!(
            "its RAM file {shown} is not there any more; a guest can be moved while its file has its name"
        )),
        io::ErrorKind::PermissionDenied => TrackError::Memory(format!(
            "QEMU has nothing mapped by the name {shown}, and the daemon's user may not look that name up ({error}); give \
             memory-backend-file an absolute mem-path without symbolic links, or let that user search its directories"
        )),
        _ => proc_error(pid, "looking at QEMU's RAM file", error),
    })?;
    if !data.is_file() {
        return Err(TrackError::Memory(format!(
            "{shown} is not a file; give memory-backend-file a mem-path that names a file (not a directory) on tmpfs or \
             hugetlbfs"
        )));
    }
    Ok((data.dev(), data.ino()))
}

/// `path` as process `pid` means it, for this process.
pub(super) fn path_inside(pid: i32, path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(below_root) => Path::new(&format!("/proc/{pid}/root")).join(below_root),
        Err(_) => Path::new(&format!("/proc/{pid}/cwd")).join(path),
    }
}

/// Page size of a file that can be tracked.
fn page_size_of(file: &File, shown: &Path) -> Result<u64, TrackError> {
    let system = rustix::fs::fstatfs(file).map_err(|error| TrackError::System {
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
            "its RAM file {} has pages of {}, and the largest that can be moved are of 2 MiB (in post-copy the guest would wait \
             for all of one): put it on a hugetlbfs that was mounted with pagesize=2M",
            shown.display(),
            size(page_size)
        )));
    }
    Ok(page_size)
}

/// For people.
fn size(bytes: u64) -> String {
    match (bytes >> 30, bytes >> 20) {
        (0, mib) => format!("{mib} MiB"),
        (gib, _) => format!("{gib} GiB"),
    }
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
        if ranges.is_empty() {
            return Err(not_mapped(path));
        }
        return Err(TrackError::Memory(format!(
            "QEMU has mapped {shown} in {} ranges where one is expected",
            ranges.len()
        )));
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ops::Range;

    use super::*;

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
