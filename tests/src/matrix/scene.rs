//! What a cell is played on: two hosts, a guest, a QEMU that waits for it, and what they were like before.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use pagecopy::engine::MigrationId;
use pagecopy::engine::journal::{self, Record, encode};
use pagecopy::limits::MAX_NAME;
use serde_json::{Value, json};

use super::cell::{Cell, Fault, Way, role};
use super::postcopy::LINK_MBIT;
use crate::real::{
    Backing, Footprint, Held, Machine, Manner, Migration, Qemu, Role, RunAs, Scratch, Side,
    SmallFs, Steps, Trust, Version, World, certified,
};

/// Guest memory. Of it 32 MiB are the guest's to fill.
const MIB: u64 = 64;
/// Slow enough that round 0 takes about half a second, and a downtime limit that is not met before round 2 or so.
const OPTIONS: [&str; 6] = [
    "--channels",
    "2",
    "--bandwidth-limit",
    "64MB/s",
    "--downtime-limit",
    "40ms",
];
/// At least two data channels, as every post-copy needs.
const POSTCOPY_OPTIONS: [&str; 4] = ["--channels", "2", "--mode", "postcopy"];
/// How long a migration may take to come to a step, on a machine that is busy with other cells.
const COMING: Duration = Duration::from_secs(60);
/// The step at which a migration that is to go back is cancelled: the destination has loaded the guest, and the source
/// waits to hear of it.
const TURN: &str = "destination Send(Loaded) 1";
/// Blocks of the small disk: a record that does not fit the last one needs another.
const BLOCK: usize = 1024;

/// The stage and all on it. Fields are dropped in this order.
pub(super) struct Scene {
    pub(super) cell: Cell,
    pub(super) vm: String,
    /// The migration that the fault comes into.
    pub(super) migration: Migration,
    pub(super) id: String,
    pub(super) source: Qemu,
    pub(super) destination: Qemu,
    /// The file system of the destination's RAM, when that is to be full.
    pub(super) memory: Option<SmallFs>,
    /// The destination's state-dir, when that is to be full.
    pub(super) disk: Option<SmallFs>,
    pub(super) before: Before,
    pub(super) world: World,
    steps: [Steps; 2],
}

/// What things were like before the migration.
pub(super) struct Before {
    pub(super) settings: [Value; 2],
    pub(super) footprints: [Footprint; 2],
    /// Blocks of the waiting QEMU's RAM file.
    pub(super) allocated: u64,
}

pub(super) fn machine() -> Machine {
    Machine::new(Version::V10_0, MIB, "rate=6 set=12")
}

impl Scene {
    /// Sets everything up and begins the migration.
    pub(super) fn set(cell: Cell) -> Scene {
        let scratch = Scratch::new();
        let memory = (cell.fault == Fault::MemoryFull)
            .then(|| SmallFs::tmpfs(&scratch.files().join("memory"), MIB + 4));
        let disk = (cell.fault == Fault::DiskFull).then(|| {
            let state = scratch.folder(Side::B.name()).join("state");
            SmallFs::ext4(&scratch.files().join("disk"), &state)
        });
        let waiting = match &memory {
            None => machine(),
            Some(memory) => machine().with_backing(&Backing::TmpfsAt(memory.path().to_owned())),
        };
        let mut destination = Qemu::start(&scratch, "destination", &waiting, Role::Destination);
        // Half of the cells over TLS: which, is a matter of the cell, so that a replay is the same.
        let tls = cell.to_string().len().is_multiple_of(2);
        let (vm, host) = match disk {
            None => ("vm".to_owned(), "a".to_owned()),
            Some(_) => names_that_fill(destination.socket(), cell.records_before(), tls),
        };
        let steps = [Side::A, Side::B].map(|side| {
            let socket = scratch.files().join(format!("steps-{}", side.name()));
            Steps::listen(&socket, &holds(&cell, side))
        });
        let trust = if tls {
            certified(&scratch)
        } else {
            [Trust::Plaintext, Trust::Plaintext]
        };
        let manners = [(Side::A, &*host), (Side::B, Side::B.name())].map(|(side, name)| Manner {
            name: name.to_owned(),
            trust: trust[side as usize].clone(),
            steps: Some(steps[side as usize].socket().to_owned()),
            run_as: RunAs::default(),
        });
        let world = World::of(scratch, &manners);
        let mut source = world.guest("source", &machine());
        let before = Before {
            settings: [settings(&mut source), settings(&mut destination)],
            footprints: [Side::A, Side::B].map(|side| Footprint::of(world.daemon(side).pid())),
            allocated: allocated(destination.ram()),
        };
        let options = match cell.step.way {
            Way::There | Way::Back => &OPTIONS[..],
            Way::First => {
                world.net.limit(LINK_MBIT);
                &POSTCOPY_OPTIONS
            }
        };
        let migration = world.begin(Side::A, &vm, &source, &destination, options);
        let begun =
            migration.wait_event("the beginning", COMING, |event| event["event"] == "begun");
        let id = begun["id"].as_str().expect("an id").to_owned();
        Scene {
            cell,
            vm,
            migration,
            id,
            source,
            destination,
            memory,
            disk,
            before,
            world,
            steps,
        }
    }

    /// Waits until the daemon stands at the cell's step.
    pub(super) fn come_to_the_step(&self) -> Held {
        let turn = (self.cell.step.way == Way::Back).then(|| self.wait(Side::B));
        if let Some(held) = &turn {
            assert_eq!(held.step(), TURN);
            self.cancel(Side::A)
                .expect("it can be cancelled before the commit");
        }
        if self.cell.step.side == Side::B {
            turn.into_iter().for_each(Held::go);
            return self.at_the_step();
        }
        let held = self.at_the_step();
        turn.into_iter().for_each(Held::go);
        held
    }

    fn at_the_step(&self) -> Held {
        let held = self.wait(self.cell.step.side);
        assert_eq!(held.step(), self.cell.step.hold());
        held
    }

    fn wait(&self, side: Side) -> Held {
        self.steps[side as usize]
            .wait(COMING)
            .unwrap_or_else(|why| {
                let told = self.world.cli(Side::A).find(&self.id);
                panic!("{}: {why}; the source says {told:?}", role(side))
            })
    }

    /// Has the operator of `side` cancel.
    ///
    /// # Errors
    /// The daemon's words.
    pub(super) fn cancel(&self, side: Side) -> Result<(), String> {
        let output = self.world.cli(side).run(&["cancel", &self.id]);
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn holds(cell: &Cell, side: Side) -> Vec<String> {
    let turn = (cell.step.way == Way::Back && side == Side::B).then(|| TURN.to_owned());
    let target = (cell.step.side == side).then(|| cell.step.hold());
    turn.into_iter().chain(target).collect()
}

/// Names of the guest and of the source's host so long that in the destination's journal the first record after `taken`
/// others begins a block that a full disk does not have.
fn names_that_fill(qmp: &Path, taken: usize, tls: bool) -> (String, String) {
    let records = [Record::Committed, Record::Running, Record::Closed];
    let lengths: Vec<usize> = records.iter().map(|record| encode(record).len()).collect();
    let room = lengths[..taken].iter().sum::<usize>() + lengths[taken] / 2;
    // The id is written as 16 numbers, with 41 digits on average.
    let id = std::array::from_fn(|at| if at < 9 { 200 } else { 50 });
    let begun = |vm: &str, host: &str| {
        encode(&Record::Begun {
            id: MigrationId(id),
            side: journal::Side::Destination,
            vm: vm.to_owned(),
            qmp: qmp.display().to_string(),
            peer: format!("{host} (10.77.0.1:40000)"),
            names: tls.then(|| Side::A.name().to_owned()).into_iter().collect(),
        })
        .len()
    };
    // JSON writes a quotation mark as two bytes.
    let vm = "\"".repeat(MAX_NAME);
    let missing = BLOCK - room - begun(&vm, "");
    let host = "\"".repeat(missing / 2) + &"a".repeat(missing % 2);
    assert_eq!(begun(&vm, &host), BLOCK - room);
    (vm, host)
}

/// QEMU's migration capabilities and parameters.
pub(super) fn settings(qemu: &mut Qemu) -> Value {
    let mut all = BTreeMap::new();
    for command in ["query-migrate-capabilities", "query-migrate-parameters"] {
        let answer = qemu.qmp.execute(command, json!({}));
        all.insert(command, answer.expect("QEMU tells its settings"));
    }
    json!(all)
}

/// Blocks of 512 bytes that a file has.
pub(super) fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).map_or(0, |metadata| metadata.blocks())
}
