//! The system calls of the tests' tools that no crate wraps.

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

/// Gives the kernel's TLS, which has the socket already, what it needs for one direction: `struct
/// tls12_crypto_info_aes_gcm_128`, byte for byte.
pub(super) fn set_tls_key(
    socket: &TcpStream,
    direction: libc::c_int,
    info: &[u8; 40],
) -> io::Result<()> {
    // SAFETY: the kernel reads 40 bytes at `info`, which lives across the call, and writes nothing.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_TLS,
            direction,
            info.as_ptr().cast(),
            40,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
