//! A userfaultfd, its ioctls and its events (`linux/userfaultfd.h`).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::ioc;

/// `UFFD_USER_MODE_ONLY` of the system call: faults in the kernel are not delivered. Needs no privilege.
pub(crate) const USER_MODE_ONLY: u64 = 1;

const API: u64 = 0xAA;

/// `UFFD_FEATURE_MISSING_HUGETLBFS`.
pub(crate) const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// `UFFD_FEATURE_MISSING_SHMEM`.
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// `UFFD_FEATURE_THREAD_ID`: a fault says which thread waits.
pub(crate) const FEATURE_THREAD_ID: u64 = 1 << 8;
/// `UFFD_FEATURE_MINOR_HUGETLBFS`.
pub(crate) const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// `UFFD_FEATURE_MINOR_SHMEM`. Since Linux 5.14.
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write-protection of shared memory. Since Linux 5.19.
pub(crate) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: pages that are not there can be protected. Since Linux 6.4.
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_POISON`: `UFFDIO_POISON`. Since Linux 6.6.
pub(crate) const FEATURE_POISON: u64 = 1 << 14;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel itself lets a write through and remembers it. Since Linux 6.7.
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// `UFFDIO_REGISTER_MODE_MISSING`: faults on pages that the file lacks.
pub(crate) const MODE_MISSING: u64 = 1;
/// `UFFDIO_REGISTER_MODE_WP`: write-protection.
pub(crate) const MODE_WP: u64 = 1 << 1;
/// `UFFDIO_REGISTER_MODE_MINOR`: faults on pages that the file has and the page table lacks.
pub(crate) const MODE_MINOR: u64 = 1 << 2;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeArgs {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgs {
    range: RangeArgs,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct ContinueArgs {
    range: RangeArgs,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct PoisonArgs {
    range: RangeArgs,
    mode: u64,
    updated: i64,
}

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`: `_IO(0xAA, 0)`.
pub(crate) const NEW_FROM_DEVICE: u64 = 0xAA00;

const UFFDIO_API: libc::c_ulong = ioc(3, 0xAA, 0x3F, size_of::<ApiArgs>());
const UFFDIO_REGISTER: libc::c_ulong = ioc(3, 0xAA, 0x00, size_of::<RegisterArgs>());
const UFFDIO_UNREGISTER: libc::c_ulong = ioc(2, 0xAA, 0x01, size_of::<RangeArgs>());
const UFFDIO_WAKE: libc::c_ulong = ioc(2, 0xAA, 0x02, size_of::<RangeArgs>());
const UFFDIO_CONTINUE: libc::c_ulong = ioc(3, 0xAA, 0x07, size_of::<ContinueArgs>());
const UFFDIO_POISON: libc::c_ulong = ioc(3, 0xAA, 0x08, size_of::<PoisonArgs>());

const _: () = assert!(UFFDIO_API == 0xC018_AA3F);
const _: () = assert!(UFFDIO_REGISTER == 0xC020_AA00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
const _: () = assert!(UFFDIO_WAKE == 0x8010_AA02);
const _: () = assert!(UFFDIO_CONTINUE == 0xC020_AA07);
const _: () = assert!(UFFDIO_POISON == 0xC020_AA08);

/// Bytes of `struct uffd_msg`.
const EVENT: usize = 32;
/// Events that one `read` takes at most.
const EVENTS: usize = 64;
/// `UFFD_EVENT_PAGEFAULT`, and the bit of its flags that says that the page is in the file (`UFFD_PAGEFAULT_FLAG_MINOR`).
const EVENT_FAULT: u8 = 0x12;
const FLAG_MINOR: u64 = 1 << 2;

/// A page fault that waits, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FaultEvent {
    /// The address, in the faulting process.
    pub(crate) address: u64,
    /// The thread that waits, by its id in its own pid namespace.
    pub(crate) thread: u32,
    /// The file has the page; only the mapping is missing.
    pub(crate) minor: bool,
}

/// A userfaultfd. Its ioctls act on the address space that created it, whoever calls them. When the last descriptor
/// closes, the kernel unregisters every range.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// A userfaultfd over this process's own memory.
    pub(crate) fn own() -> io::Result<Uffd> {
        // SAFETY: the call takes flags only and gives a new descriptor or an error.
        let fd = unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC)? };
        Ok(Uffd(fd))
    }

    /// A userfaultfd that is only asked what the kernel has: it sees no faults in the kernel, and needs no privilege.
    pub(crate) fn for_questions() -> io::Result<Uffd> {
        let user_mode_only = u32::try_from(USER_MODE_ONLY).map_err(io::Error::other)?;
        let flags = rustix::mm::UserfaultfdFlags::CLOEXEC.bits() | user_mode_only;
        let flags = rustix::mm::UserfaultfdFlags::from_bits_retain(flags);
        // SAFETY: as in `own`.
        let fd = unsafe { rustix::mm::userfaultfd(flags)? };
        Ok(Uffd(fd))
    }

    /// `UFFDIO_API` without a wish: every feature that the kernel has.
    pub(crate) fn features(&self) -> io::Result<u64> {
        let mut args = ApiArgs {
            api: API,
            features: 0,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_API, &mut args)?;
        Ok(args.features)
    }

    /// `UFFDIO_API`: asks for features, once and before anything else. `InvalidInput` when the kernel lacks one.
    pub(crate) fn enable(&self, features: u64) -> io::Result<()> {
        let mut args = ApiArgs {
            api: API,
            features,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_API, &mut args)
    }

    /// `UFFDIO_REGISTER`.
    pub(crate) fn register(&self, range: &Range<u64>, mode: u64) -> io::Result<()> {
        self.ioctl(
            UFFDIO_REGISTER,
            &mut RegisterArgs {
                range: range.into(),
                mode,
                ioctls: 0,
            },
        )
    }

    /// `UFFDIO_UNREGISTER`. Takes what write-protection is left off the range.
    pub(crate) fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut RangeArgs::from(range))
    }

    /// `UFFDIO_CONTINUE` of one page: maps the page that the file has. Whether the file has it; never allocates.
    pub(crate) fn map_present(&self, page: &Range<u64>) -> io::Result<bool> {
        let mut args = ContinueArgs {
            range: page.into(),
            mode: 0,
            mapped: 0,
        };
        loop {
            match self.ioctl(UFFDIO_CONTINUE, &mut args) {
                Ok(()) => return Ok(true),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EEXIST) => return Ok(true),
                    Some(libc::EFAULT) => return Ok(false),
                    // The address space was busy; nothing was mapped yet.
                    Some(libc::EAGAIN) => args.mapped = 0,
                    _ => return Err(error),
                },
            }
        }
    }

    /// `UFFDIO_CONTINUE`: maps the pages of `range` that the file has, and lets those go on who wait for them. Pages that are
    /// mapped already are passed over.
    ///
    /// # Errors
    /// `EFAULT`: the file lacks a page. `ENOENT`: the mapping is gone. `ESRCH`: the process is.
    pub(crate) fn map_range(&self, range: &Range<u64>, page: u64) -> io::Result<()> {
        let step = |at: u64| {
            let mut args = ContinueArgs {
                range: (&(at..range.end)).into(),
                mode: 0,
                mapped: 0,
            };
            let result = self.ioctl(UFFDIO_CONTINUE, &mut args);
            (args.mapped, result)
        };
        self.in_steps(range, page, step)
    }

    /// `UFFDIO_POISON`: a touch of a page of `range` that is not mapped is a memory error from now on (SIGBUS).
    ///
    /// # Errors
    /// `ENOENT`: the mapping is gone. `ESRCH`: the process is.
    pub(crate) fn poison_range(&self, range: &Range<u64>, page: u64) -> io::Result<()> {
        let step = |at: u64| {
            let mut args = PoisonArgs {
                range: (&(at..range.end)).into(),
                mode: 0,
                updated: 0,
            };
            let result = self.ioctl(UFFDIO_POISON, &mut args);
            (args.updated, result)
        };
        self.in_steps(range, page, step)
    }

    /// Calls `step` with where to begin until all of `range` is done. A step tells how many bytes it did, also when it
    /// failed after some.
    fn in_steps(
        &self,
        range: &Range<u64>,
        page: u64,
        step: impl Fn(u64) -> (i64, io::Result<()>),
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (done, result) = step(at);
            match result {
                Ok(()) => return Ok(()),
                Err(error) => match (u64::try_from(done), error.raw_os_error()) {
                    (Ok(done @ 1..), _) => at += done,
                    // Mapped already. Whoever waits for it all the same may look again.
                    (_, Some(libc::EEXIST)) => {
                        self.wake(&(at..at + page))?;
                        at += page;
                    }
                    // The address space was busy; nothing was done.
                    (_, Some(libc::EAGAIN)) => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// `UFFDIO_WAKE`: whoever waits for a page of `range` looks again, and faults again if it is still not mapped.
    pub(crate) fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut RangeArgs::from(range))
    }

    /// Appends page faults that nobody has read yet, some at a time; whether there were any. Never waits (the descriptor
    /// was made with `O_NONBLOCK`).
    pub(crate) fn read_faults(&self, faults: &mut Vec<FaultEvent>) -> io::Result<bool> {
        let mut bytes = [0; EVENT * EVENTS];
        let len = match rustix::io::read(&self.0, &mut bytes) {
            Ok(len) => len,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        faults.extend(bytes[..len].chunks_exact(EVENT).filter_map(fault_event));
        Ok(len > 0)
    }

    /// One of the ioctls above with the structure that belongs to it.
    fn ioctl<T>(&self, request: libc::c_ulong, args: &mut T) -> io::Result<()> {
        // SAFETY: every caller above pairs the request with its `#[repr(C)]` structure, whose size is part of the
        // request's number and asserted; the kernel touches only that structure. A uffd ioctl changes how faults in the
        // registered range are handled, never what this process's Rust objects contain: `own` is used on private
        // mappings only.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(args)) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// A page fault out of `struct uffd_msg`; `None` for another event, of which none was asked for.
fn fault_event(event: &[u8]) -> Option<FaultEvent> {
    let word = |at: usize| Some(u64::from_le_bytes(event.get(at..at + 8)?.try_into().ok()?));
    let thread = u32::from_le_bytes(event.get(24..28)?.try_into().ok()?);
    (event.first() == Some(&EVENT_FAULT)).then_some(FaultEvent {
        address: word(16)?,
        thread,
        minor: word(8)? & FLAG_MINOR != 0,
    })
}

impl From<&Range<u64>> for RangeArgs {
    fn from(range: &Range<u64>) -> RangeArgs {
        RangeArgs {
            start: range.start,
            len: range.end - range.start,
        }
    }
}
