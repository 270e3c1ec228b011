//! A userfaultfd and its ioctls (`linux/userfaultfd.h`).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::ioc;

/// `UFFD_USER_MODE_ONLY` of the system call: faults in the kernel are not delivered. Needs no privilege.
pub(crate) const USER_MODE_ONLY: u64 = 1;

const API: u64 = 0xAA;

/// `UFFD_FEATURE_MINOR_HUGETLBFS`.
pub(crate) const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write-protection of shared memory. Since Linux 5.19.
pub(crate) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: pages that are not there can be protected. Since Linux 6.4.
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel itself lets a write through and remembers it. Since Linux 6.7.
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

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

const UFFDIO_API: libc::c_ulong = ioc(3, 0xAA, 0x3F, size_of::<ApiArgs>());
const UFFDIO_REGISTER: libc::c_ulong = ioc(3, 0xAA, 0x00, size_of::<RegisterArgs>());
const UFFDIO_UNREGISTER: libc::c_ulong = ioc(2, 0xAA, 0x01, size_of::<RangeArgs>());
const UFFDIO_CONTINUE: libc::c_ulong = ioc(3, 0xAA, 0x07, size_of::<ContinueArgs>());

const _: () = assert!(UFFDIO_API == 0xC018_AA3F);
const _: () = assert!(UFFDIO_REGISTER == 0xC020_AA00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
const _: () = assert!(UFFDIO_CONTINUE == 0xC020_AA07);

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

impl From<&Range<u64>> for RangeArgs {
    fn from(range: &Range<u64>) -> RangeArgs {
        RangeArgs {
            start: range.start,
            len: range.end - range.start,
        }
    }
}
