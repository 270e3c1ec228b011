//! RDMA: reliable connections made by rdma_cm.
//!
//! A write goes straight from this side's memory into the peer's and a read the other way, by the devices alone: the peer's
//! CPU takes no part in either. Messages are sent into receives that the other side has offered before, by credits, so that
//! none ever finds the receiver not ready. Keys to the peer's memory are asked for in messages, chunk by chunk, and end
//! with the region.
//!
//! ```text
//! dialling side                 listening side
//! call (secret, channel)   ->                      private data of rdma_cm
//!                          <-   answer
//! KEY_WANTED               ->
//!                          <-   KEY                sends
//! WRITE, WRITE, ...        ->
//! MESSAGE                  ->                      a barrier: the writes before it have landed
//!                          <-   CREDITS
//! ```
//!
//! Bytes are not encrypted. Who calls is known by the secret, which both sides have from a connection that they trust.

mod channel;
mod connect;
mod frame;
mod memory;
mod receiver;
mod sender;
mod silence;
mod slots;
mod sys;
#[cfg(test)]
mod tests;

pub use self::channel::RdmaChannel;
pub use self::connect::{Call, Listener, Pending, connect};
pub use self::memory::{Memory, Settings};
use crate::error::Error;

/// Whether this host can use RDMA.
///
/// # Errors
/// [`Error::Io`] of kind `NotFound`, with what is missing: the libraries, or a device.
pub fn available() -> Result<(), Error> {
    sys::available()
}

/// Whether every RDMA device of this host fetches pages on demand, so that none of a guest's is pinned for it. Found out by
/// trying, with a page.
pub fn pages_on_demand() -> bool {
    let devices = sys::devices();
    !devices.is_empty() && devices.into_iter().all(memory::fetches)
}
