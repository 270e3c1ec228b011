//! The accepting side.

use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Socket, Type};

use crate::channel::Channel;
use crate::connect::greeting::{Answer, Code, Hello, MAGIC, VERSION_MAX, VERSION_MIN};
use crate::connect::link::Link;
use crate::connect::socket::{Bounded, Deadline, is_stale, socket_address};
use crate::connect::{Address, Greeting, Peer, Security, turn_away};
use crate::error::Error;
use crate::region::Regions;
use crate::tls::handshake;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;
/// First byte of a TLS connection: the type of a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

const NEEDS_TLS: &str =
    "this daemon only speaks TLS: configure [tls] (ca, cert, key, allow) on your side, too";
const NO_TLS: &str =
    "the peer does not use TLS: configure [tls] on its side, too, or on neither side";

/// A socket that peers dial.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

impl Listener {
    /// Listens at `address`. A unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`Error::Io`]: the address is in use, not ours, or needs a privilege.
    pub fn bind(address: &Address) -> Result<Listener, Error> {
        const WHAT: &str = "listening for peers";
        let (domain, to) = socket_address(address)?;
        let socket = Socket::new(domain, Type::STREAM, None).map_err(|e| Error::io(WHAT, &e))?;
        match address {
            Address::Tcp(_) => socket
                .set_reuse_address(true)
                .map_err(|e| Error::io(WHAT, &e))?,
            Address::Unix(path) if is_stale(path) => {
                std::fs::remove_file(path)
                    .map_err(|e| Error::io("removing a stale unix socket", &e))?;
            }
            Address::Unix(_) => {}
        }
        socket.bind(&to).map_err(|e| Error::io(WHAT, &e))?;
        socket.listen(BACKLOG).map_err(|e| Error::io(WHAT, &e))?;
        socket
            .set_nonblocking(true)
            .map_err(|e| Error::io(WHAT, &e))?;
        let address = match address {
            Address::Unix(path) => Address::Unix(path.clone()),
            Address::Tcp(wanted) => {
                let got = socket.local_addr().map_err(|e| Error::io(WHAT, &e))?;
                Address::Tcp(got.as_socket().unwrap_or(*wanted))
            }
        };
        Ok(Listener { socket, address })
    }

    /// The address, with the port that the kernel chose if it was 0.
    pub fn local_address(&self) -> Address {
        self.address.clone()
    }

    /// Waits at most `timeout` for a peer.
    ///
    /// # Errors
    /// [`Error::Io`]: the process is out of descriptors, or the like. The listener stays usable.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Pending>, Error> {
        const WHAT: &str = "accepting a peer";
        let timeout = Timespec::try_from(timeout).ok();
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut ready, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(Error::io(WHAT, &errno.into())),
        }
        match self.socket.accept() {
            Ok((socket, from)) => {
                let address = match from.as_socket() {
                    Some(address) => address.to_string(),
                    None => self.address.to_string(),
                };
                Ok(Some(Pending { socket, address }))
            }
            // The peer has gone again.
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(Error::io(WHAT, &e)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            let path: &PathBuf = path;
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A peer that has dialled and said nothing yet.
#[derive(Debug)]
pub struct Pending {
    socket: Socket,
    address: String,
}

impl Pending {
    /// The peer's address, for people.
    pub fn peer_address(&self) -> String {
        self.address.clone()
    }

    /// Takes the peer's greeting and answers it. `admit` decides by greeting and certificate, and says which regions
    /// the channel gives access to; its error is told to the peer. Blocks, at most for `deadline` in all and half a
    /// second more when the peer is turned away.
    ///
    /// # Errors
    /// As [`connect`](crate::connect::connect); [`Error::Denied`] with `admit`'s words when that refused.
    pub fn establish(
        self,
        security: &Security,
        deadline: Duration,
        admit: impl FnOnce(&Greeting, &Peer) -> Result<Regions, String>,
    ) -> Result<(Greeting, Peer, Box<dyn Channel>), Error> {
        let bounded = Bounded::new(self.socket, Deadline::after(deadline))?;
        let (mut link, names) = secure(bounded, security)?;
        let hello = match link.read_greeting() {
            Ok(hello) => hello,
            Err(error) => {
                if let Error::PeerMisbehaved(text) = &error {
                    turn_away(link, Code::Malformed, text);
                }
                return Err(error);
            }
        };
        let Some(version) = hello.common_version() else {
            let text = no_common_version(&hello);
            turn_away(link, Code::Version, &text);
            return Err(Error::PeerIncompatible(text));
        };
        let peer = Peer {
            address: self.address,
            names,
        };
        let regions = match admit(&hello.greeting, &peer) {
            Ok(regions) => regions,
            Err(text) => {
                turn_away(link, Code::Refused, &text);
                return Err(Error::Denied(text));
            }
        };
        link.write_all(
            &Answer {
                code: Code::Welcome,
                version,
                text: String::new(),
            }
            .encode(),
        )?;
        Ok((hello.greeting, peer, link.into_channel(regions)?))
    }
}

/// Finds out from the first byte whether the peer means what we mean, and shakes hands.
fn secure(bounded: Bounded, security: &Security) -> Result<(Link, Vec<String>), Error> {
    let first = bounded.peek()?;
    match security {
        Security::Plaintext if first == TLS_HANDSHAKE => {
            turn_away(Link::Plain(bounded), Code::NoTls, NO_TLS);
            let text = "the peer speaks TLS and this daemon does not: configure [tls] here, too, or on neither side";
            Err(Error::PeerIncompatible(text.to_owned()))
        }
        Security::Plaintext => Ok((Link::Plain(bounded), Vec::new())),
        Security::Tls(_) if first == MAGIC[0] => {
            turn_away(Link::Plain(bounded), Code::NeedsTls, NEEDS_TLS);
            let text = "the peer does not use TLS and this daemon only speaks TLS: configure [tls] on its side, too";
            Err(Error::PeerIncompatible(text.to_owned()))
        }
        Security::Tls(identity) => match handshake::server(bounded, identity) {
            Ok((tls, names)) => Ok((Link::Tls(tls), names)),
            Err((Some(tls), error)) => {
                turn_away(Link::Tls(tls), Code::Untrusted, &error.to_string());
                Err(error)
            }
            Err((None, error)) => Err(error),
        },
    }
}

fn no_common_version(hello: &Hello) -> String {
    format!(
        "the dialling side speaks transport versions {} to {}, the listening side {VERSION_MIN} to {VERSION_MAX}: \
         update the older of the two",
        hello.version_min, hello.version_max
    )
}
