//! A QEMU with the whole guest in it, on one of the two hosts.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::net::{Net, Side};
use super::super::qemu::{Role, Version, accept_or_die};
use super::super::user::open_to_group;
use super::super::{Process, Qmp, Scratch};
use super::switch::{GUEST, Switch};

/// Size of its memory in MiB; what it boots from takes a third of it.
const MIB: u32 = 384;
/// No time for what an emulation does not need: mitigations, calibrating clocks, testing ciphers.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check audit=0 \
    apparmor=0 random.trust_cpu=on cryptomgr.notests=1 initcall_blacklist=crypto_kdf108_init,jent_mod_init";

/// A running QEMU with the guest, or one that waits for it.
#[derive(Debug)]
pub struct LinuxGuest {
    /// The test's own monitor.
    pub qmp: Qmp,
    process: Process,
    socket: PathBuf,
}

/// How the guest is, as it says itself.
#[derive(Clone, Copy, Debug)]
pub struct LinuxState {
    /// Its monotonic clock: seconds since it booted.
    pub uptime: f64,
    /// Its clock: seconds since 1970.
    pub clock: u64,
    /// Passes of fio over the first and the second disk.
    pub passes: [u64; 2],
}

impl LinuxGuest {
    /// Its card.
    pub const MAC: &str = "52:54:00:70:61:67";

    /// Starts it on a host, under a name unique in `scratch`. Its disks are files in `scratch`, the same for all QEMUs:
    /// the first on virtio-blk through the host's page cache, the second on virtio-scsi past it, by io_uring.
    pub fn start(scratch: &Scratch, net: &Net, side: Side, name: &str, role: Role) -> LinuxGuest {
        let folder = scratch.folder(&format!("linux-{name}"));
        let monitor = folder.join("test.qmp");
        let listener = UnixListener::bind(&monitor).expect("a unix socket to listen on");
        std::fs::set_permissions(&monitor, std::fs::Permissions::from_mode(0o777))
            .expect("a socket takes a mode");
        let socket = folder.join("qmp");
        let mut command = net.command(side, Version::V10_0.binary());
        command.args(machine(scratch, name));
        command.args([
            "-serial",
            &format!("file:{}", folder.join("console").display()),
        ]);
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", socket.display()),
            "-chardev",
            &format!("socket,id=test,path={},server=off", monitor.display()),
            "-mon",
            "chardev=test,mode=control",
        ]);
        if role == Role::Destination {
            command.args(["-S", "-incoming", "defer"]);
        }
        let name = format!("QEMU {name}");
        let mut process = Process::spawn(&name, &mut command, &folder.join("log"));
        accept_or_die(&listener, &mut process);
        let qmp = Qmp::accept(&listener);
        open_to_group(&socket);
        LinuxGuest {
            qmp,
            process,
            socket,
        }
    }

    /// The QMP socket for the daemon.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

impl LinuxState {
    /// Asks the guest.
    ///
    /// # Errors
    /// It does not answer, or something is wrong with its disks.
    pub fn of(switch: &Switch) -> Result<LinuxState, String> {
        if let Ok(failed) = switch.get("/failed") {
            panic!("fio has found a block that is not as it was written: {failed}");
        }
        let text = switch.get("/cgi-bin/state")?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let [uptime, clock, first, second] = words[..] else {
            return Err(format!("no state of a guest: {text:?}"));
        };
        let number = |word: &str| word.parse().map_err(|_| format!("no number: {word:?}"));
        Ok(LinuxState {
            uptime: uptime.parse().map_err(|_| format!("no time: {uptime:?}"))?,
            clock: number(clock)?,
            passes: [number(first)?, number(second)?],
        })
    }
}

/// The machine's arguments, the same on both hosts but for the RAM file.
fn machine(scratch: &Scratch, name: &str) -> Vec<String> {
    let [kernel, initramfs] = image();
    let disk = |id: &str, options: &str| {
        let path = scratch.files().join(format!("{id}.img"));
        if !path.exists() {
            let file = std::fs::File::create(&path).expect("a file for a disk");
            file.set_len(32 << 20).expect("a file takes a size");
        }
        // QEMU's locks stay on: two that write the same disk would be an error.
        format!(
            "driver=raw,node-name={id},{options}file.driver=file,file.filename={}",
            path.display()
        )
    };
    let ram = scratch.ram().join(format!("linux-{name}"));
    let words = [
        "-accel",
        "tcg,thread=multi",
        "-machine",
        "q35,memory-backend=ram0",
        "-cpu",
        "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16",
        "-smp",
        "2",
        "-m",
        &format!("{MIB}M"),
        "-object",
        &format!(
            "memory-backend-file,id=ram0,size={MIB}M,mem-path={},share=on",
            ram.display()
        ),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-blockdev",
        &disk("cached", ""),
        "-device",
        "virtio-blk-pci,drive=cached",
        "-blockdev",
        &disk(
            "direct",
            "cache.direct=on,file.cache.direct=on,file.aio=io_uring,",
        ),
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,drive=direct",
        "-netdev",
        "tap,id=net,ifname=tap0,script=no,downscript=no",
        "-device",
        &format!("virtio-net-pci,netdev=net,mac={}", LinuxGuest::MAC),
        "-kernel",
        &kernel,
        "-initrd",
        &initramfs,
        "-append",
        &format!("{PARAMETERS} address={GUEST}/24"),
    ];
    words.map(str::to_owned).to_vec()
}

/// The kernel and the initramfs, as `scripts/guest` says; made if need be.
fn image() -> [String; 2] {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest");
    let output = Command::new(&script)
        .output()
        .expect("scripts/guest can be called");
    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = said.lines().collect();
    let [kernel, initramfs] = lines[..] else {
        panic!("scripts/guest: {}", String::from_utf8_lossy(&output.stderr));
    };
    [kernel.to_owned(), initramfs.to_owned()]
}
