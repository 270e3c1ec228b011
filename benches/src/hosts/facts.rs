//! What a host is, and what it has of this build.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tests::real::{guest_elf, program};

use super::ask::{Digests, Route};
use crate::record::Machine;

/// This machine, with that QEMU.
///
/// # Errors
/// There is no such QEMU.
pub fn describe(qemu: &Path) -> Result<Machine, String> {
    let told = Command::new(qemu).arg("--version").output();
    let told = told.map_err(|error| {
        format!(
            "QEMU does not start: {}: {error}; install it there (Debian: qemu-system-x86), or name it with --qemu",
            qemu.display()
        )
    })?;
    let version = String::from_utf8_lossy(&told.stdout);
    let version = version.lines().next().unwrap_or_default();
    if !told.status.success() || !version.starts_with("QEMU") {
        return Err(format!(
            "{} is no QEMU that runs: {}",
            qemu.display(),
            String::from_utf8_lossy(&told.stderr).trim()
        ));
    }
    Ok(Machine {
        cpu: field("/proc/cpuinfo", "model name").unwrap_or_default(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: field("/proc/meminfo", "MemTotal")
            .and_then(|text| text.split(' ').next()?.parse().ok())
            .map_or(0, |kib: u64| kib / 1024),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        qemu: version.to_owned(),
    })
}

/// What stands behind `name :` in a file of `/proc`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(key, _)| key.trim() == name)?;
    Some(value.trim().to_owned())
}

/// All that a host needs of this build: this program, and what it calls.
///
/// # Errors
/// This program does not know where it is.
pub(super) fn programs() -> Result<[PathBuf; 4], String> {
    let own = std::env::current_exe().map_err(|error| format!("this program's path: {error}"))?;
    Ok([
        own,
        program("pagecopy"),
        program("pagecopyd"),
        guest_elf().to_owned(),
    ])
}

/// Digests of [`programs`].
///
/// # Errors
/// One of them cannot be read.
pub(super) fn digests() -> Result<Digests, String> {
    let mut digests = Digests::new();
    for path in programs()? {
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let digest = blake3::hash(&bytes).to_hex().to_string();
        digests.insert(name.into_owned(), digest);
    }
    Ok(digests)
}

/// How this host sends to an address.
///
/// # Errors
/// It does not.
pub(super) fn route(to: IpAddr) -> Result<Route, String> {
    let told = Command::new("ip")
        .args(["-json", "route", "get", &to.to_string()])
        .output()
        .map_err(|error| format!("ip does not start: {error}; install iproute2 there"))?;
    let routes: Value = serde_json::from_slice(&told.stdout).unwrap_or_default();
    let device = routes[0]["dev"].as_str();
    let address = routes[0]["prefsrc"].as_str();
    match (device, address.and_then(|text| text.parse().ok())) {
        (Some(device), Some(address)) => Ok(Route {
            device: device.to_owned(),
            address,
        }),
        _ => Err(format!(
            "no way leads to {to} from there: {}",
            String::from_utf8_lossy(&told.stderr).trim()
        )),
    }
}

/// Bytes that a network device of this host has sent.
pub(super) fn bytes_sent(device: &str) -> u64 {
    let counter = format!("/sys/class/net/{device}/statistics/tx_bytes");
    let text = fs::read_to_string(counter).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
