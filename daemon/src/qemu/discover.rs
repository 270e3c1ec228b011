//! Finds out what a QEMU is made of: its version, its process, and where its RAM is; and whether pagecopy can move it.
//!
//! Everything that QEMU's `x-ignore-shared` leaves out of its stream must be carried by us, and everything that we carry
//! must be seen by us. Whatever does not fit is refused here, before anything has been touched, with the setting that
//! would help.

use std::path::PathBuf;

use pagecopy::host::TrackError;
use pagecopy::host::process::{self, RamMapping};
use pagecopy::host::ram::MappedRam;
use pagecopy::limits::{MAX_BLOCK_SIZE, MAX_BLOCKS, MAX_NAME};
use pagecopy::memory::{BlockId, BlockSpec};
use serde::Deserialize;
use serde_json::{Value, json};

use super::maps::{command_line, is_memfd, option_value, processes_mapping, shared_files};
use super::settings;
use super::status::{is_final, query_migrate, query_status};
use crate::failure::{Failure, Fault, host, operator, qemu};
use crate::qmp::{Qmp, Version};

/// Up to this version `x-ignore-shared` leaves out every shared block, also one without a named file.
const NAMED_FILES_SINCE: Version = Version {
    major: 8,
    minor: 1,
    micro: 0,
};
/// How the RAM of a guest that can be moved is given.
const RAM_REMEDY: &str = "start the guest with -object memory-backend-file,id=mem0,size=SIZE,mem-path=/dev/shm/NAME,share=on \
     and -machine …,memory-backend=mem0 (libvirt: <memoryBacking><source type='file'/><access mode='shared'/>)";

/// A RAMBlock and where it is.
#[derive(Clone, Debug)]
pub struct Block {
    /// As told to the peer.
    pub spec: BlockSpec,
    /// Where QEMU has it.
    pub mapping: RamMapping,
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
    let state = query_status(qmp).await?;
    if !state.running {
        let remedy = match state.status.as_str() {
            "inmigrate" => {
                "this QEMU waits for a guest: use `pagecopy receive` for it, and migrate on the other host"
            }
            "postmigrate" => "its guest has been moved away already",
            _ => "start the guest (\"cont\" on QEMU's monitor), then migrate",
        };
        return Err(operator(
            format!(
                "the guest does not run: QEMU's state is \"{}\"",
                state.status
            ),
            remedy,
        ));
    }
    settings::check(qmp).await?;
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
    if let Some(reason) = migration.blocked_reasons.first() {
        return Err(qemu(
            format!("QEMU says that it cannot be migrated: {reason}"),
            "remove that device or setting",
        ));
    }
    look_at(qmp).await
}

/// Looks at a QEMU that waits for a guest.
///
/// # Errors
/// Why it cannot take one, and what would help.
pub async fn destination(qmp: &Qmp) -> Result<Guest, Failure> {
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
    settings::check(qmp).await?;
    let guest = look_at(qmp).await?;
    let words = command_line(guest.pid).map_err(|error| {
        host(
            format!(
                "the command line of QEMU (process {}) cannot be read: {error}",
                guest.pid
            ),
            "run pagecopyd as root",
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
    Ok(guest)
}

/// Compares nothing with a peer yet: finds the blocks, the process, and what else must not be there.
async fn look_at(qmp: &Qmp) -> Result<Guest, Failure> {
    let memdevs = memdevs(qmp).await?;
    let direct_io = uses_direct_io(&qmp.execute("query-named-block-nodes", json!({})).await?);
    let (version, peer) = (qmp.version(), qmp.peer_pid());
    tokio::task::spawn_blocking(move || {
        let pid = find_process(peer, &memdevs)?;
        let blocks = memdevs
            .iter()
            .map(|memdev| locate(pid, memdev))
            .collect::<Result<Vec<_>, _>>()?;
        refuse_other_writers(pid, version, &blocks)?;
        Ok(Guest {
            pid,
            version,
            blocks,
            direct_io,
        })
    })
    .await
    .map_err(|error| {
        host(
            format!("looking at QEMU's process failed: {error}"),
            "report this",
        )
    })?
}

/// A memory back end as QEMU tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Memdev {
    id: String,
    size: u64,
    path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct MemdevInfo {
    id: Option<String>,
    size: u64,
    share: Option<bool>,
}

async fn memdevs(qmp: &Qmp) -> Result<Vec<Memdev>, Failure> {
    let listed: Vec<MemdevInfo> = qmp.query("query-memdev", json!({})).await?;
    let known = parse_ramblocks(&qmp.human("info ramblock").await?);
    let mut memdevs = Vec::new();
    for info in listed {
        let Some(id) = info.id else {
            return Err(operator(
                "QEMU has a memory back end without an id",
                RAM_REMEDY,
            ));
        };
        // A back end that no device or machine uses is no RAM of the guest.
        let Some(&(_, total)) = known
            .iter()
            .find(|(name, _)| name.rsplit('/').next() == Some(&id))
        else {
            continue;
        };
        let kind: String = qmp
            .query(
                "qom-get",
                json!({ "path": format!("/objects/{id}"), "property": "type" }),
            )
            .await?;
        check_kind(&id, &kind, info.share)?;
        if total != info.size {
            return Err(qemu(
                format!(
                    "QEMU tells two sizes of RAMBlock {id}: {} and {total} bytes",
                    info.size
                ),
                "report this with QEMU's version and command line",
            ));
        }
        let path: String = qmp
            .query(
                "qom-get",
                json!({ "path": format!("/objects/{id}"), "property": "mem-path" }),
            )
            .await?;
        memdevs.push(Memdev {
            id,
            size: info.size,
            path: path.into(),
        });
    }
    check_list(&memdevs)?;
    Ok(memdevs)
}

/// Refuses a kind of memory that cannot be carried, each with its own reason.
fn check_kind(id: &str, kind: &str, share: Option<bool>) -> Result<(), Failure> {
    let refuse = |what: String| Err(operator(what, RAM_REMEDY));
    match (kind, share) {
        ("memory-backend-file", Some(true)) => Ok(()),
        ("memory-backend-file", _) => refuse(format!(
            "RAM {id} is a file but not shared (share=off): QEMU's writes never reach the file"
        )),
        ("memory-backend-ram", _) => refuse(format!(
            "RAM {id} is private memory of QEMU, not a shared file"
        )),
        ("memory-backend-memfd" | "memory-backend-shm", _) => refuse(format!(
            "RAM {id} is a {kind}, which has no name: QEMU 8.1 and later would send it by itself, earlier ones would lose it"
        )),
        (other, _) => refuse(format!(
            "RAM {id} is of a kind that pagecopy does not know: {other}"
        )),
    }
}

fn check_list(memdevs: &[Memdev]) -> Result<(), Failure> {
    if memdevs.is_empty() {
        return Err(operator(
            "the guest's RAM is private memory of QEMU, not a shared file",
            RAM_REMEDY,
        ));
    }
    if memdevs.len() > MAX_BLOCKS {
        let what = format!(
            "the guest has {} RAMBlocks; at most {MAX_BLOCKS} can be moved",
            memdevs.len()
        );
        return Err(operator(what, "use fewer, larger memory back ends"));
    }
    for memdev in memdevs {
        if memdev.id.len() > MAX_NAME || memdev.size > MAX_BLOCK_SIZE {
            let what = format!(
                "RAMBlock {} is too large, or its name is ({} bytes)",
                memdev.id, memdev.size
            );
            return Err(operator(
                what,
                "at most 64 TiB a block and 255 bytes a name",
            ));
        }
    }
    Ok(())
}

/// The names and sizes in `info ramblock`: name, page size with its unit, offset, used, total.
fn parse_ramblocks(text: &str) -> Vec<(String, u64)> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| word.starts_with("0x"))?;
        let total = words.get(at + 2)?.strip_prefix("0x")?;
        // Between the name and the first address stand the page size and its unit.
        let name = words.get(..at.checked_sub(2)?)?.join(" ");
        Some((name, u64::from_str_radix(total, 16).ok()?))
    };
    text.lines().filter_map(parse).collect()
}

fn uses_direct_io(nodes: &Value) -> bool {
    let is_direct = |node: &Value| {
        node.pointer("/cache/direct")
            .and_then(Value::as_bool)
            .unwrap_or(false)
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
            "run pagecopyd in the same pid namespace as QEMU, and as root",
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
    Ok(Block { spec, mapping })
}

/// Refuses whatever writes the guest's memory without our seeing it, or has it tracked already.
fn refuse_other_writers(pid: i32, version: Version, blocks: &[Block]) -> Result<(), Failure> {
    let cannot_read = |error| {
        host(
            format!("process {pid} cannot be looked at: {error}"),
            "run pagecopyd as root",
        )
    };
    for mapping in shared_files(pid).map_err(cannot_read)? {
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
    if let Some(device) = process::assigned_devices(pid).map_err(cannot_read)?.first() {
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
            .map_err(cannot_read)?
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
    if process::userfaultfds_in_use(pid).map_err(cannot_read)? > 0 {
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
        TrackError::Permission(_) => (
            Fault::ThisHost,
            "run pagecopyd as root, or with CAP_SYS_PTRACE and as the user that runs QEMU",
        ),
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

/// Opens and maps the RAM files of `blocks`, which are in the order of their numbers, and makes sure that they are the
/// files that QEMU has.
///
/// # Errors
/// A file cannot be opened or mapped, or was replaced by another of the same name.
pub fn map_ram(blocks: &[Block], writable: bool) -> Result<MappedRam, Failure> {
    let files: Vec<_> = blocks
        .iter()
        .map(|block| (block.spec.clone(), block.mapping.path.clone()))
        .collect();
    let ram = MappedRam::open(&files, writable).map_err(|error| {
        host(
            error.to_string(),
            "run pagecopyd as root, or as the user that runs QEMU",
        )
    })?;
    for (block, number) in blocks.iter().zip(0..) {
        if ram.identity(BlockId(number)) != Some((block.mapping.device, block.mapping.inode)) {
            let path = block.mapping.path.display();
            return Err(operator(
                format!(
                    "{path} is no longer the file that QEMU has as RAM {}",
                    block.spec.name
                ),
                "do not remove or replace a RAM file while its QEMU runs",
            ));
        }
    }
    Ok(ram)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ramblocks_as_qemu_prints_them() {
        let text = "              Block Name    PSize              Offset               Used              Total\n\
                    \x20                   mem0    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000\n\
                    \x20   /rom@etc/acpi/tables    4 KiB  0x0000000020080000 0x0000000000020000 0x0000000000200000\n\
                    \x20      0000:00:02.0/mem1    2 MiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 rw\n";
        let found = parse_ramblocks(text);
        assert_eq!(found[0], ("mem0".to_owned(), 512 << 20));
        assert_eq!(found[1], ("/rom@etc/acpi/tables".to_owned(), 2 << 20));
        assert_eq!(found[2], ("0000:00:02.0/mem1".to_owned(), 256 << 10));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn each_kind_of_memory_has_its_own_answer() {
        check_kind("m", "memory-backend-file", Some(true)).unwrap();
        let words = |kind, share| check_kind("m", kind, share).unwrap_err().what;
        assert!(words("memory-backend-file", Some(false)).contains("share=off"));
        assert!(words("memory-backend-ram", Some(false)).contains("private"));
        assert!(words("memory-backend-memfd", Some(true)).contains("memfd"));
        assert!(words("memory-backend-epc", Some(true)).contains("epc"));
        assert!(check_list(&[]).unwrap_err().remedy.contains("share=on"));
    }

    #[test]
    fn direct_io_is_seen() {
        assert!(!uses_direct_io(&json!([{ "cache": { "direct": false } }])));
        assert!(uses_direct_io(
            &json!([{ "cache": { "direct": false } }, { "cache": { "direct": true } }])
        ));
        assert!(!uses_direct_io(&json!([])));
    }
}
