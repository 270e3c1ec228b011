//! Temporary folders that go away with their owner, named by process so that another run can sweep what a killed one left.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "pagecopy-";

/// A name that no other process and no other call uses: `pagecopy-PID-N`.
pub(super) fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{PREFIX}{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// Whether `name` was made by [`unique`] in a process that is gone.
pub(super) fn is_stale(name: &str) -> bool {
    let pid = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').next());
    pid.and_then(|pid| pid.parse::<u32>().ok())
        .is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// A folder for sockets, logs and state under `/tmp`, and one for guest RAM under `/dev/shm`.
#[derive(Debug)]
pub struct Scratch {
    files: PathBuf,
    ram: PathBuf,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Makes both folders, and removes those of processes that are gone.
    pub fn new() -> Scratch {
        Self::sweep();
        let name = unique();
        let scratch = Scratch {
            files: Path::new("/tmp").join(&name),
            ram: Path::new("/dev/shm").join(&name),
        };
        fs::create_dir_all(&scratch.files).expect("a folder under /tmp");
        fs::create_dir_all(&scratch.ram).expect("a folder under /dev/shm");
        scratch
    }

    /// Removes those of processes that are gone.
    pub fn sweep() {
        super::small_fs::sweep(|path| {
            let mut names = path.iter().filter_map(|name| name.to_str());
            names.any(is_stale)
        });
        remove(is_stale);
    }

    /// Removes all of this process, which is about to end without dropping them.
    pub fn abandon() {
        let mine = format!("{PREFIX}{}-", std::process::id());
        remove(|name| name.starts_with(&mine));
    }

    /// The folder for sockets, logs and state.
    pub fn files(&self) -> &Path {
        &self.files
    }

    /// The folder for guest RAM, on tmpfs.
    pub fn ram(&self) -> &Path {
        &self.ram
    }

    /// A new folder below [`files`](Self::files).
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.files.join(name);
        fs::create_dir_all(&path).expect("a folder below a scratch folder");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("PAGECOPY_KEEP").is_some() {
            eprintln!("kept: {}", self.files.display());
            return;
        }
        // Nothing to be done about a failure here: the next run sweeps.
        let _ = fs::remove_dir_all(&self.files);
        let _ = fs::remove_dir_all(&self.ram);
    }
}

/// Removes folders by their names.
fn remove(unwanted: impl Fn(&str) -> bool) {
    let folders = ["/tmp", "/dev/shm"].into_iter().flat_map(fs::read_dir);
    for entry in folders.flatten().flatten() {
        if entry.file_name().to_str().is_some_and(&unwanted) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
