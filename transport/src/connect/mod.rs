//! Making connections: dialling, accepting, and the greeting that starts each channel (WIRE.md, "Greeting").
//!
//! Everything here blocks, and everything is bounded by the deadline that the caller gives: a peer that connects and
//! says nothing costs one thread for that long and no more.

pub(crate) mod greeting;
mod link;
mod listener;
pub(crate) mod socket;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::greeting::{Answer, Code, Hello};
use self::link::Link;
pub use self::listener::{Listener, Pending};
use self::socket::{Bounded, Deadline};
use crate::channel::Channel;
use crate::error::Error;
use crate::region::Regions;
use crate::tls::handshake;
pub use crate::tls::{Identity, dns_names};

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What the dialling side says first on every channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Names the connection: the same on all its channels. Random, chosen by the dialling side for each connection.
    pub session: [u8; 16],
    /// This channel; 0 is the control channel.
    pub channel: u16,
    /// How many channels the connection has, the control channel included.
    pub channels: u16,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its address, for people.
    pub address: String,
    /// The DNS names of its certificate; empty without TLS.
    pub names: Vec<String>,
}

/// How the peers trust each other and keep what they send private.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all.
    Plaintext,
    /// Mutual TLS 1.3.
    Tls(Arc<Identity>),
}

/// Dials `address` and greets. Blocks, at most for `deadline` in all.
///
/// # Errors
/// [`Error::Unreached`] when nobody answers, [`Error::Refused`] with the peer's words, [`Error::PeerIncompatible`] when only
/// one side uses TLS or no version fits, [`Error::Untrusted`] when the peer's certificate does not pass.
pub fn connect(
    address: &Address,
    security: &Security,
    greeting: &Greeting,
    regions: &Regions,
    deadline: Duration,
) -> Result<(Box<dyn Channel>, Peer), Error> {
    let bounded = Bounded::dial(address, Deadline::after(deadline))?;
    let (mut link, names) = match security {
        Security::Plaintext => (Link::Plain(bounded), Vec::new()),
        Security::Tls(identity) => {
            let (tls, names) = handshake::client(bounded, identity)?;
            (Link::Tls(tls), names)
        }
    };
    // A peer that refuses may close before it has read the greeting: its answer tells more than our failure to send.
    let greeted = link.write_all(&Hello::new(*greeting).encode());
    let answer = link
        .read_answer()
        .map_err(|error| match (&error, greeted) {
            (Error::Closed | Error::Io { .. }, Err(earlier)) => earlier,
            _ => error,
        })?;
    match answer.code {
        Code::Welcome => {}
        Code::NeedsTls | Code::NoTls | Code::Version => {
            return Err(Error::PeerIncompatible(answer.text));
        }
        Code::Refused | Code::Untrusted | Code::Malformed => {
            return Err(Error::Refused(answer.text));
        }
    }
    let peer = Peer {
        address: address.to_string(),
        names,
    };
    Ok((link.into_channel(regions.clone())?, peer))
}

/// Tells the peer why it is turned away, and gives it time to read that.
fn turn_away(mut link: Link, code: Code, text: &str) {
    if link
        .write_all(&Answer::refusal(code, text).encode())
        .is_ok()
    {
        link.close_gently();
    }
}
