//! How a connection breaks, as a session takes it.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use transport::Error;

use crate::failure::{Failure, Fault};

/// When a data channel breaks, the peer's reason may still be on its way on the control channel: this long it may take.
const REASON_GRACE: Duration = Duration::from_millis(30);

/// A data channel that broke: what to say if no better reason comes. None has, to begin with.
#[derive(Debug, Default)]
pub(crate) struct Broken(Option<(Instant, Failure)>);

impl Broken {
    /// A data channel broke. The first reason counts.
    pub(crate) fn set(&mut self, error: &Error) {
        let at = Instant::now() + REASON_GRACE;
        self.0.get_or_insert((at, link_failure(error)));
    }

    /// What was set, and forgets it.
    pub(crate) fn take(&mut self) -> Option<Failure> {
        self.0.take().map(|(_, failure)| failure)
    }

    /// Comes when no better reason is waited for any more; never, while no channel has broken. Borrows
    /// nothing, so that the session may change while it is waited for.
    pub(crate) fn overdue(&self) -> impl Future<Output = ()> + use<> {
        let at = self.0.as_ref().map(|(at, _)| *at);
        async move {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }
}

/// Why a connection could not be made or broke, as a failure.
pub(crate) fn link_failure(error: &Error) -> Failure {
    let (fault, remedy) = match error {
        Error::Closed => (
            Fault::PeerHost,
            "see the other host's pagecopyd: it ended, or gave up (its log says why)",
        ),
        Error::Io { .. } | Error::Unreached { .. } => (
            Fault::Network,
            "check the network and that pagecopyd runs on the other host",
        ),
        Error::NoMemory(_) => (
            Fault::ThisHost,
            "free memory on this host (the file system of the RAM files is full?)",
        ),
        Error::PeerMisbehaved(_) => (
            Fault::PeerHost,
            "run the same version of pagecopyd on both hosts",
        ),
        Error::PeerIncompatible(_) => (
            Fault::Operator,
            "use TLS on both hosts or on neither, and versions of pagecopyd that fit",
        ),
        Error::Refused(_) => (
            Fault::PeerHost,
            "see the other host's configuration (its [tls] allow list) and log",
        ),
        Error::Denied(_) => (
            Fault::PeerHost,
            "see what the peer asked for; it was told the same",
        ),
        Error::Untrusted(_) => (
            Fault::Operator,
            "check [tls] of both hosts: certificates signed by the other's ca, in date, with a DNS name on its allow list",
        ),
        Error::Misuse(_) => (Fault::ThisHost, "report this"),
    };
    Failure::new(fault, error.to_string(), remedy)
}
