//! The one system call of the tests' tools that no crate wraps.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Hands a connected socket to one of the kernel's upper layer protocols.
pub(super) fn set_tcp_ulp(socket: &TcpStream, name: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(name.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes at `name`, which lives across the call, and writes nothing.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_ULP,
            name.as_ptr().cast(),
            length,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
