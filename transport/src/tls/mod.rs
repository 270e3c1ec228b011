//! TLS 1.3 between peers that both show a certificate.

pub(crate) mod handshake;
mod identity;
pub(crate) mod link;

pub use self::identity::Identity;
