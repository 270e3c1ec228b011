//! Whether QEMU's page faults can be served where the kernel meets them on its behalf, as post-copy needs.
//!
//! A QEMU that may not make such a userfaultfd itself is lent `/dev/userfaultfd`, open, over its monitor: what is made from
//! that sees every fault. It is taken back as soon as the userfaultfds are made.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use pagecopy::host::attach::{find_device, may_see_kernel_faults};
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::discover::track_failure;
use crate::failure::{Failure, host};
use crate::qmp::Qmp;
use crate::session::blocking;

/// The device.
const PATH: &str = "/dev/userfaultfd";
/// Its name inside QEMU.
const FD_NAME: &str = "pagecopy-userfaultfd";

/// The device, open; or why it is not.
#[derive(Debug)]
pub struct Device(Result<OwnedFd, String>);

impl Device {
    /// Opens it. To be called while the daemon is still root, if it ever is.
    pub(crate) fn open() -> Device {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let opened = rustix::fs::open(Path::new(PATH), flags, Mode::empty());
        Device(opened.map_err(|error| error.to_string()))
    }

    /// Finds out whether the faults of a waiting QEMU can be served, and leaves nothing behind.
    ///
    /// # Errors
    /// Why not, and what would help.
    pub(crate) async fn try_out(&self, qmp: &Qmp, pid: i32) -> Result<(), Failure> {
        let lent = self.lend(qmp, pid).await?;
        take_back(qmp, lent).await;
        Ok(())
    }

    /// Gives it to a QEMU that needs it. Returns its number there; `None`: QEMU needs none.
    ///
    /// # Errors
    /// As [`Device::try_out`].
    pub(crate) async fn lend(&self, qmp: &Qmp, pid: i32) -> Result<Option<i32>, Failure> {
        if blocking(move || may_see_kernel_faults(pid).map_err(track_failure)).await? {
            return Ok(None);
        }
        let device = self.0.as_ref().map_err(|why| not_served(why))?;
        let name = json!({ "fdname": FD_NAME });
        qmp.execute_with_fd("getfd", name, device.as_fd())
            .await
            .map_err(|error| not_served(&error.to_string()))?;
        let same = device
            .try_clone()
            .map_err(|error| not_served(&error.to_string()))?;
        let found = blocking(move || find_device(pid, same.as_fd()).map_err(track_failure)).await;
        match found {
            Ok(Some(number)) => Ok(Some(number)),
            other => {
                take_back(qmp, Some(0)).await;
                other?;
                Err(not_served("QEMU was given it, and does not have it open"))
            }
        }
    }
}

/// Has QEMU close what it was lent, if it was.
pub(crate) async fn take_back(qmp: &Qmp, lent: Option<i32>) {
    if lent.is_none() {
        return;
    }
    if let Err(error) = qmp.execute("closefd", json!({ "fdname": FD_NAME })).await {
        tracing::warn!(%error, "{PATH} stays open inside QEMU");
    }
}

fn not_served(why: &str) -> Failure {
    host(
        format!(
            "the destination's QEMU may not make a userfaultfd that sees page faults in the kernel, and cannot be given {PATH}: {why}"
        ),
        format!(
            "start pagecopyd as root (with user = in its configuration), or let its user open {PATH}; or give QEMU \
             CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
        ),
    )
}
