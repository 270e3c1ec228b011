//! pagecopyd, the migration service of a host, and pagecopy, its command line.
//!
//! This crate is wiring: it connects QEMU, the host half of `pagecopy`, the channels of `transport` and the engines,
//! and decides nothing about a migration by itself.

pub mod api;
pub mod arguments;
pub mod cli;
pub mod config;
pub mod dial;
pub mod failure;
pub mod feed;
pub mod guests;
mod hooks;
pub mod lane;
pub mod limits;
mod listener;
pub mod log;
pub mod migrations;
mod names;
mod nic;
pub mod preflight;
pub mod privilege;
pub mod pull;
pub mod qemu;
pub mod qmp;
pub mod queue;
pub mod quota;
pub mod rdma;
pub mod reload;
pub mod seldom;
pub mod service;
pub mod session;
pub mod spawn;
pub mod start;
#[cfg(feature = "steps")]
mod steps;
pub mod store;
pub mod sys;
mod systemd;
pub mod units;
