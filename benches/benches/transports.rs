//! Each transport alone: bulk writes from one region into the peer's, over one channel, and a message there and back.
//!
//! `cargo bench -p benches --bench transports`. Both ends are threads of this process; sockets go over the loopback device,
//! so what is measured is what both ends and the kernel cost together.

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make public functions without words

use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tests::real::{Certs, Scratch};
use transport::mem::{Faults, Network};
use transport::{
    Access, Address, Channel, Event, Extent, Greeting, Identity, Listener, Op, Region, RegionId,
    Regions, Security, SubmitError, Token, connect,
};

const MIB: u64 = 1 << 20;
const LEN: u64 = 64 * MIB;
const REGION: RegionId = RegionId(1);
const PATIENCE: Duration = Duration::from_secs(30);
const FULL: Access = Access {
    peer_writes: true,
    peer_reads: true,
};

fn memory() -> Regions {
    let regions = Regions::new();
    let region = Region::anonymous(usize::try_from(LEN).unwrap()).unwrap();
    // No page is missing when it is measured.
    let chunk = vec![0x5a; usize::try_from(MIB).unwrap()];
    for offset in (0..LEN).step_by(chunk.len()) {
        region.copy_in(offset, &chunk);
    }
    regions.register(REGION, region, FULL);
    regions
}

/// A channel to a peer that answers each message with the same.
struct Near {
    channel: Box<dyn Channel>,
    _echo: JoinHandle<()>,
}

impl Near {
    fn new(address: &Address, dial: &Security, accept: &Security) -> Near {
        let listener = Listener::bind(address).unwrap();
        let address = listener.local_address();
        let accept = accept.clone();
        let acceptor = std::thread::spawn(move || {
            let pending = listener.accept(PATIENCE).unwrap().unwrap();
            let (_, _, channel) = pending
                .establish(&accept, PATIENCE, |_, _| Ok(memory()))
                .unwrap();
            channel
        });
        let greeting = Greeting {
            session: [7; 16],
            channel: 0,
            channels: 1,
        };
        let (channel, _) = connect(&address, dial, &greeting, &memory(), PATIENCE).unwrap();
        let mut far = acceptor.join().unwrap();
        let echo = std::thread::spawn(move || {
            // Ends when the near end is dropped.
            while let Ok(event) = far.poll(None) {
                if let Some(Event::Message(bytes)) = event
                    && far.submit(Token(0), Op::Send(bytes)).is_err()
                {
                    return;
                }
            }
        });
        Near {
            channel,
            _echo: echo,
        }
    }

    fn submit(&mut self, mut op: Op) {
        while let Err(refused) = self.channel.submit(Token(0), op) {
            let SubmitError::Full(again) = refused else {
                panic!("{refused}");
            };
            op = again;
            self.channel.poll(None).unwrap();
        }
    }

    /// A message there and back: everything before it has landed.
    fn settle(&mut self) {
        self.submit(Op::Send(Bytes::from_static(b"landed?")));
        while !matches!(self.channel.poll(None).unwrap(), Some(Event::Message(_))) {}
    }

    /// The whole region in pieces of `len` bytes, as many in a batch as a megabyte has.
    fn write_all(&mut self, len: u64) {
        for batch in batches(len) {
            self.submit(Op::Write {
                region: REGION,
                extents: batch,
            });
        }
        self.settle();
    }
}

fn batches(len: u64) -> impl Iterator<Item = Vec<Extent>> {
    (0..LEN / MIB).map(move |mib| {
        // Every other piece from the front, then the rest: no two of a batch are neighbours.
        let pieces = MIB / len;
        let place = move |n: u64| (n * 2) % pieces + n * 2 / pieces;
        (0..pieces)
            .map(|n| Extent {
                offset: mib * MIB + place(n) * len,
                len,
            })
            .collect()
    })
}

fn measure(c: &mut Criterion, name: &str, mut near: Near) {
    let mut group = c.benchmark_group(name);
    group.sample_size(20);
    group.throughput(Throughput::Bytes(LEN));
    for (name, len) in [("1 MiB extents", MIB), ("4 KiB extents", 4096)] {
        group.bench_function(name, |b| b.iter(|| near.write_all(len)));
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("there and back", |b| b.iter(|| near.settle()));
    group.finish();
}

fn sockets(c: &mut Criterion) {
    let scratch = Scratch::new();
    let plain = Security::Plaintext;
    let tcp = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let unix = Address::Unix(scratch.files().join("near.sock"));
    let certs = Certs::new(scratch.files(), "authority");
    let identity = |host: &str, peer: &str| {
        let files = certs.identity(host);
        let allow = vec![peer.to_owned()];
        Security::Tls(Identity::load(&files.ca, &files.cert, &files.key, allow).unwrap())
    };
    measure(c, "tcp", Near::new(&tcp, &plain, &plain));
    measure(c, "unix", Near::new(&unix, &plain, &plain));
    let (near, far) = (identity("localhost", "far"), identity("far", "localhost"));
    measure(c, "tls", Near::new(&tcp, &near, &far));
}

/// The in-process network of the simulation: what its own work costs, without a kernel.
fn mem(c: &mut Criterion) {
    let network = Network::new(7, Faults::default());
    let (mut near, mut far) = network.pair(&memory(), &memory());
    let mut group = c.benchmark_group("mem");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(LEN));
    group.bench_function("1 MiB extents", |b| {
        b.iter(|| {
            for batch in batches(MIB) {
                let write = Op::Write {
                    region: REGION,
                    extents: batch,
                };
                near.submit(Token(0), write).unwrap();
                // Each event of the network may have moved a part of it.
                while near.poll(Some(Duration::ZERO)).unwrap().is_none() {
                    network.advance_to(network.next_event().unwrap());
                    far.poll(Some(Duration::ZERO)).unwrap();
                }
            }
        });
    });
    group.finish();
}

criterion_group!(benches, sockets, mem);
criterion_main!(benches);
