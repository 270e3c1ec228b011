//! A source that says what it is told to.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::wire::{AbortCode, Message};
use transport::rdma::{self, Call, Memory, Settings};
use transport::{Channel, Error, Event, Extent, Op, RegionId, Regions, Token};

use super::super::PATIENCE;
use super::{Wire, id_text};

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
    pub(super) wire: Wire,
    /// The migration that it said `Hello` for first.
    pub id: String,
    pub(super) regions: Regions,
    /// Data channels over TCP, beside those over RDMA.
    pub(super) beside: Vec<Box<dyn Channel>>,
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

    /// Asks for RDMA for a guest with `mib` of RAM, and has its data channels go over it.
    pub fn over_rdma(&mut self, mib: u64) {
        let channels = u16::try_from(self.wire.channels.len() - 1).expect("few channels");
        let bytes = mib << 20;
        let offer = Message::RdmaOffer { channels, bytes };
        let answer = self.ask(&offer, |_| true);
        let Message::RdmaAnswer {
            address, secret, ..
        } = answer
        else {
            panic!("no answer to an offer: {answer:?}");
        };
        let to = address.parse().expect("an address");
        let memory = Memory::new(&self.regions, Settings::default());
        let call = |secret, channel| Call {
            secret,
            channel,
            channels,
        };
        let stranger = rdma::connect(to, &call([1; 32], 0), &memory, PATIENCE);
        assert!(matches!(stranger, Err(Error::Refused(_))), "{stranger:?}");
        for channel in 0..channels {
            let rail = rdma::connect(to, &call(secret.0, channel), &memory, PATIENCE);
            let rail = Box::new(rail.expect("the daemon takes the call"));
            let number = usize::from(channel) + 1;
            let tcp = std::mem::replace(&mut self.wire.channels[number], rail);
            self.beside.push(tcp);
        }
    }

    /// Sends a message on the first data channel over TCP, beside the one over RDMA.
    ///
    /// # Errors
    /// The daemon has ended the channel.
    pub fn say_beside(&mut self, message: &Message) -> Result<(), Error> {
        let op = Op::Send(message.encode());
        let tcp = &mut self.beside[0];
        if tcp.submit(Token(0), op).is_ok() {
            while tcp.poll(Some(PATIENCE))? != Some(Event::Sent(Token(0))) {}
        }
        Ok(())
    }

    /// Waits until a channel is of no use any more.
    pub fn assert_broken(&mut self, channel: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.wire.turn(channel, Duration::from_millis(10)).is_ok() {
            assert!(Instant::now() < deadline, "channel {channel} goes on");
        }
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
