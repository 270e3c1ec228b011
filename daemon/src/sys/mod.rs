//! The one place of this crate with `unsafe` in it: guest RAM that the host half has mapped becomes a transport region, and
//! the kernel is told what is free, and who is in a hurry; and descriptors that systemd has passed are taken, and callers' groups asked for.

mod child;

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use pagecopy::host::ram::MappedRam;
use pagecopy::memory::BlockId;
use transport::Region;

pub(crate) use child::Child;

/// The transport region of a mapped RAMBlock, or `None` when there is no such block. Keeps the mapping alive.
pub fn region(ram: &MappedRam, block: BlockId) -> Option<Region> {
    let (base, len, owner) = ram.mapping(block)?;
    // SAFETY: `MappedRam::mapping` promises that `base .. base + len` stays mapped for as long as `owner` lives. A
    // source's mapping is read-only: its regions are registered without the peer's writes, and no `Read` is ever
    // submitted for them, so the transport only reads there.
    let region = unsafe { Region::new(base, len, owner) };
    let region = match ram.spliced_from(block) {
        Some(file) => region.sent_from(file),
        None => region,
    };
    Some(match ram.written_to(block) {
        Some(file) => region.backed_by(file),
        None => region,
    })
}

/// The descriptors that systemd has passed to this process, which are the caller's from now on. There are none the second time.
///
/// # Errors
/// The environment does not say it as systemd does, or names what is not open.
pub fn passed_descriptors() -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds()?;
    // SAFETY: they are open, for `listen_fds` has set their flags. By the protocol they were opened for this process alone,
    // and nobody else takes them: this happens once.
    Ok(passed
        .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
        .collect())
}

/// The supplementary groups of whoever has connected this unix socket, as they were at that moment (`SO_PEERGROUPS`).
///
/// # Errors
/// It is no unix socket, or not connected.
pub fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let room = size_of::<libc::gid_t>() * groups.len();
        let mut length = libc::socklen_t::try_from(room).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes to `groups`, which has room for them, and the number to `length`.
        let answer = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let error = io::Error::last_os_error();
        let number = usize::try_from(length).map_err(io::Error::other)? / size_of::<libc::gid_t>();
        if answer == 0 {
            groups.truncate(number);
            return Ok(groups);
        }
        // It has said how many there are.
        if error.raw_os_error() != Some(libc::ERANGE) || number <= groups.len() {
            return Err(error);
        }
        groups.resize(number, 0);
    }
}

/// Gives the kernel the memory that this process has freed and the C library keeps: after a device state of a gibibyte, one
/// small allocation that lives on above it can hold all of it ([`malloc_trim(3)`]). Takes a moment; other C libraries than
/// GNU's keep next to nothing, and need none of it.
///
/// [`malloc_trim(3)`]: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
pub fn give_freed_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes that this process has allocated and not freed ([`mallinfo2(3)`]): what the C library keeps for later, and the holes between
/// what lives, do not count. None with other C libraries than GNU's, which do not say.
///
/// [`mallinfo2(3)`]: https://man7.org/linux/man-pages/man3/mallinfo2.3.html
pub fn allocated_bytes() -> Option<u64> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes the allocator's own locks, and writes nothing of ours.
        let told = unsafe { libc::mallinfo2() };
        // In its heaps, and what was large enough for a mapping of its own.
        u64::try_from(told.uordblks.saturating_add(told.hblkhd)).ok()
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

/// Has the calling thread get its turns on a processor soon, and short ones in return ([`sched_setattr(2)`]; since Linux
/// 6.12, needs no privilege). For one that somebody waits for and that sleeps most of the time. Where it is refused, it is
/// a thread like others.
///
/// [`sched_setattr(2)`]: https://man7.org/linux/man-pages/man2/sched_setattr.2.html
pub fn take_short_turns() {
    const TURN_NS: u64 = 100_000;
    let (Ok(nice), Ok(size)) = (
        rustix::process::nice(0),
        u32::try_from(size_of::<libc::sched_attr>()),
    ) else {
        return;
    };
    let attributes = libc::sched_attr {
        size,
        sched_policy: libc::SCHED_OTHER.unsigned_abs(),
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: TURN_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of the structure, and nothing else is handed over.
    unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MIB: usize = 1 << 20;

    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size()
    }

    #[test]
    fn short_turns_are_given_where_the_kernel_knows_them() {
        let attributes = || {
            let size = size_of::<libc::sched_attr>();
            let mut bytes = vec![0_u8; size];
            let size = u32::try_from(size).unwrap();
            // SAFETY: `bytes` has as many bytes as the kernel is told.
            let result =
                unsafe { libc::syscall(libc::SYS_sched_getattr, 0, bytes.as_mut_ptr(), size, 0) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
            let nice = i32::from_ne_bytes(bytes[16..20].try_into().unwrap());
            (nice, u64::from_ne_bytes(bytes[24..32].try_into().unwrap()))
        };
        let (nice, before_ns) = attributes();
        take_short_turns();
        let (nice_after, turn_ns) = attributes();
        assert_eq!(nice, nice_after);
        // Before Linux 6.12 a turn is none of the attributes.
        assert!(
            turn_ns == 100_000 || (before_ns, turn_ns) == (0, 0),
            "{turn_ns}"
        );
    }

    #[test]
    fn a_callers_groups_are_the_kernels_word() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut own: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .iter()
            .map(|group| group.as_raw())
            .collect();
        let mut found = peer_groups(&one).unwrap();
        own.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, own);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(peer_groups(&file).is_err());
    }

    #[test]
    fn what_is_allocated_is_counted_until_it_is_freed() {
        let before = allocated_bytes().unwrap();
        let held: Vec<Vec<u8>> = std::hint::black_box((0..64).map(|_| vec![1; MIB]).collect());
        let during = allocated_bytes().unwrap();
        drop(held);
        let after = allocated_bytes().unwrap();
        // Other tests of this process allocate meanwhile, and not that much.
        assert!(
            during >= before + 48 * (MIB as u64),
            "{before}, then {during}"
        );
        assert!(
            after + 48 * (MIB as u64) <= during,
            "{during}, then {after}"
        );
    }

    #[test]
    fn what_was_freed_between_small_allocations_goes_back() {
        // From here on the C library takes pieces of this size from its heap, as it does after a while in any daemon.
        drop(std::hint::black_box(vec![1_u8; 16 * MIB]));
        let mut live_on = Vec::new();
        let pieces: Vec<Vec<u8>> = (0..256)
            .map(|_| {
                let piece = vec![1; MIB];
                live_on.push(std::hint::black_box(vec![1_u8; 4000]));
                piece
            })
            .collect();
        drop(std::hint::black_box(pieces));
        let kept = resident();
        give_freed_memory_back();
        let left = resident();
        assert!(kept > left + 200 * MIB, "{kept} kept, {left} left");
        drop(live_on);
    }
}
