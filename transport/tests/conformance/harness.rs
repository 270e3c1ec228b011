//! One way to make and drive a pair of channels per back end.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use transport::mem::{Faults, Network};
use transport::{
    Access, Address, Channel, Error, Event, Extent, Greeting, Listener, Op, Region, RegionId,
    Regions, Security, Token, connect,
};

/// Bytes of the regions in these tests.
pub const REGION_LEN: u64 = 32 << 20;
/// The region of every test.
pub const REGION: RegionId = RegionId(3);
/// No step of a test takes longer, in an emulated machine either.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A back end under test.
pub trait Harness {
    /// A new channel with these regions at its ends.
    fn pair(&self, a: &Regions, b: &Regions) -> (Box<dyn Channel>, Box<dyn Channel>);

    /// The memory at each end.
    fn region(&self) -> Region {
        Region::anonymous(usize::try_from(REGION_LEN).unwrap()).unwrap()
    }

    /// Lets time pass where it is virtual.
    fn pass(&self) {}

    /// Whether `poll` waits.
    fn waits(&self) -> bool {
        true
    }

    /// What `kind` says.
    fn kind(&self) -> &'static str;
}

/// The in-process network.
pub struct Mem(Network);

impl Mem {
    pub fn new() -> Mem {
        Mem(Network::new(7, Faults::default()))
    }
}

impl Harness for Mem {
    fn pair(&self, a: &Regions, b: &Regions) -> (Box<dyn Channel>, Box<dyn Channel>) {
        let (a, b) = self.0.pair(a, b);
        (Box::new(a), Box::new(b))
    }

    fn pass(&self) {
        if let Some(next) = self.0.next_event() {
            self.0.advance_to(next);
        }
    }

    fn waits(&self) -> bool {
        false
    }

    fn kind(&self) -> &'static str {
        "mem"
    }
}

/// A socket back end.
pub struct Sockets {
    pub address: Address,
    pub dial: Security,
    pub accept: Security,
    pub kind: &'static str,
    /// The memory at each end is a file's, as a guest's is.
    pub of_files: bool,
}

impl Sockets {
    /// The same between the memory of files.
    pub fn of_files(self) -> Sockets {
        Sockets {
            of_files: true,
            ..self
        }
    }

    pub fn tcp() -> Sockets {
        Sockets {
            address: loopback(),
            dial: Security::Plaintext,
            accept: Security::Plaintext,
            kind: "tcp",
            of_files: false,
        }
    }

    pub fn unix() -> Sockets {
        Sockets {
            address: socket_path(),
            dial: Security::Plaintext,
            accept: Security::Plaintext,
            kind: "unix",
            of_files: false,
        }
    }
}

impl Harness for Sockets {
    fn pair(&self, a: &Regions, b: &Regions) -> (Box<dyn Channel>, Box<dyn Channel>) {
        let listener = Listener::bind(&self.address).unwrap();
        let address = listener.local_address();
        std::thread::scope(|scope| {
            let acceptor = scope.spawn(|| {
                let pending = listener.accept(PATIENCE).unwrap().unwrap();
                pending
                    .establish(&self.accept, PATIENCE, |_, _| Ok(b.clone()))
                    .unwrap()
                    .2
            });
            let (channel, _) = connect(&address, &self.dial, &greeting(), a, PATIENCE).unwrap();
            (channel, acceptor.join().unwrap())
        })
    }

    fn region(&self) -> Region {
        let len = usize::try_from(REGION_LEN).unwrap();
        let region = if self.of_files {
            Region::memfd(len)
        } else {
            Region::anonymous(len)
        };
        region.unwrap()
    }

    fn kind(&self) -> &'static str {
        self.kind
    }
}

/// Any free port.
pub fn loopback() -> Address {
    Address::Tcp("127.0.0.1:0".parse().unwrap())
}

/// A path that no other test uses.
pub fn socket_path() -> Address {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "transport-{}-{}.sock",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    Address::Unix(std::env::temp_dir().join(name))
}

/// A greeting for the only channel of a connection.
pub fn greeting() -> Greeting {
    Greeting {
        session: [9; 16],
        channel: 0,
        channels: 1,
    }
}

/// One end: its channel, its memory, and what it has reported.
pub struct End {
    pub channel: Box<dyn Channel>,
    pub regions: Regions,
    pub memory: Region,
    pub events: Vec<Event>,
    pub error: Option<Error>,
}

impl End {
    /// Polls once for whatever there is.
    pub fn poll(&mut self) {
        match self.channel.poll(Some(Duration::ZERO)) {
            Ok(Some(event)) => self.events.push(event),
            Ok(None) => {}
            Err(error) => self.error = Some(error),
        }
    }

    pub fn write(&mut self, token: u64, extents: Vec<Extent>) {
        self.channel
            .submit(
                Token(token),
                Op::Write {
                    region: REGION,
                    extents,
                },
            )
            .unwrap();
    }

    pub fn read(&mut self, token: u64, extents: Vec<Extent>) {
        self.channel
            .submit(
                Token(token),
                Op::Read {
                    region: REGION,
                    extents,
                },
            )
            .unwrap();
    }

    pub fn send(&mut self, token: u64, message: impl Into<Bytes>) {
        self.channel
            .submit(Token(token), Op::Send(message.into()))
            .unwrap();
    }

    pub fn messages(&self) -> Vec<&[u8]> {
        let mut messages = Vec::new();
        for event in &self.events {
            if let Event::Message(bytes) = event {
                messages.push(&bytes[..]);
            }
        }
        messages
    }
}

/// Two ends of one channel, each with a region that the peer may write and read.
pub struct Pair<'h> {
    pub harness: &'h dyn Harness,
    pub a: End,
    pub b: End,
}

impl<'h> Pair<'h> {
    pub fn new(harness: &'h dyn Harness) -> Pair<'h> {
        Pair::with_access(
            harness,
            Access {
                peer_writes: true,
                peer_reads: true,
            },
        )
    }

    /// `access` is what `a` may do to `b`'s region.
    pub fn with_access(harness: &'h dyn Harness, access: Access) -> Pair<'h> {
        let full = Access {
            peer_writes: true,
            peer_reads: true,
        };
        let (a, b) = (
            registered(harness.region(), full),
            registered(harness.region(), access),
        );
        let (channel_a, channel_b) = harness.pair(&a.0, &b.0);
        assert_eq!(channel_a.kind(), harness.kind());
        assert_eq!(channel_b.kind(), harness.kind());
        let end = |(regions, memory), channel| End {
            channel,
            regions,
            memory,
            events: Vec::new(),
            error: None,
        };
        Pair {
            harness,
            a: end(a, channel_a),
            b: end(b, channel_b),
        }
    }

    /// Drives both ends until `done`.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Pair<'h>) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(
                Instant::now() < end,
                "{what}: not within {PATIENCE:?}: {:?} {:?}",
                self.a.error,
                self.b.error
            );
            self.a.poll();
            self.b.poll();
            self.harness.pass();
        }
    }
}

/// A region under `REGION`, alone in its set.
pub fn memory(access: Access) -> (Regions, Region) {
    let region = Region::anonymous(usize::try_from(REGION_LEN).unwrap()).unwrap();
    registered(region, access)
}

fn registered(region: Region, access: Access) -> (Regions, Region) {
    let regions = Regions::new();
    regions.register(REGION, region.clone(), access);
    (regions, region)
}

/// Fills `extents` with bytes that tell their place.
pub fn fill(region: &Region, extents: &[Extent], salt: u64) {
    for extent in extents {
        region.copy_in(extent.offset, &pattern(extent, salt));
    }
}

/// Whether `extents` hold what `fill` put there.
pub fn holds(region: &Region, extents: &[Extent], salt: u64) -> bool {
    extents
        .iter()
        .all(|extent| contents(region, extent) == pattern(extent, salt))
}

/// Whether `extents` are all zeroes.
pub fn untouched(region: &Region, extents: &[Extent]) -> bool {
    extents
        .iter()
        .all(|extent| contents(region, extent).iter().all(|byte| *byte == 0))
}

fn contents(region: &Region, extent: &Extent) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(extent.len).unwrap()];
    region.copy_out(extent.offset, &mut bytes);
    bytes
}

fn pattern(extent: &Extent, salt: u64) -> Vec<u8> {
    (extent.offset..extent.offset + extent.len)
        .map(|at| (at ^ (at >> 9) ^ salt) as u8 | 1)
        .collect()
}

/// `count` extents of `len` bytes, `stride` apart.
pub fn scattered(first: u64, count: u64, len: u64, stride: u64) -> Vec<Extent> {
    (0..count)
        .map(|i| Extent {
            offset: first + i * stride,
            len,
        })
        .collect()
}
