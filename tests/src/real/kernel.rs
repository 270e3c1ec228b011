//! What this machine's kernel and CPU offer to tests that need it.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use super::sys;

/// Whether guests run under KVM with the CPU's own help.
///
/// # Errors
/// Why not: also where there is a `/dev/kvm` on a CPU without SVM or VMX. That one interprets a guest's privileged code,
/// thousands of times slower.
pub fn hardware_kvm() -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("no /dev/kvm".to_owned());
    }
    let cpus = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| error.to_string())?;
    let helps = cpus
        .lines()
        .filter_map(|line| line.strip_prefix("flags"))
        .any(|flags| {
            flags
                .split_whitespace()
                .any(|flag| flag == "svm" || flag == "vmx")
        });
    if helps {
        Ok(())
    } else {
        Err("there is a /dev/kvm, but the CPU has neither SVM nor VMX".to_owned())
    }
}

/// Whether the kernel does TLS on a connected socket, when asked as a program would ask it.
///
/// # Errors
/// The kernel's answer.
pub fn kernel_tls() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    sys::set_tcp_ulp(&socket, "tls")
}

/// One direction of a connection, as the kernel's TLS numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// What is sent is sealed.
    Sent = 1,
    /// What is received is opened.
    Received = 2,
}

/// Has the kernel seal or open what goes over a connected socket: TLS 1.3 with AES-128-GCM, and a key that is no secret. For
/// measuring what that takes.
///
/// # Errors
/// The kernel's answer: `ENOENT` where it has no TLS.
pub fn seal_by_kernel(socket: &TcpStream, direction: Sealing) -> io::Result<()> {
    const TLS_1_3: u16 = 0x0304;
    const AES_GCM_128: u16 = 51;
    // Version, cipher, 8 bytes of IV, 16 of the key, 4 of salt, 8 of the first record's number.
    let mut info = [0; 40];
    info[..2].copy_from_slice(&TLS_1_3.to_ne_bytes());
    info[2..4].copy_from_slice(&AES_GCM_128.to_ne_bytes());
    info[4..32].fill(0x5a);
    sys::set_tcp_ulp(socket, "tls")?;
    sys::set_tls_key(socket, direction as libc::c_int, &info)
}
