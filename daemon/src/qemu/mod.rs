//! QEMU as the sessions use it: what it is made of, and the few orders that a migration gives it.
//!
//! - [`discover`]: a running or waiting QEMU's version, process and RAMBlocks, or why it cannot be migrated.
//! - [`settings`]: migration capabilities and parameters, set for the time of a migration and put back.
//! - [`faults`]: whether its page faults can be served, and what it is lent for that.
//! - [`outgoing`]: stop, save, resume at the source.
//! - [`incoming`]: load, run at the destination.
//! - `drives`: its disks.
//! - `vcpus`: which threads run its guest.
//! - `parts`: what it has plugged in now, compared with what it was started with.

pub mod discover;
pub(crate) mod drives;
pub mod faults;
pub mod incoming;
pub mod maps;
mod memdev;
pub mod outgoing;
pub(crate) mod parts;
pub mod settings;
pub(crate) mod status;
pub(crate) mod vcpus;

pub use discover::{Block, Guest};
