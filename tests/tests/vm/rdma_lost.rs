//! Guests over RDMA of which the link is cut or the devices are taken away, and come back: on a kernel whose devices may be in
//! network namespaces, one at each host's end of a link of its own.

use std::time::Instant;

use tests::real::{Migration, Side, Version, World, assert_moved, skipped};

use super::rdma::{assert_none_registered, assert_went_over, notice, postcopy_under_way};
use super::{receive, small};

const BOTH: [Side; 2] = [Side::A, Side::B];

/// How RDMA is lost, and comes back.
#[derive(Clone, Copy)]
enum Loss {
    /// The cables are pulled: the devices stay, and nothing that they send arrives.
    Cables,
    /// The devices go away; others come in their place.
    Devices,
}

impl Loss {
    fn begin(self, world: &World) {
        match self {
            Loss::Cables => world.net.cut_rail(),
            Loss::Devices => {
                for side in BOTH {
                    world.net.unplug(side).unwrap();
                }
            }
        }
    }

    fn end(self, world: &World) {
        match self {
            Loss::Cables => world.net.mend_rail(),
            Loss::Devices => {
                for side in BOTH {
                    world.net.plug_in(side).unwrap();
                }
            }
        }
    }
}

/// Two hosts with an RDMA device each on a link of its own, beside the one for TCP.
fn in_namespaces() -> Option<World> {
    let mut world = World::tls();
    if let Err(reason) = world.net.add_rail() {
        skipped(&reason);
        return None;
    }
    world.allow_rdma(&BOTH, &["10.78.0.0/24"]);
    Some(world)
}

/// Takes RDMA away, and gives it back when pages go over TCP.
fn lost_and_found(world: &World, migration: &Migration, loss: Loss) {
    let lost = Instant::now();
    loss.begin(world);
    notice(migration, "RDMA broke, pages go over TCP");
    println!("over TCP {:?} after that", lost.elapsed());
    loss.end(world);
    let found = Instant::now();
    notice(migration, "RDMA is there again");
    println!("over RDMA {:?} after it came back", found.elapsed());
}

/// In a round: none begins anew.
fn in_a_round(loss: Loss) {
    let Some(world) = in_namespaces() else { return };
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut source = world.guest("source", &machine);
    let mut there = world.waiting("there", &machine);
    receive(&world, Side::B, &there);
    // An emulated machine takes seconds to compare.
    let options = ["--verify", "--downtime-limit", "5s", "--channels", "2"];
    // So slowly that RDMA is back before the round is over, however long that takes.
    let options = [&options[..], &["--bandwidth-limit", "100kB/s"]].concat();
    let cli = world.cli(Side::A);
    let migration = cli.migrate("vm", &source, Side::B, &options);
    migration.wait_mid_round();
    lost_and_found(&world, &migration, loss);
    let id = cli.id_of("vm");
    let set = cli.run(&["set", &id, "--bandwidth-limit", "unlimited"]);
    assert_eq!(set.status.code(), Some(0), "{set:?}");
    let outcome = migration.finish();
    assert_went_over(&outcome, "rdma", "pages go over TCP");
    let end = outcome.completed();
    assert_eq!(end["transport_at_end"], "rdma", "{end}");
    assert!(end["bytes_on_wire"].as_u64() < Some(24 << 20), "{end}");
    assert_moved(&mut source, &mut there);
    assert_none_registered();
}

/// In a post-copy: the guest is not paused.
fn in_a_postcopy(loss: Loss) {
    let Some(world) = in_namespaces() else { return };
    let machine = small(Version::V10_0, "rate=1 set=1");
    let mut source = world.guest("source", &machine);
    let mut there = world.waiting("there", &machine);
    receive(&world, Side::B, &there);
    let migration = postcopy_under_way(&world, Side::A, &source);
    lost_and_found(&world, &migration, loss);
    let outcome = migration.finish();
    assert_went_over(&outcome, "rdma", "pages go over TCP");
    let end = outcome.completed();
    assert_eq!(end["transport_at_end"], "rdma", "{end}");
    assert_eq!(end["paused_ms"], 0.0);
    assert_moved(&mut source, &mut there);
    assert_none_registered();
}

#[test]
fn rdma_in_namespaces_link_cut_in_a_round_and_mended() {
    in_a_round(Loss::Cables);
}

#[test]
fn rdma_in_namespaces_link_cut_in_a_postcopy_and_mended() {
    in_a_postcopy(Loss::Cables);
}

#[test]
fn rdma_in_namespaces_devices_taken_away_in_a_round_and_given_back() {
    in_a_round(Loss::Devices);
}

#[test]
fn rdma_in_namespaces_devices_taken_away_in_a_postcopy_and_given_back() {
    in_a_postcopy(Loss::Devices);
}
