//! Peers that do not keep to the protocol, as fixtures: a stranger with a bare socket, a source, and a destination.
//!
//! The last two are made of the real transport, so that they get as far as an honest peer, and then say whatever a test
//! wants them to, on any channel and at any time.

use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::engine::MigrationId;
use pagecopy::memory::BlockSpec;
use pagecopy::wire::{AbortCode, Message};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use transport::{
    Access, Address, Channel, Error, Event, Extent, Greeting, Identity, Listener, Op, Region,
    RegionId, Regions, Security, SubmitError, Token,
};

use super::daemon::PORT;
use super::{Net, PATIENCE, Side};

/// A connection of a stranger to the daemon of `to`, made on the other host from the address `from`. Nothing was said.
pub fn stranger(net: &Net, to: Side, from: &str) -> TcpStream {
    let address = |ip: &str, port| -> SocketAddr {
        SocketAddr::new(ip.parse().expect("an IP address"), port)
    };
    let stream = net.within(to.other(), || {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&socket, &address(from, 0)).expect("an address of this host");
        connect(&socket, &address(to.address(), PORT)).expect("the daemon listens");
        TcpStream::from(socket)
    });
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket takes a time-out");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a socket takes a time-out");
    stream
}

/// Who a hostile peer is for the daemon that it talks to.
#[derive(Clone, Debug)]
pub struct Mallory {
    security: Security,
}

impl Mallory {
    /// Without certificates.
    pub fn plain() -> Mallory {
        Mallory {
            security: Security::Plaintext,
        }
    }

    /// With a certificate that the daemon accepts. `allow` is the daemon's name.
    pub fn with(identity: &super::Identity, allow: &str) -> Mallory {
        let loaded = Identity::load(
            Path::new(&identity.ca),
            Path::new(&identity.cert),
            Path::new(&identity.key),
            vec![allow.to_owned()],
        );
        Mallory {
            security: Security::Tls(loaded.expect("a certificate of ours")),
        }
    }

    /// Dials the daemon of `to` and greets on every channel of `channels` that `wanted` names.
    ///
    /// # Errors
    /// The daemon turned a channel away.
    pub fn dial(
        &self,
        net: &Net,
        to: Side,
        channels: u16,
        wanted: impl IntoIterator<Item = u16> + Send,
    ) -> Result<HostileSource, Error> {
        // The session's name is a number of this process; nobody else connects to the daemons of a test.
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let mut session = [0; 16];
        session[0] = NEXT.fetch_add(1, Ordering::Relaxed);
        session[1..9].copy_from_slice(&nanos().to_le_bytes());
        let regions = Regions::new();
        // What it writes comes from here; what is in it does not matter.
        let own = Region::anonymous(64 << 20).expect("memory");
        let access = Access {
            peer_writes: false,
            peer_reads: false,
        };
        for id in 0..3 {
            regions.register(RegionId(id), own.clone(), access);
        }
        let address = format!("{}:{PORT}", to.address());
        let address = Address::Tcp(address.parse().expect("an address"));
        let security = self.security.clone();
        let made = net.within(to.other(), || {
            wanted
                .into_iter()
                .map(|channel| {
                    let greeting = Greeting {
                        session,
                        channel,
                        channels,
                    };
                    transport::connect(&address, &security, &greeting, &regions, PATIENCE)
                        .map(|(channel, _)| channel)
                })
                .collect::<Result<Vec<_>, Error>>()
        })?;
        Ok(HostileSource {
            wire: Wire::new(made),
            id: String::new(),
        })
    }
}

/// An id as the API shows it.
fn id_text(id: MigrationId) -> String {
    let hex: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

fn nanos() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

/// `Hello` for a guest with `mib` of RAM as [`Machine::new`](super::Machine::new) makes it, and an id that was never used.
pub fn hello(vm: &str, mib: u64) -> Message {
    let mut id = [0x6d; 16];
    id[..8].copy_from_slice(&nanos().to_le_bytes());
    Message::Hello {
        version_min: 1,
        version_max: 1,
        capabilities: 1,
        id: MigrationId(id),
        vm: vm.to_owned(),
        host: "mallory".to_owned(),
        verify: false,
        blocks: vec![BlockSpec {
            name: "ram0".to_owned(),
            size: mib << 20,
            page_size: 4096,
        }],
    }
}

/// The channels of a hostile peer, and what came on the control channel while something was sent.
struct Wire {
    channels: Vec<Box<dyn Channel>>,
    inbox: VecDeque<Message>,
}

impl Wire {
    fn new(channels: Vec<Box<dyn Channel>>) -> Wire {
        Wire {
            channels,
            inbox: VecDeque::new(),
        }
    }

    /// Sends on a channel as long as it takes; a broken one is the daemon's answer.
    fn send(&mut self, channel: usize, op: Op) -> Result<(), Error> {
        let mut op = Some(op);
        let deadline = Instant::now() + PATIENCE;
        while let Some(next) = op.take() {
            match self.channels[channel].submit(Token(0), next) {
                Ok(()) | Err(SubmitError::Closed) => {}
                Err(SubmitError::Full(back)) => {
                    op = Some(back);
                    assert!(Instant::now() < deadline, "nothing is taken any more");
                }
                Err(SubmitError::Invalid(what)) => panic!("the test's own mistake: {what}"),
            }
            self.turn(channel, Duration::ZERO)?;
        }
        Ok(())
    }

    /// Moves bytes on a channel. Returns whether anything came of it.
    fn turn(&mut self, channel: usize, within: Duration) -> Result<bool, Error> {
        match self.channels[channel].poll(Some(within))? {
            Some(Event::Message(bytes)) if channel == 0 => {
                let message = Message::decode(&bytes).expect("the daemon speaks the protocol");
                self.inbox.push_back(message);
                Ok(true)
            }
            event => Ok(event.is_some()),
        }
    }

    /// Gives what was submitted on a channel time to leave. An error is the daemon's answer and comes again.
    fn flush(&mut self, channel: usize) {
        while self
            .turn(channel, Duration::from_millis(100))
            .unwrap_or(false)
        {}
    }

    /// The next message on the control channel.
    fn receive(&mut self, within: Duration) -> Result<Option<Message>, Error> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(message) = self.inbox.pop_front() {
                return Ok(Some(message));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.turn(0, left)? && left.is_zero() {
                return Ok(None);
            }
        }
    }
}

/// How a daemon ended what it had with a hostile peer.
#[derive(Debug)]
pub enum Ended {
    /// It said why.
    Aborted(AbortCode, String),
    /// The channel ended, with or without a reason from the transport.
    Closed(Error),
}

/// A source that says what it is told to.
pub struct HostileSource {
    wire: Wire,
    /// The migration that it said `Hello` for first.
    pub id: String,
}

impl std::fmt::Debug for HostileSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostileSource")
            .field("id", &self.id)
            .finish()
    }
}

impl HostileSource {
    /// Sends bytes as a message on a channel.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn raw(&mut self, channel: usize, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.wire.send(channel, Op::Send(bytes.into()))
    }

    /// Sends bytes as a message on a channel, and takes nothing from it any more.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn blind(&mut self, channel: usize, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.wire.channels[channel].pause(true);
        self.raw(channel, bytes)
    }

    /// Sends a message on a channel.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn say(&mut self, channel: usize, message: &Message) -> Result<(), Error> {
        if let Message::Hello { id, .. } = message
            && self.id.is_empty()
        {
            self.id = id_text(*id);
        }
        self.raw(channel, message.encode())
    }

    /// Lets go of a channel.
    pub fn close(&mut self, channel: usize) {
        self.wire.channels.remove(channel);
    }

    /// Writes bytes of its own into the guest's RAM.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn write(
        &mut self,
        channel: usize,
        region: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        let extents = vec![Extent { offset, len }];
        let region = RegionId(region);
        self.wire.send(channel, Op::Write { region, extents })
    }

    /// Asks to read the guest's RAM.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn read(&mut self, channel: usize, offset: u64, len: u64) -> Result<(), Error> {
        let extents = vec![Extent { offset, len }];
        let region = RegionId(0);
        self.wire.send(channel, Op::Read { region, extents })
    }

    /// Says a message and waits for the answer that `wanted` accepts.
    pub fn ask(&mut self, message: &Message, wanted: impl Fn(&Message) -> bool) -> Message {
        self.say(0, message).expect("the daemon listens");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wire.receive(left) {
                Ok(Some(answer)) if wanted(&answer) => return answer,
                Ok(Some(_)) => {}
                other => panic!("no answer to {}: {other:?}", message.name()),
            }
        }
    }

    /// Gets as far as `Accept` with `hello`.
    pub fn accepted(&mut self, hello: &Message) {
        let answer = self.ask(hello, |_| true);
        assert!(matches!(answer, Message::Accept { .. }), "{answer:?}");
    }

    /// Waits for the daemon to end it.
    pub fn end(&mut self, within: Duration) -> Ended {
        self.wire.channels[0].pause(false);
        for channel in 1..self.wire.channels.len() {
            self.wire.flush(channel);
        }
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wire.receive(left) {
                Ok(Some(Message::Abort { code, reason })) => return Ended::Aborted(code, reason),
                Ok(Some(_)) => {}
                Ok(None) => panic!("the daemon does not end it within {within:?}"),
                Err(error) => return Ended::Closed(error),
            }
        }
    }

    /// Waits for the daemon to end it, and panics unless it says that this peer broke the rules, with all of `words`.
    pub fn assert_blamed(&mut self, what: &str, words: &[&str]) {
        match self.end(PATIENCE) {
            Ended::Aborted(AbortCode::Protocol, reason) => {
                for word in words {
                    assert!(
                        reason.contains(word),
                        "{what}: {word:?} is not in {reason:?}"
                    );
                }
            }
            // The transport's own fault frame, or nothing, if the control channel itself was broken.
            Ended::Closed(Error::Refused(_) | Error::Closed | Error::Io { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }
}

/// A destination that says what it is told to.
pub struct HostileDestination {
    listener: Listener,
    security: Security,
    /// Where the source's pages land.
    regions: Regions,
    /// No channels before [`accept`](Self::accept).
    wire: Wire,
    stage: Stage,
}

impl std::fmt::Debug for HostileDestination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostileDestination")
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}

impl HostileDestination {
    /// Listens on a host.
    pub fn listen(mallory: &Mallory, net: &Net, on: Side, mib: u64) -> HostileDestination {
        let address = format!("{}:0", on.address());
        let address = Address::Tcp(address.parse().expect("an address"));
        let listener = net.within(on, || Listener::bind(&address).expect("a free port"));
        let regions = Regions::new();
        let len = usize::try_from(mib << 20).expect("a size");
        let access = Access {
            peer_writes: true,
            peer_reads: false,
        };
        regions.register(RegionId(0), Region::anonymous(len).expect("memory"), access);
        HostileDestination {
            listener,
            security: mallory.security.clone(),
            regions,
            wire: Wire::new(Vec::new()),
            stage: Stage::default(),
        }
    }

    /// Where it listens, as `--to` takes it.
    pub fn address(&self) -> String {
        self.listener.local_address().to_string()
    }

    /// Takes the next connection, all channels of it.
    pub fn accept(&mut self) {
        self.hang_up();
        self.stage = Stage::default();
        let mut made: Vec<(u16, Box<dyn Channel>)> = Vec::new();
        loop {
            let pending = self.listener.accept(PATIENCE).expect("it listens");
            let pending = pending.expect("the source dials");
            let admitted =
                pending.establish(&self.security, PATIENCE, |_, _| Ok(self.regions.clone()));
            let (greeting, _, channel) = admitted.expect("an honest source");
            made.push((greeting.channel, channel));
            if made.len() == usize::from(greeting.channels) {
                break;
            }
        }
        made.sort_by_key(|(number, _)| *number);
        self.wire = Wire::new(made.into_iter().map(|(_, channel)| channel).collect());
    }

    /// Closes the connection.
    pub fn hang_up(&mut self) {
        self.wire = Wire::new(Vec::new());
    }

    /// Gives what was said time to leave.
    pub fn flush(&mut self) {
        for channel in 0..self.wire.channels.len() {
            self.wire.flush(channel);
        }
    }

    /// Sends bytes as a message on a channel, and takes nothing from it any more.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn blind(&mut self, channel: usize, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.wire.channels[channel].pause(true);
        self.raw(channel, bytes)
    }

    /// Says a message on a channel.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn say(&mut self, channel: usize, message: &Message) -> Result<(), Error> {
        self.raw(channel, message.encode())
    }

    /// Sends bytes as a message on a channel.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn raw(&mut self, channel: usize, bytes: impl Into<Bytes>) -> Result<(), Error> {
        self.wire.send(channel, Op::Send(bytes.into()))
    }

    /// Does what the peer may not: writes into, or reads from, the source's RAM.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn touch(&mut self, channel: usize, write: bool) -> Result<(), Error> {
        let (region, extents) = (
            RegionId(0),
            vec![Extent {
                offset: 0,
                len: 4096,
            }],
        );
        let op = if write {
            Op::Write { region, extents }
        } else {
            Op::Read { region, extents }
        };
        self.wire.send(channel, op)
    }

    /// Says `Accept`.
    pub fn say_accept(&mut self) {
        let accept = Message::Accept {
            version: 1,
            capabilities: 1,
            host: "mallory".to_owned(),
        };
        self.say(0, &accept).expect("the source listens");
    }

    /// Goes on like an honest destination, as far as `manner` says, until a message of the control channel that `until`
    /// accepts has come, which is returned.
    pub fn honest_until(&mut self, manner: Conduct, until: impl Fn(&Message) -> bool) -> Message {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "it does not come: {self:?}");
            self.take_pages(manner);
            match self.wire.receive(Duration::from_millis(1)) {
                Ok(Some(Message::Ping { nonce })) => self.say_now(&Message::Pong { nonce }),
                Ok(Some(message)) => {
                    self.stage.hear(&message);
                    if until(&message) {
                        return message;
                    }
                }
                Ok(None) => {}
                Err(error) => panic!("the source ended it: {error}: {self:?}"),
            }
            if manner == Conduct::Loads && self.stage.may_load() {
                self.stage.loaded = true;
                self.say_now(&Message::Loaded);
            }
        }
    }

    fn take_pages(&mut self, manner: Conduct) {
        for lane in 1..self.wire.channels.len() {
            if let Ok(Some(Event::Message(bytes))) =
                self.wire.channels[lane].poll(Some(Duration::from_millis(1)))
                && let Ok(Message::Barrier { round }) = Message::decode(&bytes)
            {
                self.stage.barriers.insert(lane, round + 1);
            }
        }
        let lanes = self.wire.channels.len() - 1;
        let stage = &mut self.stage;
        let whole = stage.barriers.len() == lanes
            && stage
                .barriers
                .values()
                .all(|count| *count > stage.confirmed);
        if whole && manner != Conduct::Stalls {
            let round = stage.confirmed;
            stage.confirmed += 1;
            self.say_now(&Message::BarrierReached { round });
        }
    }

    /// Submits without waiting, so that nothing that comes is lost.
    fn say_now(&mut self, message: &Message) {
        // A channel that is closed says so when it is polled.
        let _ = self.wire.channels[0].submit(Token(0), Op::Send(message.encode()));
    }
}

/// How far a hostile destination goes on like an honest one. Pages are taken and pings are answered in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// No round is confirmed.
    Stalls,
    /// Rounds are confirmed.
    Confirms,
    /// And the guest is said to be loaded, when it could be.
    Loads,
}

/// What an honest destination would have to know.
#[derive(Debug, Default)]
struct Stage {
    /// By channel: rounds whose barrier has come.
    barriers: BTreeMap<usize, u32>,
    confirmed: u32,
    final_round: Option<u32>,
    state_whole: bool,
    loaded: bool,
}

impl Stage {
    fn hear(&mut self, message: &Message) {
        match message {
            Message::Stopped { final_round } => self.final_round = Some(*final_round),
            Message::DeviceStateEnd { .. } => self.state_whole = true,
            _ => {}
        }
    }

    fn may_load(&self) -> bool {
        let in_place = self.final_round.is_some_and(|last| self.confirmed > last);
        in_place && self.state_whole && !self.loaded
    }
}
