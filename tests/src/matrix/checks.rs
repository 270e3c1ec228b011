//! What must hold when a cell has ended: one guest, whole, never two; soon after the failure; nothing left behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cell::{End, Fault, Moment, Way};
use super::run::{Inflicted, has_failed_to_load, text};
use super::scene::{Scene, allocated, settings};
use crate::real::{Footprint, Side, eventually, nothing_left_in};

/// From a failure that a daemon has noticed until the guest runs on.
const RUNS_ON: Duration = Duration::from_millis(100);
/// What a scheduler may add on a machine that runs several cells at once, to what a guest feels.
const NOISE: Duration = Duration::from_millis(2000);
/// Beats of the source that are read so long after the destination's first are those of a second guest.
const READ_LATE: Duration = Duration::from_millis(250);
/// A guest that beats a hundred times in longer than this had no share of the processor, or something is wrong.
const SLOW: Duration = Duration::from_secs(1);
/// How long the last threads, sockets and ranges may take to go.
const LINGER: Duration = Duration::from_secs(10);

/// Checks everything; says in words what was measured.
pub(super) fn check(scene: &mut Scene, end: End, inflicted: &Inflicted) -> String {
    let busy = busy(scene, inflicted);
    let silent = guest_is_whole(scene, end);
    never_two(scene, end);
    messages(scene, end);
    let resumed = resumed_soon(scene, end, inflicted, busy);
    for side in [Side::A, Side::B] {
        must(eventually(LINGER, || nothing_left_at(scene, side)));
    }
    must(eventually(LINGER, || no_memory_kept(scene, end)));
    let told = scene.state(Side::A).map_or_else(String::new, |told| {
        let error = told["finished"]["error"].as_str().unwrap_or_default();
        format!("; {} {error}", told["state"].as_str().unwrap_or_default())
    });
    format!("{end:?}{resumed}{silent}{told}")
}

fn must(held: Result<(), String>) {
    if let Err(why) = held {
        panic!("{why}");
    }
}

/// The guest that runs beats, and finds every page right. Says so when its beats were slow to come.
fn guest_is_whole(scene: &mut Scene, end: End) -> String {
    let side = match end {
        End::Source | End::Resolved => Side::A,
        End::Destination => Side::B,
        End::Lost => return String::new(),
    };
    let serial = &scene.qemu(side).serial;
    let took = serial.wait_beats(100);
    serial.verify();
    if took < SLOW {
        return String::new();
    }
    format!(", 100 beats took {took:?}")
}

/// A guest that went over never beats at the source again; one that stayed has never beaten at the destination.
fn never_two(scene: &Scene, end: End) {
    let (source, destination) = (&scene.source.serial, &scene.destination.serial);
    source.assert_whole();
    destination.assert_whole();
    match destination.first_beat() {
        None => {}
        Some(_) if matches!(end, End::Source | End::Resolved) => {
            panic!("the guest runs at the source and has run at the destination")
        }
        Some((first, _)) => {
            let late = source.beats_after(first + READ_LATE);
            assert_eq!(late, 0, "two guests ran: the source beat on for {late} ms");
        }
    }
}

/// The exit status is success only when the guest moved, and a failure has words that say what to do.
fn messages(scene: &mut Scene, end: End) {
    if let Some(success) = scene.migration.ended() {
        assert!(
            !success || scene.cell.step.moment == Moment::Moved || end == End::Destination,
            "pagecopy exits with success, but: {end:?}"
        );
    }
    let Some(told) = scene.state(Side::A) else {
        return;
    };
    if told["state"] == "completed" {
        return;
    }
    let words = text(Some(&told));
    assert!(words.contains("what to do"), "no remedy: {words}");
    // On the way back the guest may have run here again before its QEMU was killed.
    if end == End::Lost && scene.cell.step.way != Way::Back {
        assert!(
            words.contains("QEMU") && !words.contains("`cont`"),
            "not said that the guest went with its QEMU: {words}"
        );
    }
}

/// How long the source's daemon and QEMU have waited for a processor since the harm was done: what other work on the
/// machine may have added to their times. Nearly nothing where the tests are alone.
fn busy(scene: &Scene, inflicted: &Inflicted) -> Duration {
    let [daemon, qemu] = scene.waited();
    let restarted = scene.world.daemon(Side::A).pid() != inflicted.daemon;
    let before = if restarted {
        Duration::ZERO
    } else {
        inflicted.waited[0]
    };
    daemon.saturating_sub(before) + qemu.saturating_sub(inflicted.waited[1])
}

/// By the source daemon's own clock, from the order to take the guest back, which the engine gives in the instant in
/// which it is told of the failure, until QEMU says that the guest runs; what both of them waited for a processor
/// (`busy`) is not theirs. What the guest itself felt is asserted more loosely, and only for failures that are noticed at
/// once.
fn resumed_soon(scene: &Scene, end: End, inflicted: &Inflicted, busy: Duration) -> String {
    let log = scene.world.daemon(Side::A).log();
    let told = format!("the guest runs on here id={} ms=", scene.id);
    let figures: Vec<f64> = log
        .lines()
        .filter_map(|line| line.split_once(&told)?.1.trim().parse().ok())
        .collect();
    let limit = (RUNS_ON + busy).as_secs_f64() * 1e3;
    // A daemon that was stopped in the middle cannot have been quick.
    let paused = scene.cell.fault == Fault::Pause(Side::A);
    if let Some(late) = figures.iter().find(|ms| **ms >= limit && !paused) {
        panic!(
            "the guest ran on {late:.1} ms after the failure was noticed; its host was kept waiting for {busy:?} by others"
        );
    }
    let at_once = matches!(
        scene.cell.fault,
        Fault::KillDaemon(Side::B)
            | Fault::KillQemu(Side::B)
            | Fault::Cancel(_)
            | Fault::Restart(_)
    );
    if end == End::Source && scene.cell.step.moment < Moment::Sent && at_once {
        let gap = scene.source.serial.longest_gap(inflicted.at);
        assert!(
            gap < NOISE,
            "the guest stood still for {gap:?} after the fault"
        );
    }
    figures
        .last()
        .map_or_else(String::new, |ms| format!(", resumed in {ms:.1} ms"))
}

/// QEMU, if it lives, and the daemon are as they were before.
fn nothing_left_at(scene: &mut Scene, side: Side) -> Result<(), String> {
    let number = side as usize;
    if scene.qemu(side).is_running() {
        nothing_left_in(scene.qemu(side).pid())?;
        let now = settings(scene.qemu(side));
        if now != scene.before.settings[number] {
            return Err(format!("QEMU's settings are {now}"));
        }
    }
    let (before, now) = (
        &scene.before.footprints[number],
        Footprint::of(scene.world.daemon(side).pid()),
    );
    if !now.is_within(before) {
        return Err(format!("the daemon had {before:?} and has {now:?}"));
    }
    no_stray_files(&scene.world.daemon(side).state())?;
    Ok(())
}

/// Only what `daemon/src/store` names is in a state directory, and no settings are left to be put back.
fn no_stray_files(state: &Path) -> Result<(), String> {
    let known = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let kept = [
            "lock",
            "journal",
            "spawned",
            "receivers.json",
            "fixed-downtime.json",
        ];
        let ended = [".source", ".destination"];
        // ext4 has made lost+found by itself.
        kept.contains(&&*name)
            || ended.iter().any(|end| name.ends_with(end))
            || name == "lost+found"
    };
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let within = ["journal", "spawned"].map(|folder| list(&state.join(folder)));
    let files = list(state).into_iter().chain(within.into_iter().flatten());
    let strays: Vec<PathBuf> = files.filter(|path| !known(path)).collect();
    if strays.is_empty() {
        Ok(())
    } else {
        Err(format!("left behind: {strays:?}"))
    }
}

/// A QEMU that goes on waiting has no more memory than before, and nothing new lies next to the RAM files.
fn no_memory_kept(scene: &mut Scene, end: End) -> Result<(), String> {
    let folder = scene.world.scratch.ram();
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !["source-ram0", "destination-ram0"].contains(&name.as_str()))
        .collect();
    if !names.is_empty() {
        return Err(format!("next to the RAM lies {names:?}"));
    }
    // One that says so after a post-copy that was given up while it loaded takes no guest any more, and is to be ended.
    let waits = scene.destination.is_running() && scene.destination.qmp.status() == "inmigrate";
    let loaded =
        scene.cell.step.way == Way::First && waits && has_failed_to_load(&mut scene.destination);
    let kept = allocated(scene.destination.ram());
    if end != End::Destination && waits && !loaded && kept > scene.before.allocated {
        return Err(format!(
            "the waiting QEMU keeps {} KiB of a guest that does not come",
            kept / 2
        ));
    }
    Ok(())
}
