//! What a record says of the machine, the commit and the time.

use std::fs;
use std::path::Path;
use std::process::Command;

use benches::record::Machine;
use tests::real::Version;

/// This machine.
pub(crate) fn describe() -> Machine {
    Machine {
        cpu: field("/proc/cpuinfo", "model name").unwrap_or_default(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: field("/proc/meminfo", "MemTotal")
            .and_then(|text| text.split(' ').next()?.parse().ok())
            .map_or(0, |kib: u64| kib / 1024),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        qemu: said(Command::new(Version::V10_0.binary()).arg("--version"))
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
    }
}

/// The commit of the sources that this was built from, if they are still there.
pub(crate) fn commit() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Whoever measures as root may have the sources from somebody else.
    let git = |words: &[&str]| {
        said(
            Command::new("git")
                .args(["-c", "safe.directory=*", "-C"])
                .arg(root)
                .args(words),
        )
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    match (commit.as_str(), git(&["status", "--porcelain"]).as_str()) {
        ("", _) => "unknown".to_owned(),
        (commit, "") => commit.to_owned(),
        (commit, _) => format!("{commit}-dirty"),
    }
}

/// The time, in UTC.
pub(crate) fn now() -> String {
    said(Command::new("date").args(["-u", "+%FT%TZ"]))
}

/// What a command prints; nothing when it cannot be called.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout);
    String::from_utf8_lossy(&output.unwrap_or_default())
        .trim()
        .to_owned()
}

/// What stands behind `name :` in a file of `/proc`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(key, _)| key.trim() == name)?;
    Some(value.trim().to_owned())
}
