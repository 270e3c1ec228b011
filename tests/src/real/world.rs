//! Two hosts with a daemon each, and what must hold after a migration between them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{
    Certs, Cli, Daemon, Machine, Manner, Migration, Net, Outcome, PATIENCE, Qemu, Role, RunAs,
    Scratch, Side, Trust, assert_nothing_left_in, eventually, outside_downtime,
};

/// Two hosts.
#[derive(Debug)]
pub struct World {
    daemons: [Daemon; 2],
    /// The link between them.
    pub net: Net,
    /// Folders that go away last.
    pub scratch: Scratch,
}

impl World {
    /// Two hosts that trust each other by certificates.
    pub fn tls() -> World {
        Self::tls_as(RunAs::User)
    }

    /// The same, with daemons that are started in another way.
    pub fn tls_as(run_as: RunAs) -> World {
        Self::tls_in(Scratch::new(), run_as)
    }

    /// The same, in folders where something is already.
    pub fn tls_in(scratch: Scratch, run_as: RunAs) -> World {
        let [a, b] = certified(&scratch);
        Self::with_as(scratch, &a, &b, run_as)
    }

    /// Two hosts that talk in the clear.
    pub fn plain() -> World {
        Self::with(Scratch::new(), &Trust::Plaintext, &Trust::Plaintext)
    }

    /// Two hosts that trust each other as given.
    pub fn with(scratch: Scratch, a: &Trust, b: &Trust) -> World {
        Self::with_as(scratch, a, b, RunAs::User)
    }

    fn with_as(scratch: Scratch, a: &Trust, b: &Trust, run_as: RunAs) -> World {
        let manners = [manner(Side::A, a, run_as), manner(Side::B, b, run_as)];
        Self::of(scratch, &manners)
    }

    /// Two hosts that trust each other as given, on this link.
    pub fn on(net: Net, scratch: Scratch, [a, b]: &[Trust; 2]) -> World {
        let manners = [
            manner(Side::A, a, RunAs::User),
            manner(Side::B, b, RunAs::User),
        ];
        Self::joined(net, scratch, &manners)
    }

    /// Two hosts whose daemons are of these manners.
    pub fn of(scratch: Scratch, manners: &[Manner; 2]) -> World {
        Self::joined(Net::new(), scratch, manners)
    }

    fn joined(net: Net, scratch: Scratch, manners: &[Manner; 2]) -> World {
        let start = |side: Side| {
            let folder = scratch.folder(side.name());
            Daemon::start(&net, side, &folder, &manners[side as usize])
        };
        let daemons = [start(Side::A), start(Side::B)];
        World {
            daemons,
            net,
            scratch,
        }
    }

    /// Has the daemons of these hosts allow RDMA over these networks, in the clear; they are started again.
    pub fn allow_rdma(&mut self, sides: &[Side], networks: &[&str]) {
        for side in sides {
            let config = self.daemon(*side).config().to_owned();
            let table = format!("[rdma]\nallow-plaintext = true\nnetworks = {networks:?}\n");
            let text = std::fs::read_to_string(&config).expect("the configuration can be read");
            std::fs::write(&config, text + &table).expect("the configuration can be written");
            self.restart(*side);
        }
    }

    /// A host's daemon.
    pub fn daemon(&self, side: Side) -> &Daemon {
        &self.daemons[side as usize]
    }

    /// A host's daemon.
    pub fn daemon_mut(&mut self, side: Side) -> &mut Daemon {
        &mut self.daemons[side as usize]
    }

    /// Starts a host's daemon again.
    pub fn restart(&mut self, side: Side) {
        self.daemons[side as usize].restart(&self.net);
    }

    /// A host's command line.
    pub fn cli(&self, side: Side) -> Cli {
        Cli::of(self.daemon(side))
    }

    /// Starts a QEMU that runs the guest, and waits until its memory is filled.
    pub fn guest(&self, name: &str, machine: &Machine) -> Qemu {
        let qemu = Qemu::start(&self.scratch, name, machine, Role::Source);
        qemu.serial.wait_filled();
        qemu
    }

    /// Starts a QEMU that waits for a guest.
    pub fn waiting(&self, name: &str, machine: &Machine) -> Qemu {
        Qemu::start(&self.scratch, name, machine, Role::Destination)
    }

    /// Begins to move `vm` from one host to the other.
    pub fn begin(
        &self,
        from: Side,
        vm: &str,
        source: &Qemu,
        destination: &Qemu,
        options: &[&str],
    ) -> Migration {
        self.cli(from.other())
            .receive(vm, destination.socket())
            .expect("the destination takes the guest");
        self.cli(from).migrate(vm, source, from.other(), options)
    }

    /// Moves `vm` from one host to the other and waits for the end.
    pub fn migrate(
        &self,
        from: Side,
        vm: &str,
        source: &Qemu,
        destination: &Qemu,
        options: &[&str],
    ) -> Outcome {
        self.begin(from, vm, source, destination, options).finish()
    }

    /// Moves a guest from A to B and checks all that must hold.
    pub fn move_and_check(&self, machine: &Machine, options: &[&str]) -> Moved {
        let mut source = self.guest("source", machine);
        let mut destination = self.waiting("destination", machine);
        let outcome = self.migrate(Side::A, "vm", &source, &destination, options);
        outcome.completed();
        assert_moved(&mut source, &mut destination);
        report(&outcome, &source, &destination);
        Moved {
            source,
            destination,
            outcome,
        }
    }

    /// The next attempt after one that failed: it must succeed. The destination may need a moment to notice that the
    /// attempt before is over; it says so until then.
    pub fn moves_next(&self, from: Side, vm: &str, source: &mut Qemu, destination: &mut Qemu) {
        eventually(PATIENCE, || {
            self.cli(from.other()).receive(vm, destination.socket())
        })
        .unwrap_or_else(|refusal| {
            panic!("the destination does not take a second attempt: {refusal}")
        });
        self.cli(from)
            .migrate(vm, source, from.other(), &[])
            .finish()
            .completed();
        assert_moved(source, destination);
    }

    /// Has a host keep so many percent of its free memory beside each guest that arrives.
    pub fn keep_free(&self, side: Side, percent: u64) {
        let memory = std::fs::read_to_string("/proc/meminfo").expect("figures of the memory");
        let free = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .expect("how much is free");
        let daemon = self.daemon(side);
        let text = std::fs::read_to_string(daemon.config()).expect("a configuration");
        let margin = format!("{}KiB", free / 100 * percent);
        std::fs::write(daemon.config(), text.replace("64MiB", &margin)).expect("a configuration");
        daemon.signal(Signal::HUP);
        daemon.assert_logs(&["reloaded", "memory-margin"]);
    }

    /// The folder with a host's configuration and state.
    pub fn folder(&self, side: Side) -> PathBuf {
        self.scratch.files().join(side.name())
    }
}

/// The daemon of a host that the tests know by its letter.
fn manner(side: Side, trust: &Trust, run_as: RunAs) -> Manner {
    Manner {
        name: side.name().to_owned(),
        trust: trust.clone(),
        steps: None,
        run_as,
    }
}

/// How two hosts trust each other by certificates, made in `scratch`.
pub fn certified(scratch: &Scratch) -> [Trust; 2] {
    let certs = Certs::new(scratch.files(), "authority");
    [Side::A, Side::B].map(|side| {
        Trust::Tls(
            certs.identity(side.name()),
            vec![side.other().name().to_owned()],
        )
    })
}

/// A guest that was moved, with both QEMUs.
#[derive(Debug)]
pub struct Moved {
    /// Where it was.
    pub source: Qemu,
    /// Where it is.
    pub destination: Qemu,
    /// What the command line said.
    pub outcome: Outcome,
}

/// Prints both measures of the downtime, ours and the one from outside.
fn report(outcome: &Outcome, source: &Qemu, destination: &Qemu) {
    let last = outcome.finished();
    println!(
        "downtime {} ms by our own measure, {:.1} ms from outside; total {} ms, {} rounds, {} pages sent, attach {} us",
        last["downtime_ms"],
        outside_downtime(&source.serial, &destination.serial).as_secs_f64() * 1e3,
        last["total_ms"],
        last["rounds"],
        last["pages_sent"],
        last["attach_stop_us"],
    );
}

/// Panics unless the guest runs at the destination only, whole, and nothing is left at the source.
pub fn assert_moved(source: &mut Qemu, destination: &mut Qemu) {
    assert_eq!(destination.qmp.status(), "running", "at the destination");
    destination.serial.wait_beats(300);
    let beats = source.serial.beats();
    assert_arrived(destination);
    let (_, last) = source.serial.last_beat().expect("the source has beaten");
    let (_, first) = destination
        .serial
        .first_beat()
        .expect("the destination has beaten");
    assert_follows(last, first);
    assert_left(source, beats);
}

/// Panics unless the guest runs here, whole, and nothing is left in its QEMU.
pub fn assert_arrived(destination: &mut Qemu) {
    assert_eq!(destination.qmp.status(), "running", "at the destination");
    destination.serial.verify();
    assert_nothing_left_in(destination.pid());
}

/// Panics unless the guest has gone from here, whole, and nothing is left in its QEMU; `beats` were counted here when it
/// ran at the destination already.
pub fn assert_left(source: &mut Qemu, beats: usize) {
    assert_eq!(source.qmp.status(), "postmigrate", "at the source");
    assert_eq!(
        source.serial.beats(),
        beats,
        "the source went on after the destination ran"
    );
    source.serial.assert_whole();
    assert_nothing_left_in(source.pid());
}

/// The guest counts its beats: panics unless the first one at the destination follows the last one at the source, up to a
/// beat that was lost in a serial port that was busy when QEMU stopped.
pub fn assert_follows(last: u8, first: u8) {
    let step = (128 + first - last) % 128;
    assert!(
        (1..=20).contains(&step),
        "beat {last} at the source is followed by {first} at the destination"
    );
}

/// How long a guest that stays may have stood still. In the emulated machine of `scripts/vm`, where seconds say something
/// about the host and little about us, it has only to run on.
fn standstill() -> Duration {
    if std::env::var_os("PAGECOPY_VM").is_some() {
        PATIENCE
    } else {
        Duration::from_millis(500)
    }
}

/// Panics unless the guest runs at the source only, whole and never stopped for long since `from`, and nothing is left
/// in its QEMU.
pub fn assert_stayed(source: &mut Qemu, destination: Option<&mut Qemu>, from: Instant) {
    assert_eq!(source.qmp.status(), "running", "at the source");
    source.serial.wait_beats(300);
    let gap = source.serial.longest_gap(from);
    assert!(gap < standstill(), "the guest stood still for {gap:?}");
    source.serial.verify();
    assert_nothing_left_in(source.pid());
    if let Some(destination) = destination {
        assert_eq!(destination.serial.beats(), 0, "a second guest ran");
        if destination.is_running() {
            assert_nothing_left_in(destination.pid());
            assert_ne!(destination.qmp.status(), "running", "at the destination");
        }
    }
}
