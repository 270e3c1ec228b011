//! What post-copy survives: the guest runs at the destination and lacks pages, and then the link, a daemon, both, or the
//! source's QEMU goes. The guest checks each page that it reads, throughout; no operator is needed when the peer comes back.
//!
//! Each trouble comes at a few moments that a seed decides, at twenty with `PAGECOPY_ALL=1`; `PAGECOPY_POSTCOPY_SEED=n`
//! repeats them.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::real::{
    Machine, Migration, PATIENCE, Qemu, Side, Version, World, assert_moved, assert_nothing_left_in,
    eventually, let_it_last,
};

/// What the link carries: 64 MiB take about two seconds.
const LINK_MBIT: u32 = 250;

/// A guest that has gone first and lacks most of its memory.
struct Gone {
    world: World,
    source: Qemu,
    destination: Qemu,
    migration: Option<Migration>,
    id: String,
}

impl Gone {
    fn begin() -> Gone {
        Gone::with("rate=20 set=16")
    }

    fn with(guest: &str) -> Gone {
        let world = World::tls();
        world.net.limit(LINK_MBIT);
        let machine = Machine::new(Version::V10_0, 64, guest);
        let source = world.guest("source", &machine);
        let destination = world.waiting("destination", &machine);
        let migration = world.begin(
            Side::A,
            "vm",
            &source,
            &destination,
            &["--mode", "postcopy"],
        );
        destination.serial.wait_beats(1);
        let id = world.cli(Side::A).id_of("vm");
        Gone {
            world,
            source,
            destination,
            migration: Some(migration),
            id,
        }
    }

    fn shown(&self, side: Side) -> Option<Value> {
        self.world.cli(side).find(&self.id)
    }

    /// How it ended.
    fn end(&self, side: Side) -> Value {
        self.shown(side).unwrap()["finished"].clone()
    }

    /// The command that began it says that it has failed.
    fn fails(&mut self) {
        let migration = self.migration.take().unwrap();
        migration.finish().not_completed("failed");
    }

    fn wait_state(&self, side: Side, state: &str) {
        self.world.cli(side).wait_state(&self.id, state);
    }

    /// It is paused, and the reason has all of `words`.
    fn wait_reason(&self, side: Side, words: &[&str]) {
        eventually(PATIENCE, || {
            let shown = self.shown(side).unwrap_or_default();
            let reason = shown["reason"].as_str().unwrap_or_default();
            if shown["state"] == "paused" && words.iter().all(|word| reason.contains(word)) {
                Ok(())
            } else {
                Err(shown.to_string())
            }
        })
        .unwrap_or_else(|shown| panic!("the reason is not {words:?}: {shown}"));
    }

    /// Everything has come, by itself, and nothing is wrong.
    fn assert_whole(mut self) {
        self.wait_state(Side::B, "completed");
        self.wait_state(Side::A, "completed");
        // Also a daemon that was started anew knows how it went.
        let [here, there] = [Side::A, Side::B].map(|side| {
            eventually(PATIENCE, || match self.shown(side).unwrap_or_default() {
                shown if shown["finished"].is_object() => Ok(shown),
                shown => Err(shown.to_string()),
            })
            .unwrap_or_else(|shown| panic!("it has not ended: {shown}"))
        });
        for shown in [&here, &there] {
            assert_eq!(shown["mode"], "postcopy", "{shown}");
            let end = &shown["finished"];
            assert_eq!(end["mode"], "postcopy", "{shown}");
            assert_eq!(end["sent_bytes"], 0, "{shown}");
            assert_eq!(
                end["lacking_bytes"], here["finished"]["lacking_bytes"],
                "{here} {there}"
            );
        }
        if let Some(migration) = self.migration.take() {
            // The one that began it may have lost its daemon.
            drop(migration);
        }
        assert_moved(&mut self.source, &mut self.destination);
        self.assert_nothing_kept();
    }

    /// The same of a guest whose QEMU at the source has ended.
    fn assert_whole_without_its_source(mut self) {
        self.wait_state(Side::B, "completed");
        self.wait_state(Side::A, "completed");
        assert_eq!(self.destination.qmp.status(), "running");
        self.destination.serial.wait_beats(300);
        self.destination.serial.verify();
        self.source.serial.assert_whole();
        assert_nothing_left_in(self.destination.pid());
        self.assert_nothing_kept();
    }

    /// The source's daemon has the guest's memory no more, and its QEMU keeps it, stopped.
    fn assert_nothing_served(&mut self) {
        let name = self.source.ram().file_name().unwrap().to_owned();
        let maps = format!("/proc/{}/maps", self.world.daemon(Side::A).pid());
        eventually(PATIENCE, || {
            let maps = std::fs::read_to_string(&maps).unwrap();
            match maps.contains(name.to_str().unwrap()) {
                true => Err(maps),
                false => Ok(()),
            }
        })
        .unwrap_or_else(|maps| panic!("the memory is still mapped: {maps}"));
        assert_eq!(self.source.qmp.status(), "postmigrate");
        assert_nothing_left_in(self.source.pid());
    }

    /// The record of what was received goes when nothing lacks, and before it the registration of the QEMU that had waited.
    fn assert_nothing_kept(&self) {
        let state = self.world.daemon(Side::B).state();
        let kept = state.join("journal").join(format!("{}.received", self.id));
        eventually(PATIENCE, || match kept.exists() {
            true => Err(format!("{} is left", kept.display())),
            false => Ok(()),
        })
        .unwrap_or_else(|left| panic!("{left}"));
        let list = self.world.cli(Side::B).run(&["list", "--json"]).stdout;
        let list: Value = serde_json::from_slice(&list).unwrap();
        assert_eq!(list["receivers"], serde_json::json!([]), "{list}");
    }
}

/// Moments after the guest has begun to run at the destination.
fn moments() -> Vec<Duration> {
    let seed = std::env::var("PAGECOPY_POSTCOPY_SEED").ok();
    let mut seed: u64 = seed.map_or(20_261_125, |seed| seed.parse().unwrap());
    println!("the same again: PAGECOPY_POSTCOPY_SEED={seed}");
    let count = if std::env::var_os("PAGECOPY_ALL").is_some() {
        20
    } else {
        3
    };
    (0..count)
        .map(|_| {
            // Knuth's numbers for a linear congruential generator.
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            Duration::from_millis((seed >> 33) % 1_500)
        })
        .collect()
}

fn at_each_moment(trouble: impl Fn(&mut Gone)) {
    for moment in moments() {
        let mut gone = Gone::begin();
        let_it_last(moment);
        println!(
            "after {moment:?}: {:?}",
            gone.shown(Side::B).map(|shown| shown["progress"].clone())
        );
        trouble(&mut gone);
        gone.assert_whole();
    }
}

#[test]
fn the_link_is_cut_for_a_while() {
    at_each_moment(|gone| {
        gone.world.net.cut();
        let_it_last(Duration::from_secs(2));
        gone.world.net.mend();
    });
}

#[test]
fn the_destination_daemon_is_killed() {
    at_each_moment(|gone| {
        gone.world.daemon_mut(Side::B).kill();
        let_it_last(Duration::from_millis(500));
        gone.world.restart(Side::B);
    });
}

#[test]
fn the_source_daemon_is_killed() {
    at_each_moment(|gone| {
        gone.world.daemon_mut(Side::A).kill();
        let_it_last(Duration::from_millis(500));
        gone.world.restart(Side::A);
    });
}

#[test]
fn both_daemons_are_killed_at_once() {
    at_each_moment(|gone| {
        for side in [Side::A, Side::B] {
            gone.world.daemon_mut(side).kill();
        }
        let_it_last(Duration::from_millis(500));
        for side in [Side::B, Side::A] {
            gone.world.restart(side);
        }
    });
}

/// Its RAM is in files, which its daemon has open: nothing pauses, and whoever began the migration sees it complete.
#[test]
fn the_source_qemu_is_killed() {
    for moment in moments() {
        let mut gone = Gone::begin();
        let_it_last(moment);
        let before = gone.shown(Side::B);
        println!(
            "after {moment:?}: {:?}",
            before.map(|shown| shown["progress"].clone())
        );
        gone.source.kill();
        let outcome = gone.migration.take().unwrap().finish();
        let end = outcome.completed();
        assert_eq!(end["paused_ms"].as_f64(), Some(0.0), "{end}");
        gone.assert_whole_without_its_source();
    }
}

/// The daemon that comes then has nothing but the files.
#[test]
fn the_source_qemu_and_then_its_daemon_are_killed() {
    for moment in moments() {
        let mut gone = Gone::begin();
        let_it_last(moment);
        gone.source.kill();
        gone.world.daemon_mut(Side::A).kill();
        gone.world.restart(Side::A);
        gone.assert_whole_without_its_source();
    }
}

/// A source that does not come back: the guest waits for what it lacks until the operator gives it up.
#[test]
fn a_source_that_is_gone_for_good() {
    // It touches nothing that it does not have to.
    let mut gone = Gone::with("rate=0 set=16 sweep=0");
    gone.world.daemon_mut(Side::A).kill();
    gone.wait_state(Side::B, "paused");
    let cli = gone.world.cli(Side::B);
    let refused = cli.run(&["resolve", &gone.id, "--poison"]);
    assert!(!refused.status.success(), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--peer-fenced"));
    // It has run here, and there is no way back.
    let refused = cli.run(&["resolve", &gone.id, "--abandon"]);
    assert!(!refused.status.success(), "{refused:?}");
    let said = String::from_utf8_lossy(&refused.stderr);
    for words in ["has run here", "bytes of its memory", "--poison"] {
        assert!(said.contains(words), "{said}");
    }
    let late = cli.run(&["cancel", &gone.id]);
    assert!(!late.status.success(), "{late:?}");
    let done = cli.run(&["resolve", &gone.id, "--poison", "--peer-fenced"]);
    assert!(done.status.success(), "{done:?}");
    gone.wait_state(Side::B, "completed");
    gone.destination.serial.wait_beats(300);
    // What it lacks is a memory error, which ends a QEMU without KVM, and never zeroes.
    gone.destination.serial.touch_all();
    gone.destination.wait_end();
    gone.destination.serial.assert_whole();
}

/// A source's host that was started anew has no RAM file any more: both sides say so, and what can be done.
#[test]
fn a_source_that_has_lost_the_memory() {
    let mut gone = Gone::with("rate=0 set=16 sweep=0");
    gone.world.daemon_mut(Side::A).kill();
    gone.source.kill();
    std::fs::remove_file(gone.source.ram()).unwrap();
    gone.world.restart(Side::A);
    gone.wait_reason(
        Side::B,
        &[
            "does not have the guest's memory any more",
            "resolve ID --poison --peer-fenced",
        ],
    );
    gone.wait_reason(
        Side::A,
        &["cannot be opened", "the destination knows", "--abandon"],
    );
    let cli = gone.world.cli(Side::B);
    let text = cli.run(&["status", &gone.id]);
    assert!(
        String::from_utf8_lossy(&text.stdout).contains("last resort"),
        "{text:?}"
    );
    let done = cli.run(&["resolve", &gone.id, "--poison", "--peer-fenced"]);
    assert!(done.status.success(), "{done:?}");
    gone.wait_state(Side::B, "completed");
    // It asks on, and hears that nothing is needed of it.
    gone.wait_state(Side::A, "completed");
    gone.destination.serial.wait_beats(300);
    gone.destination.serial.assert_whole();
}

/// The same, and the file comes back, or its operator lets go.
#[test]
fn a_source_whose_memory_comes_back() {
    let mut gone = Gone::begin();
    gone.world.daemon_mut(Side::A).kill();
    let (ram, aside) = (
        gone.source.ram().to_owned(),
        gone.source.ram().with_extension("aside"),
    );
    std::fs::rename(&ram, &aside).unwrap();
    gone.world.restart(Side::A);
    gone.wait_reason(Side::B, &["does not have the guest's memory any more"]);
    std::fs::rename(&aside, &ram).unwrap();
    gone.assert_whole();
}

#[test]
fn a_source_that_lets_go_of_what_it_has_lost() {
    let mut gone = Gone::with("rate=0 set=16 sweep=0");
    gone.world.daemon_mut(Side::A).kill();
    std::fs::remove_file(gone.source.ram()).unwrap();
    gone.world.restart(Side::A);
    gone.wait_reason(Side::A, &["cannot be opened"]);
    let done = gone
        .world
        .cli(Side::A)
        .run(&["resolve", &gone.id, "--abandon"]);
    assert!(done.status.success(), "{done:?}");
    gone.wait_state(Side::A, "failed");
    gone.wait_state(Side::B, "paused");
    // It is not forgotten.
    gone.world.restart(Side::A);
    gone.wait_state(Side::A, "failed");
    assert_eq!(gone.end(Side::A)["fault"], "operator");
}

/// A destination whose host has lost everything and comes back: its guest has ended, which the source hears, and keeps nothing for it.
#[test]
fn a_destination_host_that_was_started_anew() {
    let mut gone = Gone::begin();
    gone.world.daemon_mut(Side::B).kill();
    gone.destination.kill();
    std::fs::remove_file(gone.destination.ram()).unwrap();
    gone.wait_state(Side::A, "paused");
    gone.world.restart(Side::B);
    gone.wait_state(Side::B, "failed");
    gone.wait_state(Side::A, "failed");
    for side in [Side::A, Side::B] {
        let end = gone.end(side);
        assert_eq!(end["fault"], "qemu", "{end}");
        let remedy = end["remedy"].as_str().unwrap();
        assert!(remedy.contains("start it anew") || remedy.contains("start the guest anew"));
    }
    gone.fails();
    gone.assert_nothing_served();
    gone.assert_nothing_kept();
}

/// Its QEMU ends while nobody can be told: the source, when it gets through, does not hear that all is well. Both daemons say so
/// ever after, and the guest is not run at the source.
#[test]
fn a_destination_qemu_that_ends_while_the_link_is_cut() {
    let mut gone = Gone::begin();
    gone.world.net.cut();
    for side in [Side::A, Side::B] {
        gone.wait_state(side, "paused");
    }
    gone.destination.kill();
    gone.wait_state(Side::B, "failed");
    gone.world.net.mend();
    gone.wait_state(Side::A, "failed");
    gone.fails();
    gone.assert_nothing_served();
    for anew in [false, true] {
        for side in [Side::A, Side::B] {
            if anew {
                gone.world.restart(side);
                gone.wait_state(side, "failed");
            }
            let end = gone.end(side);
            assert_eq!(end["fault"], "qemu", "{end}");
            assert!(
                end["error"].as_str().unwrap().contains("has ended"),
                "{end}"
            );
            let remedy = end["remedy"].as_str().unwrap();
            assert!(remedy.contains("start the guest anew"), "{end}");
        }
    }
    gone.assert_nothing_served();
    gone.assert_nothing_kept();
}

/// One that does not come back: its operator ends what depends on it, knowing how much goes with it.
#[test]
fn a_destination_that_is_gone_for_good() {
    let mut gone = Gone::begin();
    gone.world.net.cut();
    gone.wait_state(Side::A, "paused");
    let resolve = |gone: &Gone, options: &[&str]| {
        let words = [&["resolve", &gone.id], options].concat();
        let output = gone.world.cli(Side::A).run(&words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    };
    // It is only cut off, and its guest lives.
    let refused = resolve(&gone, &["--abandon"]).unwrap_err();
    for words in ["bytes of the guest's memory are here only", "--peer-fenced"] {
        assert!(refused.contains(words), "{refused}");
    }
    let refused = resolve(&gone, &["--resume-here", "--peer-fenced"]).unwrap_err();
    assert!(
        refused.contains("the guest runs at the destination"),
        "{refused}"
    );
    gone.world.daemon_mut(Side::B).kill();
    gone.destination.kill();
    gone.world.net.mend();
    gone.wait_reason(
        Side::A,
        &[
            "nobody answers",
            "bytes of the guest's memory are here only",
        ],
    );
    let done = resolve(&gone, &["--abandon", "--peer-fenced"]).unwrap();
    assert!(done.contains("let go of"), "{done}");
    gone.wait_state(Side::A, "failed");
    gone.fails();
    gone.assert_nothing_served();
    // Nor does a daemon that is started anew run it, or forget what went.
    gone.world.restart(Side::A);
    gone.wait_state(Side::A, "failed");
    let end = gone.end(Side::A);
    assert_eq!(end["fault"], "operator", "{end}");
    assert!(
        end["error"].as_str().unwrap().contains("the guest is lost"),
        "{end}"
    );
    gone.assert_nothing_served();
}

/// The destination has moved to another address meanwhile.
#[test]
fn at_another_address() {
    let mut gone = Gone::begin();
    gone.world.daemon_mut(Side::B).kill();
    gone.wait_state(Side::A, "paused");
    gone.world.net.add_address(Side::B, "10.77.0.99");
    let config = gone.world.folder(Side::B).join("pagecopyd.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let moved = text.replace(&format!("{}:", Side::B.address()), "10.77.0.99:");
    std::fs::write(&config, moved).unwrap();
    gone.world.restart(Side::B);
    let to = "10.77.0.99:7700";
    let told = gone
        .world
        .cli(Side::A)
        .run(&["recover", &gone.id, "--to", to]);
    assert!(told.status.success(), "{told:?}");
    gone.assert_whole();
}

/// Nobody is asked for anything for as long as nothing comes back; then it goes on by itself.
#[test]
fn a_long_pause_keeps_the_guest() {
    let gone = Gone::begin();
    gone.world.net.cut();
    gone.wait_state(Side::B, "paused");
    gone.wait_state(Side::A, "paused");
    let begun = Instant::now();
    let_it_last(Duration::from_secs(15));
    gone.world.net.mend();
    gone.assert_whole();
    assert!(begun.elapsed() > Duration::from_secs(15));
}
