//! Making connections: dialling, accepting, and the greeting that starts each channel (WIRE.md, "Greeting").
//!
//! Everything here blocks, and everything is bounded by the deadline that the caller gives: a peer that connects and
//! says nothing costs one thread for that long and no more.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::channel::Channel;
use crate::error::Error;
use crate::region::Regions;
pub use crate::tls::Identity;

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
/// [`Error::Io`] when nobody answers, [`Error::Refused`] with the peer's words, [`Error::PeerIncompatible`] when only
/// one side uses TLS or no version fits, [`Error::Untrusted`] when the peer's certificate does not pass.
pub fn connect(
    _address: &Address,
    _security: &Security,
    _greeting: &Greeting,
    _regions: &Regions,
    _deadline: Duration,
) -> Result<(Box<dyn Channel>, Peer), Error> {
    Err(Error::Misuse(String::new()))
}

/// A socket that peers dial.
#[derive(Debug)]
pub struct Listener {}

impl Listener {
    /// Listens at `address`. A unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`Error::Io`]: the address is in use, not ours, or needs a privilege.
    pub fn bind(_address: &Address) -> Result<Listener, Error> {
        Err(Error::Misuse(String::new()))
    }

    /// The address, with the port that the kernel chose if it was 0.
    pub fn local_address(&self) -> Address {
        Address::Unix(PathBuf::new())
    }

    /// Waits at most `timeout` for a peer.
    ///
    /// # Errors
    /// [`Error::Io`]: the process is out of descriptors, or the like. The listener stays usable.
    pub fn accept(&self, _timeout: Duration) -> Result<Option<Pending>, Error> {
        Ok(None)
    }
}

/// A peer that has dialled and said nothing yet.
#[derive(Debug)]
pub struct Pending {}

impl Pending {
    /// The peer's address, for people.
    pub fn peer_address(&self) -> String {
        String::new()
    }

    /// Takes the peer's greeting and answers it. `admit` decides by greeting and certificate, and says which regions
    /// the channel gives access to; its error is told to the peer. Blocks, at most for `deadline` in all.
    ///
    /// # Errors
    /// As [`connect`]; with `admit`'s refusal it is [`Error::Misuse`] with the same words.
    pub fn establish(
        self,
        _security: &Security,
        _deadline: Duration,
        _admit: impl FnOnce(&Greeting, &Peer) -> Result<Regions, String>,
    ) -> Result<(Greeting, Peer, Box<dyn Channel>), Error> {
        Err(Error::Misuse(String::new()))
    }
}
