//! Failures as the whole daemon speaks of them: whose fault, what happened, what to do.
//!
//! The type is the engine's. This file adds its text for people and the short forms that the daemon needs.

use std::fmt;

pub use pagecopy::engine::{Failure, Fault};

/// A result that fails with whose fault it is.
pub type Result<T> = std::result::Result<T, Failure>;

/// A failure of this host: its kernel, memory, disk or privileges.
pub fn host(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
    Failure::new(Fault::ThisHost, what, remedy)
}

/// A failure of QEMU.
pub fn qemu(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
    Failure::new(Fault::Qemu, what, remedy)
}

/// Something that the operator asked for and that cannot be.
pub fn operator(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
    Failure::new(Fault::Operator, what, remedy)
}

/// Whose fault it is, in words.
pub fn fault_words(fault: Fault) -> &'static str {
    match fault {
        Fault::Operator => "the request",
        Fault::ThisHost => "this host",
        Fault::PeerHost => "the other host",
        Fault::Network => "the network",
        Fault::Guest => "the guest",
        Fault::Qemu => "QEMU",
    }
}

/// Shows a failure to a person on one line.
pub struct Shown<'a>(pub &'a Failure);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (fault: {})", self.0.what, fault_words(self.0.fault))?;
        if !self.0.remedy.is_empty() {
            write!(f, "; what to do: {}", self.0.remedy)?;
        }
        Ok(())
    }
}
