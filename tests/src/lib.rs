//! Tests of the whole: real guests moved between real daemons, and simulations of both engines.

pub mod matrix;
pub mod real;
/// Simulation of both engines over the `mem` transport, with virtual time and seeds.
pub mod sim;
