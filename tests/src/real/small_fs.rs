//! A small file system of its own for something that is to find it full.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system. It is unmounted on drop.
#[derive(Debug)]
pub struct SmallFs {
    path: PathBuf,
}

impl SmallFs {
    /// A tmpfs of that many MiB at `path`, which is made.
    pub fn tmpfs(path: &Path, mib: u64) -> SmallFs {
        fs::create_dir_all(path).expect("a folder to mount on");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]);
        Self::mount(mount, path)
    }

    /// An ext4 of 1 MiB in blocks of 1 KiB at `path`, which is made; its image is `image`. It needs [loop
    /// devices](Self::loop_devices).
    pub fn ext4(image: &Path, path: &Path) -> SmallFs {
        fs::create_dir_all(path).expect("a folder to mount on");
        let file = File::create(image).expect("a file for the image");
        file.set_len(1 << 20).expect("a file for the image");
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args([
            "-q",
            "-b",
            "1024",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-N",
            "64",
        ]);
        run(mkfs.arg(image));
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(image);
        Self::mount(mount, path)
    }

    /// Whether this machine can mount a file.
    pub fn loop_devices() -> bool {
        Path::new("/dev/loop-control").exists()
    }

    fn mount(mut command: Command, path: &Path) -> SmallFs {
        run(command.arg(path));
        SmallFs {
            path: path.to_owned(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes all the room that is left.
    pub fn fill(&self) {
        let mut file = File::create(self.filler()).expect("a file to fill with");
        for piece in [1 << 20, 4096, 1024] {
            let bytes = vec![1; piece];
            while file.write_all(&bytes).is_ok() {}
        }
        // The disk's complaints were looked for.
        let _ = file.sync_all();
    }

    /// Gives it back.
    pub fn empty(&self) {
        fs::remove_file(self.filler()).expect("what was filled can be emptied");
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // Lazily: what is still open on it goes when it is closed. Nothing to be done about a failure: the next run sweeps.
        let _ = Command::new("umount").arg("-l").arg(&self.path).output();
    }
}

/// Unmounts what a killed test left: every mount whose path is `stale`.
pub(super) fn sweep(stale: impl Fn(&Path) -> bool) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for path in paths.map(Path::new).filter(|path| stale(path)) {
        let _ = Command::new("umount").arg("-l").arg(path).output();
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
