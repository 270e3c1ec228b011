//! What `/proc` tells about QEMU beyond the host half: shared files, command line, who maps a file.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pagecopy::host::process::{Mapping, maps};

/// The shared, writable mappings of files and memfds of a process; devices and the kernel's rings are left out.
///
/// # Errors
/// The process is gone, or may not be looked at.
pub fn shared_files(pid: i32) -> io::Result<Vec<Mapping>> {
    Ok(maps(pid)?.into_iter().filter(is_shared_file).collect())
}

fn is_shared_file(mapping: &Mapping) -> bool {
    let name = &mapping.name;
    let device = name.starts_with("/dev")
        && !name.starts_with("/dev/shm")
        && !name.starts_with("/dev/hugepages");
    mapping.shared && mapping.writable && name.is_absolute() && !device
}

/// Whether a mapping is of a memfd.
pub fn is_memfd(mapping: &Mapping) -> bool {
    mapping.name.to_string_lossy().starts_with("/memfd:")
}

/// The processes, other than this one, that have `file` mapped shared and writable: the file that this process knows by
/// that name or, where it may not look the name up, one that they know by it.
///
/// # Errors
/// `/proc` cannot be read.
pub fn processes_mapping(file: &Path) -> io::Result<Vec<i32>> {
    let here = fs::metadata(file).ok();
    let maps_it = |mapping: &Mapping| match &here {
        Some(here) => (mapping.device, mapping.inode) == (here.dev(), here.ino()),
        None => mapping.name == file && !mapping.deleted,
    };
    // Processes come and go, and some may not be looked at: those are not ours to judge.
    others(|pid| shared_files(pid).is_ok_and(|mappings| mappings.iter().any(maps_it)))
}

/// The QEMUs that were started to wait for a guest and whose command line names `socket`.
///
/// # Errors
/// `/proc` cannot be read.
pub fn incoming_with(socket: &Path) -> io::Result<Vec<i32>> {
    let socket = socket.to_string_lossy();
    others(|pid| {
        command_line(pid).is_ok_and(|words| {
            option_value(&words, "incoming").is_some()
                && words.iter().any(|word| word.contains(&*socket))
        })
    })
}

/// The processes whose command line `wanted` takes.
///
/// # Errors
/// `/proc` cannot be read.
pub fn processes_with(wanted: impl Fn(&[String]) -> bool) -> io::Result<Vec<i32>> {
    others(|pid| command_line(pid).is_ok_and(|words| wanted(&words)))
}

/// The processes, other than this one, that `wanted` takes.
fn others(wanted: impl Fn(i32) -> bool) -> io::Result<Vec<i32>> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<i32>().ok());
        found.extend(pid.filter(|pid| *pid != own && wanted(*pid)));
    }
    Ok(found)
}

/// The command line of a process.
///
/// # Errors
/// The process is gone, or may not be looked at.
pub fn command_line(pid: i32) -> io::Result<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))?;
    Ok(bytes
        .split(|&byte| byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect())
}

/// The word after `option` (without dashes; QEMU takes one or two) on QEMU's command line; empty when the option is the
/// last word.
pub fn option_value<'a>(command_line: &'a [String], option: &str) -> Option<&'a str> {
    let is_it = |word: &String| {
        word.strip_prefix('-')
            .is_some_and(|word| word.strip_prefix('-').unwrap_or(word) == option)
    };
    let at = command_line.iter().position(is_it)?;
    Some(command_line.get(at + 1).map_or("", String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(name: &str, shared: bool, writable: bool) -> Mapping {
        let (addresses, name) = (0..4096, name.into());
        Mapping {
            addresses,
            writable,
            executable: false,
            shared,
            offset: 0,
            device: 1,
            inode: 2,
            name,
            deleted: false,
        }
    }

    #[test]
    fn only_shared_writable_files_count() {
        assert!(is_shared_file(&mapping("/dev/shm/guest ram", true, true)));
        assert!(is_shared_file(&mapping("/memfd:ivshmem", true, true)));
        assert!(is_memfd(&mapping("/memfd:ivshmem", true, true)));
        assert!(!is_shared_file(&mapping("/dev/shm/read-only", true, false)));
        assert!(!is_shared_file(&mapping("/dev/kvm", true, true)));
        assert!(!is_shared_file(&mapping(
            "anon_inode:kvm-vcpu:0",
            true,
            true
        )));
        assert!(!is_shared_file(&mapping("/tmp/private.bin", false, true)));
    }

    #[test]
    fn options_of_a_command_line() {
        let words = [
            "qemu",
            "-S",
            "--incoming",
            "defer",
            "-m",
            "1G",
            "-nodefaults",
        ]
        .map(str::to_owned);
        assert!(option_value(&words, "S").is_some());
        assert!(option_value(&words, "s").is_none());
        assert_eq!(option_value(&words, "incoming"), Some("defer"));
        assert_eq!(option_value(&words, "nodefaults"), Some(""));
    }
}
