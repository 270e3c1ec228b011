//! A machine with systemd as its first process and the Debian package installed: this one, seen through an overlay, in
//! namespaces of its own. Nothing of it is left when it goes away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use super::overlay::{has_overlay, overlay_script};
use super::{PATIENCE, Process, Scratch, eventually};

/// What the shell does in an overlay ([`overlay_script`]); `$2` is a folder to be seen at its own place, `$3` the package and
/// `$4` a folder of files for `/etc`. cgroups are of a version that may not be mounted here.
const SET_UP: &str = r#"
mount -t sysfs sys sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mkdir -p ".$2"
mount --bind "$2" ".$2"
ip link set lo up
[ -z "$3" ] || chroot . dpkg --force-confold --install "$3"
cp -r "$4/." etc
exec chroot . /usr/bin/env -i container=pagecopy PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=tested.target --log-target=console --log-level=info
"#;

/// What the machine comes up with. What a whole system needs beside that, it needs no more than these do.
const TARGET: &str = "[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n";

/// A machine that has been switched on.
#[derive(Debug)]
pub struct Booted {
    process: Process,
    /// Its first process.
    init: u32,
    /// Dropped when nobody is in it any more.
    _cgroup: Cgroup,
}

impl Booted {
    /// Installs `package`, puts `files` into `/etc` (the path below it, and the text), and boots. `scratch` is seen there, too.
    ///
    /// # Errors
    /// What this machine lacks for that.
    pub fn boot(
        scratch: &Scratch,
        package: &Path,
        files: &[(&str, String)],
    ) -> Result<Booted, String> {
        let systemd = Path::new("/lib/systemd/systemd");
        let kernel = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        for (is_there, what) in [
            (systemd.exists(), "systemd"),
            (has_overlay(), "overlay in this kernel"),
            (kernel.contains("\tcgroup2\n"), "cgroup2 in this kernel"),
        ] {
            if !is_there {
                return Err(format!("there is no {what} to boot a machine with"));
            }
        }
        let etc = scratch.folder("etc");
        let target = ("systemd/system/tested.target", TARGET.to_owned());
        for (path, text) in files.iter().chain([&target]) {
            let path = etc.join(path);
            fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a folder");
            fs::write(path, text).expect("a file for /etc");
        }
        let cgroup = own_cgroup(scratch)?;
        // All that it starts is in its cgroup, and this process is not.
        let script = format!(
            "echo $$ > \"$0/cgroup.procs\" && exec unshare --mount --pid --ipc --uts --net --cgroup --fork \
            --kill-child --propagation private sh -c '{}' sh \"$@\"",
            overlay_script(SET_UP).replace('\'', "'\\''")
        );
        let mut command = Command::new("sh");
        command
            .args(["-c", &script])
            .arg(&cgroup.0)
            .arg(scratch.folder("machine"))
            .arg(scratch.files());
        command.arg(package).arg(&etc);
        let log = scratch.files().join("machine.log");
        let mut process = Process::spawn("machine", &mut command, &log);
        let init = eventually(PATIENCE, || {
            if !process.is_running() {
                return Ok(Err(process.output()));
            }
            first_process(process.pid()).map(Ok)
        });
        let init = init?.unwrap_or_else(|output| panic!("it does not boot: {output}"));
        Ok(Booted {
            process,
            init,
            _cgroup: cgroup,
        })
    }

    /// A command that runs `program` in the machine, as root.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let all = [
            "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--root", "--wd",
        ];
        command
            .arg(format!("--target={}", self.init))
            .args(all)
            .arg(program);
        command
    }

    /// Runs a command of systemd's there.
    pub fn systemctl(&self, arguments: &[&str]) -> Output {
        self.command("systemctl")
            .arg("--no-pager")
            .args(arguments)
            .output()
            .expect("nsenter can be called")
    }

    /// The same, which must succeed.
    pub fn order(&self, arguments: &[&str]) {
        let output = self.systemctl(arguments);
        if !output.status.success() {
            let status = self.systemctl(&["status", "--full", "pagecopyd.service"]);
            let status = String::from_utf8_lossy(&status.stdout).into_owned();
            panic!(
                "{arguments:?}: {output:?}\n{status}\n{}",
                self.process.output()
            );
        }
    }

    /// What a property of a unit is.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let output = self.systemctl(&["show", "--value", "--property", name, unit]);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Where a path of the machine is seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// What its console has said.
    pub fn console(&self) -> String {
        self.process.output()
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        // Its first process takes all others along.
        self.process.kill();
    }
}

/// The cgroup of a machine.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = eventually(Duration::from_secs(10), || {
            remove_cgroups(&self.0).map_err(|error| error.to_string())
        });
        if let Err(error) = removed {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

/// The systemd that the child of `unshare` has become.
fn first_process(parent: u32) -> Result<u32, String> {
    let children =
        fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    let child = children
        .split_whitespace()
        .next()
        .and_then(|pid| pid.parse().ok());
    let child: u32 = child.ok_or("it has no first process yet")?;
    let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
    let is_up = Path::new(&format!("/proc/{child}/root/run/systemd/private")).exists();
    match name.trim() == "systemd" && is_up {
        true => Ok(child),
        false => Err(format!("its first process is {name}")),
    }
}

/// A cgroup of version 2 for the machine, wherever these are here.
fn own_cgroup(scratch: &Scratch) -> Result<Cgroup, String> {
    let name = scratch
        .files()
        .file_name()
        .expect("a scratch folder has a name");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut folders = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let folder = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then(|| PathBuf::from(folder))
    });
    let folder = folders
        .next()
        .ok_or("no cgroup2 is mounted here")?
        .join(name);
    fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(Cgroup(folder))
}

/// Cgroups are removed from below, and have no files that could be.
fn remove_cgroups(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}
