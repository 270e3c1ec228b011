//! A data channel over RDMA, with the one over TCP beside it that was there first: when RDMA breaks, what has not arrived
//! goes over TCP, and when it is there again, all goes over RDMA again. Whoever uses the channel notices nothing.
//!
//! ```text
//!            RDMA breaks, here or there            the peer has said how much came
//!   Rdma ──────────────────────────────▶ Falling ────────────────────────────────▶ Tcp
//!    ▲                                                                              │
//!    └──────────── Returning (who dials) / Awaited (who listens) ◀──────────────────┘
//!                                  RDMA is there again
//! ```
//!
//! A side ends its queue pair before it says how many messages came over it (`RdmaBroken`), and sends nothing over TCP before
//! the peer has said the same: so nothing of the old way lands after anything of the new one. Up to the last message that
//! came, everything has landed, for a queue pair keeps order; what follows goes again. On the way back all has left TCP
//! (`RdmaBack`), and the peer has said so (`RdmaTaken`), before anything goes over RDMA.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use pagecopy::wire::Message;
use transport::limits::MAX_QUEUED;
use transport::rdma::RdmaChannel;
use transport::{Channel, Error, Event, Op, Stats, SubmitError, Token};

use self::bell::Bell;
pub(super) use self::berth::Berth;
use self::ledger::{Ledger, Settled};

mod bell;
mod berth;
mod ledger;
#[cfg(test)]
mod tests;

/// The other way is looked at so often, when there is no quiet moment before.
const LOOK: Duration = Duration::from_millis(50);
/// It is looked at after so long, whatever comes.
const LOOK_AT_LAST: Duration = Duration::from_millis(200);
/// How long a queue pair that was broken off may take to report what it had.
const DRAIN: Duration = Duration::from_millis(500);
/// How long who listens waits for the call of a peer that says it has called.
const CALL_LATE: Duration = Duration::from_secs(2);
/// Bytes of the longest message of this channel's own.
const LONGEST: usize = 10;
/// Names what this channel itself says over TCP.
const MARK: Token = Token(u64::MAX);

/// A channel over RDMA.
pub(super) trait Rail: Channel {
    /// Breaks it: nothing of the peer's lands any more. What had come is reported, and then an error.
    fn break_off(&mut self);
}

impl Rail for RdmaChannel {
    fn break_off(&mut self) {
        self.break_queue_pair();
    }
}

/// What the channel is on.
enum Way {
    Rdma(Box<dyn Rail>),
    /// Until the peer has said how much came.
    Falling,
    Tcp,
    /// Who dials: nothing more goes over TCP. `said`: so has the peer been told.
    Returning {
        rail: Box<dyn Rail>,
        said: bool,
    },
    /// Who listens: the same; its call is waited for until then.
    Awaited(Instant),
}

/// What becomes of a channel.
pub(super) enum Change {
    /// It goes over TCP from now on, and why.
    Fell(String),
    /// It goes over RDMA again.
    Back,
}

/// Told of each change.
pub(super) type Tell = Arc<dyn Fn(Change) + Send + Sync>;

/// See the module's text.
pub(super) struct Spared {
    way: Way,
    tcp: Box<dyn Channel>,
    /// It is gone, which matters when it is needed.
    tcp_lost: bool,
    dials: bool,
    berth: Arc<Berth>,
    /// What is under way over RDMA.
    ledger: Ledger,
    /// Messages that came over RDMA.
    received: u64,
    /// Operations under way over TCP, …
    on_tcp: usize,
    /// … and those of them that are reads.
    reads: usize,
    /// What no way has taken yet.
    waiting: VecDeque<(Token, Op)>,
    events: VecDeque<Event>,
    bell: Arc<Bell>,
    paused: bool,
    looked: Instant,
    /// Bytes over queue pairs that are no more.
    before: Stats,
    failed: Option<Error>,
    tell: Tell,
}

impl Spared {
    /// Over `rail`, beside `tcp`. `dials`: this side makes the calls.
    pub(super) fn new(
        rail: Box<dyn Rail>,
        tcp: Box<dyn Channel>,
        dials: bool,
        berth: Arc<Berth>,
        tell: Tell,
    ) -> Spared {
        let bell = Bell::new(rail.waker());
        Spared {
            way: Way::Rdma(rail),
            tcp,
            tcp_lost: false,
            dials,
            berth,
            ledger: Ledger::default(),
            received: 0,
            on_tcp: 0,
            reads: 0,
            waiting: VecDeque::new(),
            events: VecDeque::new(),
            bell: Arc::new(bell),
            paused: false,
            looked: Instant::now(),
            before: Stats::default(),
            failed: None,
            tell,
        }
    }

    /// One look at what there is, waiting for `slice` at most.
    fn turn(&mut self, slice: Duration) -> Result<(), Error> {
        self.hand_over()?;
        let Way::Rdma(rail) = &mut self.way else {
            self.over_tcp(slice)?;
            return self.return_if_ready();
        };
        let begun = Instant::now();
        let idle = match rail.poll(Some(slice)) {
            Ok(Some(event)) => {
                self.by_rail(event);
                false
            }
            // Not woken, for then there is something to do.
            Ok(None) => begun.elapsed() >= slice,
            Err(error @ (Error::Io { .. } | Error::Refused(_) | Error::NoMemory(_))) => {
                return self.fall(&error);
            }
            Err(error) => return Err(error),
        };
        if idle || self.looked.elapsed() >= LOOK_AT_LAST {
            self.looked = Instant::now();
            self.look_at_tcp()?;
            #[cfg(feature = "steps")]
            self.break_if_asked();
        }
        Ok(())
    }

    /// For the tests: as a failing device would.
    #[cfg(feature = "steps")]
    fn break_if_asked(&mut self) {
        if let Way::Rdma(rail) = &mut self.way
            && crate::steps::breaks_rdma()
        {
            rail.break_off();
        }
    }

    /// Hands to the way that there is what it takes.
    fn hand_over(&mut self) -> Result<(), Error> {
        while let Some((token, op)) = self.waiting.pop_front() {
            match self.give(token, op) {
                Ok(()) => {}
                Err(SubmitError::Full(op)) => {
                    self.waiting.push_front((token, op));
                    break;
                }
                Err(SubmitError::Invalid(what)) => return Err(Error::Misuse(what.to_owned())),
                Err(SubmitError::Closed) => break,
            }
        }
        Ok(())
    }

    fn give(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        match &mut self.way {
            Way::Rdma(rail) => {
                let kept = op.clone();
                match rail.submit(token, op) {
                    Ok(()) => self.ledger.add(token, kept),
                    // It has broken, as the next poll finds.
                    Err(SubmitError::Closed) => return Err(SubmitError::Full(kept)),
                    Err(error) => return Err(error),
                }
            }
            Way::Tcp => {
                let read = matches!(op, Op::Read { .. });
                self.tcp.submit(token, op)?;
                self.on_tcp += 1;
                self.reads += usize::from(read);
            }
            Way::Falling | Way::Returning { .. } | Way::Awaited(_) => {
                return Err(SubmitError::Full(op));
            }
        }
        Ok(())
    }

    fn by_rail(&mut self, event: Event) {
        match &event {
            Event::Sent(token) | Event::Fetched(token) => self.ledger.ended(*token),
            Event::Message(_) => self.received += 1,
        }
        self.events.push_back(event);
    }

    /// While RDMA goes, the peer says over TCP only that it does not any more.
    fn look_at_tcp(&mut self) -> Result<(), Error> {
        while !self.tcp_lost {
            match self.tcp.poll(Some(Duration::ZERO)) {
                Ok(Some(event)) => self.by_tcp(event)?,
                Ok(None) => break,
                Err(_) => self.tcp_lost = true,
            }
        }
        Ok(())
    }

    fn over_tcp(&mut self, slice: Duration) -> Result<(), Error> {
        if let Some(event) = self.tcp.poll(Some(slice))? {
            self.by_tcp(event)?;
        }
        Ok(())
    }

    fn by_tcp(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Sent(MARK) => {}
            Event::Sent(_) => {
                self.on_tcp = self.on_tcp.saturating_sub(1);
                self.events.push_back(event);
            }
            Event::Fetched(_) => {
                self.on_tcp = self.on_tcp.saturating_sub(1);
                self.reads = self.reads.saturating_sub(1);
                self.events.push_back(event);
            }
            Event::Message(bytes) => match (ours(&bytes), &self.way) {
                (None, Way::Tcp | Way::Returning { .. }) => {
                    self.events.push_back(Event::Message(bytes));
                }
                (Some(Message::RdmaBroken { received }), Way::Rdma(_)) => {
                    self.fall(&Error::Io {
                        what: "RDMA",
                        kind: std::io::ErrorKind::ConnectionReset,
                        message: "the other host's end of it broke".to_owned(),
                    })?;
                    self.resume(received)?;
                }
                (Some(Message::RdmaBroken { received }), Way::Falling) => self.resume(received)?,
                (Some(Message::RdmaBack), Way::Tcp) if !self.dials => {
                    self.way = Way::Awaited(Instant::now() + CALL_LATE);
                }
                (Some(Message::RdmaTaken { taken }), Way::Returning { said: true, .. }) => {
                    let way = std::mem::replace(&mut self.way, Way::Tcp);
                    match way {
                        Way::Returning { rail, .. } if taken => self.go_over(rail),
                        _ => self.berth.want(true),
                    }
                }
                (told, _) => {
                    let what = told.map_or("a message", |told| told.name());
                    return Err(misbehaved(&format!(
                        "{what} over TCP, where it is not expected"
                    )));
                }
            },
        }
        Ok(())
    }

    /// RDMA is no more: ends it here, takes what had come, and says how much that was.
    fn fall(&mut self, why: &Error) -> Result<(), Error> {
        let Way::Rdma(mut rail) = std::mem::replace(&mut self.way, Way::Falling) else {
            return Ok(());
        };
        rail.break_off();
        let end = Instant::now() + DRAIN;
        while let Ok(event) = rail.poll(Some(LOOK)) {
            match event {
                Some(event) => self.by_rail(event),
                None if Instant::now() > end => break,
                None => {}
            }
        }
        let stats = rail.stats();
        self.before.sent += stats.sent;
        self.before.received += stats.received;
        // From here on nothing of the peer's lands by it.
        drop(rail);
        if self.tcp_lost {
            return Err(why.clone());
        }
        (self.tell)(Change::Fell(why.to_string()));
        self.bell.set(self.tcp.waker());
        self.say(&Message::RdmaBroken {
            received: self.received,
        })?;
        // Memory that may not be pinned is not there the next time either.
        self.berth.want(!matches!(why, Error::NoMemory(_)));
        Ok(())
    }

    /// The peer has `received` messages: what is behind them goes again.
    fn resume(&mut self, received: u64) -> Result<(), Error> {
        let Some(Settled { arrived, again }) = self.ledger.settle(received) else {
            return Err(misbehaved(
                "more messages over RDMA than were sent, or fewer than have arrived",
            ));
        };
        self.events.extend(arrived.into_iter().map(Event::Sent));
        for entry in again.into_iter().rev() {
            self.waiting.push_front(entry);
        }
        self.received = 0;
        self.way = Way::Tcp;
        Ok(())
    }

    /// Goes on with the way back, if it is time for that.
    fn return_if_ready(&mut self) -> Result<(), Error> {
        match &mut self.way {
            Way::Tcp if self.dials => {
                if let Some(rail) = self.berth.take() {
                    self.berth.want(false);
                    self.way = Way::Returning { rail, said: false };
                }
            }
            Way::Returning { said, .. } if !*said && self.reads == 0 => {
                *said = true;
                self.say(&Message::RdmaBack)?;
            }
            Way::Awaited(late) if self.reads == 0 => {
                let late = *late <= Instant::now();
                match self.berth.take() {
                    Some(rail) => {
                        self.say(&Message::RdmaTaken { taken: true })?;
                        self.go_over(rail);
                    }
                    None if late => {
                        self.say(&Message::RdmaTaken { taken: false })?;
                        self.way = Way::Tcp;
                    }
                    None => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn go_over(&mut self, mut rail: Box<dyn Rail>) {
        self.berth.want(false);
        rail.pause(self.paused);
        self.bell.set(rail.waker());
        self.way = Way::Rdma(rail);
        (self.tell)(Change::Back);
    }

    /// Says something of this channel's own over TCP. Its queue has kept room for that.
    fn say(&mut self, message: &Message) -> Result<(), Error> {
        let said = self.tcp.submit(MARK, Op::Send(message.encode()));
        said.map_err(|error| match error {
            SubmitError::Closed => Error::Closed,
            other => Error::Misuse(other.to_string()),
        })
    }
}

/// What this channel's other end says of itself; none when it is a message of its user's.
fn ours(bytes: &[u8]) -> Option<Message> {
    if bytes.len() > LONGEST {
        return None;
    }
    Message::decode(bytes).ok().filter(|message| {
        matches!(
            message,
            Message::RdmaBroken { .. } | Message::RdmaBack | Message::RdmaTaken { .. }
        )
    })
}

fn misbehaved(text: &str) -> Error {
    Error::PeerMisbehaved(text.to_owned())
}

impl Channel for Spared {
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        if self.failed.is_some() {
            return Err(SubmitError::Closed);
        }
        // Two places less than the queue over TCP has: they are for words of this channel's own.
        if self.waiting.len() + self.ledger.len() + self.on_tcp >= MAX_QUEUED - 2 {
            return Err(SubmitError::Full(op));
        }
        if self.waiting.is_empty() {
            match self.give(token, op) {
                Err(SubmitError::Full(op)) if !matches!(self.way, Way::Tcp) => {
                    self.waiting.push_back((token, op));
                    return Ok(());
                }
                given => return given,
            }
        }
        self.waiting.push_back((token, op));
        Ok(())
    }

    fn poll(&mut self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut turned = false;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if let Some(error) = &self.failed {
                return Err(error.clone());
            }
            if self.bell.was_rung() {
                return Ok(None);
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if turned && left == Some(Duration::ZERO) {
                return Ok(None);
            }
            turned = true;
            let slice = left.map_or(LOOK, |left| left.min(LOOK));
            self.failed = self.turn(slice).err();
        }
    }

    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        if let Way::Rdma(rail) = &mut self.way {
            rail.pause(paused);
        }
        self.tcp.pause(paused);
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.bell))
    }

    fn stats(&self) -> Stats {
        let (tcp, rail) = (
            self.tcp.stats(),
            match &self.way {
                Way::Rdma(rail) => rail.stats(),
                _ => Stats::default(),
            },
        );
        Stats {
            sent: self.before.sent + tcp.sent + rail.sent,
            received: self.before.received + tcp.received + rail.received,
        }
    }

    fn kind(&self) -> &'static str {
        match self.way {
            Way::Rdma(_) => "rdma",
            _ => self.tcp.kind(),
        }
    }
}
