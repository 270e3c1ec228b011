//! Verbs: protection domains, registered memory, and queue pairs with their completions.

use std::ffi::CStr;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::fd::BorrowedFd;

use super::bindings::{
    self, CompChannel, Context, Cq, Mr, QpAttr, QpInitAttr, RecvWr, SendWr, Sge,
};
use super::cm::Id;
use super::{Wc, checked, keep, last_error, library};
use crate::error::Error;
use crate::region::{Access, Extent, Region};

const LOCAL_WRITE: i32 = 1;
const REMOTE_WRITE: i32 = 2;
const REMOTE_READ: i32 = 4;
const ON_DEMAND: i32 = 1 << 6;
const SIGNALED: u32 = 2;
const INLINE: u32 = 8;
const WRITE: i32 = 0;
const SEND: i32 = 2;
const READ: i32 = 4;
const RELIABLE: i32 = 2;
const STATE: i32 = 1;
const STATE_ERROR: i32 = 6;

/// A device, which stays open for as long as the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::rdma) struct Device(*mut Context);

// SAFETY: verbs may be called by any thread; the device is never closed: see `keep`.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device of an identifier that lives, if it is still there.
    pub(super) fn of(context: *mut Context) -> Option<Device> {
        Device::listed(context).filter(|device| keep(*device))
    }

    /// One of a list, which is to keep it open.
    pub(super) fn listed(context: *mut Context) -> Option<Device> {
        (!context.is_null()).then_some(Device(context))
    }
}

/// A protection domain: keys of one are worth nothing in another.
pub(in crate::rdma) struct Pd(*mut bindings::Pd);

// SAFETY: verbs may be called by any thread.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    pub(in crate::rdma) fn new(device: Device) -> Result<Arc<Pd>, Error> {
        // SAFETY: the device is open.
        let pd = unsafe { (library()?.ibv_alloc_pd)(device.0) };
        if pd.is_null() {
            return Err(last_error("making a protection domain"));
        }
        Ok(Arc::new(Pd(pd)))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        if let Ok(library) = library() {
            // SAFETY: all that was made in it holds it, and so is gone.
            unsafe { (library.ibv_dealloc_pd)(self.0) };
        }
    }
}

/// What names registered memory: to this device, and to the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) struct MemoryKey {
    pub(in crate::rdma) local: u32,
    pub(in crate::rdma) remote: u32,
}

/// Memory that the device may use, until this is dropped.
pub(in crate::rdma) struct Registration {
    /// Null once it is closed.
    mr: AtomicPtr<Mr>,
    pub(in crate::rdma) key: MemoryKey,
    /// Whether its pages were pinned, and not left to be fetched on demand.
    pub(in crate::rdma) pinned: bool,
    /// The memory stays mapped for as long as the device may use it.
    _region: Region,
    _pd: Arc<Pd>,
}

impl Registration {
    /// Registers a piece of a region: for this device, and for the peer as `access` says.
    pub(in crate::rdma) fn new(
        pd: &Arc<Pd>,
        region: &Region,
        extent: Extent,
        access: Access,
        on_demand: bool,
    ) -> std::io::Result<Registration> {
        let outside = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let library = library().map_err(|_| outside())?;
        let address = region.address(extent).ok_or_else(outside)?;
        let len = usize::try_from(extent.len).map_err(|_| outside())?;
        let flag = |on, flag| if on { flag } else { 0 };
        let flags = flag(access.peer_writes, REMOTE_WRITE)
            | flag(access.peer_reads, REMOTE_READ)
            | flag(on_demand, ON_DEMAND);
        let register = |flags| {
            // SAFETY: the range is mapped, and stays so until the registration is gone, which holds the region. Others
            // write it meanwhile, and nobody has a reference into it.
            let mr = unsafe { (library.ibv_reg_mr)(pd.0, address.cast(), len, flags) };
            if mr.is_null() {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(mr)
            }
        };
        let mr = register(flags | LOCAL_WRITE).or_else(|error| {
            // A mapping that may only be read: all that is done with it is to read it, here or by the peer. Where the
            // first attempt failed for another reason, this one does, too.
            let unwritable = matches!(error.raw_os_error(), Some(libc::EACCES | libc::EFAULT));
            if unwritable && !access.peer_writes {
                register(flags)
            } else {
                Err(error)
            }
        })?;
        // SAFETY: just made.
        let (local, remote) = unsafe { ((*mr).lkey, (*mr).rkey) };
        Ok(Registration {
            mr: AtomicPtr::new(mr),
            key: MemoryKey { local, remote },
            pinned: !on_demand,
            _region: region.clone(),
            _pd: pd.clone(),
        })
    }
}

impl Registration {
    /// Takes the memory back from the device at once: work that still uses it fails.
    pub(in crate::rdma) fn close(&self) {
        let mr = self.mr.swap(ptr::null_mut(), Ordering::AcqRel);
        if let Ok(library) = library()
            && !mr.is_null()
        {
            // SAFETY: registered by `new`, and taken out once.
            unsafe { (library.ibv_dereg_mr)(mr) };
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a piece of work does, beside its local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) enum Kind {
    Write { remote: u64, key: u32 },
    Read { remote: u64, key: u32 },
    Send { inline: bool },
}

/// A piece of work for the send queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rdma) struct Work {
    /// Comes back in its completion.
    pub(in crate::rdma) id: u64,
    pub(in crate::rdma) kind: Kind,
    pub(in crate::rdma) local: u64,
    pub(in crate::rdma) len: u32,
    pub(in crate::rdma) key: u32,
    /// Whether it is reported also when it succeeds; all work before it is then done as well.
    pub(in crate::rdma) signaled: bool,
}

/// A queue pair with a queue of completions for both its halves.
pub(in crate::rdma) struct QueuePair {
    id: Id,
    cq: *mut Cq,
    channel: *mut CompChannel,
    /// Events taken and not acknowledged.
    events: u32,
    inline: u32,
    _pd: Arc<Pd>,
}

// SAFETY: verbs may be called by any thread, one at a time for each queue; `QueuePair` is not `Sync`.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes one for `id`, whose device is known, with room for so many sends and receives.
    pub(in crate::rdma) fn new(
        id: Id,
        pd: &Arc<Pd>,
        sends: u32,
        receives: u32,
    ) -> Result<QueuePair, Error> {
        let library = library()?;
        let Device(context) = id
            .device()
            .ok_or_else(|| Error::Misuse("an RDMA connection without a device".to_owned()))?;
        // SAFETY: the device is open.
        let channel = unsafe { (library.ibv_create_comp_channel)(context) };
        if channel.is_null() {
            return Err(last_error("making a completion channel"));
        }
        // From here on its drop tidies up.
        let mut pair = QueuePair {
            id,
            cq: ptr::null_mut(),
            channel,
            events: 0,
            inline: 0,
            _pd: pd.clone(),
        };
        let fd = pair.fd();
        let flags = rustix::fs::fcntl_getfl(fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK));
        flags.map_err(|e| Error::io("preparing completions", &e.into()))?;
        let entries = i32::try_from(sends + receives).unwrap_or(i32::MAX);
        // SAFETY: the device and the channel are open.
        pair.cq = unsafe { (library.ibv_create_cq)(context, entries, ptr::null_mut(), channel, 0) };
        if pair.cq.is_null() {
            return Err(last_error("making a completion queue"));
        }
        // What is sent inline costs the device no read of memory; some devices have none of it.
        let mut result = Ok(());
        for inline in [220, 0] {
            let mut attr = QpInitAttr {
                qp_context: ptr::null_mut(),
                send_cq: pair.cq,
                recv_cq: pair.cq,
                srq: ptr::null_mut(),
                max_send_wr: sends,
                max_recv_wr: receives,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: inline,
                qp_type: RELIABLE,
                sq_sig_all: 0,
            };
            // SAFETY: all that it refers to is alive, and outlives the queue pair.
            result = checked("making a queue pair", unsafe {
                (library.rdma_create_qp)(pair.id.raw(), pd.0, &raw mut attr)
            });
            if result.is_ok() {
                pair.inline = inline;
                break;
            }
        }
        result.map(|()| pair)
    }

    /// Its connection.
    pub(in crate::rdma) fn id(&self) -> &Id {
        &self.id
    }

    /// Bytes that a send may carry inline.
    pub(in crate::rdma) fn inline(&self) -> u32 {
        self.inline
    }

    /// Offers memory to the peer's next send but those that have been offered some.
    pub(in crate::rdma) fn receive(
        &self,
        id: u64,
        local: u64,
        len: u32,
        key: u32,
    ) -> Result<(), Error> {
        let mut sge = Sge {
            addr: local,
            length: len,
            lkey: key,
        };
        let mut work = RecvWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the request is read during the call only.
        let result = unsafe {
            let qp = (*self.id.raw()).qp;
            ((*(*qp).context).post_recv)(qp, &raw mut work, &raw mut bad)
        };
        posted("posting a receive", result)
    }

    /// Hands all of `batch` to the device at once. There is room for it in the queue.
    pub(in crate::rdma) fn post(&self, batch: &[Work]) -> Result<(), Error> {
        let mut pieces: Vec<Sge> = batch
            .iter()
            .map(|work| Sge {
                addr: work.local,
                length: work.len,
                lkey: work.key,
            })
            .collect();
        let mut requests: Vec<SendWr> = batch
            .iter()
            .zip(&mut pieces)
            .map(|(work, piece)| request(work, piece))
            .collect();
        let first = requests.as_mut_ptr();
        for index in 1..requests.len() {
            requests[index - 1].next = first.wrapping_add(index);
        }
        if requests.is_empty() {
            return Ok(());
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the chain lies in two vectors that outlive the call, which alone reads it. The
        // memory of an inline send is read during the call and lies in a region that the caller holds.
        let result = unsafe {
            let qp = (*self.id.raw()).qp;
            ((*(*qp).context).post_send)(qp, requests.as_mut_ptr(), &raw mut bad)
        };
        posted("posting to the send queue", result)
    }

    /// Takes completions. Returns how many.
    pub(in crate::rdma) fn poll(&self, to: &mut [Wc]) -> Result<usize, Error> {
        let room = i32::try_from(to.len()).unwrap_or(i32::MAX);
        // SAFETY: the queue is alive, and there is room for so many.
        let count = unsafe { ((*(*self.cq).context).poll_cq)(self.cq, room, to.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| Error::Io {
            what: "polling for completions",
            kind: std::io::ErrorKind::Other,
            message: "the device's driver failed".to_owned(),
        })
    }

    /// Makes the next completion raise an event. What came before it raises none: poll once more.
    pub(in crate::rdma) fn arm(&self) -> Result<(), Error> {
        // SAFETY: the queue is alive.
        posted("asking for an event", unsafe {
            ((*(*self.cq).context).req_notify_cq)(self.cq, 0)
        })
    }

    /// What to wait for after `arm`.
    pub(in crate::rdma) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as `self`, and its descriptor as long as it.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Takes the events that `arm` asked for.
    pub(in crate::rdma) fn take_events(&mut self) -> Result<(), Error> {
        let library = library()?;
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive; it does not block.
        while unsafe { (library.ibv_get_cq_event)(self.channel, &raw mut cq, &raw mut context) }
            == 0
        {
            self.events += 1;
        }
        // Acknowledging takes a lock: not for each.
        if self.events >= 256 {
            self.acknowledge();
        }
        Ok(())
    }

    fn acknowledge(&mut self) {
        if let Ok(library) = library()
            && self.events > 0
        {
            // SAFETY: so many were taken.
            unsafe { (library.ibv_ack_cq_events)(self.cq, self.events) };
            self.events = 0;
        }
    }

    /// Puts the queue pair into its error state: all work that is under way ends as flushed.
    pub(in crate::rdma) fn break_off(&self) {
        if let Ok(library) = library() {
            let mut attr = QpAttr {
                qp_state: STATE_ERROR,
                rest: [0; 63],
            };
            // SAFETY: the queue pair is alive; only the field that the mask names is read.
            unsafe { (library.ibv_modify_qp)((*self.id.raw()).qp, &raw mut attr, STATE) };
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let Ok(library) = library() else { return };
        self.acknowledge();
        // SAFETY: each was made by `new`, or is null and skipped; the order is that of their dependence, and all events
        // are acknowledged, which the queue's end waits for.
        unsafe {
            if !(*self.id.raw()).qp.is_null() {
                self.id.disconnect();
                (library.rdma_destroy_qp)(self.id.raw());
            }
            if !self.cq.is_null() {
                (library.ibv_destroy_cq)(self.cq);
            }
            (library.ibv_destroy_comp_channel)(self.channel);
        }
    }
}

fn request(work: &Work, piece: &mut Sge) -> SendWr {
    let (opcode, remote_addr, rkey, inline) = match work.kind {
        Kind::Write { remote, key } => (WRITE, remote, key, 0),
        Kind::Read { remote, key } => (READ, remote, key, 0),
        Kind::Send { inline } => (SEND, 0, 0, if inline { INLINE } else { 0 }),
    };
    SendWr {
        wr_id: work.id,
        next: ptr::null_mut(),
        sg_list: piece,
        num_sge: 1,
        opcode,
        send_flags: inline | if work.signaled { SIGNALED } else { 0 },
        imm_data: 0,
        remote_addr,
        rkey,
        rest: [0; 9],
    }
}

/// The result of a call of a driver's, which returns the error, some of them negated.
fn posted(what: &'static str, result: i32) -> Result<(), Error> {
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::from_raw_os_error(result.checked_abs().unwrap_or(libc::EIO));
    Err(Error::io(what, &error))
}

/// The library's words for a completion's status.
pub(in crate::rdma) fn status_text(status: i32) -> String {
    let Ok(library) = library() else {
        return status.to_string();
    };
    // SAFETY: it returns a constant string for every number.
    unsafe { CStr::from_ptr((library.ibv_wc_status_str)(status)) }
        .to_string_lossy()
        .into_owned()
}
