//! An in-process network with virtual time and seeded faults, for simulations.
//!
//! Nothing here blocks, reads a clock or draws from any source of chance but the seed: two runs that make the same calls
//! see the same events. Channels obey the same rules as the others, and are worse than any real one where the rules
//! allow it: a write is read from the source's memory and placed piece by piece, each piece at a time of its own, so that
//! a page that changes meanwhile arrives torn.

mod channel;
mod network;
mod pipe;
mod random;
mod state;
#[cfg(test)]
mod tests;

pub use self::channel::MemChannel;
pub use self::network::{Faults, Network};
