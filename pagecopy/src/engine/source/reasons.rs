//! Why a migration goes back: whose fault, what happened, what to do.

use crate::engine::bitmap::Outside;
use crate::engine::end::End;
use crate::engine::{Failure, Fault};
use crate::memory::Run;
use crate::wire::AbortCode;

/// The destination gave up, in its words.
pub(super) fn by_peer(code: AbortCode, reason: &str) -> End {
    let (fault, remedy) = match code {
        AbortCode::Cancelled => (Fault::Operator, "nothing: the guest runs on here"),
        AbortCode::UnknownVm => (
            Fault::PeerHost,
            "run `pagecopy receive` for this guest at the destination, with the same --vm, then migrate again",
        ),
        AbortCode::MemoryMismatch => (
            Fault::Operator,
            "start the destination's QEMU with the same memory back ends: ids, sizes and page sizes",
        ),
        AbortCode::Busy => (
            Fault::Operator,
            "wait for the other migration of this guest, or cancel it",
        ),
        AbortCode::Qemu => (
            Fault::Qemu,
            "read the destination's QEMU log, start it anew, then migrate again",
        ),
        AbortCode::TimedOut => (
            Fault::Network,
            "check the network between the hosts, then migrate again",
        ),
        AbortCode::Incompatible => (
            Fault::Operator,
            "run versions of pagecopyd that fit on both hosts",
        ),
        AbortCode::NoMemory => (
            Fault::PeerHost,
            "free memory at the destination, then migrate again",
        ),
        AbortCode::VerifyFailed => (
            Fault::PeerHost,
            "keep the guest here and report this: its memory arrived changed",
        ),
        AbortCode::Protocol | AbortCode::NotConverging | AbortCode::Host | AbortCode::Aborted => (
            Fault::PeerHost,
            "read the destination's log; the guest runs on here",
        ),
    };
    let what = format!("the destination gave up: {reason}");
    End::by_peer(code, Failure::new(fault, what, remedy))
}

/// The host named pages that the guest does not have.
pub(super) fn outside(outside: Outside) -> End {
    let Run {
        block,
        first,
        pages,
    } = outside.0;
    End::new(
        AbortCode::Host,
        Failure::new(
            Fault::ThisHost,
            format!(
                "the kernel reported {pages} pages from page {first} of RAMBlock {}, which has fewer",
                block.0
            ),
            "report this; the guest runs on here",
        ),
    )
}

/// Something of ours did not end in time.
pub(super) fn stalled(what: &str) -> End {
    let remedy = "see what keeps this host busy, then migrate again";
    End::new(
        AbortCode::TimedOut,
        Failure::new(Fault::ThisHost, format!("{what} in time"), remedy),
    )
}

/// The destination answers on the control channel and did not do its part in time.
pub(super) fn peer_stalled(what: &str) -> End {
    let remedy = "see what keeps the destination host or the network busy, then migrate again";
    End::new(
        AbortCode::TimedOut,
        Failure::new(Fault::PeerHost, format!("{what} in time"), remedy),
    )
}

/// Why a migration that a daemon finds in its journal ended.
pub(super) fn restarted() -> Failure {
    Failure::new(
        Fault::ThisHost,
        "pagecopyd was started anew in the middle of the migration",
        "migrate again",
    )
}
