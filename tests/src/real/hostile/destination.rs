//! A destination that goes on like an honest one as far as it is told to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::wire::Message;
use transport::{
    Access, Address, Channel, Error, Event, Extent, Listener, Op, Region, RegionId, Regions,
    Security, Token,
};

use super::super::{Net, PATIENCE, Side};
use super::{Mallory, Wire};

/// A destination that says what it is told to.
pub struct HostileDestination {
    listener: Listener,
    security: Security,
    /// Where the source's pages land.
    regions: Regions,
    /// No channels before [`accept`](Self::accept).
    wire: Wire,
    stage: Stage,
    knows_compare: bool,
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
            knows_compare: true,
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
        // Most migrations begin with a question, which is of no matter here.
        match self.wire.receive(PATIENCE) {
            Ok(Some(Message::Compare { .. })) if self.knows_compare => {
                let facts = "{}".to_owned();
                self.say_now(&Message::Findings { facts });
            }
            Ok(Some(other)) => self.wire.inbox.push_front(other),
            Ok(None) | Err(_) => {}
        }
    }

    /// From now on it is one from before `Compare`, and leaves that to the test.
    pub fn forget_compare(&mut self) {
        self.knows_compare = false;
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

    /// Takes nothing from a channel any more: what comes stays in the system's buffers, then at the daemon.
    pub fn deafen(&mut self, channel: usize) {
        self.wire.channels[channel].pause(true);
    }

    /// Says `Accept`, without post-copy.
    pub fn say_accept(&mut self) {
        self.say_accept_of(1);
    }

    /// Says `Accept` with these capabilities.
    pub fn say_accept_of(&mut self, capabilities: u64) {
        let accept = Message::Accept {
            version: 1,
            capabilities,
            host: "mallory".to_owned(),
            reason: String::new(),
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
            match self.turn(manner) {
                Ok(Some(message)) if until(&message) => return message,
                Ok(_) => {}
                Err(error) => panic!("the source ended it: {error}: {self:?}"),
            }
        }
    }

    /// Answers pings and does nothing else, until `enough` or the source ends it.
    pub fn idle_until(&mut self, mut enough: impl FnMut() -> bool) {
        while !enough() && self.turn(Conduct::Stalls).is_ok() {}
    }

    /// Hears one message, and answers it as far as `manner` says.
    fn turn(&mut self, manner: Conduct) -> Result<Option<Message>, Error> {
        let message = self.wire.receive(Duration::from_millis(1))?;
        match &message {
            Some(Message::Ping { nonce }) => self.say_now(&Message::Pong { nonce: *nonce }),
            // Had this round been the last, `Stopped` would have come before the answer.
            Some(Message::Pong { .. }) if manner == Conduct::Confirms && self.stage.asked => {
                self.confirm();
            }
            Some(other) => self.stage.hear(other),
            None => {}
        }
        if manner == Conduct::Loads && self.stage.may_load() {
            self.stage.loaded = true;
            self.say_now(&Message::Loaded);
        }
        Ok(message)
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
        let round = stage.confirmed;
        match manner {
            Conduct::Confirms if whole && !stage.asked => {
                stage.asked = true;
                self.say_now(&Message::Ping {
                    nonce: round.into(),
                });
            }
            Conduct::Loads if whole => self.confirm(),
            _ => {}
        }
    }

    fn confirm(&mut self) {
        let round = self.stage.confirmed;
        self.stage.confirmed += 1;
        self.stage.asked = false;
        self.say_now(&Message::BarrierReached { round });
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
    /// Rounds are confirmed, but not the last.
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
    /// Whether the next round that could be confirmed is the last has been asked, by a ping.
    asked: bool,
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
