//! Huge pages for one test: reserved, mounted, and given back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

/// A size of pages: where the kernel counts them, and its name among the options of hugetlbfs.
#[derive(Clone, Copy, Debug)]
struct Size {
    count: &'static str,
    option: &'static str,
}

const TWO_MIB: Size = Size {
    count: "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    option: "pagesize=2M",
};
const ONE_GIB: Size = Size {
    count: "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
    option: "pagesize=1G",
};

/// A reservation with a hugetlbfs of its own. Undone on drop.
#[derive(Debug)]
pub struct Hugepages {
    mount: PathBuf,
    size: Size,
    before: u64,
    /// Only one reservation at a time: the count is the machine's.
    _lock: File,
}

impl Hugepages {
    /// Reserves `pages` of 2 MiB and mounts a hugetlbfs on `mount`.
    ///
    /// # Errors
    /// Why this machine cannot.
    pub fn reserve(pages: u64, mount: &Path) -> Result<Hugepages, String> {
        Self::reserve_of(TWO_MIB, pages, mount)
    }

    /// The same with `pages` of 1 GiB.
    ///
    /// # Errors
    /// Why this machine cannot.
    pub fn reserve_gigantic(pages: u64, mount: &Path) -> Result<Hugepages, String> {
        Self::reserve_of(ONE_GIB, pages, mount)
    }

    fn reserve_of(size: Size, pages: u64, mount: &Path) -> Result<Hugepages, String> {
        let lock =
            File::create("/tmp/pagecopy-hugepages.lock").map_err(|error| error.to_string())?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
        let before = read(size)?;
        let reserved = Hugepages {
            mount: mount.to_owned(),
            size,
            before,
            _lock: lock,
        };
        fs::write(size.count, (before + pages).to_string())
            .map_err(|error| format!("{}: {error}", size.count))?;
        let now = read(size)?;
        if now < before + pages {
            return Err(format!(
                "only {} of {pages} huge pages could be reserved",
                now - before
            ));
        }
        fs::create_dir_all(mount).map_err(|error| error.to_string())?;
        let status = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", size.option, "none"])
            .arg(mount)
            .status()
            .map_err(|error| error.to_string())?;
        if status.success() {
            Ok(reserved)
        } else {
            Err("hugetlbfs cannot be mounted".to_owned())
        }
    }

    /// The mount point.
    pub fn mount(&self) -> &Path {
        &self.mount
    }
}

impl Drop for Hugepages {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.mount)
            .output();
        let _ = fs::write(self.size.count, self.before.to_string());
    }
}

fn read(size: Size) -> Result<u64, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", size.count);
    let text = fs::read_to_string(size.count).map_err(|error| failed(&error))?;
    text.trim().parse().map_err(|error| failed(&error))
}
