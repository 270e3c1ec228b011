//! Simulation of both engines over the `mem` transport: virtual time, one seed, and a checker that is always on.
//!
//! The engines, the journal's format, the wire messages and the splitting of batches are the real ones. Around them are a
//! guest whose pages know their versions (`ram`, `guest`), QEMUs, disks, daemons that can die at any output (`source`,
//! `destination`) and a network that stalls, falls silent and breaks (`network`). A run is a function of its theme and
//! seed: no clock, no thread, no hash order. `mistake` lists classic mistakes that can be planted to show that the
//! checker finds them.

mod agenda;
mod arrived;
mod checker;
mod clock;
mod destination;
mod disk;
mod driver;
mod env;
mod fault;
mod generate;
mod guest;
mod lane;
mod mistake;
mod names;
mod network;
mod plan;
mod qemu;
mod ram;
mod rng;
mod shrink;
mod source;
mod survey;
mod sys;
mod tally;
mod trace;
mod world;

pub use checker::{CHANNEL_LIMIT, Violation};
pub use fault::Wish;
pub use mistake::Mistake;
pub use names::{Name, OUTPUTS, POSTCOPY_OUTPUTS};
pub use plan::{Plan, Side, Theme};
pub(crate) use rng::Rng;
pub use shrink::shrink;
pub use survey::{Broken, Survey, broken};
pub use tally::{Crash, Happened, Tally};
pub use world::Outcome;

use world::World;

/// Runs a plan, with `mistake` planted if one is given.
pub fn run(plan: &Plan, mistake: Option<Mistake>) -> Outcome {
    World::new(plan, mistake, false).run()
}

/// The same run again, with the trace of all that happened.
pub fn run_traced(plan: &Plan, mistake: Option<Mistake>) -> Outcome {
    World::new(plan, mistake, true).run()
}
