//! What a disk of a QEMU is on: asked of the file as QEMU has it open, so that neither a name nor a directory's mode stands in
//! between.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::process::PidfdGetfdFlags;

use super::ram_file::path_inside;
use super::{Process, descriptors};
use crate::preflight::Storage;

/// Kinds of file systems by their magic numbers (`statfs(2)`), as they are called where they are mounted.
const SYSTEMS: [(u64, &str); 20] = [
    (0xEF53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x9584_58F6, "hugetlbfs"),
    (0x8584_58F6, "ramfs"),
    (0x2FC1_2FC1, "zfs"),
    (0x794C_7630, "overlay"),
    (0xF2F5_2010, "f2fs"),
    (0x6969, "nfs"),
    (0x00C3_6400, "ceph"),
    (0x7461_636F, "ocfs2"),
    (0x0116_1970, "gfs2"),
    (0x0BD0_0BD0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0x6573_5546, "fuse"),
    (0xFF53_4D42, "cifs"),
    (0xFE53_4D42, "smb3"),
    (0x0102_1997, "9p"),
    (0x786F_4256, "vboxsf"),
];

/// What the file that process `pid` has open by the name `path` is on. May take as long as its storage does to answer.
///
/// # Errors
/// It has no such file open, or may not be looked at.
pub fn opened_storage(pid: i32, path: &Path) -> io::Result<Storage> {
    let file = opened(pid, path)?;
    let data = file.metadata()?;
    if data.file_type().is_block_device() {
        let device = data.rdev();
        let wwid = world_wide_name(device);
        return Ok(Storage::Device { device, wwid });
    }
    let magic = rustix::fs::fstatfs(&file)?.f_type;
    Ok(Storage::Path {
        system: system(u64::try_from(magic).unwrap_or_default()),
        device: data.dev(),
        inode: data.ino(),
    })
}

/// The kind of a file system. What has no name here has its number.
fn system(magic: u64) -> String {
    let known = SYSTEMS.iter().find(|(number, _)| *number == magic);
    known.map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).to_owned())
}

fn opened(pid: i32, path: &Path) -> io::Result<File> {
    let process = Process::open(pid).map_err(io::Error::other)?;
    let open = descriptors(pid)?;
    // QEMU was given a link to it, or a relative path.
    let inside = fs::canonicalize(path_inside(pid, path)).ok();
    let root = format!("/proc/{pid}/root");
    let inside = inside.map(|found| match found.strip_prefix(&root) {
        Ok(below) => Path::new("/").join(below),
        Err(_) => found,
    });
    for one in open
        .iter()
        .filter(|one| one.target == path || Some(&one.target) == inside.as_ref())
    {
        let none = PidfdGetfdFlags::empty();
        match rustix::process::pidfd_getfd(process.handle(), one.number, none) {
            Ok(file) => return Ok(File::from(file)),
            // Closed in the meantime.
            Err(Errno::BADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "QEMU has no file open by that name",
    ))
}

/// What a block device is called wherever it is reached, where it has such a name.
fn world_wide_name(device: u64) -> Option<String> {
    let folder = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["wwid", "device/wwid", "dm/uuid"]
        .iter()
        .filter_map(|name| fs::read_to_string(format!("{folder}/{name}")).ok())
        .map(|name| name.trim().to_owned())
        .find(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_open_file_is_found_by_its_name_and_by_a_link_to_it() {
        let folder = std::env::temp_dir().join(format!("pagecopy-storage-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (path, link) = (folder.join("disk"), folder.join("link"));
        let file = File::create(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let data = file.metadata().unwrap();
        for name in [&path, &link] {
            let found = opened_storage(own, name).unwrap();
            let Storage::Path { device, inode, .. } = found else {
                panic!("{found:?}");
            };
            assert_eq!((device, inode), (data.dev(), data.ino()));
        }
        assert!(opened_storage(own, &folder.join("none")).is_err());
        drop(file);
        assert!(opened_storage(own, &path).is_err(), "it is closed");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn file_systems_have_names() {
        assert_eq!(system(0x6969), "nfs");
        assert_eq!(system(0xABC), "0xabc");
    }
}
