//! Making connections: dialling, accepting, and the greeting that starts each channel (WIRE.md, "Greeting").

use std::path::PathBuf;
use std::net::SocketAddr;

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
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
