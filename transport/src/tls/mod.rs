//! TLS 1.3 between peers that both show a certificate.
//!
//! rustls does the handshake and derives all keys; the records of the data phase are sealed and opened here, with the
//! keys that rustls gives out for that purpose (its `kernel` interface, made for kTLS). Two reasons, both from reading
//! rustls 0.23: its own record path copies and allocates twice per record in each direction, and it needs the buffer of
//! received bytes in hand while it encrypts, so that a channel could not receive while it sends.

mod alert;
pub(crate) mod handshake;
mod identity;
pub(crate) mod layer;
pub(crate) mod link;
pub(crate) mod record;
#[cfg(test)]
pub(crate) mod tests;
mod verify;

pub use self::identity::Identity;
pub use self::verify::dns_names;
