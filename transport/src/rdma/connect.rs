//! Making connections: rdma_cm carries the caller's words, with a secret that both sides have from elsewhere, in its
//! private data, and the answer back.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::connect::greeting::clip;
use crate::error::{Error, peer_text};
use crate::limits::MAX_CHANNELS;
use crate::rdma::channel::RdmaChannel;
use crate::rdma::memory::Memory;
use crate::rdma::receiver::RECEIVE_SLOTS;
use crate::rdma::sys::{CmEvent, EventKind, Id};

/// First bytes of what both sides say.
const MAGIC: [u8; 4] = *b"PGCR";
/// The version that this build speaks.
const VERSION: u16 = 1;
/// Bytes of a call: no more than 56 fit.
const CALL_LEN: usize = 48;
/// Bytes of the answer.
const ANSWER_LEN: usize = 8;
/// Bytes of a refusal's words: 148 fit with what is before them.
const REASON_LEN: usize = 120;
/// Calls that may wait to be accepted.
const BACKLOG: i32 = 128;

/// What the dialling side says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Known to both sides from a connection that they trust, and to nobody else.
    pub secret: [u8; 32],
    /// This channel.
    pub channel: u16,
    /// How many channels the connection has.
    pub channels: u16,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call")
            .field("channel", &self.channel)
            .field("channels", &self.channels)
            .finish_non_exhaustive()
    }
}

impl Call {
    /// Whether it holds this secret. Takes as long whatever differs.
    pub fn knows(&self, secret: &[u8; 32]) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.secret, secret).is_ok()
    }

    pub(super) fn encode(&self) -> [u8; CALL_LEN] {
        let mut out = [0; CALL_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6..8].copy_from_slice(&self.channel.to_le_bytes());
        out[8..10].copy_from_slice(&self.channels.to_le_bytes());
        out[10..12].copy_from_slice(&RECEIVE_SLOTS.to_le_bytes());
        out[12..44].copy_from_slice(&self.secret);
        let crc = crc32c::crc32c(&out[..44]);
        out[44..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a call, and how many sends the caller has receives for. What follows it is the library's padding. The error
    /// says which rule is broken.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Call, u16), &'static str> {
        let bytes: &[u8; CALL_LEN] = bytes.first_chunk().ok_or("a call that is cut short")?;
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[..4] != MAGIC {
            return Err("its first bytes are no call; it is no pagecopy daemon");
        }
        if crc32c::crc32c(&bytes[..44]).to_le_bytes() != bytes[44..] {
            return Err("the call's checksum is wrong");
        }
        if number(4) != VERSION {
            return Err("a call of another version");
        }
        let mut secret = [0; 32];
        secret.copy_from_slice(&bytes[12..44]);
        let call = Call {
            secret,
            channel: number(6),
            channels: number(8),
        };
        if call.channels == 0 || call.channels > MAX_CHANNELS || call.channel >= call.channels {
            return Err("a call with no channels, too many, or one beyond the last");
        }
        match number(10) {
            credits @ 1..=RECEIVE_SLOTS => Ok((call, credits)),
            _ => Err("a call with no receives, or more than there may be"),
        }
    }
}

fn answer() -> [u8; ANSWER_LEN] {
    let mut out = [0; ANSWER_LEN];
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[6..].copy_from_slice(&RECEIVE_SLOTS.to_le_bytes());
    out
}

fn decode_answer(bytes: &[u8]) -> Result<u16, Error> {
    let wrong = |text: &str| Error::PeerMisbehaved(text.to_owned());
    let bytes: &[u8; ANSWER_LEN] = bytes
        .first_chunk()
        .ok_or_else(|| wrong("an answer that is cut short"))?;
    if bytes[..4] != MAGIC {
        return Err(wrong("it does not answer like a pagecopy daemon"));
    }
    if u16::from_le_bytes([bytes[4], bytes[5]]) != VERSION {
        return Err(Error::PeerIncompatible(
            "it speaks another version over RDMA".to_owned(),
        ));
    }
    match u16::from_le_bytes([bytes[6], bytes[7]]) {
        credits @ 1..=RECEIVE_SLOTS => Ok(credits),
        _ => Err(wrong(
            "an answer with no receives, or more than there may be",
        )),
    }
}

/// Waits for calls at an address. If its device is removed, it waits for one that comes in its place.
pub struct Listener {
    /// None while there is no device.
    id: Option<Id>,
    address: SocketAddr,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Listener {
    /// Listens at an address of an RDMA device; port 0 is any.
    ///
    /// # Errors
    /// [`Error::Io`], of kind `NotFound` when this host has no RDMA device.
    pub fn bind(address: SocketAddr) -> Result<Listener, Error> {
        let id = Id::new()?;
        id.listen(address, BACKLOG)?;
        let address = SocketAddr::new(address.ip(), id.port());
        Ok(Listener {
            id: Some(id),
            address,
        })
    }

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Whether both listen at addresses of one device.
    pub fn shares_device(&self, other: &Listener) -> bool {
        let device = |it: &Listener| it.id.as_ref().and_then(Id::device);
        device(self).is_some() && device(self) == device(other)
    }

    /// The next call, if one comes in time.
    ///
    /// # Errors
    /// [`Error::Io`] when rdma_cm fails.
    pub fn accept(&mut self, timeout: Duration) -> Result<Option<Pending>, Error> {
        Listener::accept_any(std::slice::from_mut(self), timeout)
    }

    /// The next call at any of these, if one comes in time. Looks first whether devices that were removed are back.
    ///
    /// # Errors
    /// [`Error::Io`] when rdma_cm fails.
    pub fn accept_any(
        listeners: &mut [Listener],
        timeout: Duration,
    ) -> Result<Option<Pending>, Error> {
        let end = Instant::now() + timeout;
        for listener in listeners.iter_mut().filter(|it| it.id.is_none()) {
            if let Ok(again) = Listener::bind(listener.address) {
                *listener = again;
            }
        }
        loop {
            let ids: Vec<Option<&Id>> = listeners.iter().map(|it| it.id.as_ref()).collect();
            let Some((which, event)) = next_event(&ids, end)? else {
                return Ok(None);
            };
            if let Some(id) = event.request {
                return Ok(Some(Pending {
                    id,
                    private: event.private,
                }));
            }
            if event.kind == EventKind::DeviceRemoved {
                // It hears nothing more, and would keep its port.
                listeners[which].id = None;
            }
        }
    }
}

/// A call that nobody has looked at yet.
pub struct Pending {
    id: Id,
    private: Vec<u8>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl Pending {
    /// Answers. `admit` sees the call, its secret above all ([`Call::knows`]), and says what memory the channel is to use,
    /// or why the caller is turned away, which it is told. Blocks, at most for `deadline`.
    ///
    /// # Errors
    /// [`Error::Denied`] when `admit` refuses, [`Error::PeerMisbehaved`] when the call is none, [`Error::Io`] when the
    /// caller is gone.
    pub fn establish(
        self,
        deadline: Duration,
        admit: impl FnOnce(&Call) -> Result<Memory, String>,
    ) -> Result<(Call, RdmaChannel), Error> {
        let end = Instant::now() + deadline;
        let mut id = self.id;
        let (call, credits) = match Call::decode(&self.private) {
            Ok(call) => call,
            Err(text) => {
                id.reject(&[&MAGIC[..], text.as_bytes()].concat());
                return Err(Error::PeerMisbehaved(text.to_owned()));
            }
        };
        let memory = match admit(&call) {
            Ok(memory) => memory,
            Err(text) => {
                let short = &text[..text.floor_char_boundary(REASON_LEN)];
                id.reject(&[&MAGIC[..], clip(short).as_bytes()].concat());
                return Err(Error::Denied(text));
            }
        };
        id.settle()?;
        let channel = RdmaChannel::new(id, &memory, usize::from(credits))?;
        channel.id().accept(&answer())?;
        wait_for(channel.id(), EventKind::Established, end)?;
        Ok((call, channel))
    }
}

/// Dials `address` and says `call`. Blocks, at most for `deadline` in all.
///
/// # Errors
/// [`Error::Io`] when nobody answers, of kind `NotFound` when this host has no RDMA device; [`Error::Refused`] with the
/// peer's words.
pub fn connect(
    address: SocketAddr,
    call: &Call,
    memory: &Memory,
    deadline: Duration,
) -> Result<RdmaChannel, Error> {
    let end = Instant::now() + deadline;
    let milliseconds = i32::try_from(deadline.as_millis()).unwrap_or(i32::MAX);
    let id = Id::new()?;
    id.resolve_address(address, milliseconds)?;
    wait_for(&id, EventKind::AddressResolved, end)?;
    id.resolve_route(milliseconds)?;
    wait_for(&id, EventKind::RouteResolved, end)?;
    let mut channel = RdmaChannel::new(id, memory, 0)?;
    channel.id().connect(&call.encode())?;
    let event = wait_for(channel.id(), EventKind::Established, end)?;
    channel.set_credits(decode_answer(&event.private)?);
    Ok(channel)
}

/// The next event of one of these until `end`, and whose it is.
fn next_event(ids: &[Option<&Id>], end: Instant) -> Result<Option<(usize, CmEvent)>, Error> {
    loop {
        for (which, id) in ids.iter().enumerate() {
            let event = id.map(Id::next_event).transpose()?;
            if let Some(event) = event.flatten() {
                return Ok(Some((which, event)));
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let fds = ids.iter().filter_map(|id| id.and_then(Id::fd));
        let mut fds: Vec<_> = fds
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let left = Timespec::try_from(left).ok();
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("waiting for rdma_cm", &error.into())),
        }
    }
}

/// Waits for one event of a connection that is being made.
fn wait_for(id: &Id, wanted: EventKind, end: Instant) -> Result<CmEvent, Error> {
    let failed = |kind, message: String| Error::Io {
        what: "connecting over RDMA",
        kind,
        message,
    };
    while let Some((_, event)) = next_event(&[Some(id)], end)? {
        match event.kind {
            kind if kind == wanted => return Ok(event),
            EventKind::Rejected => return Err(rejected(&event)),
            EventKind::Other(_) => {}
            EventKind::Unreachable => {
                return Err(failed(
                    ErrorKind::HostUnreachable,
                    "the peer cannot be reached".to_owned(),
                ));
            }
            EventKind::Disconnected => {
                return Err(failed(
                    ErrorKind::ConnectionReset,
                    "the peer hung up".to_owned(),
                ));
            }
            kind => {
                let status = std::io::Error::from_raw_os_error(event.status.saturating_abs());
                return Err(failed(
                    ErrorKind::NotConnected,
                    format!("{kind:?}: {status} (does this address belong to an RDMA device?)"),
                ));
            }
        }
    }
    Err(failed(ErrorKind::TimedOut, "no answer in time".to_owned()))
}

/// The error of a call that was turned away: by the peer, with its words, or by its system, where nobody listens.
fn rejected(event: &CmEvent) -> Error {
    match event.private.strip_prefix(&MAGIC) {
        Some(text) => {
            let end = text
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(text.len());
            Error::Refused(peer_text(&text[..end]))
        }
        None => Error::Io {
            what: "connecting over RDMA",
            kind: ErrorKind::ConnectionRefused,
            message: "nobody listens there".to_owned(),
        },
    }
}
