//! The users that daemons and QEMUs run as in tests: none of them is root, and none is made on this machine.
//!
//! A daemon looks its user up by name. `ip netns exec` gives it a mount namespace of its own, and in that one the lists of
//! users and groups are others, which hold two more lines. QEMU needs ids only.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Net, Place, Scratch, Side, Version};

/// Name of the daemon's user, and of its group.
pub const DAEMON_USER: &str = "pagecopy-test";
/// Its id, and that of its group.
pub const DAEMON_ID: u32 = 64_110;
/// Name of the user that a policy has QEMU run as.
pub(super) const QEMU_USER: &str = "pagecopy-test-qemu";
/// Id of QEMU's user.
pub const QEMU_ID: u32 = 64_111;
/// Id of the group that QEMU's monitor is open to, as a distribution's `kvm` or `libvirt` might be. The daemon is in it.
pub const MONITOR_GROUP: u32 = 64_112;

/// How a daemon is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunAs {
    /// By root, with `user` in its configuration: as in production, and in every test that does not say otherwise.
    #[default]
    User,
    /// By root, without, and in the monitor's group: root, too, has to be let in.
    Root,
    /// As the user, with the capabilities that it needs as ambient ones, as systemd does.
    Ambient,
    /// As the user, with no capability.
    Bare,
}

impl RunAs {
    /// The line that the configuration needs for this.
    pub fn configuration(self) -> String {
        match self {
            RunAs::User => format!("user = {DAEMON_USER:?}\n"),
            _ => String::new(),
        }
    }

    /// A command that runs `program` on a host in this way, with the user known to it; what it needs is put into `folder`,
    /// which is given to the user. The process has the pid of the command.
    pub fn command(self, net: &Net, side: Side, folder: &Path, program: &Path) -> Command {
        self.command_at(Place::On(net, side), folder, program)
    }

    /// The same, wherever that is.
    pub(super) fn command_at(self, place: Place<'_>, folder: &Path, program: &Path) -> Command {
        let lists = ["passwd", "group"].map(|list| list_with_user(folder, list));
        if self != RunAs::Root {
            for path in [folder.to_owned(), folder.join("state")] {
                if path.exists() {
                    chown(&path, Some(DAEMON_ID), Some(DAEMON_ID)).expect("a folder is given away");
                }
            }
        }
        let mut command = place.command("sh");
        command.args([
            "-c",
            "mount --bind \"$1\" /etc/passwd && mount --bind \"$2\" /etc/group && shift 2 && exec \"$@\"",
            "sh",
        ]);
        command.args(lists);
        let ids = [
            format!("--reuid={DAEMON_ID}"),
            format!("--regid={DAEMON_ID}"),
            format!("--groups={DAEMON_ID},{MONITOR_GROUP}"),
        ];
        match self {
            RunAs::User => {}
            RunAs::Root => {
                let groups = format!("--groups=0,{MONITOR_GROUP}");
                command.args(["setpriv", &groups]);
            }
            RunAs::Ambient => {
                let capabilities = "-all,+sys_ptrace,+dac_read_search";
                command.arg("setpriv").args(ids).args([
                    format!("--inh-caps={capabilities}"),
                    format!("--ambient-caps={capabilities}"),
                ]);
            }
            RunAs::Bare => {
                command.arg("setpriv").args(ids);
            }
        }
        command.arg(program);
        command
    }
}

/// The machine's list with one user or two groups more.
fn list_with_user(folder: &Path, list: &str) -> PathBuf {
    let mut text =
        fs::read_to_string(Path::new("/etc").join(list)).expect("a list of users or groups");
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text += &match list {
        "passwd" => {
            let user = |name: &str, id: u32| {
                format!("{name}:x:{id}:{id}::/nonexistent:/usr/sbin/nologin\n")
            };
            user(DAEMON_USER, DAEMON_ID) + &user(QEMU_USER, QEMU_ID)
        }
        _ => format!(
            "{DAEMON_USER}:x:{DAEMON_ID}:\n{DAEMON_USER}-monitor:x:{MONITOR_GROUP}:{DAEMON_USER}\n"
        ),
    };
    let path = folder.join(list);
    fs::write(&path, text).expect("a list of users or groups");
    path
}

/// Lets the monitor's group use a socket, and nobody else but its owner.
pub(super) fn open_to_group(socket: &Path) {
    chown(socket, None, Some(MONITOR_GROUP)).expect("a socket is given to a group");
    fs::set_permissions(socket, Permissions::from_mode(0o720)).expect("a socket takes a mode");
}

/// A command that runs QEMU as a user of its own, who owns `folder` and the folder for RAM, with a umask that keeps all its
/// files to itself and lets its group use its monitor.
pub(super) fn unprivileged_qemu(scratch: &Scratch, version: Version, folder: &Path) -> Command {
    let binary = version.binary();
    let place = binary.parent().expect("a program is in a folder");
    for path in [folder, scratch.ram()] {
        chown(path, Some(QEMU_ID), Some(MONITOR_GROUP)).expect("a folder is given away");
    }
    fs::set_permissions(scratch.ram(), Permissions::from_mode(0o700))
        .expect("a folder takes a mode");
    // A QEMU that was unpacked lies where root alone may look: it is shown elsewhere, in a mount namespace of its own. What
    // starts it names that place throughout.
    let shown = scratch.folder("qemu");
    let mut start = binary.clone();
    if let Ok(script) = fs::read_to_string(&binary) {
        let from = place.to_str().expect("a path in UTF-8");
        let to = shown.to_str().expect("a path in UTF-8");
        start = scratch.files().join(format!("start-{version:?}"));
        fs::write(&start, script.replace(from, to)).expect("a script");
        fs::set_permissions(&start, Permissions::from_mode(0o755)).expect("a script takes a mode");
    }
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        "mount --bind \"$1\" \"$2\" && shift 2 && umask 057 && exec \"$@\"",
        "sh",
    ]);
    command.arg(place).arg(&shown).arg("setpriv").args([
        format!("--reuid={QEMU_ID}"),
        format!("--regid={MONITOR_GROUP}"),
        "--clear-groups".to_owned(),
        "--bounding-set=-all".to_owned(),
    ]);
    command.arg(start);
    command
}
