//! Whether something was taken out of a guest's RAM files.
//!
//! No scan sees a hole that is punched (by a balloon, by free page reporting), and to list a file's holes takes as long as to
//! walk through all of its pages, some 8 ms a GiB: too long for a guest that stands still. But the kernel tells whoever watches
//! a file of each change that is not made through a mapping: `fallocate` and `MADV_REMOVE`, which punch holes, and `ftruncate`
//! and `write` besides, by any process and through any descriptor (`IN_MODIFY` of inotify; on tmpfs and on hugetlbfs, measured
//! on Linux 6.18). It tells once the change is made, before the system call returns.
//!
//! Of files that are the kernel's own it does not tell, wherever the descriptor says so that the change is made through: of a memfd
//! nothing is heard since Linux 6.14, neither of `fallocate` nor of `MADV_REMOVE`. Only files that were opened by a name on a
//! mounted tmpfs or hugetlbfs are watched, therefore; for all others the holes are listed when they are needed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::MappedRam;

/// Room for some events at a time; all of them are read.
const EVENTS: usize = 4096;
/// What a memfd is called below `/proc/PID/fd`.
const MEMFD: &[u8] = b"/memfd:";
/// File systems of which it is known that the kernel tells.
const TOLD_OF: [&str; 2] = ["tmpfs", "hugetlbfs"];

/// Watches RAM files.
#[derive(Debug)]
pub struct Taken {
    inotify: OwnedFd,
}

impl MappedRam {
    /// Begins to watch for what is taken out of the files.
    ///
    /// # Errors
    /// `Unsupported` where the kernel would not tell of everything; the kernel's limit of watches is reached (`fs.inotify` below
    /// sysctl); or this user may not read the files by name.
    pub fn watch(&self) -> io::Result<Taken> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let mounts = std::fs::read("/proc/self/mountinfo")?;
        let mounts = String::from_utf8_lossy(&mounts);
        for block in &*self.blocks {
            // The file itself, whatever its name is by now.
            let path = format!("/proc/self/fd/{}", block.file.as_raw_fd());
            let device = rustix::fs::fstat(&block.file)?.st_dev;
            let own = std::fs::read_link(&path)?;
            if own.as_os_str().as_encoded_bytes().starts_with(MEMFD) || !is_mounted(&mounts, device)
            {
                let what = format!(
                    "the kernel does not tell of all changes to {}",
                    own.display()
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, what));
            }
            inotify::add_watch(&inotify, path, WatchFlags::MODIFY)?;
        }
        Ok(Taken { inotify })
    }
}

impl Taken {
    /// Whether something may have been taken out since this was asked last, or since the watch began.
    pub fn anything(&self) -> bool {
        let (mut buffer, mut any) = ([0; EVENTS], false);
        loop {
            match rustix::io::read(&self.inotify, &mut buffer) {
                Ok(1..) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return any,
                // It cannot be known.
                Ok(0) | Err(_) => return true,
            }
        }
    }
}

/// Whether that device is a file system of the kind that is told of, which has a place in the tree of names: the kernel's own,
/// of memfds and the like, has none. `mounts` is the text of `/proc/self/mountinfo`.
fn is_mounted(mounts: &str, device: u64) -> bool {
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    mounts.lines().any(|line| {
        // `22 1 0:20 / /dev/shm rw,nosuid - tmpfs tmpfs rw`
        let (place, kind) = line.split_once(" - ").unwrap_or_default();
        let kind = kind.split(' ').next().unwrap_or_default();
        place.split(' ').nth(2) == Some(&number) && TOLD_OF.contains(&kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mounted_file_system_in_memory_is_told_of() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/vda rw\n\
            22 21 0:20 / /dev/shm rw,nosuid shared:4 - tmpfs tmpfs rw\n\
            23 21 0:31 /a - b /huge rw - hugetlbfs none rw\n\
            24 21 0:32 / /huge rw - hugetlbfs none rw\n";
        let device = rustix::fs::makedev;
        assert!(is_mounted(mounts, device(0, 20)) && is_mounted(mounts, device(0, 32)));
        assert!(!is_mounted(mounts, device(8, 1)), "ext4");
        assert!(!is_mounted(mounts, device(0, 2)), "the kernel's own");
        assert!(!is_mounted(mounts, device(0, 31)), "what is not understood");
    }
}
