//! One socket on one io_uring: at most one send, one receive and the waker's read are in flight.
//!
//! The ring is set up without `SINGLE_ISSUER` and `DEFER_TASKRUN` on purpose. A channel is made by the thread that
//! accepts it and then moves to the thread that uses it, which the first forbids; and without the second the kernel goes
//! on with a send or receive that has to wait for the network while the thread that owns the channel is busy elsewhere.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::fd::{AsFd, AsRawFd};
use socket2::Socket;

use crate::error::Error;
use crate::stream::pipe::Pipe;
use crate::sys::iovecs::{Gather, Scatter};
use crate::wake::WakeFd;

/// Room for a send, a receive, the waker's read and a cancel.
const ENTRIES: u32 = 8;

const SEND: u64 = 1;
const RECEIVE: u64 = 2;
const WAKE: u64 = 3;
const CANCEL: u64 = 4;

/// How long the end of what was cancelled is waited for before it is cancelled once more.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A splice from a socket whose bytes are gone again waits so long, and io_uring does not heed it.
const NO_TIME: Duration = Duration::from_millis(1);

/// What is to be sent.
pub(crate) enum Outgoing {
    /// Copied by the kernel.
    Copied(Gather),
    /// All that is in a pipe, by reference.
    Spliced(Pipe),
}

/// Where what is received goes.
pub(crate) enum Incoming {
    /// Copied there by the kernel.
    Copied(Scatter),
    /// Into a pipe, at most so many bytes, by reference.
    Spliced(Pipe, usize),
}

/// What became of the operations in flight. What was handed to the kernel comes back with the result.
#[derive(Default)]
pub(crate) struct Progress {
    /// The send ended.
    pub(crate) sent: Option<(Outgoing, io::Result<usize>)>,
    /// The receive ended.
    pub(crate) received: Option<(Incoming, io::Result<usize>)>,
    /// Somebody called the waker.
    pub(crate) woken: bool,
}

impl Progress {
    fn is_empty(&self) -> bool {
        self.sent.is_none() && self.received.is_none() && !self.woken
    }
}

/// A socket and its ring.
pub(crate) struct Uring {
    ring: IoUring,
    socket: Socket,
    wake: Arc<WakeFd>,
    /// Where the kernel puts the waker's counter. Boxed: the address stays when the driver moves.
    wake_count: Box<[u8; 8]>,
    waking: bool,
    send: Option<Outgoing>,
    send_header: Box<libc::msghdr>,
    receive: Option<Incoming>,
    receive_header: Box<libc::msghdr>,
}

// SAFETY: the raw pointers are in the two message headers, which only the kernel follows, and lead into `send` and
// `receive`, which are `Send`.
unsafe impl Send for Uring {}

impl Uring {
    /// Takes a connected socket.
    pub(crate) fn new(socket: Socket) -> Result<Uring, Error> {
        // A non-blocking socket would make io_uring report EAGAIN instead of waiting.
        socket
            .set_nonblocking(false)
            .and_then(|()| socket.set_read_timeout(Some(NO_TIME)))
            .map_err(|e| Error::io("preparing the socket", &e))?;
        let ring = IoUring::new(ENTRIES).map_err(|e| setup_error(&e))?;
        let wake = WakeFd::new(EventfdFlags::empty())?;
        Ok(Uring {
            ring,
            socket,
            wake: Arc::new(wake),
            wake_count: Box::new([0; 8]),
            waking: false,
            send: None,
            send_header: Box::new(empty_header()),
            receive: None,
            receive_header: Box::new(empty_header()),
        })
    }

    /// Ends a wait, from any thread.
    pub(crate) fn waker(&self) -> Waker {
        Waker::from(self.wake.clone())
    }

    /// Whether a send is in flight.
    pub(crate) fn sending(&self) -> bool {
        self.send.is_some()
    }

    /// Whether a receive is in flight.
    pub(crate) fn receiving(&self) -> bool {
        self.receive.is_some()
    }

    /// Starts to send all of `outgoing`, at the next `wait`. Only when no send is in flight.
    pub(crate) fn send(&mut self, outgoing: Outgoing) {
        assert!(self.send.is_none(), "one send at a time");
        let socket = Fd(self.socket.as_raw_fd());
        let entry = match self.send.insert(outgoing) {
            Outgoing::Copied(gather) => {
                *self.send_header = header_of(gather.iovecs());
                let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
                opcode::SendMsg::new(socket, &*self.send_header)
                    .flags(flags.cast_unsigned())
                    .build()
            }
            Outgoing::Spliced(pipe) => {
                let len = u32::try_from(pipe.len()).unwrap_or(u32::MAX);
                opcode::Splice::new(Fd(pipe.read_end()), -1, socket, -1, len).build()
            }
        };
        self.push(&entry.user_data(SEND));
    }

    /// Starts to receive into `incoming`, at the next `wait`. Only when no receive is in flight.
    pub(crate) fn receive(&mut self, incoming: Incoming) {
        assert!(self.receive.is_none(), "one receive at a time");
        let socket = Fd(self.socket.as_raw_fd());
        let entry = match self.receive.insert(incoming) {
            Incoming::Copied(scatter) => {
                *self.receive_header = header_of(scatter.iovecs());
                opcode::RecvMsg::new(socket, &mut *self.receive_header).build()
            }
            // io_uring has a thread of its own for each splice from a socket. So it only waits, and we splice.
            Incoming::Spliced(..) => {
                let readable = u32::from(libc::POLLIN.cast_unsigned());
                opcode::PollAdd::new(socket, readable).build()
            }
        };
        self.push(&entry.user_data(RECEIVE));
    }

    /// Waits until something has ended, at most for `timeout` (none: as long as it takes).
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> Result<Progress, Error> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut progress = Progress::default();
        loop {
            // Each time: its read also ends with the thread that submitted it, and a wait without it would be deaf.
            self.arm_waker();
            self.reap(&mut progress);
            if !progress.is_empty() {
                // What was started above is to be under way while the caller looks at this.
                self.submit()?;
                return Ok(progress);
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            self.enter(left)?;
            self.reap(&mut progress);
            if !progress.is_empty() || deadline.is_some_and(|d| Instant::now() >= d) {
                return Ok(progress);
            }
        }
    }

    /// Ends the receive in flight, if there is one, with what it has got so far. What else has ended meanwhile comes with
    /// it.
    pub(crate) fn call_back_receive(&mut self) -> Result<Progress, Error> {
        let mut progress = Progress::default();
        self.call_back(
            || CancelBuilder::user_data(RECEIVE),
            Uring::receiving,
            &mut progress,
        )?;
        Ok(progress)
    }

    /// Makes sure that the kernel knows of what was started.
    pub(crate) fn submit(&mut self) -> Result<(), Error> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(Some(Duration::ZERO))
    }

    /// Sends a few last bytes if the socket takes them at once. Only when no send is in flight.
    pub(crate) fn send_at_once(&self, bytes: &[u8]) {
        if self.send.is_none() {
            let _ = rustix::net::send(
                &self.socket,
                bytes,
                rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL,
            );
        }
    }

    /// Ends both directions: what has arrived can still be received, then comes the end.
    pub(crate) fn shut_down(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn arm_waker(&mut self) {
        if self.waking {
            return;
        }
        self.waking = true;
        let entry = opcode::Read::new(
            Fd(self.wake.as_fd().as_raw_fd()),
            self.wake_count.as_mut_ptr(),
            8,
        )
        .build()
        .user_data(WAKE);
        self.push(&entry);
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to is owned by `self`, at an address that does not change, and is neither
        // touched nor freed before its completion has come: `send`, `receive` and `wake_count` are let go only in
        // `complete`, and `drop` waits for all completions.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(
            pushed.is_ok(),
            "the ring has room for all operations that can be in flight"
        );
    }

    /// Calls back what matches, and waits for its end: until `there` says that it is over. Asks again and again, because a
    /// cancel passes over what is just between two attempts.
    fn call_back(
        &mut self,
        what: impl Fn() -> CancelBuilder,
        there: impl Fn(&Uring) -> bool,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        while there(self) {
            // A full queue is one that the kernel does not take now.
            if !self.ring.submission().is_full() {
                let cancel = opcode::AsyncCancel2::new(what()).build().user_data(CANCEL);
                self.push(&cancel);
            }
            let again = Instant::now() + ASK_AGAIN;
            while there(self) && Instant::now() < again {
                self.enter(Some(ASK_AGAIN))?;
                self.reap(progress);
            }
        }
        Ok(())
    }

    /// One system call: submits what is pushed, and waits for a completion, at most for `timeout`.
    fn enter(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let submitter = self.ring.submitter();
        let entered = match timeout {
            None => submitter.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        match entered.map_err(|e| (e.raw_os_error(), e)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN), _)) => {
                Ok(())
            }
            Err((_, error)) => Err(Error::io("entering io_uring", &error)),
        }
    }

    fn reap(&mut self, progress: &mut Progress) {
        while let Some(entry) = self.next_completion() {
            self.complete(&entry, progress);
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    fn complete(&mut self, entry: &cqueue::Entry, progress: &mut Progress) {
        let result = match entry.result() {
            n @ 0.. => Ok(n.cast_unsigned() as usize),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        };
        match entry.user_data() {
            SEND => progress.sent = self.send.take().map(|outgoing| (outgoing, result)),
            RECEIVE => {
                progress.received = self.receive.take().map(|mut incoming| {
                    let result = match &mut incoming {
                        Incoming::Copied(_) => result,
                        Incoming::Spliced(pipe, most) => {
                            result.and_then(|_| pipe.receive(&self.socket, *most))
                        }
                    };
                    (incoming, result)
                });
            }
            WAKE => {
                self.waking = false;
                // It also ends when the thread that submitted it ends; that is nobody's call.
                progress.woken |= result.is_ok();
            }
            _ => {}
        }
    }

    fn in_flight(&self) -> bool {
        self.sending() || self.receiving() || self.waking
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if !self.in_flight() {
            return;
        }
        self.shut_down();
        self.wake.wake_by_ref();
        let ended = self.call_back(
            CancelBuilder::any,
            Uring::in_flight,
            &mut Progress::default(),
        );
        // The kernel holds addresses of ours until it has said otherwise: nothing may stop this short.
        if ended.is_err() {
            std::process::abort();
        }
    }
}

fn empty_header() -> libc::msghdr {
    // SAFETY: all zeroes is a valid `msghdr`: null pointers with lengths of zero.
    unsafe { std::mem::zeroed() }
}

fn header_of(iovecs: &[libc::iovec]) -> libc::msghdr {
    libc::msghdr {
        msg_iov: iovecs.as_ptr().cast_mut(),
        msg_iovlen: iovecs.len() as _,
        ..empty_header()
    }
}

fn setup_error(error: &io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is forbidden here; allow it with `sysctl kernel.io_uring_disabled=0` (or 1 and \
            the group in kernel.io_uring_group), and in the seccomp filter of the container or service"
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring",
        Some(libc::ENOMEM) => "RLIMIT_MEMLOCK is too small",
        _ => return Error::io("setting up io_uring", error),
    };
    Error::Misuse(format!("setting up io_uring: {error}: {remedy}"))
}
