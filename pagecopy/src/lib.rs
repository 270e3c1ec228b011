//! Decides what of a running guest's memory moves, and when.
//!
//! The crate has two halves. [`engine`], [`preflight`] and [`wire`] are pure: they take inputs and the time, and return outputs; no I/O,
//! clock, thread, randomness or hash order is in them (this crate's `clippy.toml` and a build without features prove it).
//! `host` (feature `host`) is the machine's side: attaching to QEMU, tracking dirty pages, placing pages, testing for
//! zeroes.

pub mod engine;
#[cfg(feature = "host")]
#[allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the host half touches the machine: clocks, threads, files"
)]
pub mod host;
pub mod limits;
pub mod memory;
pub mod preflight;
pub mod wire;
