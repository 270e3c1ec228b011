//! Sockets for the time before a channel exists: blocking calls, all of them bounded by one deadline.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use crate::connect::Address;
use crate::error::Error;
use crate::limits::MAX_DROPPED;

/// How long a peer may leave our bytes unacknowledged before the connection is given up.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection is probed after so long, and again at such intervals.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// How long a refused peer is given to read the reason.
const LINGER: Duration = Duration::from_millis(500);

/// The point in time at which a connection must have been made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(duration: Duration) -> Deadline {
        let now = Instant::now();
        Deadline(
            now.checked_add(duration)
                .unwrap_or_else(|| now + Duration::from_secs(86_400)),
        )
    }

    /// What is left, or the error that nothing is.
    fn left(self, what: &'static str) -> Result<Duration, Error> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(timed_out(what))
        } else {
            Ok(left)
        }
    }
}

/// A connected socket with a deadline.
#[derive(Debug)]
pub(crate) struct Bounded {
    socket: Socket,
    deadline: Deadline,
}

impl Bounded {
    /// Dials.
    pub(crate) fn dial(address: &Address, deadline: Deadline) -> Result<Bounded, Error> {
        const WHAT: &str = "connecting to the peer";
        let (domain, to) = socket_address(address)?;
        let socket = Socket::new(domain, Type::STREAM, None).map_err(|e| Error::io(WHAT, &e))?;
        socket
            .connect_timeout(&to, deadline.left(WHAT)?)
            .map_err(|e| Error::Unreached {
                kind: e.kind(),
                message: e.to_string(),
            })?;
        Bounded::new(socket, deadline)
    }

    /// Takes a connected socket.
    pub(crate) fn new(socket: Socket, deadline: Deadline) -> Result<Bounded, Error> {
        set_options(&socket).map_err(|e| Error::io("setting the socket's options", &e))?;
        Ok(Bounded { socket, deadline })
    }

    /// The first byte that the peer sends, left in place.
    pub(crate) fn peek(&self) -> Result<u8, Error> {
        const WHAT: &str = "waiting for the peer's greeting";
        let mut first = [0];
        loop {
            self.socket
                .set_read_timeout(Some(self.deadline.left(WHAT)?))
                .map_err(|e| Error::io(WHAT, &e))?;
            match rustix::net::recv(&self.socket, &mut first, RecvFlags::PEEK)
                .map_err(io::Error::from)
            {
                Ok((0, _)) => return Err(Error::Closed),
                Ok(_) => return Ok(first[0]),
                Err(e) => retry(WHAT, &e)?,
            }
        }
    }

    /// Reads at least one byte.
    pub(crate) fn read(&mut self, to: &mut [u8], what: &'static str) -> Result<usize, Error> {
        loop {
            self.socket
                .set_read_timeout(Some(self.deadline.left(what)?))
                .map_err(|e| Error::io(what, &e))?;
            match self.socket.read(to) {
                Ok(0) => return Err(Error::Closed),
                Ok(n) => return Ok(n),
                Err(e) => retry(what, &e)?,
            }
        }
    }

    /// Writes all.
    pub(crate) fn write_all(&mut self, mut bytes: &[u8], what: &'static str) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.socket
                .set_write_timeout(Some(self.deadline.left(what)?))
                .map_err(|e| Error::io(what, &e))?;
            match self.socket.send_with_flags(bytes, libc::MSG_NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) => retry(what, &e)?,
            }
        }
        Ok(())
    }

    /// Closes so that the peer still gets what was written: closing with unread bytes would reset the connection and
    /// take the reason away with it.
    pub(crate) fn close_gently(mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let end = Instant::now() + LINGER;
        if end < self.deadline.0 {
            self.deadline = Deadline(end);
        }
        let mut buffer = [0; 4096];
        let mut dropped = 0;
        while let Ok(n) = self.read(&mut buffer, "closing") {
            dropped += n;
            if dropped > MAX_DROPPED {
                break;
            }
        }
    }

    /// The socket, without time limits.
    pub(crate) fn into_socket(self) -> Result<Socket, Error> {
        const WHAT: &str = "preparing the socket";
        self.socket
            .set_read_timeout(None)
            .map_err(|e| Error::io(WHAT, &e))?;
        self.socket
            .set_write_timeout(None)
            .map_err(|e| Error::io(WHAT, &e))?;
        Ok(self.socket)
    }

    /// Whether this is a unix socket.
    pub(crate) fn is_unix(&self) -> bool {
        self.socket
            .local_addr()
            .is_ok_and(|address| address.is_unix())
    }
}

/// The address as the kernel takes it.
pub(crate) fn socket_address(address: &Address) -> Result<(Domain, SockAddr), Error> {
    match address {
        Address::Tcp(address) => Ok((Domain::for_address(*address), SockAddr::from(*address))),
        Address::Unix(path) => match SockAddr::unix(path) {
            Ok(to) => Ok((Domain::UNIX, to)),
            Err(e) => Err(Error::Misuse(format!(
                "{}: no path for a unix socket: {e}",
                path.display()
            ))),
        },
    }
}

/// Whether a unix socket's file has nobody behind it.
pub(crate) fn is_stale(path: &Path) -> bool {
    matches!(UnixStream::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused)
}

fn set_options(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    if !socket.local_addr()?.is_unix() {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
    }
    Ok(())
}

/// Goes on after an interruption; everything else is an error.
fn retry(what: &'static str, error: &io::Error) -> Result<(), Error> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => Err(timed_out(what)),
        _ => Err(Error::io(what, error)),
    }
}

fn timed_out(what: &'static str) -> Error {
    Error::Io {
        what,
        kind: io::ErrorKind::TimedOut,
        message: "the peer did not answer in time".to_owned(),
    }
}
