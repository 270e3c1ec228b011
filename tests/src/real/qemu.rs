//! A stock QEMU with the test guest in it, started the way that a user would start one that can be moved.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::user::{open_to_group, unprivileged_qemu};
use super::{PATIENCE, Process, Qmp, Scratch, Serial, guest_elf};

/// A QEMU release that the tests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's.
    V7_2,
    /// From Debian 12's backports.
    V10_0,
}

impl Version {
    /// Where it is, as `scripts/qemu` says; fetched if need be.
    pub fn binary(self) -> PathBuf {
        let (name, variable) = match self {
            Version::V7_2 => ("7.2", "PAGECOPY_QEMU_7_2"),
            Version::V10_0 => ("10.0", "PAGECOPY_QEMU_10_0"),
        };
        if let Some(path) = std::env::var_os(variable) {
            return path.into();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/qemu");
        let output = Command::new(&script)
            .arg(name)
            .output()
            .expect("scripts/qemu can be called");
        assert!(
            output.status.success(),
            "scripts/qemu {name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    }
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's emulation.
    Tcg,
    /// The kernel, with the CPU's help; see [`hardware_kvm`](super::hardware_kvm).
    Kvm,
}

/// What one memory back end is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// `memory-backend-file,share=on` on tmpfs.
    Tmpfs,
    /// `memory-backend-file,share=on` on this other tmpfs.
    TmpfsAt(PathBuf),
    /// `memory-backend-file,share=on` on this hugetlbfs.
    Hugetlbfs(PathBuf),
    /// `memory-backend-memfd,share=on`.
    Memfd,
    /// `memory-backend-ram`.
    Anonymous,
    /// `memory-backend-file,share=off`.
    FilePrivate,
}

/// One memory back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ram {
    /// Its id.
    pub id: String,
    /// Its size in MiB.
    pub mib: u64,
    /// What it is made of.
    pub backing: Backing,
}

/// A machine to start. The same on both sides, unless a test wants a difference.
#[derive(Clone, Debug)]
pub struct Machine {
    /// QEMU's release.
    pub version: Version,
    /// What runs the guest's code.
    pub accel: Accel,
    /// `-machine` type.
    pub machine: String,
    /// Memory back ends; two or more become NUMA nodes.
    pub ram: Vec<Ram>,
    /// `prealloc=on`: QEMU allocates all of it before it does anything else.
    pub prealloc: bool,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// `-sandbox on`.
    pub sandbox: bool,
    /// The guest's command line.
    pub guest: String,
    /// More of QEMU's arguments.
    pub extra: Vec<String>,
}

impl Machine {
    /// A q35 machine with one vCPU and `mib` of shared RAM on tmpfs, all but the first and the last 16 MiB of it the
    /// guest's to fill, dirtied as `guest` says (see `tests/guest/guest.c`).
    pub fn new(version: Version, mib: u64, guest: &str) -> Machine {
        Machine {
            version,
            accel: Accel::Tcg,
            machine: "q35".to_owned(),
            ram: vec![Ram {
                id: "ram0".to_owned(),
                mib,
                backing: Backing::Tmpfs,
            }],
            prealloc: false,
            vcpus: 1,
            sandbox: false,
            guest: format!("mem=16..{} {guest}", mib - 16),
            extra: Vec::new(),
        }
    }

    /// The same with this backing for all RAM.
    #[must_use]
    pub fn with_backing(mut self, backing: &Backing) -> Machine {
        for ram in &mut self.ram {
            ram.backing = backing.clone();
        }
        self
    }

    fn arguments(&self, role: Role, name: &str, ram: &Path, elf: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        add(&[
            "-accel",
            match self.accel {
                Accel::Tcg => "tcg",
                Accel::Kvm => "kvm",
            },
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-smp",
            &self.vcpus.to_string(),
        ]);
        for block in &self.ram {
            let mut object = block.object(name, ram);
            if self.prealloc {
                object.push_str(",prealloc=on");
            }
            add(&["-object", &object]);
        }
        let total: u64 = self.ram.iter().map(|block| block.mib).sum();
        add(&["-m", &format!("{total}M")]);
        if let [only] = self.ram.as_slice() {
            add(&[
                "-machine",
                &format!("{},memory-backend={}", self.machine, only.id),
            ]);
        } else {
            add(&["-machine", &self.machine]);
            for block in &self.ram {
                add(&["-numa", &format!("node,memdev={}", block.id)]);
            }
        }
        if self.sandbox {
            add(&["-sandbox", "on"]);
        }
        match role {
            Role::Source => {}
            Role::Destination => add(&["-S", "-incoming", "defer"]),
            Role::EagerDestination => add(&["-incoming", "defer"]),
        }
        let elf = elf.to_str().expect("a path in UTF-8");
        add(&["-kernel", elf, "-append", &self.guest]);
        arguments.extend(self.extra.iter().map(OsString::from));
        arguments
    }
}

impl Ram {
    fn object(&self, name: &str, folder: &Path) -> String {
        let (id, mib) = (&self.id, self.mib);
        let file = |folder: &Path, share: &str| {
            let path = folder.join(format!("{name}-{id}"));
            format!(
                "memory-backend-file,id={id},size={mib}M,mem-path={},share={share}",
                path.display()
            )
        };
        match &self.backing {
            Backing::Tmpfs => file(folder, "on"),
            Backing::TmpfsAt(mount) | Backing::Hugetlbfs(mount) => file(mount, "on"),
            Backing::FilePrivate => file(folder, "off"),
            Backing::Memfd => format!("memory-backend-memfd,id={id},size={mib}M,share=on"),
            Backing::Anonymous => format!("memory-backend-ram,id={id},size={mib}M"),
        }
    }
}

/// What a QEMU is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It runs the guest.
    Source,
    /// It waits for one, and will stay paused when it has it: `-S -incoming defer`.
    Destination,
    /// As `Destination`, without `-S`: it would run the guest by itself.
    EagerDestination,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    /// The guest's serial port.
    pub serial: Serial,
    /// The test's own monitor.
    pub qmp: Qmp,
    process: Process,
    socket: PathBuf,
    ram: PathBuf,
}

impl Qemu {
    /// Starts `machine` under `name`, unique in `scratch`.
    pub fn start(scratch: &Scratch, name: &str, machine: &Machine, role: Role) -> Qemu {
        Self::start_with(
            scratch,
            name,
            machine,
            role,
            Command::new(machine.version.binary()),
        )
    }

    /// The same as a user of its own, who owns the folder for RAM, and lets no other user read its files.
    pub fn start_unprivileged(
        scratch: &Scratch,
        name: &str,
        machine: &Machine,
        role: Role,
    ) -> Qemu {
        let folder = scratch.folder(&format!("qemu-{name}"));
        let command = unprivileged_qemu(scratch, machine.version, &folder);
        Self::start_with(scratch, name, machine, role, command)
    }

    /// The same with a command that runs QEMU in some other place, such as a network namespace.
    pub fn start_with(
        scratch: &Scratch,
        name: &str,
        machine: &Machine,
        role: Role,
        mut command: Command,
    ) -> Qemu {
        let folder = scratch.folder(&format!("qemu-{name}"));
        let at = |file: &str| folder.join(file);
        // QEMU connects to the test, so that the test has not to wait until QEMU listens.
        let listen = |path: &Path| {
            let listener = UnixListener::bind(path).expect("a unix socket to listen on");
            fs::set_permissions(path, Permissions::from_mode(0o777))
                .expect("a socket takes a mode");
            listener
        };
        let (monitor, serial) = (listen(&at("test.qmp")), listen(&at("serial")));
        let connect =
            |id: &str, file: &str| format!("socket,id={id},path={},server=off", at(file).display());
        let guest = at("guest.elf");
        fs::copy(guest_elf(), &guest).expect("the guest's image is copied");
        command.args(machine.arguments(role, name, scratch.ram(), &guest));
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", at("qmp").display()),
        ]);
        command.args([
            "-chardev",
            &connect("test", "test.qmp"),
            "-mon",
            "chardev=test,mode=control",
        ]);
        command.args([
            "-chardev",
            &connect("com1", "serial"),
            "-serial",
            "chardev:com1",
        ]);
        let mut process = Process::spawn(&format!("QEMU {name}"), &mut command, &at("log"));
        accept_or_die(&monitor, &mut process);
        let qmp = Qmp::accept(&monitor);
        // The daemon is not root: its user is let in by a group.
        open_to_group(&at("qmp"));
        let folder = match &machine.ram[0].backing {
            Backing::TmpfsAt(mount) => mount,
            _ => scratch.ram(),
        };
        let ram = folder.join(format!("{name}-{}", machine.ram[0].id));
        Qemu {
            serial: Serial::accept(&serial),
            qmp,
            process,
            socket: at("qmp"),
            ram,
        }
    }

    /// The QMP socket for the daemon.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file of the first memory back end, if it is one on tmpfs.
    pub fn ram(&self) -> &Path {
        &self.ram
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether QEMU still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits until QEMU has ended by itself.
    pub fn wait_end(&mut self) {
        assert!(self.process.wait(PATIENCE).is_some(), "QEMU has not ended");
    }

    /// Sends SIGKILL to QEMU.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// Waits until a QEMU that is no child of the test has connected.
pub(super) fn accept_or_timeout(listener: &UnixListener) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec::try_from(PATIENCE).expect("a short time");
    let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit));
    assert_eq!(ready, Ok(1), "no QEMU connects");
}

/// Waits until QEMU has connected, and fails at once with its words if it ends instead.
pub(super) fn accept_or_die(listener: &UnixListener, process: &mut Process) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let slice = Timespec::try_from(Duration::from_millis(200)).expect("a short time");
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&slice)).unwrap_or(0);
        if ready > 0 {
            return;
        }
        assert!(process.is_running(), "QEMU ended: {}", process.output());
        assert!(
            std::time::Instant::now() < deadline,
            "QEMU does not connect: {}",
            process.output()
        );
    }
}
