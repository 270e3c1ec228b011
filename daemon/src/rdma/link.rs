//! Makes the data channels of a connection once more, over RDMA: asked for and answered on its control channel, which both
//! sides trust, before anything else is said there. Those over TCP stay beside them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pagecopy::wire::Message;
use transport::rdma::{self, Call, Listener, Memory, RdmaChannel, Settings};
use transport::{Channel, Error, Event, Op, Regions, SubmitError, Token};

use super::spared::{Berth, Change, Spared, Tell};
use super::{Hearer, Plan, Rdma, again, chunk, pin_limit, usable};
use crate::dial::{DIAL_LIMIT, fresh_secret};
use crate::limits::{GATHER_LIMIT, MAX_GATHERING_RDMA};

/// Most devices that one migration goes over.
const MAX_RAILS: usize = 8;

/// Connections whose channels are being made over RDMA, each of which keeps a thread waiting.
static GATHERING: AtomicUsize = AtomicUsize::new(0);

/// What came of asking.
pub(crate) enum Asked {
    /// The data channels go over RDMA now, to these addresses.
    Over(Vec<Box<dyn Channel>>, String),
    /// They stay as they are, and why.
    Declined(Vec<Box<dyn Channel>>, String),
    /// The connection is of no use any more, and why.
    Spoiled(String),
}

/// Whether this host has RDMA.
pub(super) fn available() -> Result<(), String> {
    rdma::available().map_err(|error| error.to_string())
}

/// Whether nothing is pinned for this host's devices.
pub(super) fn pages_on_demand() -> bool {
    rdma::pages_on_demand()
}

/// Asks the destination for RDMA in the place of the data channels of a connection, control channel first. Blocks.
pub(crate) fn ask(mut channels: Vec<Box<dyn Channel>>, regions: &Regions, plan: &Plan) -> Asked {
    let data = u16::try_from(channels.len().saturating_sub(1)).unwrap_or(u16::MAX);
    let Some(control) = channels.first_mut() else {
        return Asked::Spoiled("a connection without channels".to_owned());
    };
    let offer = Message::RdmaOffer {
        channels: data,
        bytes: plan.bytes,
    };
    let (address, secret, reason) = match answer(control.as_mut(), &offer) {
        Ok(Message::RdmaAnswer {
            address,
            secret,
            reason,
        }) => (address, secret, reason),
        Ok(Message::Abort { reason, .. }) => return Asked::Spoiled(reason),
        Ok(other) => {
            return Asked::Spoiled(format!("the destination answers with {}", other.name()));
        }
        Err(error) => return Asked::Spoiled(format!("the destination does not answer: {error}")),
    };
    if address.is_empty() {
        return Asked::Declined(channels, reason);
    }
    let Some(mut to) = parse(&address) else {
        return Asked::Spoiled("the destination gives no address".to_owned());
    };
    to.retain(|to| plan.allowed.includes(to.ip()));
    if to.is_empty() {
        let networks = networks(&plan.allowed);
        return Asked::Spoiled(format!(
            "the destination listens at {address}, which is not in this host's networks of [rdma] ({networks})"
        ));
    }
    to.truncate(rails(plan.bytes, plan.pin_limit));
    let memory = Memory::new(regions, settings(plan.bytes, plan.pin_limit));
    let call = |channel| Call {
        secret: secret.0,
        channel,
        channels: data,
    };
    let rails = match call_all(&mut to, (0..data).map(call), &memory) {
        Ok(rails) => rails,
        Err(error) => return Asked::Spoiled(error),
    };
    let beside = channels.split_off(1);
    let made = beside_tcp(rails, beside, true, &memory, plan.hearer.clone());
    let calls = made.berths.into_iter().zip((0..).map(call)).collect();
    let told = listed(to.iter());
    match again::dial(to, calls, made.bells) {
        Ok(()) => {
            channels.extend(made.channels);
            Asked::Over(channels, told)
        }
        Err(error) => Asked::Spoiled(format!("no thread: {error}")),
    }
}

/// Makes each call at the next address in turn. One that cannot be called is left out of `to`, as long as there are others.
fn call_all(
    to: &mut Vec<SocketAddr>,
    calls: impl Iterator<Item = Call>,
    memory: &Memory,
) -> Result<Vec<RdmaChannel>, String> {
    let mut rails = Vec::new();
    for call in calls {
        rails.push(loop {
            let at = to[rails.len() % to.len()];
            let limit = DIAL_LIMIT / if to.len() > 1 { 2 } else { 1 };
            match rdma::connect(at, &call, memory, limit) {
                Ok(rail) => break rail,
                Err(error) if to.len() > 1 => {
                    tracing::warn!(%at, %error, "this address is left out");
                    to.retain(|it| *it != at);
                }
                Err(error) => return Err(format!("{at} cannot be called: {error}")),
            }
        });
    }
    Ok(rails)
}

/// The addresses of an answer.
fn parse(addresses: &str) -> Option<Vec<SocketAddr>> {
    let all = addresses.split(',').map(str::parse);
    let all: Vec<SocketAddr> = all.collect::<Result<_, _>>().ok()?;
    (all.len() <= MAX_RAILS).then_some(all)
}

/// As `parse` reads them.
fn listed<'a>(addresses: impl Iterator<Item = &'a SocketAddr>) -> String {
    let all: Vec<String> = addresses.map(ToString::to_string).collect();
    all.join(",")
}

/// How many devices a guest with so many bytes may go over.
fn rails(bytes: u64, pin_limit: Option<u64>) -> usize {
    match pages_on_demand() {
        true => MAX_RAILS,
        false => rails_for(bytes, pin_limit),
    }
}

/// The same where each of them pins all of it.
fn rails_for(bytes: u64, pin_limit: Option<u64>) -> usize {
    let fit = pin_limit.map_or(u64::MAX, |limit| limit / bytes.max(1));
    usize::try_from(fit).map_or(MAX_RAILS, |fit| fit.clamp(1, MAX_RAILS))
}

/// Channels over RDMA beside those over TCP, and what is needed to make them again.
struct Beside {
    channels: Vec<Box<dyn Channel>>,
    berths: Vec<Weak<Berth>>,
    bells: Receiver<()>,
}

/// Puts each channel over RDMA beside the one over TCP.
fn beside_tcp(
    rails: Vec<RdmaChannel>,
    tcp: Vec<Box<dyn Channel>>,
    dials: bool,
    memory: &Memory,
    hearer: Hearer,
) -> Beside {
    let (bell, bells) = mpsc::channel();
    let tell = once(hearer);
    let mut berths = Vec::new();
    let beside = |(rail, tcp): (RdmaChannel, _)| {
        let berth = Berth::new(memory.clone(), bell.clone());
        berths.push(Arc::downgrade(&berth));
        let spared = Spared::new(Box::new(rail), tcp, dials, berth, Arc::clone(&tell));
        Box::new(spared) as Box<dyn Channel>
    };
    let channels = rails.into_iter().zip(tcp).map(beside).collect();
    Beside {
        channels,
        berths,
        bells,
    }
}

/// Tells of the first channel that falls, and when all are back.
fn once(hearer: Hearer) -> Tell {
    let fallen = AtomicUsize::new(0);
    Arc::new(move |change| match change {
        Change::Fell(why) if fallen.fetch_add(1, Ordering::AcqRel) == 0 => {
            (hearer.0)(format!("RDMA broke, pages go over TCP: {why}"));
        }
        Change::Back if fallen.fetch_sub(1, Ordering::AcqRel) == 1 => {
            (hearer.0)("RDMA is there again, pages go over it".to_owned());
        }
        Change::Fell(_) | Change::Back => {}
    })
}

/// Says `question`, and waits for what is said next.
fn answer(control: &mut dyn Channel, question: &Message) -> Result<Message, Error> {
    let end = Instant::now() + DIAL_LIMIT;
    let said = control.submit(Token(0), Op::Send(question.encode()));
    said.map_err(|error| match error {
        SubmitError::Closed => Error::Closed,
        _ => Error::Misuse("a new channel takes no message".to_owned()),
    })?;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match control.poll(Some(left))? {
            Some(Event::Message(bytes)) => {
                return Message::decode(&bytes)
                    .map_err(|error| Error::PeerMisbehaved(error.to_string()));
            }
            _ if left.is_zero() => {
                return Err(Error::Refused("nothing came in time".to_owned()));
            }
            _ => {}
        }
    }
}

fn settings(bytes: u64, pin_limit: Option<u64>) -> Settings {
    Settings {
        chunk: chunk(bytes),
        pin_limit,
        // Only whole pages of the guest are written and read.
        on_demand: true,
    }
}

fn networks(allowed: &Rdma) -> String {
    let networks: Vec<String> = allowed.networks.iter().map(ToString::to_string).collect();
    networks.join(", ")
}

/// A destination that listens for the calls of one connection.
pub(crate) struct Waiting {
    listeners: Vec<Listener>,
    secret: [u8; 32],
    channels: u16,
    settings: Settings,
    _place: Place,
}

impl Waiting {
    /// Listens for `channels` calls, of a guest with so many bytes of RAM, at an address of each RDMA device that has one in
    /// an allowed network.
    ///
    /// # Errors
    /// Why this host takes no part.
    pub(crate) fn listen(allowed: &Rdma, bytes: u64, channels: u16) -> Result<Waiting, String> {
        let told = |(why, remedy): (String, String)| format!("{why}; {remedy}");
        usable(allowed).map_err(told)?;
        // The source writes where it likes: whatever it has a key to stays pinned.
        let limit = pin_limit(allowed.pin, bytes, true).map_err(told)?;
        let place =
            Place::take().ok_or("too many connections over RDMA are being made, try again")?;
        let addresses = if_addrs::get_if_addrs()
            .map_err(|error| format!("this host's addresses are not known: {error}"))?;
        let addresses = addresses.iter().map(if_addrs::Interface::ip);
        let most = rails(bytes, limit).min(usize::from(channels).max(1));
        let mut listeners: Vec<Listener> = Vec::new();
        for ip in addresses.filter(|ip| allowed.includes(*ip)) {
            if listeners.len() < most
                && let Ok(listener) = Listener::bind(SocketAddr::new(ip, 0))
                && !listeners.iter().any(|it| it.shares_device(&listener))
            {
                listeners.push(listener);
            }
        }
        if listeners.is_empty() {
            let networks = networks(allowed);
            return Err(format!(
                "no RDMA device here has an address in the networks of [rdma] ({networks})"
            ));
        }
        Ok(Waiting {
            listeners,
            secret: fresh_secret(),
            channels,
            settings: settings(bytes, limit),
            _place: place,
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> String {
        let all: Vec<SocketAddr> = self.listeners.iter().map(Listener::local_address).collect();
        listed(all.iter())
    }

    /// What a call must hold.
    pub(crate) fn secret(&self) -> [u8; 32] {
        self.secret
    }

    /// Takes the calls, until each channel of `beside` has one over RDMA. Blocks.
    ///
    /// # Errors
    /// They did not come in time.
    pub(crate) fn gather(
        mut self,
        regions: &Regions,
        beside: Vec<Box<dyn Channel>>,
    ) -> Result<Vec<Box<dyn Channel>>, String> {
        let memory = Memory::new(regions, self.settings);
        let end = Instant::now() + GATHER_LIMIT;
        let mut made = BTreeMap::new();
        let left =
            || Some(end.saturating_duration_since(Instant::now())).filter(|it| !it.is_zero());
        while made.len() < usize::from(self.channels) {
            let left = left().ok_or_else(|| {
                format!(
                    "{} of {} channels have come over RDMA",
                    made.len(),
                    self.channels
                )
            })?;
            let pending = match Listener::accept_any(&mut self.listeners, left) {
                Ok(Some(pending)) => pending,
                Ok(None) => continue,
                Err(error) => return Err(error.to_string()),
            };
            let established = pending.establish(left.min(GREETS), |call| {
                if call.knows(&self.secret)
                    && call.channels == self.channels
                    && !made.contains_key(&call.channel)
                {
                    Ok(memory.clone())
                } else {
                    Err(NOT_AWAITED.to_owned())
                }
            });
            match established {
                Ok((call, rail)) => {
                    made.insert(call.channel, rail);
                }
                Err(error) => tracing::warn!(%error, "a call over RDMA was turned away"),
            }
        }
        let rails = made.into_values().collect();
        let hearer = Hearer::new(|text| tracing::info!("{text}"));
        let made = beside_tcp(rails, beside, false, &memory, hearer);
        again::answer(self.listeners, self.secret, made.berths, made.bells)
            .map_err(|error| format!("no thread: {error}"))?;
        Ok(made.channels)
    }
}

/// How long a caller may take that was answered.
pub(super) const GREETS: Duration = Duration::from_secs(5);
/// What a caller is told who is not waited for.
pub(super) const NOT_AWAITED: &str = "nobody waits here for this call";

/// A place among those that are gathering, free again on drop.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let more = |count: usize| (count < MAX_GATHERING_RDMA).then_some(count + 1);
        let taken = GATHERING.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.is_ok().then_some(Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        GATHERING.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_listed() {
        let text = "192.0.2.1:5,[2001:db8::1]:6";
        let addresses = parse(text).unwrap();
        assert_eq!(listed(addresses.iter()), text);
        let many = ["192.0.2.1:5"; MAX_RAILS + 1].join(",");
        for wrong in [
            "",
            "192.0.2.1",
            "192.0.2.1:5,",
            "192.0.2.1:5, 192.0.2.2:5",
            &many,
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_guest_goes_over_as_many_devices_as_may_pin_all_of_it() {
        assert_eq!(rails_for(10, None), MAX_RAILS);
        assert_eq!(rails_for(10, Some(25)), 2);
        // Less than all is pinned at a time.
        assert_eq!(rails_for(10, Some(5)), 1);
        assert_eq!(rails_for(0, Some(5)), 5);
    }
}
