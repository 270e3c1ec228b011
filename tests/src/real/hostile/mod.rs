//! Peers that do not keep to the protocol, as fixtures: a stranger with a bare socket, a source, and a destination.
//!
//! The last two are made of the real transport, so that they get as far as an honest peer, and then say whatever a test
//! wants them to, on any channel and at any time.

mod destination;
mod source;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use pagecopy::engine::MigrationId;
use pagecopy::memory::BlockSpec;
use pagecopy::wire::Message;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use transport::{
    Access, Address, Channel, Error, Event, Greeting, Identity, Op, Region, RegionId, Regions,
    Security, SubmitError, Token,
};

pub use self::destination::{Conduct, HostileDestination};
pub use self::source::{Ended, HostileSource};
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
            regions,
            beside: Vec::new(),
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
