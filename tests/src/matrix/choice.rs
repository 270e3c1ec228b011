//! Which cells run: all, one by its name, or a random tenth in which each step and each fault occurs.

use std::collections::HashSet;

use super::cell::{Cell, Fault, Step};
use crate::sim::Rng;

/// One cell in so many.
const SHARE: usize = 10;

/// A tenth of `cells`, by `seed`: each step and each fault is in it as often as the others, give or take one.
///
/// Walks along the steps and the faults at once, each shuffled anew when it is used up, so that the numbers of both are
/// level at any length.
pub fn choose(cells: &[Cell], seed: u64) -> Vec<Cell> {
    let mut rng = Rng::new(seed);
    let (all_steps, all_faults) = axes(cells);
    let count = (cells.len() / SHARE).max(all_steps.len());
    let count = count.max(all_faults.len());
    let mut chosen = Vec::new();
    let mut seen = HashSet::new();
    let (mut steps, mut faults) = (Vec::new(), Vec::new());
    // A pair that was chosen already is left out; there are ten times as many as are wanted.
    for _ in 0..2 * count {
        let step = draw(&mut steps, &all_steps, &mut rng);
        let fault = draw(&mut faults, &all_faults, &mut rng);
        let cell = Cell { step, fault };
        if chosen.len() < count && seen.insert(cell.to_string()) {
            chosen.push(cell);
        }
    }
    chosen
}

/// The steps and the faults that occur.
fn axes(cells: &[Cell]) -> (Vec<Step>, Vec<Fault>) {
    let (mut steps, mut faults) = (Vec::new(), Vec::new());
    for cell in cells {
        if !steps.contains(&cell.step) {
            steps.push(cell.step);
        }
        if !faults.contains(&cell.fault) {
            faults.push(cell.fault);
        }
    }
    (steps, faults)
}

fn draw<T: Copy>(left: &mut Vec<T>, all: &[T], rng: &mut Rng) -> T {
    if left.is_empty() {
        left.extend_from_slice(all);
        rng.shuffle(left);
    }
    left.pop().unwrap_or(all[0])
}

#[cfg(test)]
mod tests {
    use super::super::cell::cells;
    use super::super::postcopy::postcopy_cells;
    use super::*;

    #[test]
    fn a_tenth_holds_every_step_and_every_fault() {
        for all in [cells(), postcopy_cells()] {
            let (steps, faults) = axes(&all);
            for seed in 0..50 {
                let chosen = choose(&all, seed);
                assert_eq!(chosen.len(), all.len() / SHARE);
                for step in &steps {
                    assert!(chosen.iter().any(|cell| cell.step == *step), "{step}");
                }
                for fault in &faults {
                    assert!(chosen.iter().any(|cell| cell.fault == *fault), "{fault}");
                }
            }
            assert_eq!(choose(&all, 7), choose(&all, 7));
            assert_ne!(choose(&all, 7), choose(&all, 8));
        }
    }
}
