//! Lanes: one thread for each channel, which owns it and drives it.
//!
//! The session gives a lane commands through a queue and wakes it; what comes back goes to the session as
//! [`LaneEvent`]s. What a channel is used for differs ([`control`], [`source`], [`destination`]); the loop is the same.

pub mod control;
pub mod destination;
#[cfg(test)]
mod limited;
mod meter;
pub mod source;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::engine::ChannelId;
use pagecopy::engine::source::Pushed;
use pagecopy::wire::Message;
use rustix::time::{ClockId, clock_gettime};
use transport::{Channel, Error, Event, Op, SubmitError, Token};

use crate::failure::{Failure, host};
use crate::limits::{CLOSE_LIMIT, LINGER, MAX_BACKLOG};
use crate::log;
use crate::sys;

/// A lane's thread asks so often how much processor time it has had.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// What a lane tells its session.
#[derive(Debug)]
pub enum LaneEvent {
    /// A message on the control channel.
    Message(Message),
    /// A batch has left.
    Pushed {
        /// The channel.
        channel: ChannelId,
        /// The batch.
        batch: u64,
        /// What went how.
        pushed: Pushed,
    },
    /// A barrier arrived, and all before it is in place.
    Barrier {
        /// The channel.
        channel: ChannelId,
        /// The round that it ends.
        round: u32,
        /// Bytes of zero runs placed since the barrier before.
        zero_bytes: u64,
    },
    /// Nothing more goes over the channel: `Leave` has left, or has come with all before it in place. The lane has ended.
    Left {
        /// The channel.
        channel: ChannelId,
        /// The round of which that is the barrier.
        round: u32,
    },
    /// The peer sent what it may not.
    Misbehaved(String),
    /// This host has no place for what came. Nothing more is placed.
    NoPlace(std::io::Error),
    /// The channel is broken. The lane has ended.
    Lost(ChannelId, Error),
}

/// An event on its way to the session. While it is, it counts against what the lane may tell.
#[derive(Debug)]
pub struct Told {
    event: LaneEvent,
    _place: Place,
}

impl Told {
    /// The event: the session deals with it now.
    pub fn take(self) -> LaneEvent {
        self.event
    }
}

/// What a lane has told and its session has not taken.
#[derive(Debug)]
struct Backlog {
    count: AtomicUsize,
    waker: Waker,
}

/// A place in the backlog, free again on drop.
#[derive(Debug)]
struct Place(Arc<Backlog>);

impl Drop for Place {
    fn drop(&mut self) {
        let left = self.0.count.fetch_sub(1, Ordering::AcqRel) - 1;
        if left == MAX_BACKLOG / 2 {
            self.0.waker.wake_by_ref();
        }
    }
}

/// Where a lane's events go.
pub struct Events {
    tell: Box<dyn Fn(Told) + Send>,
    backlog: Arc<Backlog>,
}

impl Events {
    /// Tells the session.
    pub fn tell(&self, event: LaneEvent) {
        self.backlog.count.fetch_add(1, Ordering::AcqRel);
        (self.tell)(Told {
            event,
            _place: Place(Arc::clone(&self.backlog)),
        });
    }

    fn backlog(&self) -> usize {
        self.backlog.count.load(Ordering::Acquire)
    }
}

/// That nothing more goes over a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// All has left: the peer closes when it has it.
    Sent,
    /// All has come: nothing of the peer's may land any more.
    Received,
}

/// What one kind of channel is used for.
pub trait Handler: Send + 'static {
    /// What the session may ask of it.
    type Command: Send + 'static;

    /// Turns a command into operations, in order.
    fn command(&mut self, command: Self::Command, ops: &mut Ops);

    /// Makes one step's operations more of what was commanded, if it is time for them. False: not now.
    fn produce(&mut self, _ops: &mut Ops) -> bool {
        false
    }

    /// How long until there may be something to produce, if that is known.
    fn wait(&self) -> Option<Duration> {
        None
    }

    /// How long nothing more is taken from the peer, if it has had its share.
    fn hold(&self) -> Option<Duration> {
        None
    }

    /// Whether what is to be sent waits for the operator's limit.
    fn is_held(&self) -> bool {
        false
    }

    /// Whether the channel is done with.
    fn over(&self) -> Option<Over> {
        None
    }

    /// So many bytes have gone over the channel in all.
    fn moved(&mut self, _sent: u64) {}

    /// The channel was waited for, with nothing to produce.
    fn waited(&mut self, _took: Duration) {}

    /// An operation has left.
    fn sent(&mut self, token: Token, events: &Events);

    /// The peer's message.
    ///
    /// # Errors
    /// How it breaks the protocol.
    fn message(&mut self, message: Bytes, events: &Events) -> Result<(), String>;
}

/// Operations that wait for a place in the channel.
#[derive(Debug, Default)]
pub struct Ops {
    waiting: VecDeque<(Token, Op)>,
    next: u64,
}

impl Ops {
    /// Adds an operation, and names it.
    pub fn push(&mut self, op: Op) -> Token {
        let token = Token(self.next);
        self.next += 1;
        self.waiting.push_back((token, op));
        token
    }
}

/// What a lane has moved and goes over, readable from elsewhere.
#[derive(Debug)]
pub struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
    /// In microseconds, as the next two.
    busy: AtomicU64,
    held: AtomicU64,
    cpu: AtomicU64,
    kind: Mutex<&'static str>,
}

impl Moved {
    fn over(kind: &'static str) -> Moved {
        Moved {
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            held: AtomicU64::new(0),
            cpu: AtomicU64::new(0),
            kind: Mutex::new(kind),
        }
    }

    /// The transport's name of the channel, which is another one while RDMA is broken.
    pub fn kind(&self) -> &'static str {
        *self.lock_kind()
    }

    fn lock_kind(&self) -> MutexGuard<'_, &'static str> {
        self.kind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes on the wire, to the peer.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// How long it had something under way, and how long that waited for the operator's limit.
    pub fn busy_and_held(&self) -> (Duration, Duration) {
        let of = |time: &AtomicU64| Duration::from_micros(time.load(Ordering::Relaxed));
        (of(&self.busy), of(&self.held))
    }

    /// Processor time of its thread, as it was some milliseconds ago at most.
    pub fn cpu(&self) -> Duration {
        Duration::from_micros(self.cpu.load(Ordering::Relaxed))
    }

    /// Bytes on the wire, both ways.
    pub fn bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed) + self.received.load(Ordering::Relaxed)
    }
}

enum Order<C> {
    Do(C),
    Hurry,
    /// Send what waits, let the peer take it, then close.
    Close,
    /// Stop touching the channel, but keep it open.
    Park,
}

/// What a lane's thread leaves: the channel, and what was held for it.
type Ended = (Box<dyn Channel>, Box<dyn Send>);

/// A channel with its thread. Dropping it closes the channel at once.
#[derive(Debug)]
pub struct Lane<C: Send + 'static> {
    id: ChannelId,
    orders: Sender<Order<C>>,
    waker: Waker,
    thread: Option<JoinHandle<Ended>>,
    kind: &'static str,
    moved: Arc<Moved>,
}

impl<C: Send + 'static> Lane<C> {
    /// Starts the thread. `held` is dropped when the channel is closed, however long that takes.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start<H: Handler<Command = C>>(
        name: &str,
        id: ChannelId,
        channel: Box<dyn Channel>,
        handler: H,
        held: impl Send + 'static,
        tell: impl Fn(Told) + Send + 'static,
    ) -> Result<Lane<C>, Failure> {
        let (orders, queue) = self::channel();
        let (waker, kind, moved) = (
            channel.waker(),
            channel.kind(),
            Arc::new(Moved::over(channel.kind())),
        );
        let backlog = Arc::new(Backlog {
            count: AtomicUsize::new(0),
            waker: waker.clone(),
        });
        let events = Events {
            tell: Box::new(tell),
            backlog,
        };
        let driver = Driver {
            id,
            channel,
            handler,
            events,
            queue,
            ops: Ops::default(),
            kind,
            spent: Spent::new(),
            moved: Arc::clone(&moved),
        };
        let thread = std::thread::Builder::new()
            .name(format!("{name}-{}", id.0))
            .spawn(log::inherited(move || {
                (driver.run(), Box::new(held) as Box<dyn Send>)
            }))
            .map_err(|error| {
                host(
                    format!("no thread for a channel: {error}"),
                    "raise the limit of processes",
                )
            })?;
        Ok(Lane {
            id,
            orders,
            waker,
            thread: Some(thread),
            kind,
            moved,
        })
    }

    /// The channel's number.
    pub fn id(&self) -> ChannelId {
        self.id
    }

    /// Gives a command. One to a lane that has ended is lost; the session was told of the end.
    pub fn give(&self, command: C) {
        self.order(Order::Do(command));
    }

    /// From now on somebody waits for what goes over this channel.
    pub fn hurry(&self) {
        self.order(Order::Hurry);
    }

    /// Sends what waits, then closes the channel in order, in the background.
    pub fn close(mut self) {
        self.order(Order::Close);
        // The thread goes on by itself for the time that the closing takes.
        drop(self.thread.take());
    }

    /// Stops the thread and returns the channel, still open and no longer touched.
    pub fn park(mut self) -> Option<Box<dyn Channel>> {
        self.order(Order::Park);
        let (channel, _) = self.thread.take()?.join().ok()?;
        Some(channel)
    }

    /// The transport's name of the channel, as it was when this began.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What it has moved.
    pub fn moved(&self) -> Arc<Moved> {
        Arc::clone(&self.moved)
    }

    fn order(&self, order: Order<C>) {
        // A lane that has ended has said so.
        let _ = self.orders.send(order);
        self.waker.wake_by_ref();
    }
}

impl<C: Send + 'static> Drop for Lane<C> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.order(Order::Park);
            // The channel closes when it is dropped here.
            drop(thread.join());
        }
    }
}

struct Driver<H: Handler> {
    id: ChannelId,
    channel: Box<dyn Channel>,
    handler: H,
    events: Events,
    queue: Receiver<Order<H::Command>>,
    ops: Ops,
    /// What it went over when that was last looked at.
    kind: &'static str,
    spent: Spent,
    moved: Arc<Moved>,
}

/// What a lane's time has gone to.
struct Spent {
    since: Instant,
    busy: Duration,
    held: Duration,
    /// When the thread was last asked how much processor time it has had.
    asked: Instant,
}

impl Spent {
    fn new() -> Spent {
        let now = Instant::now();
        Spent {
            since: now,
            busy: Duration::ZERO,
            held: Duration::ZERO,
            asked: now,
        }
    }

    /// The time since the last call was such.
    fn note(&mut self, busy: bool, held: bool) {
        let now = Instant::now();
        let took = now - std::mem::replace(&mut self.since, now);
        match (held, busy) {
            (true, _) => self.held += took,
            (false, true) => self.busy += took,
            (false, false) => {}
        }
    }

    fn publish(&mut self, moved: &Moved) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        moved.busy.store(micros(self.busy), Ordering::Relaxed);
        moved.held.store(micros(self.held), Ordering::Relaxed);
        if self.since - self.asked >= ASK_EVERY {
            self.asked = self.since;
            moved.cpu.store(micros(thread_time()), Ordering::Relaxed);
        }
    }
}

/// Processor time that the calling thread has had.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

enum Next {
    Go,
    Close,
    Park,
}

impl<H: Handler> Driver<H> {
    fn run(mut self) -> Box<dyn Channel> {
        match self.serve() {
            Ok(Next::Close) => self.linger(),
            // Nobody looks at it any more: nothing of the peer's may land.
            Ok(_) => self.channel.pause(true),
            Err(error) => self.events.tell(LaneEvent::Lost(self.id, error)),
        }
        self.channel
    }

    fn serve(&mut self) -> Result<Next, Error> {
        let mut under_way = 0_usize;
        // Set when what waits is still to be sent and nothing more will come.
        let mut closing = None;
        let mut paused = false;
        // After the first breach nothing more is taken from the peer, so that it cannot flood the session.
        let mut muted = false;
        loop {
            if closing.is_none() {
                match self.take_orders() {
                    Next::Go => {}
                    Next::Close => closing = Some(Instant::now() + CLOSE_LIMIT),
                    Next::Park => return Ok(Next::Park),
                }
            }
            let produced = closing.is_none() && self.handler.produce(&mut self.ops);
            under_way += self.submit()?;
            if closing.is_some() && under_way == 0 && self.ops.waiting.is_empty() {
                return Ok(Next::Close);
            }
            let left = closing.map(|end| end.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                // The peer takes nothing any more.
                return Ok(Next::Park);
            }
            // A peer that is faster than the session waits in the network, not in this process.
            let most = if paused {
                MAX_BACKLOG / 2
            } else {
                MAX_BACKLOG - 1
            };
            let hold = self.handler.hold();
            let full = hold.is_some() || self.events.backlog() > most;
            if full != paused {
                paused = full;
                self.channel.pause(full);
            }
            // What is made next is made beside what is sent; only then there is nothing to do but to wait.
            let begun = Instant::now();
            let longest = [left, hold, self.handler.wait()];
            let event = self.channel.poll(match produced {
                true => Some(Duration::ZERO),
                false => longest.into_iter().flatten().min(),
            });
            if !produced {
                self.handler.waited(begun.elapsed());
            }
            self.spent
                .note(produced || under_way > 0, self.handler.is_held());
            self.publish();
            match event? {
                Some(Event::Sent(token)) => {
                    under_way = under_way.saturating_sub(1);
                    self.handler.sent(token, &self.events);
                }
                Some(Event::Message(message)) if !muted => {
                    if let Err(what) = self.handler.message(message, &self.events) {
                        muted = true;
                        self.events.tell(LaneEvent::Misbehaved(what));
                    }
                }
                Some(Event::Message(_) | Event::Fetched(_)) | None => {}
            }
            match self.handler.over() {
                Some(Over::Sent) => return Ok(Next::Close),
                Some(Over::Received) => return Ok(Next::Park),
                None => {}
            }
        }
    }

    fn take_orders(&mut self) -> Next {
        loop {
            match self.queue.try_recv() {
                Ok(Order::Do(command)) => self.handler.command(command, &mut self.ops),
                Ok(Order::Hurry) => sys::take_short_turns(),
                Ok(Order::Close) => return Next::Close,
                Ok(Order::Park) | Err(TryRecvError::Disconnected) => return Next::Park,
                Err(TryRecvError::Empty) => return Next::Go,
            }
        }
    }

    /// Submits what there is room for; returns how many operations were taken.
    fn submit(&mut self) -> Result<usize, Error> {
        let mut taken = 0;
        while let Some((token, op)) = self.ops.waiting.pop_front() {
            match self.channel.submit(token, op) {
                Ok(()) => taken += 1,
                Err(SubmitError::Full(op)) => {
                    self.ops.waiting.push_front((token, op));
                    break;
                }
                Err(SubmitError::Invalid(what)) => return Err(Error::Misuse(what.to_owned())),
                // The poll that follows says why.
                Err(SubmitError::Closed) => break,
            }
        }
        Ok(taken)
    }

    /// Waits until the peer has closed: closing first, with the peer's bytes unread, would make the system throw away
    /// what we have sent.
    fn linger(&mut self) {
        self.channel.pause(false);
        let end = Instant::now() + LINGER;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.channel.poll(Some(left)).is_err() {
                return;
            }
        }
    }

    fn publish(&mut self) {
        let stats = self.channel.stats();
        self.handler.moved(stats.sent);
        self.moved.sent.store(stats.sent, Ordering::Relaxed);
        self.moved.received.store(stats.received, Ordering::Relaxed);
        self.spent.publish(&self.moved);
        let kind = self.channel.kind();
        if kind != self.kind {
            self.kind = kind;
            *self.moved.lock_kind() = kind;
        }
    }
}
