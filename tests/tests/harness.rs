//! The tests' own tools, proved without the daemon: the guest survives QEMU's own migration, and notices what it must.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::json;
use tests::real::{
    Backing, Hugepages, Machine, Qemu, Role, Scratch, Version, outside_downtime, skipped,
};

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// Moves a guest by QEMU itself over a unix socket: the guest must find nothing wrong, and the downtime be measured.
fn qemu_moves_it(version: Version, vcpus: u32) {
    let scratch = Scratch::new();
    let mut machine = Machine::new(version, 256, &format!("rate=50 set=64 cpus={vcpus}"));
    machine.vcpus = vcpus;
    let mut source = Qemu::start(&scratch, "source", &machine, Role::Source);
    let mut destination = Qemu::start(&scratch, "destination", &machine, Role::Destination);
    source.serial.wait_filled();

    let uri = format!("unix:{}", scratch.files().join("migration").display());
    source.qmp.capabilities(&["events"]);
    destination.qmp.capabilities(&["events"]);
    destination
        .qmp
        .execute("migrate-incoming", json!({"uri": uri}))
        .unwrap();
    source
        .qmp
        .execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 1_u64 << 40}),
        )
        .unwrap();
    source.qmp.execute("migrate", json!({"uri": uri})).unwrap();
    source
        .qmp
        .wait_event("MIGRATION", Duration::from_secs(60), |data| {
            data["status"] == "completed"
        });
    destination
        .qmp
        .wait_event("MIGRATION", Duration::from_secs(60), |data| {
            data["status"] == "completed"
        });
    destination.qmp.execute("cont", json!({})).unwrap();

    tests::real::assert_moved(&mut source, &mut destination);
    let downtime = outside_downtime(&source.serial, &destination.serial);
    assert!(downtime < Duration::from_secs(5), "{downtime:?}");
}

#[test]
fn guest_survives_qemu_7_2() {
    qemu_moves_it(Version::V7_2, 1);
}

#[test]
fn guest_with_two_cpus_survives_qemu_10_0() {
    qemu_moves_it(Version::V10_0, 2);
}

/// Writes into the guest's memory behind its back and returns whether it noticed.
fn noticed(guest: &str, spoil: impl Fn(&File)) -> bool {
    let scratch = Scratch::new();
    let machine = Machine::new(Version::V7_2, 64, guest);
    let qemu = Qemu::start(&scratch, "spoiled", &machine, Role::Source);
    qemu.serial.wait_filled();
    qemu.serial.wait_beats(300);
    let ram = File::options()
        .read(true)
        .write(true)
        .open(qemu.ram())
        .unwrap();
    spoil(&ram);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| qemu.serial.verify())).is_err()
}

#[test]
fn guest_notices_a_wrong_word() {
    // Word 5 of a page in the middle of the region: one of those that never change.
    assert!(noticed("rate=0", |ram| ram
        .write_all_at(&[0xde, 0xad, 0xbe, 0xef], 32 * MIB + 20)
        .unwrap()));
}

#[test]
fn guest_notices_a_lost_page() {
    assert!(noticed("rate=20 set=8", |ram| ram
        .write_all_at(&[0; PAGE], 40 * MIB)
        .unwrap()));
}

#[test]
fn guest_notices_two_pages_exchanged() {
    assert!(noticed("rate=0", |ram| {
        let mut pages = [[0; PAGE]; 2];
        ram.read_exact_at(&mut pages[0], 20 * MIB).unwrap();
        ram.read_exact_at(&mut pages[1], 21 * MIB).unwrap();
        ram.write_all_at(&pages[0], 21 * MIB).unwrap();
        ram.write_all_at(&pages[1], 20 * MIB).unwrap();
    }));
}

#[test]
fn guest_notices_an_old_page() {
    // Every page of the working set is set back to what it held when it was filled.
    assert!(noticed("rate=20 set=1 fill=zero", |ram| {
        ram.write_all_at(&vec![0; 1 << 20], 16 * MIB).unwrap();
    }));
}

#[test]
fn guest_notices_its_table_set_back() {
    // The generations at 4 MiB and the pages at 16 MiB go back together, so that each page agrees with its generation.
    assert!(noticed("rate=20 set=1 fill=zero", |ram| {
        ram.write_all_at(&vec![0; 1 << 20], 4 * MIB).unwrap();
        ram.write_all_at(&vec![0; 1 << 20], 16 * MIB).unwrap();
    }));
}

#[test]
fn guest_finds_nothing_wrong_when_nothing_is() {
    assert!(!noticed("rate=50 set=16", |_| {}));
}

/// Each page that the guest dirties or checks is timed once; what was told is counted anew.
#[test]
fn guest_times_its_touches_of_pages() {
    let scratch = Scratch::new();
    let machine = Machine::new(Version::V10_0, 64, "rate=10 set=16 sweep=1 cpus=1");
    let source = Qemu::start(&scratch, "source", &machine, Role::Source);
    source.serial.wait_filled();
    source.serial.touches();
    source.serial.wait_beats(1000);
    let touches = source.serial.touches();
    // 2441 pages are dirtied a second and 1000 checked, unless the machine is busy.
    assert!((500..20_000).contains(&touches.count()), "{touches:?}");
    let (half, all) = (touches.quantile_us(0.5), touches.quantile_us(1.0));
    assert!(half > 0.0 && half <= all, "{touches:?}");
    assert!(half < 1000.0, "memory that is here: {touches:?}");
}

#[test]
fn huge_pages_are_given_back() {
    const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let scratch = Scratch::new();
    let hugepages = match Hugepages::reserve(32, &scratch.files().join("huge")) {
        Ok(hugepages) => hugepages,
        Err(reason) => return skipped(&reason),
    };
    let backing = Backing::Hugetlbfs(hugepages.mount().to_owned());
    let machine = Machine::new(Version::V7_2, 64, "rate=20 set=8").with_backing(&backing);
    let qemu = Qemu::start(&scratch, "huge", &machine, Role::Source);
    qemu.serial.wait_filled();
    qemu.serial.verify();
    let reserved: u64 = std::fs::read_to_string(COUNT)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    drop(qemu);
    std::fs::remove_file(hugepages.mount().join("huge-ram0")).unwrap();
    drop(hugepages);
    let after: u64 = std::fs::read_to_string(COUNT)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert_eq!(after + 32, reserved);
}
