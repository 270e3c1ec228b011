//! A channel over a queue pair: hands work to the device, takes its completions, and waits when there are none.
//!
//! What the peer writes lands without anything happening here. That it came is known by the message after it: the device
//! delivers in order.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};

use crate::channel::{Channel, Event, Op, Stats, SubmitError, Token};
use crate::error::Error;
use crate::limits::MAX_QUEUED;
use crate::rdma::frame::Frame;
use crate::rdma::memory::Memory;
use crate::rdma::receiver::{RECEIVE_SLOTS, Receiver, is_receive};
use crate::rdma::sender::{DEPTH, SEND_SLOTS, Sender};
use crate::rdma::silence::{LONGEST, LOOK, Silence};
use crate::rdma::slots::Slots;
use crate::rdma::sys::{Device, EventKind, Id, QueuePair, Wc, devices, status_text};
use crate::stream::channel::check_message;
use crate::wake::WakeFd;

/// How long completions are polled for before the thread sleeps: about what a sleep and a wake-up cost.
const SPIN: Duration = Duration::from_micros(20);
/// The same while a few pages are read, for which somebody stands still: where that is about what they take.
const SPIN_READ: Duration = Duration::from_micros(200);
/// How long the last words may take when a channel is dropped.
const LINGER: Duration = Duration::from_millis(500);
/// A port without a link is known as such after so long.
const LINK_LATE: Duration = Duration::from_millis(500);
/// One poll in so many that finds nothing looks whether the connection has ended.
const LOOK_EVERY: u32 = 64;

/// One end of a channel over RDMA.
///
/// `pause` holds back messages and keys that the peer asks for; writes and reads with keys that it has go on.
pub struct RdmaChannel {
    /// First, so that the device has let go of all that follows when that is dropped.
    pair: QueuePair,
    send_slots: Slots,
    receiver: Receiver,
    sender: Sender,
    memory: Memory,
    device: Device,
    events: VecDeque<Event>,
    wake: Arc<WakeFd>,
    woken: bool,
    fetched: u64,
    idle: u32,
    silence: Silence,
    /// What a read of a few pages has taken of late.
    read_takes: Duration,
    /// We have broken the connection off ourselves.
    broken_off: bool,
    failed: Option<Error>,
}

impl fmt::Debug for RdmaChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaChannel")
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl RdmaChannel {
    /// Makes the queue pair for `id`, with its receives. `credits` are the sends that the peer has receives for; a dialling
    /// side learns that later.
    pub(super) fn new(id: Id, memory: &Memory, credits: usize) -> Result<RdmaChannel, Error> {
        let device = id
            .device()
            .ok_or_else(|| Error::Misuse("an RDMA connection without a device".to_owned()))?;
        let domain = memory.domain(device)?;
        let pair = QueuePair::new(id, &domain, DEPTH, Receiver::count())?;
        let receiver = Receiver::new(Slots::new(&domain, Receiver::count() as usize)?);
        receiver.offer_all(&pair)?;
        let wake = WakeFd::new(EventfdFlags::NONBLOCK)?;
        Ok(RdmaChannel {
            send_slots: Slots::new(&domain, SEND_SLOTS)?,
            receiver,
            sender: Sender::new(memory.clone(), device, credits),
            memory: memory.clone(),
            device,
            events: VecDeque::new(),
            wake: Arc::new(wake),
            woken: false,
            fetched: 0,
            idle: 0,
            silence: Silence::new(),
            read_takes: Duration::ZERO,
            broken_off: false,
            failed: None,
            pair,
        })
    }

    /// Its connection.
    pub(super) fn id(&self) -> &Id {
        self.pair.id()
    }

    /// The peer has receives for so many sends.
    pub(super) fn set_credits(&mut self, credits: u16) {
        self.sender.grant(credits, usize::MAX);
    }

    /// Registers all of a region with this channel's device, so that no write or read has to wait for that. `threads`
    /// register at a time.
    ///
    /// # Errors
    /// [`Error::NoMemory`] with the remedy when so much may not be pinned.
    pub fn register(&self, region: crate::region::RegionId, threads: usize) -> Result<(), Error> {
        self.memory.register_all(self.device, region, threads)
    }

    /// Breaks the queue pair, as a failing device would: nothing of the peer's lands any more, and both ends report an error,
    /// after what had come before.
    pub fn break_queue_pair(&mut self) {
        self.broken_off = true;
        self.pair.break_off();
    }

    #[cfg(test)]
    pub(super) fn sender(&mut self) -> &mut Sender {
        &mut self.sender
    }

    /// Hands to the device what can go.
    fn post(&mut self) -> Result<(), Error> {
        loop {
            let batch = self
                .sender
                .next_batch(&self.send_slots, self.pair.inline())?;
            if batch.is_empty() {
                return Ok(());
            }
            self.pair.post(&batch)?;
        }
    }

    /// Takes what the device reports. Returns whether there was anything.
    fn reap(&mut self) -> Result<bool, Error> {
        let mut completions = [Wc::default(); 16];
        let count = self.pair.poll(&mut completions)?;
        if count > 0 {
            self.silence.ended(Instant::now());
        }
        for completion in &completions[..count] {
            self.completed(completion)?;
        }
        Ok(count > 0)
    }

    fn completed(&mut self, completion: &Wc) -> Result<(), Error> {
        if completion.status != 0 {
            return Err(self.broken(completion));
        }
        if !is_receive(completion.wr_id) {
            if let Some(done) = self.sender.completed() {
                self.fetched += done.fetched;
                self.events.extend(done.event);
            }
            return Ok(());
        }
        self.receiver.arrived(completion.wr_id, completion.byte_len);
        self.take_arrived()
    }

    /// Handles what has arrived, unless it has to wait.
    fn take_arrived(&mut self) -> Result<(), Error> {
        while let Some(taken) = self.receiver.next(&self.pair)? {
            if !self.sender.grant(taken.credits, usize::from(RECEIVE_SLOTS)) {
                return Err(misbehaved("more credits than it has receives"));
            }
            if taken.cost {
                self.sender.owe(RECEIVE_SLOTS / 2);
            }
            if let Some(message) = taken.message {
                self.events.push_back(Event::Message(message.into()));
            }
            match taken.frame {
                None | Some(Frame::Credits) => {}
                Some(Frame::Key(key)) => {
                    if !self.sender.learn(key) {
                        return Err(misbehaved("a key that nobody asked for"));
                    }
                }
                Some(Frame::KeyWanted {
                    region,
                    offset,
                    write,
                }) => {
                    let key =
                        self.receiver
                            .key(&self.memory, self.device, region, offset, write)?;
                    if !self.sender.answer(key) {
                        return Err(misbehaved("more questions at a time than it may have"));
                    }
                }
                Some(Frame::Fault(text)) => return Err(Error::Refused(text)),
                Some(Frame::Goodbye) => return Err(Error::Closed),
            }
        }
        Ok(())
    }

    /// What a completion that failed says about whose fault it is.
    fn broken(&self, completion: &Wc) -> Error {
        let text = status_text(completion.status);
        let io = |what, kind| Error::Io {
            what,
            kind,
            message: text.clone(),
        };
        match completion.status {
            _ if self.broken_off => io("the queue pair on this host", ErrorKind::ConnectionAborted),
            // Flushed. We did not end the queue pair, so the device did.
            5 if is_receive(completion.wr_id) => {
                if self.loses_link() {
                    io(
                        "this host's RDMA device has no link",
                        ErrorKind::NetworkDown,
                    )
                } else {
                    misbehaved(
                        "it wrote or read memory that is closed to it, or sent more than fits",
                    )
                }
            }
            1 if is_receive(completion.wr_id) => misbehaved("a send that is longer than a receive"),
            9..=11 => Error::Refused(format!("the memory is closed to us ({text})")),
            12 => io(
                "the peer's RDMA device does not answer",
                ErrorKind::TimedOut,
            ),
            13 => misbehaved("it has no receives for the credits that it gave"),
            _ => io("this host's RDMA device", ErrorKind::Other),
        }
    }

    /// Whether the port has no link, now or in a moment. A device ends a queue pair at a peer's request that it may not make; rdma_rxe
    /// also does when nothing leaves the host, and may report that before the port's state is another.
    fn loses_link(&self) -> bool {
        let end = Instant::now() + LINK_LATE;
        while self.pair.id().has_link() {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(LINK_LATE / 20);
        }
        true
    }

    /// Looks whether the connection has ended.
    fn look(&mut self) -> Result<(), Error> {
        while let Some(event) = self.pair.id().next_event()? {
            match event.kind {
                EventKind::Disconnected => {
                    // What came before is taken first: it may say why.
                    while self.reap()? {}
                    return Err(Error::Io {
                        what: "the connection over RDMA",
                        kind: ErrorKind::ConnectionReset,
                        message: "the peer's end of it broke".to_owned(),
                    });
                }
                EventKind::DeviceRemoved => {
                    return Err(Error::Io {
                        what: "this host's RDMA device",
                        kind: ErrorKind::NotConnected,
                        message: "it was removed".to_owned(),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// One round without waiting. Returns whether anything happened.
    fn turn(&mut self) -> Result<bool, Error> {
        let had_work = self.sender.under_way();
        self.post()?;
        let any = self.reap()?;
        if any {
            self.idle = 0;
            self.post()?;
        } else {
            self.idle += 1;
            if self.idle.is_multiple_of(LOOK_EVERY) {
                self.look()?;
            }
        }
        if !had_work {
            self.silence.ended(Instant::now());
        } else if !any && self.silence.goes_on(Instant::now()) {
            return Err(Error::Io {
                what: "the peer's RDMA device does not answer",
                kind: ErrorKind::TimedOut,
                message: format!("nothing in {} s", LONGEST.as_secs()),
            });
        }
        Ok(any)
    }

    /// Waits for the device, the connection or the waker: spins, then sleeps. `None`: for as long as it takes.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let begun = Instant::now();
        let reads = self.sender.reads_little();
        if self.spin(begun, timeout, reads)? {
            return Ok(());
        }
        self.pair.arm()?;
        if self.reap()? {
            return Ok(());
        }
        let left = timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
        // While it has work, to look again whether it has been silent for too long.
        let left = if self.sender.under_way() {
            Some(left.map_or(LOOK, |left| left.min(LOOK)))
        } else {
            left
        };
        let (completions, connection) = self.sleep(left)?;
        if completions {
            self.pair.take_events()?;
            self.read_took(reads, begun.elapsed());
        }
        if connection {
            self.look()?;
        }
        Ok(())
    }

    /// Polls for as long as that is likely to be of use. Returns whether something came.
    fn spin(
        &mut self,
        begun: Instant,
        timeout: Option<Duration>,
        reads: bool,
    ) -> Result<bool, Error> {
        let longest = if reads && self.read_takes <= 2 * SPIN_READ {
            SPIN_READ
        } else {
            SPIN
        };
        let longest = timeout.map_or(longest, |timeout| longest.min(timeout));
        loop {
            if self.wake.is_rung() {
                self.take_wake();
                return Ok(true);
            }
            if self.reap()? {
                self.read_took(reads, begun.elapsed());
                return Ok(true);
            }
            match begun.elapsed() {
                spun if spun >= longest => return Ok(false),
                spun if spun < SPIN => std::hint::spin_loop(),
                // What is waited for may need this processor: a software device does.
                _ => std::thread::yield_now(),
            }
        }
    }

    /// Takes note of what a read took: for the next one, those before count three times as much.
    fn read_took(&mut self, reads: bool, took: Duration) {
        if reads {
            self.read_takes = (3 * self.read_takes + took) / 4;
        }
    }

    /// Sleeps. Returns whether the device has an event, and the connection.
    fn sleep(&mut self, left: Option<Duration>) -> Result<(bool, bool), Error> {
        let mut fds = vec![
            PollFd::new(&*self.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.pair.fd(), PollFlags::IN),
        ];
        if let Some(fd) = self.pair.id().fd() {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("waiting for the RDMA device", &error.into())),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (woken, completions, connection) = (ready(0), ready(1), ready(2));
        if woken {
            self.take_wake();
        }
        Ok((completions, connection))
    }

    /// Takes note of a call of the waker.
    fn take_wake(&mut self) {
        self.woken |= self.wake.take();
    }

    fn fail(&mut self, error: Error) {
        if matches!(
            error,
            Error::Io { .. } | Error::Refused(_) | Error::NoMemory(_)
        ) {
            // The peer's device was told that it came: it is reported, paused or not. There is an error already.
            self.receiver.pause(false);
            let _ = self.take_arrived();
        }
        if matches!(error, Error::Io { .. }) && !devices().contains(&self.device) {
            self.memory.forget(self.device);
        }
        // The peer is told what it cannot know by itself.
        let fault = match &error {
            Error::PeerMisbehaved(text) => Some(text.clone()),
            Error::NoMemory(_) => Some(error.to_string()),
            _ => None,
        };
        match fault {
            Some(text) => {
                self.sender.end(Frame::Fault(text));
                // If the queue pair is broken already, the peer's device has told it.
                let _ = self.post();
            }
            None => self.pair.id().disconnect(),
        }
        self.failed = Some(error);
    }
}

fn misbehaved(text: &str) -> Error {
    Error::PeerMisbehaved(text.to_owned())
}

impl Channel for RdmaChannel {
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        if self.failed.is_some() {
            return Err(SubmitError::Closed);
        }
        if self.sender.awaited >= MAX_QUEUED {
            return Err(SubmitError::Full(op));
        }
        match op {
            Op::Write { region, extents } => {
                self.memory.check(region, &extents)?;
                self.sender.one_sided(token, true, region, extents);
            }
            Op::Read { region, extents } => {
                self.memory.check(region, &extents)?;
                self.sender.one_sided(token, false, region, extents);
            }
            Op::Send(message) => {
                check_message(&message)?;
                let message: Bytes = message;
                self.sender.message(token, message);
            }
        }
        Ok(())
    }

    fn poll(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut turned = false;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if let Some(error) = &self.failed {
                return Err(error.clone());
            }
            if std::mem::take(&mut self.woken) {
                return Ok(None);
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if turned && left == Some(Duration::ZERO) {
                return Ok(None);
            }
            turned = true;
            let turn = match self.turn() {
                Ok(false) if left != Some(Duration::ZERO) => self.wait(left),
                turn => turn.map(|_| ()),
            };
            if left == Some(Duration::ZERO) {
                self.take_wake();
            }
            if let Err(error) = turn {
                self.fail(error);
            }
        }
    }

    fn pause(&mut self, paused: bool) {
        self.receiver.pause(paused);
        if !paused
            && self.failed.is_none()
            && let Err(error) = self.take_arrived()
        {
            self.fail(error);
        }
    }

    fn waker(&self) -> Waker {
        Waker::from(self.wake.clone())
    }

    fn stats(&self) -> Stats {
        Stats {
            sent: self.sender.total,
            received: self.receiver.total() + self.fetched,
        }
    }

    fn kind(&self) -> &'static str {
        "rdma"
    }
}

impl Drop for RdmaChannel {
    fn drop(&mut self) {
        // The last words go out, after what is under way already. A connection that never came about takes none.
        let said = match &self.failed {
            None => {
                self.sender.end(Frame::Goodbye);
                self.post().is_ok()
            }
            Some(error) => matches!(error, Error::PeerMisbehaved(_) | Error::NoMemory(_)),
        };
        let end = Instant::now() + LINGER;
        while said && self.sender.busy() && Instant::now() < end {
            if self.post().is_err() || self.reap().is_err() {
                break;
            }
            std::thread::yield_now();
        }
    }
}
