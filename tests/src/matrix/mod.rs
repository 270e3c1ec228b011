//! The fault matrix: every fault at every step of a migration of a real guest.
//!
//! A cell is data, a [`Step`] and a [`Fault`]; what may come of it follows from one function ([`Cell::allows`]) by where
//! the step lies with regard to the commit. [`run`] migrates a guest, holds the daemon at the step, inflicts the fault,
//! lets go, heals what was broken, and then checks that exactly one guest runs where one may, whole, that nothing was
//! left behind, and that the next attempt succeeds. The same is done to post-copies, which have steps of their own.

mod cell;
mod checks;
mod choice;
mod postcopy;
mod run;
mod scene;

pub use cell::{Cell, End, Fault, Moment, STEPS, Step, Way, cells};
pub use choice::choose;
pub use postcopy::{POSTCOPY_STEPS, postcopy_cells};
pub use run::run;
