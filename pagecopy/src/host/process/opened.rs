//! What a process has open, and its files under `/proc` that only their owner may read.
//!
//! `CAP_SYS_PTRACE` lets this process take descriptors of QEMU, trace it and read its `maps`, `fdinfo` and `status`. Three
//! things more are guarded by plain file permissions, which ask for QEMU's user (measured on Linux 6.18, with QEMU of
//! another user, of root, and in a user namespace): `/proc/PID/pagemap`, `/proc/PID/mem` and the list `/proc/PID/fd`. For
//! these alone `CAP_DAC_READ_SEARCH` is raised, in a thread of its own and while they are opened: a daemon that holds it as
//! permitted only cannot be led to read a file that its user may not.
//!
//! Guest memory is never opened by its path: QEMU's own descriptor of the file is taken. That is the file that QEMU has,
//! whatever its mode, its mount namespace and who may search the directories on the way.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::PidfdGetfdFlags;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::Process;
use crate::engine::journal::RamFile;

/// A descriptor that a process has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Its number in that process.
    pub(crate) number: i32,
    /// Where it leads: a path as the process means it, or a name of another kind.
    pub(crate) target: PathBuf,
}

/// All descriptors of process `pid`. They are only listed: asking a file on storage that hangs would hang as well.
///
/// # Errors
/// It is gone, or may not be looked at.
pub(crate) fn descriptors(pid: i32) -> io::Result<Vec<Descriptor>> {
    with_read_search(|| {
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match fs::read_link(entry.path()) {
                Ok(target) => found.push(Descriptor { number, target }),
                // Closed in the meantime.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    })
}

/// Opens `/proc/PID/NAME` for reading.
///
/// # Errors
/// The process is gone, or may not be looked at.
pub(crate) fn open_proc(pid: i32, name: &'static str) -> io::Result<File> {
    with_read_search(|| File::open(format!("/proc/{pid}/{name}")))
}

/// Takes from a process the file of `identity` (device and inode number) that it has open by the name `target`: both have
/// the same open file then, with one offset and the same access. One that can be written is preferred. `None` if it has no
/// such file open.
///
/// # Errors
/// The process may not be looked at.
pub(crate) fn take_file(
    process: &Process,
    open: &[Descriptor],
    target: &Path,
    identity: (u64, u64),
) -> io::Result<Option<File>> {
    let mut taken = None;
    for descriptor in open.iter().filter(|one| one.target == target) {
        let none = PidfdGetfdFlags::empty();
        let file = match rustix::process::pidfd_getfd(process.handle(), descriptor.number, none) {
            Ok(file) => File::from(file),
            // Closed in the meantime.
            Err(Errno::BADF) => continue,
            Err(error) => return Err(error.into()),
        };
        let data = file.metadata()?;
        if (data.dev(), data.ino()) != identity {
            continue;
        }
        if is_writable(&file) {
            return Ok(Some(file));
        }
        taken = Some(file);
    }
    Ok(taken)
}

/// Opens a RAM file again by its name, to read it: that of a QEMU that may have ended. A link is not followed, and another
/// file under that name is not taken.
///
/// # Errors
/// It is not there, or another is; or it may not be opened.
pub fn open_ram_file(wanted: &RamFile) -> io::Result<File> {
    let path = Path::new(&wanted.path);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let named = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
    let file = with_read_search(|| Ok(rustix::fs::open(path, flags, Mode::empty())?))
        .map_err(|error| named(&error.to_string()))?;
    let file = File::from(file);
    let data = file.metadata()?;
    if (data.dev(), data.ino()) != (wanted.device, wanted.inode) || !data.is_file() {
        return Err(named("it is another file than the guest's"));
    }
    Ok(file)
}

/// Whether an open file can be written.
fn is_writable(file: &File) -> bool {
    rustix::fs::fcntl_getfl(file)
        .is_ok_and(|flags| flags & rustix::fs::OFlags::ACCMODE == rustix::fs::OFlags::RDWR)
}

/// Does `work` with `CAP_DAC_READ_SEARCH` in effect, if this process may have it. In a thread that ends with it: one whose
/// capabilities were changed, be it back again, has credentials of its own for ever, and what other threads have opened of
/// RDMA (verbs, rdma_cm) is closed to its writes.
fn with_read_search<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let raised = move || {
            let _raised = Raised::new(CapabilitySet::DAC_READ_SEARCH);
            work()
        };
        let thread = std::thread::Builder::new().name("proc".to_owned());
        let ended = thread.spawn_scoped(scope, raised)?.join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A capability in effect for this thread until the drop.
struct Raised(Option<CapabilitySets>);

impl Raised {
    fn new(wanted: CapabilitySet) -> Raised {
        let Ok(before) = capabilities(None) else {
            return Raised(None);
        };
        if before.effective.contains(wanted) || !before.permitted.contains(wanted) {
            return Raised(None);
        }
        let raised = CapabilitySets {
            effective: before.effective | wanted,
            ..before
        };
        // Without it the work fails, and says so.
        Raised(set_capabilities(None, raised).is_ok().then_some(before))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(before) = self.0.take()
            && set_capabilities(None, before).is_err()
        {
            // The kernel never refuses to lower. A thread that went on with more than it should have is no way out.
            std::process::abort();
        }
    }
}
