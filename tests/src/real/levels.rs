//! What a process holds: memory of its own, descriptors and threads. Looked at again and again, it must stay level.

use std::fmt;
use std::fs;
use std::path::Path;

/// What a process held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Memory that is its own (RssAnon), in KiB.
    pub memory_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

impl Levels {
    /// What process `pid` holds now.
    pub fn of(pid: u32) -> Levels {
        let proc = Path::new("/proc").join(pid.to_string());
        let status = fs::read_to_string(proc.join("status")).expect("the process lives");
        let figure = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.and_then(|word| word.parse().ok())
                .expect("a figure of the process")
        };
        Levels {
            memory_kib: figure("RssAnon:"),
            descriptors: fs::read_dir(proc.join("fd"))
                .expect("the process lives")
                .count() as u64,
            threads: figure("Threads:"),
        }
    }

    /// The highest of each.
    #[must_use]
    pub fn highest(all: &[Levels]) -> Levels {
        let highest = |figure: fn(&Levels) -> u64| all.iter().map(figure).max().unwrap_or(0);
        Levels {
            memory_kib: highest(|one| one.memory_kib),
            descriptors: highest(|one| one.descriptors),
            threads: highest(|one| one.threads),
        }
    }
}

impl fmt::Display for Levels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} KiB, {} descriptors, {} threads",
            self.memory_kib, self.descriptors, self.threads
        )
    }
}
