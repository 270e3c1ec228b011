//! What is around a guest moves with it: a whole guest, Debian's kernel with a network card on a bridge and two disks, moved
//! there and back while somebody talks to it and fio writes to its disks; and the network that hears where a guest is.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::real::{
    Download, LinuxGuest, LinuxState, Machine, Manner, PATIENCE, Ping, Qemu, Role, RunAs, Scratch,
    Side, Steps, Switch, Trust, Version, World, assert_nothing_left_in, eventually, let_it_last,
};

/// How far a clock of the guest may be from ours: what it has stood still, and what a busy machine adds.
const NEAR: f64 = 15.0;

/// Within this time QEMU says what it says by itself of a guest that has come.
const ANNOUNCED: Duration = Duration::from_secs(3);

/// What is asked of the guest again and again: that its time goes on, and its disks are sound.
struct Observer<'a> {
    switch: &'a Switch,
    first: (Instant, f64),
    last: f64,
}

impl<'a> Observer<'a> {
    /// Waits until the guest is up.
    fn new(switch: &'a Switch) -> Observer<'a> {
        let state = eventually(4 * PATIENCE, || LinuxState::of(switch)).unwrap();
        Observer {
            switch,
            first: (Instant::now(), state.uptime),
            last: state.uptime,
        }
    }

    fn look(&mut self) -> LinuxState {
        let state = eventually(PATIENCE, || LinuxState::of(self.switch)).unwrap();
        assert!(state.uptime >= self.last, "{state:?} after {}", self.last);
        self.last = state.uptime;
        state
    }

    /// Waits until fio has done two more passes over each disk: one at least was begun and ended from now on.
    fn passes(&mut self) {
        let before = self.look().passes;
        eventually(4 * PATIENCE, || {
            let now = self.look().passes;
            let all = before.iter().zip(now).all(|(then, now)| now >= then + 2);
            all.then_some(()).ok_or(format!("{before:?}, {now:?}"))
        })
        .unwrap();
    }

    /// The guest's clocks have gone on as ours have.
    fn clocks(&mut self) {
        let state = self.look();
        let (since, uptime) = self.first;
        let apart = (state.uptime - uptime) - since.elapsed().as_secs_f64();
        assert!(apart.abs() < NEAR, "its time is {apart} s from ours");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let apart = now.as_secs().abs_diff(state.clock);
        assert!(apart < 15, "its clock is {apart} s from ours");
    }
}

#[test]
fn heavy_debian_there_and_back() {
    let world = World::tls();
    let switch = Switch::between(&world.net);
    let start = |side, name, role| LinuxGuest::start(&world.scratch, &world.net, side, name, role);
    let mut here = start(Side::A, "first", Role::Source);
    let mut observer = Observer::new(&switch);
    let sum = switch.get("/blob.sum").unwrap();
    let ping = Ping::start(&switch);
    let download = Download::start(&switch, &world.scratch.files().join("blob"));
    observer.passes();
    switch.wait_learnt(LinuxGuest::MAC, Side::A);
    let precopy = ["--mode", "precopy"].as_slice();
    // A limit that pre-copy never meets.
    let hybrid = [
        "--mode",
        "hybrid",
        "--downtime-limit",
        "1ms",
        "--postcopy-after",
        "1",
    ];
    for (from, name, way) in [(Side::A, "there", precopy), (Side::B, "back", &hybrid)] {
        let to = from.other();
        let mut next = start(to, name, Role::Destination);
        let taken = download.taken();
        world.cli(to).receive("debian", next.socket()).unwrap();
        let address = format!("{}:7700", to.address());
        let limit = ["--bandwidth-limit", "100MB/s"];
        let options = [way, &limit].concat();
        let migration = world
            .cli(from)
            .migrate_socket("debian", here.socket(), &address, &options);
        let outcome = migration.finish();
        println!("{}", outcome.completed());
        assert_eq!(outcome.finished()["mode"], way[1]);
        assert_eq!(here.qmp.status(), "postmigrate");
        assert_eq!(next.qmp.status(), "running");
        switch.wait_learnt(LinuxGuest::MAC, to);
        world.daemon(from).assert_logs(&["direct_io=true"]);
        assert_nothing_left_in(here.pid());
        assert_nothing_left_in(next.pid());
        observer.passes();
        observer.clocks();
        assert!(download.taken() > taken, "the download goes on");
        here = next;
    }
    assert_eq!(
        download.finish().unwrap(),
        sum.trim(),
        "the download is whole"
    );
    assert_eq!(switch.get("/cgi-bin/cold").unwrap().trim(), "good");
    let pinged = ping.stop();
    println!("{pinged:?}");
    assert!(pinged.longest_gap < Duration::from_secs(10), "{pinged:?}");
    assert!(pinged.answered > pinged.sent / 2, "{pinged:?}");
}

/// QEMU says a few times within a second where its guest is, and only while that runs. One that is run later has to be heard
/// of, too: this guest has no driver for its card and says nothing itself.
#[test]
fn the_network_is_told_of_a_guest_that_is_run_late() {
    let scratch = Scratch::new();
    let hold = ["destination RunGuest 1".to_owned()];
    let steps = Steps::listen(&scratch.files().join("steps.sock"), &hold);
    let manner = |side: Side, steps| Manner {
        name: side.name().to_owned(),
        trust: Trust::Plaintext,
        steps,
        run_as: RunAs::User,
    };
    let manners = [
        manner(Side::A, None),
        manner(Side::B, Some(steps.socket().to_owned())),
    ];
    let world = World::of(scratch, &manners);
    let switch = Switch::between(&world.net);
    let mut machine = Machine::new(Version::V10_0, 64, "rate=5 set=8");
    machine.extra = [
        "-netdev",
        "tap,id=net,ifname=tap0,script=no,downscript=no",
        "-device",
        &format!("virtio-net-pci,netdev=net,mac={}", LinuxGuest::MAC),
    ]
    .map(str::to_owned)
    .to_vec();
    let start = |side, name, role| {
        let command = world.net.command(side, machine.version.binary());
        Qemu::start_with(&world.scratch, name, &machine, role, command)
    };
    let source = start(Side::A, "source", Role::Source);
    let destination = start(Side::B, "destination", Role::Destination);
    source.serial.wait_filled();
    let migration = world.begin(Side::A, "vm", &source, &destination, &[]);
    let held = steps.wait(PATIENCE).unwrap();
    let_it_last(ANNOUNCED);
    assert_eq!(switch.port_of(LinuxGuest::MAC), None);
    held.go();
    switch.wait_learnt(LinuxGuest::MAC, Side::B);
    destination.serial.wait_beats(100);
    destination.serial.verify();
    drop(migration);
}
