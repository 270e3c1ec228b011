//! Accepting peers, and putting the channels of a connection together.
//!
//! Each channel greets on its own; those with the same session number belong together. A connection is served when all
//! its channels are there. How many may wait, and for how long, is bounded, and channels of one connection must come
//! from the same peer.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::limits::MAX_DATA_CHANNELS;
use tokio::runtime::Handle;
use transport::{Channel, Greeting, Listener, Peer, Pending, Regions};

use crate::limits::{
    GATHER_LIMIT, GREETING_LIMIT, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER, MAX_GATHERED_CHANNELS,
    MAX_GATHERED_CHANNELS_PER_PEER, MAX_GATHERING, MAX_GATHERING_PER_PEER, MAX_GREETING,
    MAX_GREETING_PER_ADDRESS, MAX_LINES_A_SECOND,
};
use crate::quota::{Quota, Share};
use crate::seldom::Seldom;
use crate::service::Service;
use crate::session::arrive::{Connection, serve};

/// How often the end of the daemon, and what has waited too long, is looked for.
const TURN: Duration = Duration::from_millis(200);

/// A connection whose channels are not all there yet.
struct Gathering {
    since: Instant,
    expected: u16,
    names: Vec<String>,
    regions: Regions,
    /// Channels that were admitted, each with its share of those that may wait.
    admitted: BTreeMap<u16, Share>,
    channels: BTreeMap<u16, Box<dyn Channel>>,
    /// Its share of the connections that may be incomplete.
    _share: Share,
}

/// What the threads that greet share.
struct Gate {
    service: Arc<Service>,
    runtime: Handle,
    gatherings: Mutex<BTreeMap<[u8; 16], Gathering>>,
    greeting: Quota,
    gathering: Quota,
    waiting: Quota,
    connections: Quota,
    log: Seldom,
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
        greeting: Quota::new(MAX_GREETING, MAX_GREETING_PER_ADDRESS),
        gathering: Quota::new(MAX_GATHERING, MAX_GATHERING_PER_PEER),
        waiting: Quota::new(MAX_GATHERED_CHANNELS, MAX_GATHERED_CHANNELS_PER_PEER),
        connections: Quota::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER),
        log: Seldom::new(MAX_LINES_A_SECOND),
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
        let Some(share) = gate.greeting.take(host(&address)) else {
            return gate.tell(&address, "too many peers are greeting: turned away");
        };
        let in_thread = Arc::clone(gate);
        let spawned = std::thread::Builder::new()
            .name("greeting".to_owned())
            .spawn(move || {
                in_thread.establish(pending);
                drop(share);
            });
        if let Err(error) = spawned {
            gate.tell(&address, &format!("no thread for a peer: {error}"));
        }
    }

    /// A line of the log that a stranger has caused: not too many of them.
    fn tell(&self, peer: &str, what: &str) {
        if let Some(left_out) = self.log.may_tell() {
            tracing::warn!(peer, left_out, "{what}");
        }
    }

    fn establish(&self, pending: Pending) {
        let address = pending.peer_address();
        let admit = |greeting: &Greeting, peer: &Peer| self.admit(greeting, peer);
        match pending.establish(&self.service.security.now(), GREETING_LIMIT, admit) {
            Ok((greeting, peer, channel)) => self.arrived(&greeting, peer, channel),
            Err(error) => self.tell(&address, &format!("a peer was turned away: {error}")),
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
        let too_many = || "too many connections are being made, try again".to_owned();
        let who = key(peer);
        let mut gatherings = self.lock();
        let gathering = match gatherings.entry(greeting.session) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(free) => free.insert(Gathering {
                since: Instant::now(),
                expected: greeting.channels,
                names: peer.names.clone(),
                regions: Regions::new(),
                admitted: BTreeMap::new(),
                channels: BTreeMap::new(),
                _share: self.gathering.take(&who).ok_or_else(too_many)?,
            }),
        };
        if gathering.expected != greeting.channels || gathering.names != peer.names {
            return Err("the channels of this connection do not belong together".to_owned());
        }
        if gathering.admitted.contains_key(&greeting.channel) {
            return Err(format!(
                "channel {} of this connection is there already",
                greeting.channel
            ));
        }
        let share = self.waiting.take(&who).ok_or_else(too_many)?;
        gathering.admitted.insert(greeting.channel, share);
        Ok(gathering.regions.clone())
    }

    fn arrived(&self, greeting: &Greeting, peer: Peer, channel: Box<dyn Channel>) {
        let mut gatherings = self.lock();
        let Some(gathering) = gatherings.get_mut(&greeting.session) else {
            drop(gatherings);
            return self.tell(&peer.address, "a channel came too late for its connection");
        };
        gathering.channels.insert(greeting.channel, channel);
        if gathering.channels.len() < usize::from(gathering.expected) {
            return;
        }
        let Some(gathering) = gatherings.remove(&greeting.session) else {
            return;
        };
        drop(gatherings);
        let Some(share) = self.connections.take(&key(&peer)) else {
            return self.tell(&peer.address, "too many connections: closed");
        };
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
            share,
            places: gathering.admitted.into_values().collect(),
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

/// Whose a connection is: the names of the certificate, or without TLS the address.
pub(crate) fn key(peer: &Peer) -> String {
    if peer.names.is_empty() {
        host(&peer.address).to_owned()
    } else {
        peer.names.join(" ")
    }
}

/// An address without its port.
fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}
