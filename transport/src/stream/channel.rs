//! The channel over a socket: joins the frames' state machines, a layer, and the I/O driver.

use std::collections::VecDeque;
use std::io;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::channel::{Channel, Event, Op, Stats, SubmitError, Token};
use crate::connect::greeting::clip;
use crate::error::Error;
use crate::limits::{MAX_EXTENTS, MAX_MESSAGE, MAX_PAYLOAD, MAX_QUEUED};
use crate::region::{Extent, Region, RegionId, Regions};
use crate::stream::layer::{Halves, Layer};
use crate::stream::receiver::{Receiver, receive_error};
use crate::stream::sender::Sender;
use crate::sys::uring::{Progress, Uring};

/// A channel over a connected socket.
pub(crate) struct StreamChannel<L: Layer> {
    driver: Uring,
    layer: L,
    halves: Halves,
    kind: &'static str,
    stats: Stats,
    /// A call of the waker that no `poll` has reported yet.
    woken: bool,
    /// No receive may be under way.
    paused: bool,
    /// Sending has failed. What the peer said before it left is read before this is reported.
    send_failed: Option<Error>,
    failed: Option<Error>,
}

impl<L: Layer> StreamChannel<L> {
    /// Begins at the first frame. `already` is what both directions carried before.
    pub(crate) fn new(
        driver: Uring,
        layer: L,
        regions: Regions,
        kind: &'static str,
        already: Stats,
    ) -> Self {
        let halves = Halves {
            sender: Sender::default(),
            receiver: Receiver::new(regions),
            events: VecDeque::new(),
        };
        StreamChannel {
            driver,
            layer,
            halves,
            kind,
            stats: already,
            woken: false,
            paused: false,
            send_failed: None,
            failed: None,
        }
    }

    /// Handles bytes that came with the greeting.
    pub(crate) fn feed_early(
        &mut self,
        feed: impl FnOnce(&mut L, &mut Halves) -> Result<(), Error>,
    ) {
        if let Err(error) = feed(&mut self.layer, &mut self.halves) {
            self.fail(error);
        }
    }

    /// Starts what can be started.
    fn start(&mut self) -> Result<(), Error> {
        while let Some(request) = self.halves.receiver.next_request() {
            if !self
                .halves
                .sender
                .reply(request.region, request.extents, request.number)
            {
                return Err(Error::PeerMisbehaved(
                    "more reads at a time than it may have".to_owned(),
                ));
            }
        }
        if !self.driver.sending()
            && self.send_failed.is_none()
            && let Some(outgoing) = self.layer.next_send(&mut self.halves)?
        {
            self.driver.send(outgoing);
        }
        if self.paused
            && let Some(error) = self.send_failed.take()
        {
            // Nothing is received that could say more.
            return Err(error);
        }
        if !self.paused && !self.driver.receiving() {
            let incoming = self.layer.next_receive(&mut self.halves)?;
            self.driver.receive(incoming);
        }
        Ok(())
    }

    /// Takes note of what has ended.
    fn handle(&mut self, progress: Progress) -> Result<(), Error> {
        self.woken |= progress.woken;
        if let Some((outgoing, result)) = progress.sent {
            let n = retried(result).unwrap_or_else(|error| self.send_failed(&error));
            self.stats.sent += n as u64;
            self.layer.sent(&mut self.halves, outgoing, n)?;
        }
        if let Some((incoming, result)) = progress.received {
            if matches!(result, Ok(0)) {
                let ended = self.layer.ended(&self.halves);
                return Err(self.send_failed.take().unwrap_or(ended));
            }
            let n = retried(result).map_err(|error| receive_error(&error))?;
            self.stats.received += n as u64;
            self.layer.received(&mut self.halves, incoming, n)?;
        }
        Ok(())
    }

    fn send_failed(&mut self, error: &io::Error) -> usize {
        // The peer may have said why before it left: go on receiving until its end.
        self.send_failed = Some(match error.kind() {
            io::ErrorKind::BrokenPipe => Error::Closed,
            _ if error.raw_os_error() == Some(libc::EFAULT) => {
                Error::io("reading the guest's memory to send it", error)
            }
            _ => Error::io("sending to the peer", error),
        });
        self.driver.shut_down();
        0
    }

    /// One round: start, wait, take note.
    fn turn(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        self.start()?;
        let progress = self.driver.wait(timeout)?;
        self.handle(progress)
    }

    fn fail(&mut self, error: Error) {
        // The peer is told what it cannot know by itself.
        let fault = match &error {
            Error::PeerMisbehaved(text) => Some(text.clone()),
            Error::NoMemory(_) => Some(error.to_string()),
            _ => None,
        };
        if let Some(fault) = fault
            && !self.driver.sending()
        {
            let bytes = self.layer.goodbye(&self.halves, Some(clip(&fault)));
            self.driver.send_at_once(&bytes);
        }
        self.failed = Some(error);
    }

    fn check(&self, id: RegionId, extents: &[Extent]) -> Result<Region, SubmitError> {
        check_extents(self.halves.receiver.regions(), id, extents)
    }
}

/// The local region of a write or read, if the operation keeps within it and the limits.
pub(crate) fn check_extents(
    regions: &Regions,
    id: RegionId,
    extents: &[Extent],
) -> Result<Region, SubmitError> {
    if extents.is_empty() || extents.len() > MAX_EXTENTS {
        return Err(SubmitError::Invalid("no extents, or more than MAX_EXTENTS"));
    }
    let (region, _) = regions
        .get(id)
        .ok_or(SubmitError::Invalid("no such region"))?;
    if extents
        .iter()
        .any(|extent| region.address(*extent).is_none())
    {
        return Err(SubmitError::Invalid(
            "an extent is empty or outside of the region",
        ));
    }
    let mut total: u64 = 0;
    for extent in extents {
        total = total.saturating_add(extent.len);
    }
    if total > MAX_PAYLOAD {
        return Err(SubmitError::Invalid("more than MAX_PAYLOAD bytes"));
    }
    Ok(region)
}

/// Whether a message keeps within the limits.
pub(crate) fn check_message(message: &[u8]) -> Result<(), SubmitError> {
    if message.is_empty() || message.len() > MAX_MESSAGE {
        return Err(SubmitError::Invalid(
            "a message that is empty or longer than MAX_MESSAGE",
        ));
    }
    Ok(())
}

/// An operation that was interrupted (also because the thread that started it has ended) has done nothing, and is done
/// again.
fn retried(result: io::Result<usize>) -> io::Result<usize> {
    match result.as_ref().map_err(io::Error::raw_os_error) {
        Err(Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED)) => Ok(0),
        _ => result,
    }
}

impl<L: Layer> Channel for StreamChannel<L> {
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        if self.failed.is_some() {
            return Err(SubmitError::Closed);
        }
        if self.halves.sender.awaited() + self.halves.receiver.awaited() >= MAX_QUEUED {
            return Err(SubmitError::Full(op));
        }
        match op {
            Op::Write {
                region: id,
                extents,
            } => {
                let region = self.check(id, &extents)?;
                self.halves.sender.write(token, id, region, extents);
            }
            Op::Read {
                region: id,
                extents,
            } => {
                let region = self.check(id, &extents)?;
                let number = self.halves.receiver.expect(token, region, extents.clone());
                self.halves.sender.read(id, &extents, number);
            }
            Op::Send(message) => {
                check_message(&message)?;
                self.halves.sender.message(token, message);
            }
        }
        Ok(())
    }

    fn poll(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut left = timeout;
        loop {
            if let Some(event) = self.halves.events.pop_front() {
                return Ok(Some(event));
            }
            if let Some(error) = &self.failed {
                return Err(error.clone());
            }
            if std::mem::take(&mut self.woken) {
                return Ok(None);
            }
            if let Err(error) = self.turn(left) {
                self.fail(error);
                continue;
            }
            if !self.halves.events.is_empty() || self.woken {
                continue;
            }
            left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                // What has just ended may have made room: the next operation is to be under way meanwhile.
                if let Err(error) = self.start().and_then(|()| self.driver.submit()) {
                    self.fail(error);
                    continue;
                }
                return Ok(None);
            }
        }
    }

    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        if paused && self.failed.is_none() {
            let called_back = self.driver.call_back_receive();
            if let Err(error) = called_back.and_then(|progress| self.handle(progress)) {
                self.fail(error);
            }
        }
    }

    fn waker(&self) -> Waker {
        self.driver.waker()
    }

    fn stats(&self) -> Stats {
        self.stats
    }

    fn kind(&self) -> &'static str {
        self.kind
    }
}

impl<L: Layer> Drop for StreamChannel<L> {
    fn drop(&mut self) {
        if self.failed.is_none() && self.send_failed.is_none() && !self.driver.sending() {
            let bytes = self.layer.goodbye(&self.halves, None);
            if !bytes.is_empty() {
                self.driver.send_at_once(&bytes);
            }
        }
    }
}
