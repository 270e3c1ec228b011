//! A host that starts QEMUs for guests that come: its policy, where they connect to, and what must be left of them.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::qemu::accept_or_timeout;
use super::user::{QEMU_ID, QEMU_USER};
use super::{PATIENCE, Qmp, Scratch, Serial, Side, Version, assert_nothing_left_in, eventually};

/// Whom a policy has QEMU run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpawnAs {
    /// Root, without any capability: a QEMU that lies where only root may look.
    Root,
    /// A user of its own.
    QemuUser,
}

/// A host with a policy. To be made before its daemon is started.
#[derive(Debug)]
pub struct SpawnHost {
    policy: PathBuf,
    state: PathBuf,
    folder: PathBuf,
    ram: PathBuf,
    serial: UnixListener,
}

impl SpawnHost {
    /// The host `side`, whose policy takes guests from the QEMU named `from` with its RAM in `ram`, as `version`.
    pub fn new(
        scratch: &Scratch,
        side: Side,
        (from, ram): (&str, &Path),
        version: Version,
        run_as: SpawnAs,
    ) -> SpawnHost {
        let name = Self::qemu(side);
        let folder = scratch.folder(&format!("qemu-{name}"));
        let here = scratch.ram().join(&name);
        fs::create_dir_all(&here).expect("a folder for RAM");
        fs::copy(super::guest_elf(), folder.join("guest.elf"))
            .expect("the guest's image is copied");
        let serial = UnixListener::bind(folder.join("serial")).expect("a unix socket to listen on");
        fs::set_permissions(folder.join("serial"), Permissions::from_mode(0o777))
            .expect("a socket takes a mode");
        let user = match run_as {
            SpawnAs::Root => "root",
            SpawnAs::QemuUser => {
                chown(&here, Some(QEMU_ID), Some(QEMU_ID)).expect("a folder is given away");
                QEMU_USER
            }
        };
        let from = scratch.files().join(format!("qemu-{from}"));
        let host = scratch.folder(side.name());
        let made = SpawnHost {
            policy: host.join("spawn.toml"),
            state: host.join("state/spawned"),
            folder,
            ram: here,
            serial,
        };
        made.write_policy(&format!(
            "user = {user:?}\n[binaries]\nqemu-system-x86_64 = {:?}\n[paths]\n{from:?} = {:?}\n\
             [memory-directories]\n{ram:?} = {:?}\n",
            version.binary(),
            made.folder,
            made.ram,
        ));
        made
    }

    /// What the folder of the QEMU that is started on `side` is called, as [`Qemu::start`](super::Qemu::start) names them.
    pub fn qemu(side: Side) -> String {
        format!("spawned-{}", side.name())
    }

    /// Replaces its policy.
    pub fn write_policy(&self, text: &str) {
        fs::write(&self.policy, text).expect("a policy");
        fs::set_permissions(&self.policy, Permissions::from_mode(0o644)).expect("a mode");
    }

    /// Its policy.
    pub fn policy(&self) -> String {
        fs::read_to_string(&self.policy).expect("a policy")
    }

    /// The folder of its QEMU's RAM files.
    pub fn ram(&self) -> &Path {
        &self.ram
    }

    /// The folder of its QEMU's files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The QEMUs that it runs.
    pub fn pids(&self) -> Vec<u32> {
        processes_with(&self.ram)
    }

    /// The guest that has come, with QEMU's monitor.
    pub fn arrived(&self) -> Spawned {
        accept_or_timeout(&self.serial);
        let pids = self.pids();
        let [pid] = pids.as_slice() else {
            panic!("not one QEMU: {pids:?}");
        };
        Spawned {
            serial: Serial::accept(&self.serial),
            socket: self.files_with("qmp").pop().expect("a monitor"),
            pid: *pid,
        }
    }

    /// The serial port of a QEMU that was started and has ended.
    pub fn serial(&self) -> Serial {
        accept_or_timeout(&self.serial);
        Serial::accept(&self.serial)
    }

    /// What there is of its QEMUs under `state-dir`.
    pub fn files_with(&self, extension: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        paths
            .filter(|path| path.extension().is_some_and(|it| it == extension))
            .collect()
    }

    /// Waits until it runs no QEMU.
    pub fn wait_ended(&self) {
        let ended = eventually(PATIENCE, || match self.pids().as_slice() {
            [] => Ok(()),
            pids => Err(format!("{pids:?}")),
        });
        assert_eq!(ended, Ok(()), "QEMU runs");
    }

    /// Waits until nothing of a QEMU is left: no process, no RAM file, no socket, no log.
    pub fn assert_nothing_left(&self) {
        let left = eventually(PATIENCE, || {
            let mut left: Vec<String> = self
                .pids()
                .iter()
                .map(|pid| format!("process {pid}"))
                .collect();
            for folder in [&self.ram, &self.state] {
                let entries = fs::read_dir(folder).into_iter().flatten().flatten();
                left.extend(entries.map(|entry| entry.path().display().to_string()));
            }
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
        if let Err(left) = left {
            panic!("left of a QEMU that was started: {left}");
        }
    }
}

impl Drop for SpawnHost {
    fn drop(&mut self) {
        for pid in self.pids() {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                // It may have ended just now.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// The processes whose command line names `path`, which no other test's does.
fn processes_with(path: &Path) -> Vec<u32> {
    let path = path.to_string_lossy().into_owned();
    let named = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|bytes| {
            let words = String::from_utf8_lossy(&bytes).into_owned();
            words.contains(&path) && words.contains("defer")
        })
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(named)
        .collect()
}

/// A guest in a QEMU that a daemon has had started.
#[derive(Debug)]
pub struct Spawned {
    /// The guest's serial port.
    pub serial: Serial,
    /// The QMP socket, which the daemon uses, too.
    pub socket: PathBuf,
    /// QEMU's process.
    pub pid: u32,
}

impl Spawned {
    /// QEMU's state, over a connection that ends with the call.
    pub fn status(&self) -> String {
        Qmp::connect(&self.socket).status()
    }

    /// Panics unless the guest runs here, whole.
    pub fn assert_runs(&self) {
        assert_eq!(self.status(), "running");
        self.serial.wait_beats(300);
        self.serial.verify();
        assert_nothing_left_in(self.pid);
    }
}
