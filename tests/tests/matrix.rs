//! Every fault at every step, on real QEMU: see `tests::matrix`.
//!
//! The same for post-copies. A tenth of the cells by default, each step and each fault in it, by a seed that is printed and
//! that `PAGECOPY_MATRIX_SEED=n` repeats: another one in each run for pre-copy, the same one for post-copy. All with
//! `PAGECOPY_ALL=1`; one with `PAGECOPY_CELL="source Send(Commit) / kill
//! destination daemon"`, with `PAGECOPY_REPEAT=n` so many times.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tests::matrix::{Cell, Fault, cells, choose, postcopy_cells, run};
use tests::real::{SmallFs, skipped};

/// Which post-copies are played unless more is asked for.
const POSTCOPY_SEED: u64 = 4;
/// Cells that run at once. They wait most of the time.
const AT_ONCE: usize = 6;

#[test]
fn matrix() {
    play_all(&cells(), None);
}

#[test]
fn postcopy_matrix() {
    play_all(&postcopy_cells(), Some(POSTCOPY_SEED));
}

/// The order to load the device state may outlast its migration, and did in 2 of 12 before it was waited for.
#[test]
fn given_up_while_qemu_is_told_to_load() {
    let name = "source DeviceStateSaved / cancel at source";
    let all = cells();
    let cell = all.iter().find(|cell| cell.to_string() == name);
    play_these(&[*cell.expect("there is such a cell"); 12]);
}

fn play_all(all: &[Cell], seed: Option<u64>) {
    let mut chosen = chosen(all, seed);
    if !SmallFs::loop_devices() {
        let before = chosen.len();
        chosen.retain(|cell| cell.fault != Fault::DiskFull);
        let left_out = before - chosen.len();
        skipped(&format!(
            "{left_out} cells with a full journal disk: no loop devices (they run where /dev/loop-control is)"
        ));
    }
    play_these(&chosen);
}

fn play_these(chosen: &[Cell]) {
    let (queue, failed) = (Mutex::new(chosen.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(chosen.len()) {
            scope.spawn(|| {
                while let Some(cell) = next(&queue) {
                    if !play(*cell) {
                        failed.lock().expect("no panic while held").push(*cell);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic while held");
    let names: Vec<String> = failed.iter().map(Cell::to_string).collect();
    assert!(
        failed.is_empty(),
        "{} of {} cells failed: {names:#?}",
        failed.len(),
        chosen.len()
    );
}

fn next<'a>(queue: &Mutex<std::slice::Iter<'a, Cell>>) -> Option<&'a Cell> {
    queue.lock().expect("no panic while held").next()
}

/// Runs a cell; false when it failed, with all that is needed to run it again.
fn play(cell: Cell) -> bool {
    let begun = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| run(cell)));
    let seconds = begun.elapsed().as_secs_f64();
    match &result {
        Ok(words) => println!("{seconds:5.1} s  {cell}: {words}"),
        Err(_) => println!(
            "{seconds:5.1} s  {cell}: FAILED; again: PAGECOPY_CELL=\"{cell}\" cargo nextest run -p tests -E 'test(matrix)'"
        ),
    }
    result.is_ok()
}

/// Which cells are played: `seed` decides, or the clock.
fn chosen(all: &[Cell], seed: Option<u64>) -> Vec<Cell> {
    if let Ok(name) = std::env::var("PAGECOPY_CELL") {
        let known = [cells(), postcopy_cells()].concat();
        assert!(
            known.iter().any(|cell| cell.to_string() == name),
            "there is no cell {name:?}"
        );
        let named: Vec<Cell> = all
            .iter()
            .filter(|cell| cell.to_string() == name)
            .copied()
            .collect();
        let times = std::env::var("PAGECOPY_REPEAT").map_or(1, |times| {
            times.parse().expect("PAGECOPY_REPEAT is a number")
        });
        return named.repeat(times);
    }
    if std::env::var_os("PAGECOPY_ALL").is_some() {
        println!("all {} cells; none is impossible", all.len());
        return all.to_vec();
    }
    let seed = match std::env::var("PAGECOPY_MATRIX_SEED") {
        Ok(seed) => seed.parse().expect("PAGECOPY_MATRIX_SEED is a number"),
        Err(_) => seed.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(0, |time| time.as_secs())
        }),
    };
    let chosen = choose(all, seed);
    println!(
        "{} of {} cells, PAGECOPY_MATRIX_SEED={seed}; none is impossible",
        chosen.len(),
        all.len()
    );
    chosen
}
