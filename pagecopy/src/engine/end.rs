//! How a migration ends without completing, as both engines pass it from where it is found to where it is dealt with.

use super::event::State;
use super::{Failure, Fault};
use crate::wire::AbortCode;

/// Why a migration ends, and what the peer is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct End {
    /// `Failed` or `Cancelled`.
    pub(super) state: State,
    pub(super) failure: Failure,
    /// For the peer; none when it said so itself.
    pub(super) code: Option<AbortCode>,
}

impl End {
    /// It failed on this side.
    pub(super) fn new(code: AbortCode, failure: Failure) -> End {
        End {
            state: State::Failed,
            failure,
            code: Some(code),
        }
    }

    /// This side's operator cancelled it.
    pub(super) fn cancelled(what: &str, remedy: &str) -> End {
        End {
            state: State::Cancelled,
            failure: Failure::new(Fault::Operator, what, remedy),
            code: Some(AbortCode::Cancelled),
        }
    }

    /// The peer broke the protocol.
    pub(super) fn protocol(what: impl Into<String>) -> End {
        let remedy = "run the same version of pagecopyd on both hosts; report this";
        End::new(
            AbortCode::Protocol,
            Failure::new(Fault::PeerHost, what, remedy),
        )
    }

    /// The peer gave up, with `code`.
    pub(super) fn by_peer(code: AbortCode, failure: Failure) -> End {
        let state = if code == AbortCode::Cancelled {
            State::Cancelled
        } else {
            State::Failed
        };
        End {
            state,
            failure,
            code: None,
        }
    }
}
