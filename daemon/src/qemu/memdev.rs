//! The memory back ends that a QEMU has its guest's RAM in, and which kinds of them can be moved.

use std::path::PathBuf;

use pagecopy::limits::{MAX_BLOCK_SIZE, MAX_BLOCKS, MAX_NAME};
use serde::Deserialize;
use serde_json::json;

use crate::failure::{Failure, operator, qemu};
use crate::qmp::Qmp;

/// How the RAM of a guest that can be moved is given.
pub(super) const RAM_REMEDY: &str = "start the guest with -object memory-backend-file,id=mem0,size=SIZE,mem-path=/dev/shm/NAME,share=on \
     and -machine …,memory-backend=mem0 (libvirt: <memoryBacking><source type='file'/><access mode='shared'/>)";

/// A memory back end as QEMU tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memdev {
    pub(super) id: String,
    /// In bytes.
    pub(super) size: u64,
    /// Of its file, as QEMU was told it.
    pub(super) path: PathBuf,
    /// `prealloc=on`: all of it is allocated as QEMU starts.
    pub(super) preallocated: bool,
}

#[derive(Debug, Deserialize)]
struct MemdevInfo {
    id: Option<String>,
    size: u64,
    share: Option<bool>,
    prealloc: Option<bool>,
}

/// The memory back ends that are the guest's RAM.
///
/// # Errors
/// One of them cannot be moved, and how it would have to be given.
pub(super) async fn memdevs(qmp: &Qmp) -> Result<Vec<Memdev>, Failure> {
    let (listed, known) = tokio::join!(
        qmp.query::<Vec<MemdevInfo>>("query-memdev", json!({})),
        qmp.human("info ramblock"),
    );
    let (listed, known) = (listed?, parse_ramblocks(&known?));
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
        let property = |name: &str| {
            let path = format!("/objects/{id}");
            qmp.query::<String>("qom-get", json!({ "path": path, "property": name }))
        };
        // Other kinds have no path.
        let (kind, path) = tokio::join!(property("type"), property("mem-path"));
        let kind = kind?;
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
        memdevs.push(Memdev {
            id,
            size: info.size,
            path: path?.into(),
            preallocated: info.prealloc == Some(true),
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
}
