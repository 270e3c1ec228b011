//! This machine's files, seen through an overlay in memory: what is done to them there is gone with it.

use std::fs;

/// Makes the overlay in the empty folder `$1`, and goes into it. In a mount namespace of its own.
const SET_UP: &str = r#"
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --rbind /dev dev
"#;

/// Whether the kernel can do that.
pub fn has_overlay() -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.contains("\toverlay\n")
}

/// A script for the shell in a mount namespace of its own, which does `then` at the top of the overlay. `$1` is an empty
/// folder. What fails ends it.
pub fn overlay_script(then: &str) -> String {
    format!("{SET_UP}{then}")
}
