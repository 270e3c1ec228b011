//! Why the source gave up, as this side tells it: whose fault, what happened, what to do.

use crate::engine::end::End;
use crate::engine::{Failure, Fault};
use crate::wire::AbortCode;

/// The source gave up, in its words.
pub(super) fn by_peer(code: AbortCode, reason: &str) -> End {
    let fault = match code {
        AbortCode::Cancelled => Fault::Operator,
        AbortCode::NotConverging => Fault::Guest,
        AbortCode::Qemu => Fault::Qemu,
        _ => Fault::PeerHost,
    };
    let remedy = "nothing here: the guest runs on at the source, which says more";
    let what = format!("the source gave up: {reason}");
    End::by_peer(code, Failure::new(fault, what, remedy))
}
