//! The test guest's image, and the downtime that its users would feel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::Serial;

const SOURCES: [&str; 3] = ["guest.c", "boot.S", "guest.ld"];
const FLAGS: [&str; 17] = [
    "-m32",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-pic",
    "-no-pie",
    "-mgeneral-regs-only",
    "-nostdlib",
    "-static",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--build-id=none",
    "-Wl,--no-warn-rwx-segments",
    "-Wl,-T,guest.ld",
];

/// The guest's ELF file, built with gcc when it is missing or older than its sources.
pub fn guest_elf() -> &'static Path {
    static ELF: OnceLock<PathBuf> = OnceLock::new();
    ELF.get_or_init(build)
}

fn build() -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let elf = super::daemon::target_folder().join("test-guest.elf");
    let built = modified(&elf);
    if built.is_some()
        && SOURCES
            .iter()
            .all(|source| modified(&sources.join(source)) < built)
    {
        return elf;
    }
    // Tests run at the same time: each builds to a name of its own, and the last rename wins.
    let mine = elf.with_extension(format!("{}.elf", std::process::id()));
    let output = Command::new("gcc")
        .current_dir(&sources)
        .args(FLAGS)
        .arg("-o")
        .arg(&mine)
        .args(["guest.c", "boot.S"])
        .output()
        .expect("gcc can be called");
    assert!(
        output.status.success(),
        "the guest does not build: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(&mine, &elf).expect("the guest's image takes its place");
    elf
}

fn modified(path: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}

/// The gap from the last beat read at the source to the first one at the destination.
pub fn outside_downtime(source: &Serial, destination: &Serial) -> Duration {
    let (last, _) = source.last_beat().expect("the source has beaten");
    let (first, _) = destination
        .first_beat()
        .expect("the destination has beaten");
    // Zero when this process was too busy to read the source's last beats in time.
    first.saturating_duration_since(last)
}
