//! Asking a destination what a migration would find there, and seeing what the link carries.
//!
//! The connection is one as a migration has: the same transport, the same encryption, as many channels. Bytes are written to a
//! region that holds nothing there, in rounds that a barrier ends, each twice as large as the one before, for a fifth of a
//! second: a slow link is not filled for longer than that, and a fast one gets to carry what it can.

use std::time::{Duration, Instant};

use pagecopy::limits::{MAX_PROBE_ROUNDS, PROBE_BYTES, PROBE_REGION};
use pagecopy::preflight::{Facts, Span};
use pagecopy::wire::{AbortCode, Message};
use transport::{
    Access, Channel, Event, Extent, Op, Region, RegionId, Regions, SubmitError, Token,
};

use crate::dial::{Dialled, Target, dial};
use crate::failure::{Failure, Fault, host};
use crate::nic::default_channels;
use crate::session::{blocking, link_failure};

/// How long the link is filled.
const PROBE: Duration = Duration::from_millis(200);
/// How long the destination may look at itself.
const LOOK_LIMIT: Duration = Duration::from_secs(15);
/// How long everything after that may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a channel's first round.
const FIRST_ROUND: u64 = 32 << 10;
/// Bytes of a channel's round at most.
const LARGEST_ROUND: u64 = 16 << 20;
/// Bytes of one write.
const WRITE: u64 = 256 << 10;
/// Writes under way on a channel.
const UNDER_WAY: usize = 4;
/// Pings.
const PINGS: u64 = 5;
/// Pages are fetched, compared and allocated besides, and others use the link: a migration may get so much less.
const LESS: f64 = 0.4;

/// A destination, as it was found.
pub(super) struct Asked {
    /// What it told of itself.
    pub(super) facts: Facts,
    /// What lies between.
    pub(super) link: Link,
}

/// What lies between two hosts.
pub(super) struct Link {
    /// The transport's name.
    pub(super) kind: &'static str,
    /// Channels that carried bytes.
    pub(super) channels: usize,
    /// There and back.
    pub(super) round_trip: Duration,
    /// Bytes a second.
    pub(super) goodput: Span,
    /// Bytes that were sent to find out.
    pub(super) bytes: u64,
    /// How long it took.
    pub(super) took: Duration,
}

/// Asks the destination about `vm`, which has `ram` bytes of memory.
///
/// # Errors
/// It cannot be reached, does not know the question, or does not keep to the protocol; each with what to do.
pub(super) async fn ask(target: &Target, vm: &str, name: &str, ram: u64) -> Result<Asked, Failure> {
    let regions = Regions::new();
    let own = Region::anonymous(usize::try_from(PROBE_BYTES).unwrap_or(usize::MAX))
        .map_err(|error| host(format!("no memory to send from: {error}"), "free memory"))?;
    let nothing = Access {
        peer_writes: false,
        peer_reads: false,
    };
    regions.register(RegionId(PROBE_REGION), own, nothing);
    let Dialled { channels, .. } = dial(
        target,
        |address| default_channels(address, false) + 1,
        &regions,
    )
    .await?;
    let question = Message::Preflight {
        vm: vm.to_owned(),
        host: name.to_owned(),
        ram,
    };
    blocking(move || {
        let mut talk = Talk::over(channels)?;
        let facts = talk.question(&question)?;
        let link = talk.probe()?;
        Ok(Asked { facts, link })
    })
    .await
}

/// What a destination says that is asked on the connection of a migration: the channels, on which the guest may come, and its facts,
/// if they can be read.
pub(super) type Compared = (Vec<Box<dyn Channel>>, Result<Facts, String>);

/// Asks over the channels of a migration that is about to begin. None: the destination is of a version that does not know the
/// question, and has ended the connection.
///
/// # Errors
/// It does not answer, or with something else.
pub(super) async fn compare(
    channels: Vec<Box<dyn Channel>>,
    question: Message,
) -> Result<Option<Compared>, Failure> {
    blocking(move || {
        let mut talk = Talk::over(channels)?;
        talk.say(&question)?;
        match talk.heard(Instant::now() + LOOK_LIMIT)? {
            Message::Findings { facts } => {
                let mut channels = talk.data;
                channels.insert(0, talk.control);
                Ok(Some((channels, Facts::from_text(&facts))))
            }
            Message::Abort {
                code: AbortCode::Protocol,
                ..
            } => Ok(None),
            Message::Abort { reason, .. } => Err(declined(&reason)),
            other => Err(unexpected(&other)),
        }
    })
    .await
}

/// A connection to a destination that is asked.
struct Talk {
    control: Box<dyn Channel>,
    data: Vec<Box<dyn Channel>>,
}

/// A round of writes.
struct Round {
    bytes: u64,
    took: Duration,
}

impl Talk {
    fn over(channels: Vec<Box<dyn Channel>>) -> Result<Talk, Failure> {
        let mut channels = channels.into_iter();
        let control = channels
            .next()
            .ok_or_else(|| host("no channel was made", "report this"))?;
        let data = channels.collect();
        Ok(Talk { control, data })
    }

    fn question(&mut self, question: &Message) -> Result<Facts, Failure> {
        self.say(question)?;
        match self.hear(Instant::now() + LOOK_LIMIT)? {
            Message::Findings { facts } => Facts::from_text(&facts)
                .map_err(|what| misbehaved(&format!("its findings are not as agreed: {what}"))),
            other => Err(unexpected(&other)),
        }
    }

    fn probe(&mut self) -> Result<Link, Failure> {
        let begun = Instant::now();
        let deadline = begun + PROBE_LIMIT;
        let mut round_trip = Duration::MAX;
        for nonce in 0..PINGS {
            let sent = Instant::now();
            self.say(&Message::Ping { nonce })?;
            match self.hear(deadline)? {
                Message::Pong { nonce: heard } if heard == nonce => {}
                other => return Err(unexpected(&other)),
            }
            round_trip = round_trip.min(sent.elapsed());
        }
        let mut rounds = Vec::new();
        let mut each = FIRST_ROUND;
        let filling = Instant::now();
        for number in 0..MAX_PROBE_ROUNDS {
            let took = self.round(number, each, deadline)?;
            let bytes = each * u64::try_from(self.data.len()).unwrap_or(1);
            rounds.push(Round { bytes, took });
            let Some(left) = PROBE.checked_sub(filling.elapsed()) else {
                break;
            };
            if took > left {
                break;
            }
            if took * 2 <= left {
                each = (each * 2).min(LARGEST_ROUND);
            }
        }
        Ok(Link {
            kind: self.control.kind(),
            channels: self.data.len(),
            round_trip,
            goodput: goodput(&rounds, round_trip),
            bytes: rounds.iter().map(|round| round.bytes).sum(),
            took: begun.elapsed(),
        })
    }

    /// Writes so many bytes on each channel, and waits until all of them are there.
    fn round(&mut self, number: u32, each: u64, deadline: Instant) -> Result<Duration, Failure> {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let push = |channel| scope.spawn(move || write(channel, number, each, deadline));
            let threads: Vec<_> = self.data.iter_mut().map(push).collect();
            let joined = threads.into_iter().map(|thread| {
                let panicked = |_| Err(host("the probe panicked", "report this"));
                thread.join().unwrap_or_else(panicked)
            });
            // All of them, so that none writes on.
            joined
                .collect::<Vec<_>>()
                .into_iter()
                .collect::<Result<(), Failure>>()
        })?;
        match self.hear(deadline)? {
            Message::BarrierReached { round } if round == number => Ok(begun.elapsed()),
            other => Err(unexpected(&other)),
        }
    }

    fn say(&mut self, message: &Message) -> Result<(), Failure> {
        match self.control.submit(Token(0), Op::Send(message.encode())) {
            // Why a channel is closed is said by the poll that follows.
            Ok(()) | Err(SubmitError::Closed) => Ok(()),
            Err(error) => Err(host(error.to_string(), "report this")),
        }
    }

    fn hear(&mut self, deadline: Instant) -> Result<Message, Failure> {
        match self.heard(deadline)? {
            Message::Abort { reason, .. } => Err(declined(&reason)),
            message => Ok(message),
        }
    }

    /// The same, an `Abort` included.
    fn heard(&mut self, deadline: Instant) -> Result<Message, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            match self.control.poll(Some(left)) {
                Ok(Some(Event::Message(bytes))) => {
                    return Message::decode(&bytes).map_err(|error| misbehaved(&error.to_string()));
                }
                Ok(_) => {}
                Err(error) => return Err(link_failure(&error)),
            }
        }
    }
}

/// Writes `bytes` and the barrier behind them. Returns when they have left this host's hands.
fn write(
    channel: &mut Box<dyn Channel>,
    round: u32,
    bytes: u64,
    deadline: Instant,
) -> Result<(), Failure> {
    let (mut at, mut under_way, mut is_closed) = (0, 0, false);
    loop {
        while under_way < UNDER_WAY && !is_closed {
            let len = WRITE.min(bytes - at);
            let op = if len == 0 {
                Op::Send(Message::Barrier { round }.encode())
            } else {
                let region = RegionId(PROBE_REGION);
                let extents = vec![Extent {
                    offset: at % PROBE_BYTES,
                    len,
                }];
                Op::Write { region, extents }
            };
            match channel.submit(Token(0), op) {
                Ok(()) => {
                    under_way += 1;
                    is_closed = len == 0;
                    at += len;
                }
                Err(SubmitError::Full(_)) => break,
                Err(SubmitError::Closed) => is_closed = true,
                Err(SubmitError::Invalid(what)) => return Err(host(what, "report this")),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match channel.poll(Some(left)) {
            Ok(Some(Event::Sent(_))) => under_way = under_way.saturating_sub(1),
            Ok(Some(_)) => return Err(misbehaved("it sent something on a data channel")),
            Ok(None) if left.is_zero() => return Err(late()),
            Ok(None) => {}
            Err(error) => return Err(link_failure(&error)),
        }
        if is_closed && under_way == 0 {
            return Ok(());
        }
    }
}

/// What the rounds say that the link carries: those of the later half of the time, which were the largest.
#[allow(clippy::cast_precision_loss)] // Of a measured rate the last digit says nothing.
fn goodput(rounds: &[Round], round_trip: Duration) -> Span {
    let most = rounds.iter().map(|round| round.bytes).max().unwrap_or(0);
    let large = rounds.iter().filter(|round| round.bytes * 2 >= most);
    // That a round is over is heard half a round trip late, and its first byte takes the other half.
    let took = |round: &Round| {
        let alone = round.took.saturating_sub(round_trip).max(round.took / 4);
        alone.as_secs_f64().max(1e-6)
    };
    let rates = large.clone().map(|round| round.bytes as f64 / took(round));
    let (bytes, time) = large.fold((0.0, 0.0), |(bytes, time), round| {
        (bytes + round.bytes as f64, time + took(round))
    });
    let likely = if time > 0.0 { bytes / time } else { 0.0 };
    Span {
        low: rates.clone().fold(likely, f64::min) * LESS,
        likely,
        high: rates.fold(likely, f64::max),
    }
}

fn declined(reason: &str) -> Failure {
    Failure::new(
        Fault::PeerHost,
        format!("the destination does not let itself be asked: {reason}"),
        "run the same version of pagecopyd on both hosts, or see what it says",
    )
}

fn late() -> Failure {
    Failure::new(
        Fault::PeerHost,
        "the destination does not answer in time",
        "see that host's pagecopyd, and whether its QEMU hangs; then the network",
    )
}

fn misbehaved(what: &str) -> Failure {
    Failure::new(
        Fault::PeerHost,
        format!("the destination does not keep to the protocol: {what}"),
        "run the same version of pagecopyd on both hosts",
    )
}

fn unexpected(message: &Message) -> Failure {
    misbehaved(&format!("{} came, which nobody waited for", message.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput_is_of_the_large_rounds_and_without_the_way() {
        let round = |kib: u64, ms| Round {
            bytes: kib << 10,
            took: Duration::from_millis(ms),
        };
        let trip = Duration::from_millis(2);
        let rounds = [
            round(64, 50),
            round(8192, 10),
            round(16384, 18),
            round(16384, 20),
        ];
        let span = goodput(&rounds, trip);
        // 40 MiB in 8 + 16 + 18 ms.
        assert!((0.99e9..1.01e9).contains(&span.likely), "{span:?}");
        assert!(
            span.low < span.likely && span.likely < span.high,
            "{span:?}"
        );
        let none = goodput(&[], trip);
        assert_eq!((none.low, none.likely, none.high), (0.0, 0.0, 0.0));
        // A round trip that is longer than a round by chance makes no rate without end.
        let odd = goodput(&[round(1024, 1)], trip);
        assert!(odd.high <= 4.3e9, "{odd:?}");
    }
}
