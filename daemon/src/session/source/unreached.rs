//! An attempt that made no connection: the destination's pagecopyd may be there all the same, and an operator who says that it
//! is fenced is wrong then.

use pagecopy::engine::source::Input;

use crate::dial::{Target, resolve};
use crate::failure::{Failure, Fault};

/// Why there is no connection.
pub(super) struct Unreached {
    /// In words.
    pub(super) what: String,
    /// Somebody answers at that address: by a refusal, a certificate, or the end of what had begun.
    pub(super) answers: bool,
}

impl Unreached {
    /// What came of dialling `target`.
    pub(super) async fn by(failure: Failure, target: &Target) -> Unreached {
        let answers = match failure.fault {
            Fault::PeerHost => true,
            // Certificates or versions that do not fit were shown by somebody, but for a name that is not known.
            Fault::Operator => resolve(&target.to).await.is_ok(),
            Fault::ThisHost | Fault::Network | Fault::Guest | Fault::Qemu => false,
        };
        Unreached {
            what: failure.what,
            answers,
        }
    }
}

impl From<Unreached> for Input {
    fn from(unreached: Unreached) -> Input {
        match unreached.answers {
            true => Input::ReconnectRefused(unreached.what),
            false => Input::ReconnectFailed(unreached.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::operator;
    use crate::session::link_failure;
    use transport::{Error, Security};

    async fn answers(to: &str, failure: Failure) -> bool {
        let target = Target {
            to: to.to_owned(),
            security: crate::reload::Trust::new(Security::Plaintext),
            rdma: None,
            names: Vec::new(),
        };
        Unreached::by(failure, &target).await.answers
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer_and_a_host_that_cannot_be_reached_is_none() {
        let here = "127.0.0.1:1";
        for error in [
            Error::Closed,
            Error::Refused("full".into()),
            Error::Untrusted("another name".into()),
            Error::PeerIncompatible("no TLS".into()),
            Error::PeerMisbehaved("no greeting".into()),
        ] {
            assert!(answers(here, link_failure(&error)).await, "{error}");
        }
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let unreachable = Error::io("connect", &refused);
        assert!(!answers(here, link_failure(&unreachable)).await);
        let unknown = operator("the host is not known", "");
        assert!(!answers("no-such-host.invalid:1", unknown).await);
    }
}
