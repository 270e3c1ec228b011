//! A connection before its channel exists: the same calls with TLS and without.

use crate::channel::{Channel, Stats};
use crate::connect::greeting::{ANSWER_LEN, Answer, GREETING_LEN, Hello};
use crate::connect::socket::Bounded;
use crate::error::Error;
use crate::region::Regions;
use crate::stream::channel::StreamChannel;
use crate::stream::plain::Plain;
use crate::sys::uring::Uring;
use crate::tls::link::TlsLink;

/// A connection that greets.
pub(crate) enum Link {
    Plain(Bounded),
    Tls(Box<TlsLink>),
}

impl Link {
    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            Link::Plain(bounded) => bounded.write_all(bytes, "greeting the peer"),
            Link::Tls(tls) => tls.write_all(bytes),
        }
    }

    fn read_exact(&mut self, to: &mut [u8], what: &'static str) -> Result<(), Error> {
        let mut filled = 0;
        while filled < to.len() {
            filled += match self {
                Link::Plain(bounded) => bounded.read(&mut to[filled..], what)?,
                Link::Tls(tls) => tls.read(&mut to[filled..], what)?,
            };
        }
        Ok(())
    }

    /// Reads what the dialling side says first.
    pub(crate) fn read_greeting(&mut self) -> Result<Hello, Error> {
        let mut bytes = [0; GREETING_LEN];
        self.read_exact(&mut bytes, "waiting for the peer's greeting")?;
        Hello::decode(&bytes).map_err(|what| Error::PeerMisbehaved(what.to_owned()))
    }

    /// Reads what the accepting side says to it.
    pub(crate) fn read_answer(&mut self) -> Result<Answer, Error> {
        const WHAT: &str = "waiting for the peer's answer to the greeting";
        let misbehaved = |what: &str| Error::PeerMisbehaved(what.to_owned());
        let mut head = [0; ANSWER_LEN];
        self.read_exact(&mut head, WHAT)?;
        let mut text = vec![0; Answer::text_len(&head).map_err(misbehaved)?];
        self.read_exact(&mut text, WHAT)?;
        Answer::decode(&head, &text).map_err(misbehaved)
    }

    /// Closes so that the peer still gets what was written.
    pub(crate) fn close_gently(self) {
        match self {
            Link::Plain(bounded) => bounded.close_gently(),
            Link::Tls(tls) => tls.close_gently(),
        }
    }

    /// The channel, from the first frame on.
    pub(crate) fn into_channel(self, regions: Regions) -> Result<Box<dyn Channel>, Error> {
        match self {
            Link::Plain(bounded) => {
                let kind = if bounded.is_unix() { "unix" } else { "tcp" };
                let driver = Uring::new(bounded.into_socket()?)?;
                Ok(Box::new(StreamChannel::new(
                    driver,
                    Plain::new(),
                    regions,
                    kind,
                    Stats::default(),
                )))
            }
            Link::Tls(tls) => tls.into_channel(regions),
        }
    }
}
