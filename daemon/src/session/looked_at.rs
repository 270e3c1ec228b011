//! A peer asks what a migration would find here: to know it and to see what the link carries, with nothing of a migration beginning; or
//! to begin one on the same connection.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::ChannelId;
use pagecopy::limits::{MAX_PROBE_ROUNDS, PROBE_BYTES, PROBE_REGION};
use pagecopy::wire::{AbortCode, Message};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, timeout, timeout_at};
use transport::{Access, Channel, Region, RegionId, Token};

use super::arrive::{Visit, VisitParts};
use crate::failure::{Failure, Shown, host};
use crate::lane::{Events, Handler, Lane, LaneEvent, Ops, Told};
use crate::limits::{FIRST_MESSAGE, PREFLIGHT_LIMIT};
use crate::preflight::own;

/// How long this host and its QEMU may be looked at.
const LOOK_LIMIT: Duration = Duration::from_secs(8);

impl Visit {
    /// Tells what both sides are compared in; then the guest may come. Returns its `Hello`.
    pub(super) async fn be_compared(mut self, vm: &str) -> Option<(Visit, Message)> {
        let service = Arc::clone(&self.service);
        let looked = timeout(LOOK_LIMIT, async {
            // Closed, it would only mean that nobody waits for his turn.
            let _turn = service.compared.acquire().await;
            own::compared(&service, vm).await
        });
        let Ok(facts) = looked.await else {
            let reason = format!("looking at QEMU takes more than {} s", LOOK_LIMIT.as_secs());
            self.refuse(AbortCode::TimedOut, reason);
            return None;
        };
        let facts = facts.to_text();
        self.control.give(Message::Findings { facts });
        let next = timeout(FIRST_MESSAGE, self.events.recv()).await;
        let (code, reason) = match next.map(|told| told.map(Told::take)) {
            Ok(Some(LaneEvent::Message(hello @ Message::Hello { .. }))) => {
                return Some((self, hello));
            }
            Ok(Some(LaneEvent::Message(other))) => {
                let what = format!("{} came, where Hello should", other.name());
                (AbortCode::Protocol, what)
            }
            Ok(Some(LaneEvent::Misbehaved(what))) => (AbortCode::Protocol, what),
            // It has seen enough.
            Ok(_) => return None,
            Err(_) => (
                AbortCode::TimedOut,
                "nothing was said for too long".to_owned(),
            ),
        };
        self.refuse(code, reason);
        None
    }

    /// Tells what was found, then takes what the peer writes to see what the link carries.
    pub(super) async fn be_looked_at(self, vm: String, host: String, ram: u64) {
        let peer = self.peer_key();
        let Some(_share) = self.service.looked_at.take(&peer) else {
            let reason = "others are looking at this host just now, try again".to_owned();
            return self.refuse(AbortCode::Busy, reason);
        };
        tracing::info!(vm, from = host, peer = self.peer.address, "preflight");
        let deadline = Instant::now() + PREFLIGHT_LIMIT;
        let looked = timeout(LOOK_LIMIT, own::destination(&self.service, &vm, ram)).await;
        let Ok(own) = looked else {
            let reason = format!("looking at QEMU takes more than {} s", LOOK_LIMIT.as_secs());
            return self.refuse(AbortCode::TimedOut, reason);
        };
        let facts = own.facts.to_text();
        // Before the peer hears of it, so that it finds the region there.
        let mut sink = match Sink::open(self) {
            Ok(sink) => sink,
            Err(failure) => {
                return tracing::error!(failure = %Shown(&failure), "a peer could not be served");
            }
        };
        sink.control.give(Message::Findings { facts });
        let over = timeout_at(deadline, sink.serve()).await;
        let end = over
            .unwrap_or_else(|_| Some((AbortCode::TimedOut, "preflight takes too long".to_owned())));
        sink.close(end);
    }
}

/// A connection whose data channels take bytes that nobody wants.
struct Sink {
    control: Lane<Message>,
    events: UnboundedReceiver<Told>,
    data: Vec<Lane<Command>>,
    barriers: UnboundedReceiver<Told>,
    /// The round that each channel is in.
    rounds: Vec<u32>,
    address: String,
    name: String,
}

impl Sink {
    fn open(visit: Visit) -> Result<Sink, Failure> {
        let (address, name) = (
            visit.peer.address.clone(),
            visit.service.config.name.clone(),
        );
        let VisitParts {
            control,
            events,
            data,
            regions,
        } = visit.into_parts();
        let room = Region::anonymous(usize::try_from(PROBE_BYTES).unwrap_or(usize::MAX))
            .map_err(|error| host(format!("no memory: {error}"), "free memory"))?;
        let access = Access {
            peer_writes: true,
            peer_reads: false,
        };
        regions.register(RegionId(PROBE_REGION), room, access);
        let (sender, barriers) = unbounded_channel();
        let lanes = data.into_iter().zip(1..).map(|(channel, number)| {
            let sender = sender.clone();
            lane(channel, ChannelId(number), move |told| {
                // One that has ended needs no events.
                let _ = sender.send(told);
            })
        });
        let data = lanes.collect::<Result<Vec<_>, _>>()?;
        Ok(Sink {
            rounds: vec![0; data.len()],
            control,
            events,
            data,
            barriers,
            address,
            name,
        })
    }

    /// Answers until the peer has left, or has broken a rule: with what it is told then.
    async fn serve(&mut self) -> Option<(AbortCode, String)> {
        loop {
            let event = tokio::select! {
                told = self.events.recv() => told,
                told = self.barriers.recv(), if !self.data.is_empty() => told,
            };
            let offence = match event.map(Told::take) {
                Some(LaneEvent::Message(Message::Ping { nonce })) => {
                    self.control.give(Message::Pong { nonce });
                    continue;
                }
                Some(LaneEvent::Barrier { channel, round, .. }) => {
                    match self.barrier(channel, round) {
                        Ok(()) => continue,
                        Err(what) => what,
                    }
                }
                Some(LaneEvent::Message(other)) => format!("{} in a preflight", other.name()),
                Some(LaneEvent::Misbehaved(what)) => what,
                _ => return None,
            };
            return Some((AbortCode::Protocol, offence));
        }
    }

    /// A channel has ended a round; the last one to do so ends it for all.
    fn barrier(&mut self, channel: ChannelId, round: u32) -> Result<(), String> {
        let index = usize::from(channel.0).saturating_sub(1);
        let own = self.rounds.get_mut(index);
        let own = own.ok_or_else(|| format!("channel {} is not there", channel.0))?;
        if round != *own || round >= MAX_PROBE_ROUNDS {
            return Err(format!(
                "Barrier({round}) where {own} should be, below {MAX_PROBE_ROUNDS}"
            ));
        }
        *own += 1;
        if self.rounds.iter().all(|own| *own > round) {
            self.control.give(Message::BarrierReached { round });
        }
        Ok(())
    }

    fn close(self, end: Option<(AbortCode, String)>) {
        if let Some((code, reason)) = end {
            tracing::warn!(peer = self.address, ?code, reason, "refused");
            let reason = format!("{}: {reason}", self.name);
            self.control.give(Message::Abort { code, reason });
        }
        self.control.close();
    }
}

fn lane(
    channel: Box<dyn Channel>,
    id: ChannelId,
    tell: impl Fn(Told) + Send + 'static,
) -> Result<Lane<Command>, Failure> {
    Lane::start("probe", id, channel, Discard(id), (), tell)
}

/// A data channel whose bytes land where nobody looks.
struct Discard(ChannelId);

/// Nothing is ever sent on it.
enum Command {}

impl Handler for Discard {
    type Command = Command;

    fn command(&mut self, command: Command, _ops: &mut Ops) {
        match command {}
    }

    fn sent(&mut self, _token: Token, _events: &Events) {}

    fn message(&mut self, message: bytes::Bytes, events: &Events) -> Result<(), String> {
        match Message::decode(&message).map_err(|error| error.to_string())? {
            Message::Barrier { round } => {
                events.tell(LaneEvent::Barrier {
                    channel: self.0,
                    round,
                    zero_bytes: 0,
                });
                Ok(())
            }
            other => Err(format!("{} on a data channel in a preflight", other.name())),
        }
    }
}
