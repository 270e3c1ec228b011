//! `/proc/PID/maps`, line by line.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

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
}
