//! Disks that the guest may write: whether the destination's QEMU has the same.
//!
//! Two QEMUs on one host see the same file by its device and inode number. On two hosts a file is the same where its file
//! system is of a kind that hosts share, and its inode number the same; a block device by its world-wide name.

use serde::{Deserialize, Serialize};

use super::facts::QemuFacts;
use super::{Facts, Line, Whose, size};

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// What the guest's device is called in QEMU: the same on both sides.
    pub id: String,
    /// Its format, such as `qcow2`.
    pub driver: String,
    /// Where QEMU has it: a path, or what stands for one.
    pub name: String,
    /// Bytes that the guest sees.
    pub bytes: u64,
    /// What it is on.
    pub storage: Storage,
}

/// What a disk is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Storage {
    /// A file.
    Path {
        /// The kind of its file system, such as `nfs`.
        system: String,
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
    },
    /// A block device.
    Device {
        /// `st_rdev`.
        device: u64,
        /// Its world-wide name, where it has one.
        wwid: Option<String>,
    },
    /// Something that QEMU reaches by itself, such as `nbd://`.
    Remote,
    /// It could not be looked at.
    Unknown {
        /// Why.
        why: String,
    },
}

impl Default for Storage {
    fn default() -> Storage {
        Storage::Unknown {
            why: "it was not said".to_owned(),
        }
    }
}

/// File systems of which each host has its own.
const LOCAL: [&str; 9] = [
    "ext4",
    "xfs",
    "btrfs",
    "tmpfs",
    "zfs",
    "overlay",
    "f2fs",
    "hugetlbfs",
    "ramfs",
];
/// File systems that hosts share, with inode numbers that all of them see.
const SHARED: [&str; 6] = ["nfs", "ocfs2", "gfs2", "ceph", "lustre", "gpfs"];

/// What to do about what cannot be seen.
const YOURSELF: &str = "see to it yourself: a guest that finds another disk loses its data";

/// Whether two are one.
enum Sameness {
    Same,
    Differs(String),
    Unclear(String),
}

fn sameness(one_host: bool, source: &Disk, destination: &Disk) -> Sameness {
    use Sameness::{Differs, Same, Unclear};
    match (&source.storage, &destination.storage) {
        (
            Storage::Path {
                system,
                device,
                inode,
            },
            Storage::Path {
                system: their_system,
                device: their_device,
                inode: their_inode,
            },
        ) => match one_host {
            true if (device, inode) == (their_device, their_inode) => Same,
            true => Differs("two files".to_owned()),
            false if system != their_system => {
                let how =
                    format!("on {system} at the source, on {their_system} at the destination");
                match [system, their_system].iter().all(|it| is_local(it)) {
                    true => Differs(how),
                    // One of them may be what serves the other.
                    false => Unclear(how),
                }
            }
            false if is_local(system) => {
                Differs(format!("on {system}, of which each host has its own"))
            }
            false if inode == their_inode => Same,
            false if SHARED.contains(&system.as_str()) => {
                Differs(format!("two files, on {system}"))
            }
            false => Unclear(format!(
                "inodes {inode} and {their_inode}, on {system}, where that may mean nothing"
            )),
        },
        (
            Storage::Device { device, wwid },
            Storage::Device {
                device: their_device,
                wwid: their_wwid,
            },
        ) => match (wwid, their_wwid) {
            _ if one_host && device == their_device => Same,
            (Some(ours), Some(theirs)) if ours == theirs => Same,
            (Some(ours), Some(theirs)) => {
                let how = format!("devices {ours} and {theirs}");
                match naming(ours) == naming(theirs) {
                    true => Differs(how),
                    false => Unclear(how),
                }
            }
            _ if one_host => Differs("two devices".to_owned()),
            _ => Unclear("a block device without a world-wide name".to_owned()),
        },
        (Storage::Remote, Storage::Remote) if source.name == destination.name => Same,
        (Storage::Remote, Storage::Remote) => Unclear(format!(
            "{} at the source, {} at the destination",
            source.name, destination.name
        )),
        (Storage::Unknown { why }, _) | (_, Storage::Unknown { why }) => Unclear(why.clone()),
        (ours, theirs) => {
            let how = format!(
                "{} at the source, {} at the destination, which are of two kinds",
                source.name, destination.name
            );
            match [ours, theirs].contains(&&Storage::Remote) {
                // QEMU may reach by itself what the other host's kernel has as a device.
                true => Unclear(how),
                false => Differs(how),
            }
        }
    }
}

fn is_local(system: &str) -> bool {
    LOCAL.contains(&system)
}

/// Who gave a device its name (`naa.…`, `eui.…`, `mpath-…`): names of two kinds may be of one device.
fn naming(wwid: &str) -> &str {
    wwid.split(['.', '-']).next().unwrap_or_default()
}

/// A line for each disk that the guest may write.
pub(super) fn compare(
    source: &Facts,
    ours: &QemuFacts,
    destination: &Facts,
    theirs: &QemuFacts,
) -> Vec<Line> {
    if ours.disks.is_empty() {
        return vec![Line::pass("disks", Whose::Both, "the guest writes none")];
    }
    let one_host = !source.boot.is_empty() && source.boot == destination.boot;
    let of_one = |disk: &Disk| {
        let Some(other) = theirs.disks.iter().find(|other| other.id == disk.id) else {
            let is_spare = |other: &&Disk| {
                other.bytes == disk.bytes && ours.disks.iter().all(|disk| disk.id != other.id)
            };
            if let Some(spare) = theirs.disks.iter().find(is_spare) {
                let found = format!(
                    "{}: whether it is {} there cannot be seen: no disk there has that id",
                    disk.id, spare.id
                );
                return Line::warn("disk", Whose::Both, found, YOURSELF);
            }
            return Line::fail(
                "disk",
                Whose::Destination,
                format!(
                    "{}: the destination's QEMU has no such disk that can be written",
                    disk.id
                ),
                "start the destination's QEMU with the same disks, under the same ids",
            );
        };
        let shared = "put the disk on storage that both hosts reach, and give both QEMUs the same";
        let Disk {
            id,
            name,
            driver,
            bytes,
            ..
        } = disk;
        if *bytes != other.bytes {
            let found = format!(
                "{id}: {} at the source, {} at the destination",
                size(*bytes),
                size(other.bytes)
            );
            return Line::fail("disk", Whose::Both, found, shared);
        }
        match sameness(one_host, disk, other) {
            Sameness::Same => {
                let found = format!(
                    "{id}: {name} ({driver}, {}), the same on both sides",
                    size(*bytes)
                );
                Line::pass("disk", Whose::Both, found)
            }
            Sameness::Differs(how) if ours.mirrors => Line::warn(
                "disk",
                Whose::Both,
                format!("{id}: {how}; a mirror job runs, which may copy it there"),
                "see that the job copies this disk to the destination's, and is ready",
            ),
            Sameness::Differs(how) => {
                let found = format!("{id}: {name} and {} are not the same: {how}", other.name);
                Line::fail("disk", Whose::Both, found, shared)
            }
            Sameness::Unclear(why) => Line::warn(
                "disk",
                Whose::Both,
                format!(
                    "{id}: whether {name} and {} are the same cannot be seen: {why}",
                    other.name
                ),
                YOURSELF,
            ),
        }
    };
    ours.disks.iter().map(of_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Verdict;

    fn on(system: &str, device: u64, inode: u64) -> Storage {
        let system = system.to_owned();
        Storage::Path {
            system,
            device,
            inode,
        }
    }

    fn block(device: u64, wwid: Option<&str>) -> Storage {
        Storage::Device {
            device,
            wwid: wwid.map(str::to_owned),
        }
    }

    fn side(boot: &str, storage: Storage, bytes: u64) -> (Facts, QemuFacts) {
        let facts = Facts {
            boot: boot.to_owned(),
            ..Facts::default()
        };
        let disk = Disk {
            id: "d0".to_owned(),
            name: "/d".to_owned(),
            bytes,
            storage,
            ..Disk::default()
        };
        let qemu = QemuFacts {
            disks: vec![disk],
            ..QemuFacts::default()
        };
        (facts, qemu)
    }

    fn verdict(boots: [&str; 2], a: Storage, b: Storage) -> Verdict {
        let ((fa, qa), (fb, qb)) = (side(boots[0], a, 1), side(boots[1], b, 1));
        let lines = compare(&fa, &qa, &fb, &qb);
        assert_eq!(lines.len(), 1);
        lines[0].verdict
    }

    #[test]
    fn a_disk_is_the_same_or_not_or_it_cannot_be_seen() {
        let (one, two) = (["x", "x"], ["x", "y"]);
        use Verdict::{Fail, Pass, Warn};
        let unknown = Storage::default();
        let cases = [
            (one, on("ext4", 1, 2), on("ext4", 1, 2), Pass),
            (one, on("ext4", 1, 2), on("ext4", 1, 3), Fail),
            (two, on("ext4", 1, 2), on("ext4", 1, 2), Fail),
            (two, on("nfs", 1, 2), on("nfs", 9, 2), Pass),
            (two, on("nfs", 1, 2), on("nfs", 9, 3), Fail),
            (two, on("nfs", 1, 2), on("xfs", 9, 2), Warn),
            (two, on("ext4", 1, 2), on("xfs", 9, 2), Fail),
            (two, on("fuse", 1, 2), on("fuse", 9, 3), Warn),
            (one, block(7, None), block(7, None), Pass),
            (one, block(7, None), block(8, None), Fail),
            (two, block(7, Some("w")), block(8, Some("w")), Pass),
            (two, block(7, Some("naa.w")), block(7, Some("naa.v")), Fail),
            (
                two,
                block(7, Some("naa.w")),
                block(7, Some("mpath-w")),
                Warn,
            ),
            (two, block(7, None), block(7, None), Warn),
            (two, Storage::Remote, Storage::Remote, Pass),
            (two, Storage::Remote, block(7, Some("naa.w")), Warn),
            (two, block(7, None), on("nfs", 1, 2), Fail),
            (one, unknown.clone(), on("nfs", 1, 2), Warn),
            // Two hosts that say nothing of their boot are not taken for one.
            (["", ""], on("ext4", 1, 2), on("ext4", 1, 2), Fail),
        ];
        for (boots, a, b, expected) in cases {
            assert_eq!(
                verdict(boots, a.clone(), b.clone()),
                expected,
                "{boots:?} {a:?} {b:?}"
            );
        }
    }

    #[test]
    fn another_size_none_at_all_and_one_that_is_copied() {
        let (fa, mut qa) = side("x", on("ext4", 1, 2), 1 << 30);
        let (fb, qb) = side("x", on("ext4", 1, 2), 2 << 30);
        let line = &compare(&fa, &qa, &fb, &qb)[0];
        assert!(
            line.found.contains("1 GiB at the source, 2 GiB"),
            "{line:?}"
        );
        let none = QemuFacts::default();
        assert_eq!(compare(&fa, &qa, &fb, &none)[0].verdict, Verdict::Fail);
        assert_eq!(compare(&fa, &none, &fb, &qb)[0].verdict, Verdict::Pass);
        // Another id is no other disk.
        let (fc, mut qc) = side("x", on("ext4", 1, 2), 1 << 30);
        qc.disks.iter_mut().for_each(|disk| disk.id.push('x'));
        let line = &compare(&fa, &qa, &fc, &qc)[0];
        assert_eq!(line.verdict, Verdict::Warn, "{line:?}");
        let (fb, qb) = side("x", on("ext4", 1, 3), 1 << 30);
        qa.mirrors = true;
        assert_eq!(compare(&fa, &qa, &fb, &qb)[0].verdict, Verdict::Warn);
    }
}
