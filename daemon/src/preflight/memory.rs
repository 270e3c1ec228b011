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

/// What the lines about it are called.
pub(crate) const CHECK: &str = "memory";

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
    /// Reserves for a guest with these RAMBlocks. `forced`: also where only the margin is missing.
    ///
    /// # Errors
    /// There is not as much, beside what others have reserved.
    pub(crate) fn take(
        service: &Arc<Service>,
        blocks: &[Block],
        forced: bool,
    ) -> Result<Reserved, Failure> {
        let margin = service.in_force.now().memory_margin;
        let available = available().map_err(|error| {
            host(
                format!("how much memory is free cannot be read: {error}"),
                "let pagecopyd read /proc/meminfo",
            )
        })?;
        let mut all = service.reserved.lock();
        let need = blocks.iter().map(lacks).sum();
        let line = free_memory(need, margin, SpokenFor::by(&all), available);
        match line.verdict {
            Verdict::Pass => {}
            Verdict::Warn if forced => tracing::warn!(found = line.found, "forced"),
            Verdict::Warn | Verdict::Fail => return Err(host(line.found, line.remedy)),
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

/// What the guests that arrive will take.
#[derive(Clone, Copy, Default)]
struct SpokenFor {
    /// What they do not have yet.
    bytes: u64,
    /// How many they are: each has its margin.
    guests: u64,
}

impl SpokenFor {
    fn by(all: &BTreeMap<u64, Vec<Block>>) -> SpokenFor {
        SpokenFor {
            bytes: all
                .values()
                .flatten()
                .map(lacks)
                .fold(0, u64::saturating_add),
            guests: all.len().try_into().unwrap_or(u64::MAX),
        }
    }
}

/// Whether the destination has room for a guest of `ram` bytes, by the QEMU that waits for it if there is one, and `margin`
/// beside it.
pub(super) fn lines(service: &Service, guest: Option<&Guest>, ram: u64) -> Vec<Line> {
    let margin = service.in_force.now().memory_margin;
    let spoken_for = SpokenFor::by(&service.reserved.lock());
    let blocks = guest.map_or(&[][..], |guest| guest.blocks.as_slice());
    let need = if blocks.is_empty() {
        ram
    } else {
        blocks.iter().map(lacks).sum()
    };
    let mut lines = vec![match available() {
        Ok(available) => free_memory(need, margin, spoken_for, available),
        Err(error) => Line::warn(
            CHECK,
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

fn free_memory(need: u64, margin: u64, spoken_for: SpokenFor, available: u64) -> Line {
    let margins = margin.saturating_mul(spoken_for.guests);
    let reserved = spoken_for.bytes.saturating_add(margins);
    let others = match reserved {
        0 => String::new(),
        bytes => format!(", {} of them for guests that arrive", show_bytes(bytes)),
    };
    let found = format!(
        "the guest takes {} more, {} are free{others} (margin {})",
        show_bytes(need),
        show_bytes(available),
        show_bytes(margin)
    );
    let wanted = need.saturating_add(margin).saturating_add(reserved);
    if need == 0 || available >= wanted {
        return Line::pass(CHECK, Whose::Destination, found);
    }
    let side = Whose::Destination;
    if available >= need.saturating_add(spoken_for.bytes) {
        let remedy = "free memory on the destination, choose another, lower memory-margin in its configuration, or go on without the \
             margin (migrate --force)";
        return Line::warn(CHECK, side, found, remedy);
    }
    let remedy = "free memory on the destination, or choose another";
    Line::fail(CHECK, side, found, remedy)
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
                CHECK,
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
        let verdict = |need, [bytes, guests]: [u64; 2], available| {
            free_memory(need, 2, SpokenFor { bytes, guests }, available).verdict
        };
        assert_eq!(verdict(10, [0, 0], 12), Verdict::Pass);
        // The guest fits, and its margin does not.
        assert_eq!(verdict(10, [0, 0], 11), Verdict::Warn);
        assert_eq!(verdict(10, [0, 0], 10), Verdict::Warn);
        assert_eq!(verdict(10, [0, 0], 9), Verdict::Fail);
        assert_eq!(verdict(10, [5, 1], 19), Verdict::Pass);
        assert_eq!(verdict(10, [5, 1], 18), Verdict::Warn);
        assert_eq!(verdict(10, [5, 1], 14), Verdict::Fail);
        let all = [u64::MAX, u64::MAX];
        assert_eq!(verdict(u64::MAX, all, u64::MAX - 1), Verdict::Fail);
        // All of it is there already.
        assert_eq!(verdict(0, [0, 0], 1), Verdict::Pass);
        assert!(available().is_ok_and(|bytes| bytes > 0));
    }
}
