//! Finds out what a QEMU is made of: its version, its process, and where its RAM is; and whether pagecopy can move it.
//!
//! Everything that QEMU's `x-ignore-shared` leaves out of its stream must be carried by us, and everything that we carry
//! must be seen by us. Whatever does not fit is refused here, before anything has been touched, with the setting that
//! would help.

use std::sync::Arc;

use pagecopy::engine::journal::RamFile;
use pagecopy::host::TrackError;
use pagecopy::host::process::{self, RamMapping};
use pagecopy::host::ram::MappedRam;
use pagecopy::memory::{BlockId, BlockSpec};
use serde_json::{Value, json};

use super::maps::{command_line, is_memfd, option_value, processes_mapping, shared_files};
use super::memdev::{Memdev, RAM_REMEDY, memdevs};
use super::settings;
use super::status::{is_final, migration_status, query_migrate, query_status};
use crate::failure::{Failure, Fault, host, operator, qemu};
use crate::qmp::{Qmp, Version};
use crate::session::blocking;

/// Up to this version `x-ignore-shared` leaves out every shared block, also one without a named file.
const NAMED_FILES_SINCE: Version = Version {
    major: 8,
    minor: 1,
    micro: 0,
};
/// What is in the way where QEMU's process may not be looked into: the capabilities are checked when the daemon starts.
const NEEDS: &str = "run pagecopyd in QEMU's user namespace or outside of it (not in a rootless container), and let no security \
     policy (SELinux, AppArmor) forbid it to trace QEMU";

/// A RAMBlock and where it is.
#[derive(Clone, Debug)]
pub struct Block {
    /// As told to the peer.
    pub spec: BlockSpec,
    /// Where QEMU has it.
    pub mapping: RamMapping,
    /// QEMU was told to allocate all of it as it starts (`prealloc=on`): then it stays allocated.
    pub preallocated: bool,
}

impl Block {
    /// The file, to be found again after a restart.
    pub fn ram_file(&self) -> RamFile {
        RamFile {
            path: self.mapping.path.display().to_string(),
            device: self.mapping.device,
            inode: self.mapping.inode,
        }
    }
}

/// A QEMU that pagecopy can deal with.
#[derive(Clone, Debug)]
pub struct Guest {
    /// QEMU's process.
    pub pid: i32,
    /// QEMU's version.
    pub version: Version,
    /// Its shared, file-backed RAMBlocks: all the RAM that is ours to move.
    pub blocks: Vec<Block>,
    /// Whether a disk of it does direct I/O.
    pub direct_io: bool,
}

/// Looks at a QEMU whose guest runs and shall leave.
///
/// # Errors
/// Why it cannot, and what would help.
pub async fn source(qmp: &Qmp) -> Result<Guest, Failure> {
    let (runs, able, leaves) = tokio::join!(runs(qmp), settings::check(qmp), may_leave(qmp));
    runs?;
    able?;
    leaves?;
    look_at(qmp).await
}

/// Looks at a QEMU whose guest runs, whether or not it could leave.
///
/// # Errors
/// Why its memory cannot be tracked, and what would help.
pub(crate) async fn running(qmp: &Qmp) -> Result<Guest, Failure> {
    runs(qmp).await?;
    look_at(qmp).await
}

/// Whether the guest runs.
///
/// # Errors
/// It does not, and what it would take.
pub(crate) async fn runs(qmp: &Qmp) -> Result<(), Failure> {
    let state = query_status(qmp).await?;
    if state.running {
        return Ok(());
    }
    let remedy = match state.status.as_str() {
        "inmigrate" => {
            "this QEMU waits for a guest: use `pagecopy receive` for it, and migrate on the other host"
        }
        "postmigrate" => "its guest has been moved away already",
        _ => "start the guest (\"cont\" on QEMU's monitor), then migrate",
    };
    Err(operator(
        format!(
            "the guest does not run: QEMU's state is \"{}\"",
            state.status
        ),
        remedy,
    ))
}

/// Whether nothing else migrates it, and QEMU itself would.
///
/// # Errors
/// What does, or what QEMU says is in the way.
pub(crate) async fn may_leave(qmp: &Qmp) -> Result<(), Failure> {
    let migration = query_migrate(qmp).await?;
    if let Some(status) = migration
        .status
        .as_deref()
        .filter(|status| !is_final(status))
    {
        return Err(operator(
            format!(
                "QEMU is being migrated already, by something else: its migration is \"{status}\""
            ),
            "wait for it, or send migrate_cancel to QEMU",
        ));
    }
    match migration.blocked_reasons.first() {
        None => Ok(()),
        Some(reason) => Err(qemu(
            format!("QEMU says that it cannot be migrated: {reason}"),
            "remove that device or setting",
        )),
    }
}

/// Looks once more at a guest that is under way: whether something has come that writes its memory where tracking does not
/// see it.
///
/// # Errors
/// What has come, and what to do about it.
pub async fn unchanged(qmp: &Qmp, guest: &Guest) -> Result<(), Failure> {
    let nodes = qmp.execute("query-named-block-nodes", json!({})).await?;
    if !guest.direct_io && uses_direct_io(&nodes) {
        return Err(operator(
            "a disk with direct I/O came during the migration: what it has read into guest memory since, no scan has seen",
            "migrate again: its reads are waited for then, from the start",
        ));
    }
    let Guest {
        pid,
        version,
        blocks,
        ..
    } = guest.clone();
    blocking(move || refuse_other_writers(pid, version, &blocks)).await
}

/// Looks at a QEMU that waits for a guest.
///
/// # Errors
/// Why it cannot take one, and what would help.
pub async fn destination(qmp: &Qmp) -> Result<Guest, Failure> {
    takes_a_guest(qmp).await?;
    waiting(qmp).await
}

/// Whether a QEMU waits for a guest, and would still take one.
///
/// # Errors
/// Why it would not, and what would help.
pub(crate) async fn takes_a_guest(qmp: &Qmp) -> Result<(), Failure> {
    let state = query_status(qmp).await?;
    if state.status != "inmigrate" {
        return Err(operator(
            format!(
                "this QEMU does not wait for a guest: its state is \"{}\"",
                state.status
            ),
            "start the destination's QEMU with -incoming defer -S",
        ));
    }
    // One whose load was cut short says that it waits, and takes no guest any more.
    if migration_status(qmp).await? == "failed" {
        return Err(operator(
            "this QEMU was given a guest whose migration was given up while it loaded, and takes no other",
            "end the destination's QEMU and start another",
        ));
    }
    Ok(())
}

/// Looks at a QEMU whose state is `inmigrate`, whether or not it takes a guest any more.
///
/// # Errors
/// Why it is none that may be touched, and what would help.
pub(crate) async fn waiting(qmp: &Qmp) -> Result<Guest, Failure> {
    settings::check(qmp).await?;
    let guest = look_at(qmp).await?;
    started_to_wait(guest.pid)?;
    Ok(guest)
}

/// Whether a QEMU was started so that it waits for a guest, and does not run it by itself.
///
/// # Errors
/// How it was started, and how it should be.
pub(crate) fn started_to_wait(pid: i32) -> Result<(), Failure> {
    let words = command_line(pid).map_err(|error| {
        host(
            format!("the command line of QEMU (process {pid}) cannot be read: {error}"),
            NEEDS,
        )
    })?;
    if option_value(&words, "S").is_none() {
        return Err(operator(
            "the destination's QEMU was started without -S: it would run the guest as soon as it is loaded, while the \
             source may still take it back",
            "start the destination's QEMU with -S -incoming defer",
        ));
    }
    if option_value(&words, "incoming") != Some("defer") {
        return Err(operator(
            "the destination's QEMU was started with -incoming of another kind than defer",
            "start the destination's QEMU with -S -incoming defer",
        ));
    }
    Ok(())
}

/// Compares nothing with a peer yet: finds the blocks, the process, and what else must not be there.
async fn look_at(qmp: &Qmp) -> Result<Guest, Failure> {
    let guest = found(qmp).await?;
    blocking(move || {
        refuse_other_writers(guest.pid, guest.version, &guest.blocks)?;
        refuse_if_tracked(guest.pid)?;
        Ok(guest)
    })
    .await
}

/// Finds the blocks and the process, whatever else is there.
///
/// # Errors
/// RAM that cannot be moved, or a process that may not be looked at; with what would help.
pub(crate) async fn found(qmp: &Qmp) -> Result<Guest, Failure> {
    let nodes = qmp.execute("query-named-block-nodes", json!({}));
    let (memdevs, nodes) = tokio::join!(memdevs(qmp), nodes);
    let (memdevs, direct_io) = (memdevs?, uses_direct_io(&nodes?));
    let (version, peer) = (qmp.version(), qmp.peer_pid());
    blocking(move || {
        let pid = find_process(peer, &memdevs)?;
        let blocks = memdevs
            .iter()
            .map(|memdev| locate(pid, memdev))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Guest {
            pid,
            version,
            blocks,
            direct_io,
        })
    })
    .await
}

/// Whether a disk read may write guest memory past every page table. A host's device may do so whatever its cache setting
/// is: QEMU's `scsi-block` passes the guest's reads on by `SG_IO` with `SG_FLAG_DIRECT_IO` (`hw/scsi/scsi-disk.c`).
fn uses_direct_io(nodes: &Value) -> bool {
    let is_direct = |node: &Value| {
        node["cache"]["direct"] == true
            || node["drv"] == "host_device"
            || node["drv"] == "host_cdrom"
    };
    nodes
        .as_array()
        .is_some_and(|nodes| nodes.iter().any(is_direct))
}

/// QEMU's process: the one at the other end of the QMP socket if it maps the RAM, or else the one that does.
fn find_process(peer: Option<i32>, memdevs: &[Memdev]) -> Result<i32, Failure> {
    let Some(first) = memdevs.first() else {
        return Err(operator("the guest has no RAM", RAM_REMEDY));
    };
    let from_socket = peer.filter(|pid| *pid > 0);
    let not_there = match from_socket {
        Some(pid) => match process::find_mapping(pid, &first.path, first.size) {
            Ok(_) => return Ok(pid),
            Err(error) => Some(error),
        },
        None => None,
    };
    // The socket may have been made by a manager, or lead through a proxy.
    let found = processes_mapping(&first.path).unwrap_or_default();
    match (found.as_slice(), not_there) {
        ([one], _) => Ok(*one),
        ([], Some(error)) => Err(track_failure(error)),
        ([], None) => Err(qemu(
            format!(
                "no process has the RAM file {} mapped",
                first.path.display()
            ),
            "run pagecopyd in the same pid namespace as QEMU",
        )),
        (several, _) => Err(operator(
            format!(
                "several processes have the RAM file {} mapped: {several:?}",
                first.path.display()
            ),
            "give each guest a RAM file of its own, and end the other processes",
        )),
    }
}

fn locate(pid: i32, memdev: &Memdev) -> Result<Block, Failure> {
    let mapping = process::find_mapping(pid, &memdev.path, memdev.size).map_err(track_failure)?;
    let spec = BlockSpec {
        name: memdev.id.clone(),
        size: memdev.size,
        page_size: mapping.page_size,
    };
    Ok(Block {
        spec,
        mapping,
        preallocated: memdev.preallocated,
    })
}

fn cannot_read(pid: i32) -> impl Fn(std::io::Error) -> Failure {
    move |error| host(format!("process {pid} cannot be looked at: {error}"), NEEDS)
}

/// Refuses whatever writes the guest's memory without our seeing it.
///
/// # Errors
/// What does, and what to do about it.
pub(crate) fn refuse_other_writers(
    pid: i32,
    version: Version,
    blocks: &[Block],
) -> Result<(), Failure> {
    let cannot_read = cannot_read(pid);
    for mapping in shared_files(pid).map_err(&cannot_read)? {
        let file = (mapping.device, mapping.inode);
        let ours = blocks
            .iter()
            .any(|block| (block.mapping.device, block.mapping.inode) == file);
        let sent_by_qemu = is_memfd(&mapping) && version >= NAMED_FILES_SINCE;
        if !ours && !sent_by_qemu {
            let len = mapping.addresses.end - mapping.addresses.start;
            return Err(operator(
                format!(
                    "QEMU shares another file that is no RAM back end: {} ({len} bytes)",
                    mapping.name.display()
                ),
                "remove the device that shares it (ivshmem, …), or give it a memory-backend-file with share=on",
            ));
        }
    }
    if let Some(device) = process::assigned_devices(pid)
        .map_err(&cannot_read)?
        .first()
    {
        return Err(operator(
            format!(
                "QEMU has {} open: such a device writes guest memory where nobody can track it",
                device.display()
            ),
            "unplug the VFIO or vDPA device before the migration",
        ));
    }
    for block in blocks {
        if let Some(other) = process::other_writers(pid, &block.mapping)
            .map_err(&cannot_read)?
            .first()
        {
            return Err(operator(
                format!(
                    "process {} ({}) has the guest's RAM {} mapped, too",
                    other.pid, other.name, block.spec.name
                ),
                "its writes could not be tracked: end it, or unplug its vhost-user device",
            ));
        }
    }
    Ok(())
}

/// Refuses a QEMU that somebody tracks already.
///
/// # Errors
/// Somebody does.
pub(crate) fn refuse_if_tracked(pid: i32) -> Result<(), Failure> {
    if process::userfaultfds_in_use(pid).map_err(cannot_read(pid))? > 0 {
        return Err(host(
            "QEMU has a userfaultfd in use already: another tool or migration tracks it",
            "end that migration first (a post-copy, a background snapshot, or another daemon's)",
        ));
    }
    Ok(())
}

/// What the host half says, as a failure with whose fault it is.
pub fn track_failure(error: TrackError) -> Failure {
    let (fault, remedy) = match &error {
        TrackError::Kernel(_) => (Fault::ThisHost, "use Linux 6.7 or later with userfaultfd"),
        TrackError::Permission(_) => (Fault::ThisHost, NEEDS),
        TrackError::Busy(_) => (
            Fault::ThisHost,
            "end the other tool (a debugger, another migration), then try again",
        ),
        TrackError::Gone(_) => (Fault::Qemu, "see QEMU's log for why it ended"),
        TrackError::Memory(_) => (Fault::Operator, RAM_REMEDY),
        TrackError::System { .. } => (
            Fault::ThisHost,
            "see the system's words; the kernel's log may say more",
        ),
    };
    Failure::new(fault, error.to_string(), remedy)
}

/// Maps the RAM files of `blocks`, which are in the order of their numbers.
///
/// # Errors
/// A file cannot be mapped.
pub fn map_ram(blocks: &[Block], writable: bool) -> Result<MappedRam, Failure> {
    let files = blocks
        .iter()
        .map(|block| (block.spec.clone(), Arc::clone(&block.mapping.file)));
    let kept = (0..).map(BlockId).zip(blocks);
    let kept = kept.filter_map(|(id, block)| block.preallocated.then_some(id));
    let mapped = MappedRam::map(files, writable).map(|ram| ram.keeping(kept));
    mapped.map_err(|error| {
        host(
            error.to_string(),
            "give memory-backend-file a file that QEMU may write (no readonly=on), as large as its size",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_io_is_seen() {
        assert!(!uses_direct_io(&json!([{ "cache": { "direct": false } }])));
        assert!(uses_direct_io(
            &json!([{ "cache": { "direct": false } }, { "cache": { "direct": true } }])
        ));
        assert!(!uses_direct_io(&json!([])));
        // What a disk on a host's device is told as: the device below, the format above.
        let buffered = |drv| json!({ "drv": drv, "cache": { "direct": false } });
        assert!(uses_direct_io(&json!([
            buffered("raw"),
            buffered("host_device")
        ])));
        assert!(!uses_direct_io(&json!([buffered("raw"), buffered("file")])));
    }
}
