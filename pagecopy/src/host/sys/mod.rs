//! The system calls that need `unsafe`, each behind a function or type that is safe to use.
//!
//! Numbers and structures that the `libc` crate lacks are defined here after the kernel's headers and checked at compile
//! time against the values that those headers give on x86-64.

pub(crate) mod map;
pub(crate) mod pagemap;
#[cfg(target_arch = "x86_64")]
pub(crate) mod ptrace;
#[cfg(target_arch = "x86_64")]
pub(crate) mod survivor;
pub(crate) mod uffd;
pub(crate) mod words;
pub(crate) mod zero;

/// The number of an ioctl, as the kernel's `_IOC` macro makes it: direction (1 write, 2 read, 3 both), type, number and
/// size of the argument.
const fn ioc(direction: u32, kind: u8, number: u8, size: usize) -> libc::c_ulong {
    assert!(
        size < 1 << 14,
        "an ioctl's argument has at most 14 bits of size"
    );
    ((direction as libc::c_ulong) << 30)
        | ((size as libc::c_ulong) << 16)
        | ((kind as libc::c_ulong) << 8)
        | number as libc::c_ulong
}
