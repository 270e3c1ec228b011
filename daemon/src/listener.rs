//! Accepting peers, and putting the channels of a connection together.
//!
//! Each channel greets on its own; those with the same session number belong together. A connection is served when all
//! its channels are there. How many may wait, and for how long, is bounded, and channels of one connection must come
//! from the same peer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::limits::MAX_DATA_CHANNELS;
use tokio::runtime::Handle;
use transport::{Channel, Greeting, Listener, Peer, Pending, Regions};

use crate::service::Service;
use crate::session::arrive::{Connection, serve};

/// How long a peer may take to greet (TLS included).
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long the channels of a connection may take to be all there.
const GATHER_LIMIT: Duration = Duration::from_secs(10);
/// Connections that may be incomplete at a time.
const MAX_GATHERING: usize = 64;
/// Peers that may be greeting at a time; each costs a thread.
const MAX_GREETING: usize = 128;
/// How often the end of the daemon, and what has waited too long, is looked for.
const TURN: Duration = Duration::from_millis(200);

/// A connection whose channels are not all there yet.
struct Gathering {
    since: Instant,
    expected: u16,
    names: Vec<String>,
    regions: Regions,
    admitted: Vec<u16>,
    channels: BTreeMap<u16, Box<dyn Channel>>,
}

/// What the threads that greet share.
struct Gate {
    service: Arc<Service>,
    runtime: Handle,
    gatherings: Mutex<BTreeMap<[u8; 16], Gathering>>,
    greeting: AtomicUsize,
}

/// Accepts peers until `end` is set. Blocks.
pub(crate) fn listen(
    service: &Arc<Service>,
    listener: &Listener,
    runtime: &Handle,
    end: &AtomicBool,
) {
    let gate = Arc::new(Gate {
        service: Arc::clone(service),
        runtime: runtime.clone(),
        gatherings: Mutex::default(),
        greeting: AtomicUsize::new(0),
    });
    while !end.load(Ordering::Relaxed) {
        match listener.accept(TURN) {
            Ok(Some(pending)) => Gate::greet(&gate, pending),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "no peer can be accepted");
                // Out of descriptors, most likely: accepting at once again would only spin.
                std::thread::sleep(TURN);
            }
        }
        gate.forget_old();
    }
}

impl Gate {
    fn greet(gate: &Arc<Gate>, pending: Pending) {
        let address = pending.peer_address();
        if gate.greeting.fetch_add(1, Ordering::Relaxed) >= MAX_GREETING {
            gate.greeting.fetch_sub(1, Ordering::Relaxed);
            return tracing::warn!(peer = address, "too many peers are greeting: turned away");
        }
        let in_thread = Arc::clone(gate);
        let spawned = std::thread::Builder::new()
            .name("greeting".to_owned())
            .spawn(move || {
                in_thread.establish(pending);
                in_thread.greeting.fetch_sub(1, Ordering::Relaxed);
            });
        if let Err(error) = spawned {
            gate.greeting.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(peer = address, %error, "no thread for a peer");
        }
    }

    fn establish(&self, pending: Pending) {
        let address = pending.peer_address();
        let admit = |greeting: &Greeting, peer: &Peer| self.admit(greeting, peer);
        match pending.establish(&self.service.security, GREETING_LIMIT, admit) {
            Ok((greeting, peer, channel)) => self.arrived(&greeting, peer, channel),
            Err(error) => tracing::warn!(peer = address, %error, "a peer was turned away"),
        }
    }

    /// Decides by the greeting, and says which regions the channel gives access to.
    fn admit(&self, greeting: &Greeting, peer: &Peer) -> Result<Regions, String> {
        if greeting.channels == 0
            || greeting.channels > MAX_DATA_CHANNELS + 1
            || greeting.channel >= greeting.channels
        {
            return Err(format!(
                "channel {} of {} is not possible",
                greeting.channel, greeting.channels
            ));
        }
        let mut gatherings = self.lock();
        if gatherings.len() >= MAX_GATHERING && !gatherings.contains_key(&greeting.session) {
            return Err("too many connections are being made, try again".to_owned());
        }
        let gathering = gatherings
            .entry(greeting.session)
            .or_insert_with(|| Gathering {
                since: Instant::now(),
                expected: greeting.channels,
                names: peer.names.clone(),
                regions: Regions::new(),
                admitted: Vec::new(),
                channels: BTreeMap::new(),
            });
        if gathering.expected != greeting.channels || gathering.names != peer.names {
            return Err("the channels of this connection do not belong together".to_owned());
        }
        if gathering.admitted.contains(&greeting.channel) {
            return Err(format!(
                "channel {} of this connection is there already",
                greeting.channel
            ));
        }
        gathering.admitted.push(greeting.channel);
        Ok(gathering.regions.clone())
    }

    fn arrived(&self, greeting: &Greeting, peer: Peer, channel: Box<dyn Channel>) {
        let mut gatherings = self.lock();
        let Some(gathering) = gatherings.get_mut(&greeting.session) else {
            return tracing::warn!(
                peer = peer.address,
                "a channel came too late for its connection"
            );
        };
        gathering.channels.insert(greeting.channel, channel);
        if gathering.channels.len() < usize::from(gathering.expected) {
            return;
        }
        let Some(gathering) = gatherings.remove(&greeting.session) else {
            return;
        };
        drop(gatherings);
        let mut channels = gathering.channels.into_values();
        let Some(control) = channels.next() else {
            return;
        };
        let (data, regions) = (channels.collect(), gathering.regions);
        let connection = Connection {
            control,
            data,
            regions,
            peer,
        };
        self.runtime
            .spawn(serve(Arc::clone(&self.service), connection));
    }

    fn forget_old(&self) {
        self.lock()
            .retain(|_, gathering| gathering.since.elapsed() < GATHER_LIMIT);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<[u8; 16], Gathering>> {
        self.gatherings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
