//! A QEMU's disks and drives, as its monitor tells of them.

use serde::Deserialize;
use serde_json::json;

use crate::qmp::{Qmp, QmpError};

/// A disk or drive in `query-block`.
#[derive(Debug, Deserialize)]
pub(crate) struct Drive {
    /// Its name as `-drive` gave it; empty where `-blockdev` was used.
    pub(crate) device: String,
    /// The device of the guest that it is in: an id, or a path in QEMU's tree.
    pub(crate) qdev: Option<String>,
    /// None of a drive that is empty.
    pub(crate) inserted: Option<Inserted>,
}

/// What is in a drive.
#[derive(Debug, Deserialize)]
pub(crate) struct Inserted {
    /// A file, a device, or what QEMU makes of what is neither.
    pub(crate) file: String,
    /// The guest may not write it.
    pub(crate) ro: bool,
    /// The format.
    pub(crate) drv: String,
    pub(crate) image: Image,
}

/// The image as the guest sees it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Image {
    /// Bytes.
    pub(crate) virtual_size: u64,
}

/// Asks a QEMU for its drives.
///
/// # Errors
/// It does not answer.
pub(crate) async fn drives(qmp: &Qmp) -> Result<Vec<Drive>, QmpError> {
    qmp.query("query-block", json!({})).await
}
