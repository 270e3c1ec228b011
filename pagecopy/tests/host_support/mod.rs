//! What the tests of the host's side share: RAM files, a process to attach to, and commands for it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation
)]

pub mod sys;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pagecopy::host::ram::MappedRam;
use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{Ram, Tracker};
use pagecopy::memory::{BlockId, BlockSpec, Run};

use self::sys::disk_read::DiskRead;
use self::sys::{Child, Map};

pub const PAGE: u64 = 4096;
pub const HUGE: u64 = 2 << 20;
/// What a disk read brings.
pub const FROM_DISK: u8 = 0xD1;

/// Ends the test when it lacks what it needs, and says so.
#[macro_export]
macro_rules! skip_unless {
    ($condition:expr, $($reason:tt)*) => {
        if !$condition {
            println!("SKIPPED: {}", format!($($reason)*));
            return;
        }
    };
}

/// Whether this process may trace others and see their page tables.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A RAM file that is removed on drop.
pub struct RamFile {
    pub path: PathBuf,
    pub file: File,
    pub size: u64,
    pub page_size: u64,
}

impl RamFile {
    /// On `/dev/shm`.
    pub fn tmpfs(size: u64) -> RamFile {
        RamFile::at(Path::new("/dev/shm"), size, PAGE)
    }

    /// In a folder of a file system with such pages.
    pub fn at(folder: &Path, size: u64, page_size: u64) -> RamFile {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("pagecopy-test-{}-{number}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(size).unwrap();
        RamFile {
            path,
            file,
            size,
            page_size,
        }
    }

    pub fn map(&self) -> Map {
        Map::shared(self.file.as_fd(), self.size as usize)
    }

    pub fn spec(&self, name: &str) -> BlockSpec {
        BlockSpec {
            name: name.into(),
            size: self.size,
            page_size: self.page_size,
        }
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A mounted file system that is unmounted on drop.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// `mount -t KIND -o OPTIONS`, or `None` where that is not permitted.
    pub fn new(kind: &str, options: &str) -> Option<Mounted> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("pagecopy-mount-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", kind, "-o", options, "none"])
            .arg(&folder)
            .status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Mounted(folder));
        }
        let _ = fs::remove_dir(&folder);
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that another test has forked may still have a file here open.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
        let _ = fs::remove_dir(&self.0);
    }
}

/// Huge pages reserved for a test; given back on drop. Tests of one program that reserve take turns.
pub struct HugePages {
    before: u64,
    pub mount: Mounted,
    _turn: MutexGuard<'static, ()>,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Reserves `count` pages of 2 MiB beyond those there are; says so where that cannot be.
    pub fn reserve(count: u64) -> Option<HugePages> {
        let reserved = HugePages::try_reserve(count);
        if reserved.is_none() {
            println!("SKIPPED: no {count} huge pages of 2 MiB can be reserved");
        }
        reserved
    }

    fn try_reserve(count: u64) -> Option<HugePages> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || {
            fs::read_to_string(NR_HUGEPAGES)
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        };
        let before = read()?;
        fs::write(NR_HUGEPAGES, (before + count).to_string()).ok()?;
        if read()? < before + count {
            let _ = fs::write(NR_HUGEPAGES, before.to_string());
            return None;
        }
        let Some(mount) = Mounted::new("hugetlbfs", "pagesize=2M") else {
            let _ = fs::write(NR_HUGEPAGES, before.to_string());
            return None;
        };
        Some(HugePages {
            before,
            mount,
            _turn: turn,
        })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, self.before.to_string());
    }
}

/// A process with RAM mapped that does what it is told.
pub struct Target {
    pub child: Child,
    pub blocks: Vec<TrackedBlock>,
    pub orders: Orders,
    _turn: MutexGuard<'static, ()>,
}

/// The way to a target's ear.
pub struct Orders {
    commands: File,
    answers: File,
}

impl Orders {
    /// Has a command carried out; its answer, or an error when the target dies of it.
    pub fn answer(&mut self, command: Command) -> std::io::Result<u8> {
        self.commands.write_all(&encode(command))?;
        let mut answer = [0];
        self.answers.read_exact(&mut answer)?;
        Ok(answer[0])
    }

    /// Has a command carried out and waits until it is.
    pub fn tell(&mut self, command: Command) {
        self.answer(command).unwrap();
    }

    /// The first byte of a page, as the target reads it.
    pub fn get(&mut self, block: u64, page: u64) -> u8 {
        self.answer(Command::Get { block, page }).unwrap()
    }
}

/// What another thread of a target does.
pub type Background = Box<dyn Fn(&[Map]) + Send + Sync>;

/// What a target can be told.
#[derive(Clone, Copy)]
pub enum Command {
    /// Write one byte into each of `count` pages from `first` on, `stride` apart.
    Write {
        block: u64,
        first: u64,
        count: u64,
        stride: u64,
    },
    /// Read one byte of each.
    Read {
        block: u64,
        first: u64,
        count: u64,
        stride: u64,
    },
    /// Have the kernel write one byte into a page (`read` from a pipe).
    KernelWrite { block: u64, page: u64 },
    /// `madvise(MADV_DONTNEED)` of a page.
    Drop { block: u64, page: u64 },
    /// Give up root.
    BecomeNobody,
    /// Unmap a block.
    Unmap { block: u64 },
    /// Start a disk read by direct I/O into the first bytes of a page: it is pinned from now on.
    StartDiskRead { block: u64, page: u64 },
    /// Have the data of the disk read land.
    FinishDiskRead,
    /// Discard a page as a balloon does (`MADV_REMOVE`: a hole in the file).
    Discard { block: u64, page: u64 },
    /// Read a byte; the answer is that byte.
    Get { block: u64, page: u64 },
    /// Close a descriptor.
    Close { descriptor: u64 },
}

impl Target {
    /// A process with these files mapped. The first thread of it waits in `read` for commands; the others run `background`.
    pub fn new(files: &[&RamFile], background: Vec<Background>) -> Target {
        // A forked process inherits what other tests have open and mapped; so one test forks at a time.
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let maps: Vec<Map> = files.iter().map(|file| file.map()).collect();
        let blocks = files
            .iter()
            .zip(&maps)
            .zip(0..)
            .map(|((file, map), number)| TrackedBlock {
                block: BlockId(number),
                address: map.address(),
                len: file.size,
                page_size: file.page_size,
            })
            .collect();
        let page_sizes: Vec<u64> = files.iter().map(|file| file.page_size).collect();
        let (commands_in, commands) = pipe();
        let (answers, answers_out) = pipe();
        let child = sys::fork(move || {
            std::thread::scope(|scope| {
                for work in &background {
                    scope.spawn(|| work(&maps));
                }
                obey(&maps, &page_sizes, commands_in, answers_out);
                sys::exit(0);
            });
        });
        Target {
            child,
            blocks,
            orders: Orders { commands, answers },
            _turn: turn,
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.pid
    }

    /// Has a command carried out and waits until it is.
    pub fn tell(&mut self, command: Command) {
        self.orders.tell(command);
    }

    pub fn write(&mut self, block: u64, first: u64, count: u64) {
        self.tell(Command::Write {
            block,
            first,
            count,
            stride: 1,
        });
    }

    pub fn tracker(&self) -> UffdTracker {
        UffdTracker::new(self.pid(), self.blocks.clone()).unwrap()
    }
}

/// A pipe: its end to read from, its end to write to.
pub fn pipe() -> (File, File) {
    let (read, write) = std::io::pipe().unwrap();
    (OwnedFd::from(read).into(), OwnedFd::from(write).into())
}

fn encode(command: Command) -> [u8; 40] {
    let words = match command {
        Command::Write {
            block,
            first,
            count,
            stride,
        } => [0, block, first, count, stride],
        Command::Read {
            block,
            first,
            count,
            stride,
        } => [1, block, first, count, stride],
        Command::KernelWrite { block, page } => [2, block, page, 0, 0],
        Command::Drop { block, page } => [3, block, page, 0, 0],
        Command::BecomeNobody => [4, 0, 0, 0, 0],
        Command::Unmap { block } => [5, block, 0, 0, 0],
        Command::StartDiskRead { block, page } => [6, block, page, 0, 0],
        Command::FinishDiskRead => [7, 0, 0, 0, 0],
        Command::Discard { block, page } => [8, block, page, 0, 0],
        Command::Get { block, page } => [9, block, page, 0, 0],
        Command::Close { descriptor } => [10, 0, descriptor, 0, 0],
    };
    let mut bytes = [0; 40];
    for (place, word) in bytes.chunks_mut(8).zip(words) {
        place.copy_from_slice(&u64::to_le_bytes(word));
    }
    bytes
}

/// The target's side of `tell`.
fn obey(maps: &[Map], page_sizes: &[u64], mut commands: File, mut answers: File) {
    let (pipe_out, mut pipe_in) = pipe();
    let mut disk_read = None;
    let mut bytes = [0; 40];
    while commands.read_exact(&mut bytes).is_ok() {
        let mut words = bytes
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let mut word = || words.next().unwrap();
        let (what, block, first, count, stride) = (word(), word() as usize, word(), word(), word());
        let (map, page) = (&maps[block], page_sizes[block]);
        let pages = (0..count).map(|index| (first + index * stride) * page);
        let mut answer = 1;
        match what {
            0 => pages.for_each(|offset| map.write_byte(offset, 0x5A)),
            1 => pages.for_each(|offset| {
                let _ = map.read_byte(offset);
            }),
            2 => {
                pipe_in.write_all(&[0x77]).unwrap();
                map.read_into(pipe_out.as_fd(), first * page, 1);
            }
            3 => map.drop_pages(first * page, page),
            4 => sys::become_nobody(),
            5 => map.unmap(),
            6 => disk_read = Some(DiskRead::start(map, first * page, PAGE as usize)),
            7 => disk_read.take().unwrap().finish(FROM_DISK),
            8 => map.remove_pages(first * page, page),
            9 => answer = map.read_byte(first * page),
            10 => sys::close(first as i32),
            other => panic!("no command {other}"),
        }
        if answers.write_all(&[answer]).is_err() {
            break;
        }
    }
}

/// Pages of a block.
pub fn run(block: u16, first: u64, pages: u64) -> Run {
    Run {
        block: BlockId(block),
        first,
        pages,
    }
}

/// RAM files as a destination maps them.
pub fn open_ram(files: &[&RamFile]) -> MappedRam {
    let blocks: Vec<_> = files
        .iter()
        .map(|file| (file.spec("ram"), file.path.clone()))
        .collect();
    MappedRam::open(&blocks, true).unwrap()
}

/// What RAM files hold.
pub fn populated(ram: &MappedRam) -> Vec<Run> {
    let mut runs = Vec::new();
    ram.populated(&mut runs).unwrap();
    runs
}

/// What was written since the last scan.
pub fn scan(tracker: &mut UffdTracker) -> Vec<Run> {
    let mut dirty = Vec::new();
    tracker.scan(&mut dirty).unwrap();
    dirty
}

/// Pages of runs, as `(block, page)`.
pub fn pages(runs: &[Run]) -> Vec<(u16, u64)> {
    runs.iter()
        .flat_map(|run| (run.first..run.end()).map(|page| (run.block.0, page)))
        .collect()
}

/// Whether any of a process's mappings is registered with a userfaultfd (`VmFlags` `um`, `uw`, `ui`).
pub fn is_registered(pid: i32) -> bool {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    smaps
        .lines()
        .filter(|line| line.starts_with("VmFlags:"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| matches!(flag, "um" | "uw" | "ui"))
        })
}

/// Page tables of a process, in KiB.
pub fn page_tables(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPTE:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound
    }
}
