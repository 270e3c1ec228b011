//! Moves bytes between the registered memory regions of two peers.
//!
//! This crate knows *regions* (memory that both sides have mapped), *messages* and *channels*; no pages and no guests.
//! A [`Channel`] takes [`Op`]s and reports [`Event`]s; it has no thread of its own. The back ends are io_uring over TCP
//! and unix sockets, TLS over the same, RDMA, and an in-process network with seeded faults and virtual time.

mod backing;
pub mod channel;
pub mod connect;
pub mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod limits;
pub mod mem;
#[cfg(feature = "rdma")]
pub mod rdma;
pub mod region;
mod stream;
mod sys;
pub mod tls;
mod wake;

pub use channel::{Channel, Event, Op, Stats, SubmitError, Token};
pub use connect::{Address, Greeting, Identity, Listener, Peer, Pending, Security, connect};
pub use error::Error;
pub use region::{Access, Extent, Region, RegionId, Regions};
