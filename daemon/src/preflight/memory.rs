//! Free memory of a destination, and what of it is spoken for: two guests that arrive at once do not both count on the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecopy::preflight::{Line, Verdict, Whose};

use crate::failure::{Failure, host};
use crate::qemu::{Block, Guest};
use crate::service::Service;
use crate::units::show_bytes;

/// The RAMBlocks of the guests that arrive, by a number of their own.
#[derive(Debug, Default)]
pub(crate) struct Reservations(Mutex<BTreeMap<u64, Vec<Block>>>);

impl Reservations {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<Block>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an arriving guest does not have yet is its own, and the margin, until the drop. What it has got is not free any more.
pub(crate) struct Reserved {
    service: Arc<Service>,
    number: u64,
}

impl Reserved {
    /// Reserves for a guest with these RAMBlocks.
    ///
    /// # Errors
    /// There is not as much, beside what others have reserved.
    pub(crate) fn take(service: &Arc<Service>, blocks: &[Block]) -> Result<Reserved, Failure> {
        let margin = service.in_force.now().memory_margin;
        let available = available().map_err(|error| {
            host(
                format!("how much memory is free cannot be read: {error}"),
                "let pagecopyd read /proc/meminfo",
            )
        })?;
        let mut all = service.reserved.lock();
        let need = blocks.iter().map(lacks).sum();
        let line = free_memory(need, margin, spoken_for(&all, margin), available);
        if line.verdict == Verdict::Fail {
            return Err(host(line.found, line.remedy));
        }
        let number = all.last_key_value().map_or(0, |(last, _)| last + 1);
        all.insert(number, blocks.to_vec());
        Ok(Reserved {
            service: Arc::clone(service),
            number,
        })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.service.reserved.lock().remove(&self.number);
    }
}

/// What the guests that arrive do not have yet, with a margin for each.
fn spoken_for(all: &BTreeMap<u64, Vec<Block>>, margin: u64) -> u64 {
    let each = |blocks: &Vec<Block>| blocks.iter().map(lacks).sum::<u64>().saturating_add(margin);
    all.values().map(each).fold(0, u64::saturating_add)
}

/// Whether the destination has room for a guest of `ram` bytes, by the QEMU that waits for it if there is one, and `margin`
/// beside it.
pub(super) fn lines(service: &Service, guest: Option<&Guest>, ram: u64) -> Vec<Line> {
    let margin = service.in_force.now().memory_margin;
    let spoken_for = spoken_for(&service.reserved.lock(), margin);
    let blocks = guest.map_or(&[][..], |guest| guest.blocks.as_slice());
    let need = if blocks.is_empty() {
        ram
    } else {
        blocks.iter().map(lacks).sum()
    };
    let mut lines = vec![match available() {
        Ok(available) => free_memory(need, margin, spoken_for, available),
        Err(error) => Line::warn(
            "memory",
            Whose::Destination,
            format!("how much is free cannot be read: {error}"),
            "let pagecopyd read /proc/meminfo",
        ),
    }];
    lines.extend(file_systems(blocks));
    lines
}

/// What a RAMBlock does not have yet. A huge page is QEMU's from the moment on in which it maps the file.
fn lacks(block: &Block) -> u64 {
    if block.spec.page_size > 4096 {
        return 0;
    }
    let held = block
        .mapping
        .file
        .metadata()
        .map_or(0, |data| data.blocks() * 512);
    block.spec.size.saturating_sub(held)
}

fn free_memory(need: u64, margin: u64, spoken_for: u64, available: u64) -> Line {
    let others = match spoken_for {
        0 => String::new(),
        bytes => format!(", {} of them for guests that arrive", show_bytes(bytes)),
    };
    let found = format!(
        "the guest takes {} more, {} are free{others} (margin {})",
        show_bytes(need),
        show_bytes(available),
        show_bytes(margin)
    );
    let wanted = need.saturating_add(margin).saturating_add(spoken_for);
    if need == 0 || available >= wanted {
        return Line::pass("memory", Whose::Destination, found);
    }
    Line::fail(
        "memory",
        Whose::Destination,
        found,
        "free memory on the destination, choose another, or lower memory-margin in its configuration",
    )
}

/// Whether the file systems of RAM files have room: tmpfs takes half of the memory where nothing else is said.
fn file_systems(blocks: &[Block]) -> Vec<Line> {
    let mut needs: BTreeMap<u64, (u64, &Block)> = BTreeMap::new();
    for block in blocks.iter().filter(|block| block.spec.page_size == 4096) {
        needs.entry(block.mapping.device).or_insert((0, block)).0 += lacks(block);
    }
    let full = |(need, block): (u64, &Block)| {
        let system = rustix::fs::fstatvfs(&block.mapping.file).ok()?;
        let room = system.f_bavail.saturating_mul(system.f_frsize);
        // One without a limit says that it has no blocks at all.
        (system.f_blocks > 0 && room < need).then(|| {
            Line::fail(
                "memory",
                Whose::Destination,
                format!(
                    "the guest takes {} more, and the file system of {} has room for {}",
                    show_bytes(need),
                    block.mapping.path.display(),
                    show_bytes(room)
                ),
                "make it larger (mount -o remount,size=SIZE on a tmpfs)",
            )
        })
    };
    needs.into_values().filter_map(full).collect()
}

/// Memory that this host could give without swapping.
fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| io::Error::other("there is no MemAvailable in /proc/meminfo"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_enough_with_its_margin_and_beside_the_others_or_not() {
        let verdict =
            |need, margin, others, available| free_memory(need, margin, others, available).verdict;
        assert_eq!(verdict(10, 2, 0, 12), Verdict::Pass);
        assert_eq!(verdict(10, 2, 0, 11), Verdict::Fail);
        assert_eq!(verdict(10, 2, 5, 16), Verdict::Fail);
        assert_eq!(verdict(10, 2, 5, 17), Verdict::Pass);
        assert_eq!(verdict(u64::MAX, 2, u64::MAX, u64::MAX - 1), Verdict::Fail);
        // All of it is there already.
        assert_eq!(verdict(0, 2, 0, 1), Verdict::Pass);
        assert!(available().is_ok_and(|bytes| bytes > 0));
    }
}
