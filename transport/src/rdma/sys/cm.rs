//! rdma_cm: identifiers, each with an event channel of its own, and what happens to them.

use std::net::SocketAddr;
use std::ptr;

use rustix::fd::BorrowedFd;
use socket2::SockAddr;

use super::bindings::{self, CmId, ConnParam, EventChannel, PortAttr};
use super::verbs::Device;
use super::{checked, last_error, library};
use crate::error::Error;

const PS_TCP: i32 = 0x0106;
/// As many reads at a time as the device can, and no more than the peer's (`RDMA_MAX_RESP_RES`, `RDMA_MAX_INIT_DEPTH`). A
/// number would be refused by each device that can do less.
const MOST_READS: u8 = 0xff;

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT`: how long a device waits for an answer before it sends again.
const ACK_TIMEOUT: (i32, i32) = (0, 3);
/// 4.096 us times 2 to this: 134 ms. With [`RETRIES`] a peer that is not there is noticed within about a second. rdma_cm would
/// take four times that, or more.
const ACK_EXPONENT: u8 = 15;
const RETRIES: u8 = 7;
/// `IBV_PORT_ACTIVE`.
const PORT_ACTIVE: i32 = 4;

/// What rdma_cm reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) enum EventKind {
    AddressResolved,
    RouteResolved,
    Request,
    Established,
    Rejected,
    Unreachable,
    Disconnected,
    DeviceRemoved,
    /// What needs no action.
    Other(i32),
    /// What ends the attempt.
    Failed(i32),
}

/// An event, with copies of all that it points to.
pub(in crate::rdma) struct CmEvent {
    pub(in crate::rdma) kind: EventKind,
    pub(in crate::rdma) status: i32,
    pub(in crate::rdma) private: Vec<u8>,
    /// The new connection of a request. It has no event channel of its own yet.
    pub(in crate::rdma) request: Option<Id>,
}

struct Events(*mut EventChannel);

impl Events {
    fn new() -> Result<Events, Error> {
        let library = library()?;
        // SAFETY: no arguments.
        let channel = unsafe { (library.rdma_create_event_channel)() };
        if channel.is_null() {
            return Err(last_error("opening rdma_cm (is rdma_ucm loaded?)"));
        }
        let events = Events(channel);
        let fd = events.fd();
        let flags =
            rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io("preparing rdma_cm", &e.into()))?;
        rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| Error::io("preparing rdma_cm", &e.into()))?;
        Ok(events)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as `self`, and its descriptor as long as it.
        unsafe { BorrowedFd::borrow_raw((*self.0).fd) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Ok(library) = library() {
            // SAFETY: made by `new`, and its identifier is gone: see the order of `Id`'s drop.
            unsafe { (library.rdma_destroy_event_channel)(self.0) }
        }
    }
}

/// An identifier, which is a listener or one end of a connection.
pub(in crate::rdma) struct Id {
    id: *mut CmId,
    events: Option<Events>,
}

// SAFETY: librdmacm's objects may be used by any thread, one at a time; `Id` is not `Sync`.
unsafe impl Send for Id {}

impl Id {
    /// A new one.
    pub(in crate::rdma) fn new() -> Result<Id, Error> {
        let library = library()?;
        let events = Events::new()?;
        let mut id = ptr::null_mut();
        // SAFETY: the event channel is alive, and outlives the identifier.
        let result =
            unsafe { (library.rdma_create_id)(events.0, &raw mut id, ptr::null_mut(), PS_TCP) };
        checked("making an rdma_cm identifier", result)?;
        Ok(Id {
            id,
            events: Some(events),
        })
    }

    /// Listens at `address`.
    pub(in crate::rdma) fn listen(&self, address: SocketAddr, backlog: i32) -> Result<(), Error> {
        let library = library()?;
        let address = SockAddr::from(address);
        // SAFETY: the address is read during the call only.
        let result =
            unsafe { (library.rdma_bind_addr)(self.id, address.as_ptr().cast_mut().cast()) };
        checked("binding an RDMA listener", result)?;
        // SAFETY: the identifier is alive.
        checked("listening for RDMA", unsafe {
            (library.rdma_listen)(self.id, backlog)
        })
    }

    /// The port that it is bound to.
    pub(in crate::rdma) fn port(&self) -> u16 {
        library().map_or(0, |library| {
            // SAFETY: the identifier is alive.
            u16::from_be(unsafe { (library.rdma_get_src_port)(self.id) })
        })
    }

    /// Gives the connection of a request an event channel of its own.
    pub(in crate::rdma) fn settle(&mut self) -> Result<(), Error> {
        let events = Events::new()?;
        // SAFETY: both are alive.
        checked("taking over an RDMA connection", unsafe {
            (library()?.rdma_migrate_id)(self.id, events.0)
        })?;
        self.events = Some(events);
        Ok(())
    }

    /// Starts to look for the device that leads to `address`.
    pub(in crate::rdma) fn resolve_address(
        &self,
        address: SocketAddr,
        milliseconds: i32,
    ) -> Result<(), Error> {
        let address = SockAddr::from(address);
        let address = address.as_ptr().cast_mut().cast();
        // SAFETY: the address is read during the call only.
        checked("resolving the peer's RDMA address", unsafe {
            (library()?.rdma_resolve_addr)(self.id, ptr::null_mut(), address, milliseconds)
        })
    }

    /// Starts to look for the way there.
    pub(in crate::rdma) fn resolve_route(&self, milliseconds: i32) -> Result<(), Error> {
        // SAFETY: the identifier is alive.
        checked("resolving the RDMA route", unsafe {
            (library()?.rdma_resolve_route)(self.id, milliseconds)
        })
    }

    /// The device of a connection; none before its address is resolved.
    pub(in crate::rdma) fn device(&self) -> Option<Device> {
        // SAFETY: the identifier is alive.
        Device::of(unsafe { (*self.id).verbs })
    }

    /// Whether the port that the connection goes over has a link. One that cannot be asked any more has none.
    pub(in crate::rdma) fn has_link(&self) -> bool {
        let Ok(library) = library() else {
            return false;
        };
        // SAFETY: the identifier is alive.
        let (device, number) = unsafe { ((*self.id).verbs, (*self.id).port_num) };
        if device.is_null() {
            return false;
        }
        let mut port = PortAttr {
            state: 0,
            rest: [0; 31],
        };
        // SAFETY: a device that an identifier has had is never closed; the attributes are written during the call only.
        let result = unsafe { (library.ibv_query_port)(device, number, &raw mut port) };
        result == 0 && port.state == PORT_ACTIVE
    }

    pub(super) fn raw(&self) -> *mut CmId {
        self.id
    }

    /// Has the device find out soon that the peer's does not answer. A kernel that cannot is as slow as it is.
    fn hurry(&self) -> Result<(), Error> {
        let (level, name) = ACK_TIMEOUT;
        let mut exponent = ACK_EXPONENT;
        // SAFETY: the option is read during the call only.
        unsafe {
            (library()?.rdma_set_option)(self.id, level, name, (&raw mut exponent).cast(), 1);
        }
        Ok(())
    }

    /// Starts to connect, and says `private`. The queue pair is there, with its receives.
    pub(in crate::rdma) fn connect(&self, private: &[u8]) -> Result<(), Error> {
        self.hurry()?;
        let mut param = parameters(private);
        // SAFETY: the parameters are read during the call only.
        checked("connecting over RDMA", unsafe {
            (library()?.rdma_connect)(self.id, &raw mut param)
        })
    }

    /// Accepts a request, and says `private`. The queue pair is there, with its receives.
    pub(in crate::rdma) fn accept(&self, private: &[u8]) -> Result<(), Error> {
        self.hurry()?;
        let mut param = parameters(private);
        // SAFETY: the parameters are read during the call only.
        checked("accepting an RDMA connection", unsafe {
            (library()?.rdma_accept)(self.id, &raw mut param)
        })
    }

    /// Turns a request away.
    pub(in crate::rdma) fn reject(&self, private: &[u8]) {
        if let (Ok(library), Ok(len)) = (library(), u8::try_from(private.len())) {
            // The peer's time limit is the only other thing that could be done about a failure.
            // SAFETY: the data is read during the call only.
            let _ = unsafe { (library.rdma_reject)(self.id, private.as_ptr().cast(), len) };
        }
    }

    /// Ends the connection, if there is one, and its queue pair's work.
    pub(in crate::rdma) fn disconnect(&self) {
        if let Ok(library) = library() {
            // SAFETY: the identifier is alive. It fails where there is no connection, which is what was wanted.
            let _ = unsafe { (library.rdma_disconnect)(self.id) };
        }
    }

    /// What to wait for before `next_event`.
    pub(in crate::rdma) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(Events::fd)
    }

    /// The next event, if there is one.
    pub(in crate::rdma) fn next_event(&self) -> Result<Option<CmEvent>, Error> {
        let (Some(events), library) = (&self.events, library()?) else {
            return Ok(None);
        };
        let mut event = ptr::null_mut();
        // SAFETY: the event channel is alive.
        if unsafe { (library.rdma_get_cm_event)(events.0, &raw mut event) } != 0 {
            let error = std::io::Error::last_os_error();
            return match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted => Ok(None),
                _ => Err(Error::io("taking an event from rdma_cm", &error)),
            };
        }
        // SAFETY: the event is ours until it is acknowledged.
        let copy = unsafe { copy_event(&*event) };
        // SAFETY: acknowledged once; nothing of it is used afterwards.
        unsafe { (library.rdma_ack_cm_event)(event) };
        Ok(Some(copy))
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        if let Ok(library) = library() {
            // SAFETY: the identifier is ours, its queue pair is gone (`QueuePair` owns the `Id`), every event of it was
            // acknowledged; its event channel goes afterwards.
            unsafe { (library.rdma_destroy_id)(self.id) };
        }
    }
}

fn parameters(private: &[u8]) -> ConnParam {
    ConnParam {
        private_data: private.as_ptr().cast(),
        private_data_len: u8::try_from(private.len()).unwrap_or(u8::MAX),
        responder_resources: MOST_READS,
        initiator_depth: MOST_READS,
        flow_control: 1,
        retry_count: RETRIES,
        // Credits see to it that there is a receive for every send. A peer that gives them and has none ends the
        // connection, after a few times 655 ms; 7 would be for ever.
        rnr_retry_count: 3,
        srq: 0,
        qp_num: 0,
    }
}

/// # Safety
/// The event has not been acknowledged yet.
unsafe fn copy_event(event: &bindings::CmEvent) -> CmEvent {
    let kind = match event.event {
        0 => EventKind::AddressResolved,
        2 => EventKind::RouteResolved,
        4 => EventKind::Request,
        7 => EventKind::Unreachable,
        8 => EventKind::Rejected,
        9 => EventKind::Established,
        10 => EventKind::Disconnected,
        11 => EventKind::DeviceRemoved,
        failed @ (1 | 3 | 6) => EventKind::Failed(failed),
        other => EventKind::Other(other),
    };
    let has_data = matches!(
        kind,
        EventKind::Request | EventKind::Rejected | EventKind::Established
    ) && !event.conn.private_data.is_null();
    let private = if has_data {
        let len = usize::from(event.conn.private_data_len);
        // SAFETY: the library says how long the data is, which lives until the event is acknowledged.
        unsafe { std::slice::from_raw_parts(event.conn.private_data.cast(), len) }.to_vec()
    } else {
        Vec::new()
    };
    // Only a request's identifier is a new one. An `Id` made for any other event would take ours with it.
    let request = if kind == EventKind::Request {
        Some(Id {
            id: event.id,
            events: None,
        })
    } else {
        None
    };
    CmEvent {
        kind,
        status: event.status,
        private,
        request,
    }
}
