//! Huge pages of 2 MiB for one test: reserved, mounted, and given back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// A reservation with a hugetlbfs of its own. Undone on drop.
#[derive(Debug)]
pub struct Hugepages {
    mount: PathBuf,
    before: u64,
    /// Only one reservation at a time: the count is the machine's.
    _lock: File,
}

impl Hugepages {
    /// Reserves `pages` and mounts a hugetlbfs on `mount`.
    ///
    /// # Errors
    /// Why this machine cannot.
    pub fn reserve(pages: u64, mount: &Path) -> Result<Hugepages, String> {
        let lock =
            File::create("/tmp/pagecopy-hugepages.lock").map_err(|error| error.to_string())?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
        let before = read()?;
        let reserved = Hugepages {
            mount: mount.to_owned(),
            before,
            _lock: lock,
        };
        fs::write(COUNT, (before + pages).to_string())
            .map_err(|error| format!("{COUNT}: {error}"))?;
        let now = read()?;
        if now < before + pages {
            return Err(format!(
                "only {} of {pages} huge pages could be reserved",
                now - before
            ));
        }
        fs::create_dir_all(mount).map_err(|error| error.to_string())?;
        let status = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
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
        let _ = fs::write(COUNT, self.before.to_string());
    }
}

fn read() -> Result<u64, String> {
    let text = fs::read_to_string(COUNT).map_err(|error| format!("{COUNT}: {error}"))?;
    text.trim()
        .parse()
        .map_err(|error| format!("{COUNT}: {error}"))
}
