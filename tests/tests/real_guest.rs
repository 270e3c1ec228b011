//! A whole guest: Debian's kernel with a network card on a bridge and two disks, moved there and back while somebody
//! talks to it and fio writes to its disks.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::real::{
    Download, LinuxGuest, LinuxState, PATIENCE, Ping, Role, Side, Switch, World,
    assert_nothing_left_in, eventually,
};

/// How far a clock of the guest may be from ours: what it has stood still, and what a busy machine adds.
const NEAR: f64 = 15.0;

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
