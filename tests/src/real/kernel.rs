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
