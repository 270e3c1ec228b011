//! What the benchmarks share: what can be compared, how it is written down, and how it is shown.
//!
//! `ways`, `work` and `link` say what a run is; [`record`] is the file that says what came out; [`report`] makes a page of
//! it for people. [`hosts`] are the two that guests are moved between; what does so is the program `bench` (`src/bin/bench`).

pub mod faults;
pub mod hosts;
pub mod link;
pub mod predictions;
pub mod rdma;
pub mod record;
pub mod report;
pub mod series;
pub mod stats;
pub mod ways;
pub mod work;

pub use self::stats::{Sample, medians, to_json};
