//! The RDMA back end, on devices that `PAGECOPY_RDMA` names by their addresses, separated by commas: each is a rail.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

use transport::rdma::{Call, Listener, Memory, Settings, available, connect};
use transport::{Access, Channel, Error, Regions};

use crate::body;
use crate::harness::{Harness, PATIENCE, memory};

const CALL: Call = Call {
    secret: [6; 32],
    channel: 0,
    channels: 1,
};

/// The addresses; says so when there are none.
fn rails() -> Vec<IpAddr> {
    let named = std::env::var("PAGECOPY_RDMA").unwrap_or_default();
    let rails: Vec<IpAddr> = named.split(',').filter_map(|ip| ip.parse().ok()).collect();
    if rails.is_empty() {
        println!("SKIPPED: PAGECOPY_RDMA names no address of an RDMA device");
    }
    rails
}

/// Channels over these rails in turn.
struct Rails {
    rails: Vec<IpAddr>,
    next: AtomicUsize,
    settings: Settings,
}

impl Rails {
    fn new(rails: Vec<IpAddr>, settings: Settings) -> Rails {
        Rails {
            rails,
            next: AtomicUsize::new(0),
            settings,
        }
    }
}

impl Harness for Rails {
    fn pair(&self, a: &Regions, b: &Regions) -> (Box<dyn Channel>, Box<dyn Channel>) {
        let rail = self.next.fetch_add(1, Ordering::Relaxed) % self.rails.len();
        let mut listener = Listener::bind(SocketAddr::new(self.rails[rail], 0)).unwrap();
        let (a, b) = (Memory::new(a, self.settings), Memory::new(b, self.settings));
        let address = listener.local_address();
        std::thread::scope(|scope| {
            let acceptor = scope.spawn(move || {
                let pending = listener.accept(PATIENCE).unwrap().unwrap();
                let (call, channel) = pending.establish(PATIENCE, |_| Ok(b)).unwrap();
                assert_eq!(call, CALL);
                channel
            });
            let channel = connect(address, &CALL, &a, PATIENCE).unwrap();
            (
                Box::new(channel) as Box<dyn Channel>,
                Box::new(acceptor.join().unwrap()) as Box<dyn Channel>,
            )
        })
    }

    fn kind(&self) -> &'static str {
        "rdma"
    }
}

#[test]
fn rdma() {
    let rails = rails();
    if let Some(first) = rails.first() {
        body::all(&Rails::new(vec![*first], Settings::default()));
    }
}

/// Small chunks, so that operations go over their ends, and a device for every other channel.
#[test]
fn rdma_over_all_rails_in_small_chunks() {
    let rails = rails();
    if !rails.is_empty() {
        let settings = Settings {
            chunk: 256 << 10,
            ..Settings::default()
        };
        body::all(&Rails::new(rails, settings));
    }
}

#[test]
fn rdma_callers_without_the_secret_are_turned_away() {
    let Some(rail) = rails().first().copied() else {
        return;
    };
    let mut listener = Listener::bind(SocketAddr::new(rail, 0)).unwrap();
    let (regions, _) = memory(Access {
        peer_writes: true,
        peer_reads: true,
    });
    let memory = Memory::new(&regions, Settings::default());
    let address = listener.local_address();
    std::thread::scope(|scope| {
        let acceptor = scope.spawn(move || {
            let pending = listener.accept(PATIENCE).unwrap().unwrap();
            let admit = |call: &Call| {
                assert!(!call.knows(&[1; 32]));
                Err("no such secret".to_owned())
            };
            pending.establish(PATIENCE, admit).err()
        });
        let refused = connect(address, &CALL, &memory, PATIENCE).err();
        assert!(
            matches!(&refused, Some(Error::Refused(text)) if text == "no such secret"),
            "{refused:?}"
        );
        let denied = acceptor.join().unwrap();
        assert!(matches!(denied, Some(Error::Denied(_))), "{denied:?}");
    });
}

/// A host without a device is an ordinary host: it is told what it lacks.
#[test]
fn rdma_without_a_device_is_an_error_with_a_reason() {
    if let Err(error) = available() {
        assert!(error.to_string().contains("no RDMA device"), "{error}");
        let bound = Listener::bind("127.0.0.1:0".parse().unwrap()).err();
        assert!(matches!(bound, Some(Error::Io { .. })), "{bound:?}");
    }
}
