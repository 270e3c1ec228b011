//! What both sides must have alike, by what each of them told.

use super::facts::QemuFacts;
use super::{Facts, Line, Whose, cpu, disk, size};

/// The lines in which both sides are compared: none where a side has no QEMU that answers, which its own lines say.
pub fn compare(source: &Facts, destination: &Facts) -> Vec<Line> {
    let (Some(ours), Some(theirs)) = (&source.qemu, &destination.qemu) else {
        return Vec::new();
    };
    let mut lines = vec![versions(ours, theirs), machine(ours, theirs)];
    match vcpus(ours, theirs) {
        // How many there are is a feature, too.
        Some(line) => lines.push(line),
        None => lines.push(cpu::compare(ours.cpu.as_ref(), theirs.cpu.as_ref())),
    }
    lines.extend(memory(ours, theirs));
    lines.extend(disk::compare(source, ours, destination, theirs));
    lines
}

fn shown([major, minor, micro]: [u32; 3]) -> String {
    format!("{major}.{minor}.{micro}")
}

/// No versions are forbidden: QEMU promises nothing for its older ones, and a device state that one cannot load leaves the
/// guest where it is.
fn versions(ours: &QemuFacts, theirs: &QemuFacts) -> Line {
    let found = match ours.version.cmp(&theirs.version) {
        std::cmp::Ordering::Equal => format!("{} on both sides", shown(ours.version)),
        order => {
            let older = if order == std::cmp::Ordering::Greater {
                ", which is older"
            } else {
                ""
            };
            format!(
                "{} at the source, {} at the destination{older}",
                shown(ours.version),
                shown(theirs.version)
            )
        }
    };
    Line::pass("qemu", Whose::Both, found)
}

fn machine(ours: &QemuFacts, theirs: &QemuFacts) -> Line {
    if ours.machine == theirs.machine {
        return Line::pass(
            "machine",
            Whose::Both,
            format!("{} on both sides", ours.machine),
        );
    }
    Line::fail(
        "machine",
        Whose::Both,
        format!(
            "{} at the source, {} at the destination",
            ours.machine, theirs.machine
        ),
        format!(
            "start the destination's QEMU with -machine {}",
            ours.machine
        ),
    )
}

fn vcpus(ours: &QemuFacts, theirs: &QemuFacts) -> Option<Line> {
    (ours.cpus != theirs.cpus).then(|| {
        Line::fail(
            "vcpus",
            Whose::Both,
            format!(
                "{} at the source, {} at the destination",
                ours.cpus, theirs.cpus
            ),
            "start the destination's QEMU with the same -smp",
        )
    })
}

/// Nothing is said of memory that a side could not look at: it has said so.
fn memory(ours: &QemuFacts, theirs: &QemuFacts) -> Vec<Line> {
    if ours.blocks.is_empty() || theirs.blocks.is_empty() {
        return Vec::new();
    }
    let remedy = "start the destination's QEMU with the same -object memory-backend-file: ids, sizes, kind of file system";
    let fail = |found: String| Line::fail("ram-match", Whose::Both, found, remedy);
    let mut lines = Vec::new();
    for block in &ours.blocks {
        let name = &block.name;
        match theirs.blocks.iter().find(|other| other.name == *name) {
            None => lines.push(fail(format!("{name}: the destination has none of that id"))),
            Some(other) if other.size != block.size => lines.push(fail(format!(
                "{name}: {} at the source, {} at the destination",
                size(block.size),
                size(other.size)
            ))),
            Some(other) if other.page_size != block.page_size => lines.push(fail(format!(
                "{name}: pages of {} at the source, of {} at the destination",
                size(block.page_size),
                size(other.page_size)
            ))),
            Some(_) => {}
        }
    }
    let more = theirs
        .blocks
        .iter()
        .filter(|other| ours.blocks.iter().all(|block| block.name != other.name));
    lines.extend(more.map(|other| fail(format!("{}: the source has none of that id", other.name))));
    if lines.is_empty() {
        let all: u64 = ours.blocks.iter().map(|block| block.size).sum();
        let found = format!(
            "{} in {} on both sides",
            size(all),
            blocks(ours.blocks.len())
        );
        lines.push(Line::pass("ram-match", Whose::Both, found));
    }
    lines
}

fn blocks(count: usize) -> String {
    match count {
        1 => "one RAMBlock".to_owned(),
        count => format!("{count} RAMBlocks"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BlockSpec;
    use crate::preflight::Verdict;

    fn facts(machine: &str, version: [u32; 3], blocks: &[(&str, u64, u64)]) -> Facts {
        let blocks = blocks.iter().map(|(name, size, page_size)| BlockSpec {
            name: (*name).to_owned(),
            size: *size,
            page_size: *page_size,
        });
        Facts {
            qemu: Some(QemuFacts {
                version,
                machine: machine.to_owned(),
                cpus: 1,
                cpu: Some(super::super::Cpu::default()),
                blocks: blocks.collect(),
                ..QemuFacts::default()
            }),
            ..Facts::default()
        }
    }

    fn failed(source: &Facts, destination: &Facts) -> Vec<String> {
        let lines = compare(source, destination);
        let failed = lines.iter().filter(|line| line.verdict == Verdict::Fail);
        failed
            .map(|line| format!("{} {}", line.check, line.found))
            .collect()
    }

    #[test]
    fn alike_sides_pass_and_each_difference_has_its_line() {
        let ram = [("m", 1 << 30, 4096)];
        let source = facts("q35-10", [10, 0, 2], &ram);
        assert_eq!(failed(&source, &source), [""; 0]);
        assert_eq!(failed(&source, &facts("q35-10", [7, 2, 0], &ram)), [""; 0]);
        let other = failed(&source, &facts("q35-9", [10, 0, 2], &ram));
        assert_eq!(
            other,
            ["machine q35-10 at the source, q35-9 at the destination"]
        );
        let other = failed(
            &source,
            &facts("q35-10", [10, 0, 2], &[("m", 2 << 30, 4096)]),
        );
        assert_eq!(
            other,
            ["ram-match m: 1 GiB at the source, 2 GiB at the destination"]
        );
        let other = failed(
            &source,
            &facts("q35-10", [10, 0, 2], &[("m", 1 << 30, 2 << 20)]),
        );
        assert_eq!(other.len(), 1, "{other:?}");
        let other = failed(
            &source,
            &facts("q35-10", [10, 0, 2], &[("n", 1 << 30, 4096)]),
        );
        assert_eq!(other.len(), 2, "{other:?}");
        let mut more = source.clone();
        more.qemu.iter_mut().for_each(|qemu| qemu.cpus = 4);
        assert_eq!(
            failed(&source, &more),
            ["vcpus 1 at the source, 4 at the destination"]
        );
        assert!(compare(&source, &Facts::default()).is_empty());
    }
}
