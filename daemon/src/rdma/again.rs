//! Channels over RDMA that broke are made again: who has dialled dials, who has listened listens on, each in a thread that ends
//! with the last of the channels.

use std::io;
use std::net::SocketAddr;
use std::sync::Weak;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use transport::rdma::{self, Call, Listener};

use super::link::{GREETS, NOT_AWAITED};
use super::spared::Berth;
use crate::log;

/// How long after it broke RDMA is tried, and how long between two attempts at most. Each pause is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32));
/// After so long without an attempt the next pause is the shortest again.
const FORGOTTEN: Duration = Duration::from_secs(120);
/// How long a call may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How often who listens looks whether there are channels left.
const TURN: Duration = Duration::from_millis(500);

/// Calls `to` for every channel that has fallen: the address of its number in turn first, then the others.
///
/// # Errors
/// There is no thread left.
pub(super) fn dial(
    to: Vec<SocketAddr>,
    calls: Vec<(Weak<Berth>, Call)>,
    bells: Receiver<()>,
) -> io::Result<()> {
    let dial = log::inherited(move || {
        let (mut pause, mut last) = (PAUSES.0, Instant::now());
        // The bells are gone when the channels are.
        while bells.recv().is_ok() {
            if last.elapsed() > FORGOTTEN {
                pause = PAUSES.0;
            }
            while wanted(calls.iter().map(|(berth, _)| berth)) {
                if !wait(&bells, pause) {
                    return;
                }
                (pause, last) = ((2 * pause).min(PAUSES.1), Instant::now());
                call_all(&to, &calls);
            }
        }
    });
    let thread = std::thread::Builder::new().name("rdma-dial".to_owned());
    thread.spawn(dial).map(|_| ())
}

fn call_all(to: &[SocketAddr], calls: &[(Weak<Berth>, Call)]) {
    let mut deaf = Vec::new();
    for (number, (berth, call)) in calls.iter().enumerate() {
        let Some(berth) = berth.upgrade().filter(|berth| berth.wants()) else {
            continue;
        };
        for turn in 0..to.len() {
            let at = to[(number + turn) % to.len()];
            // The other channels would fare no better.
            if deaf.contains(&at) {
                continue;
            }
            match rdma::connect(at, call, &berth.memory(), CALL_LIMIT) {
                Ok(rail) => {
                    berth.put(Box::new(rail));
                    break;
                }
                Err(error) => {
                    tracing::debug!(to = %at, %error, "no RDMA yet");
                    deaf.push(at);
                }
            }
        }
    }
}

fn wanted<'a>(mut berths: impl Iterator<Item = &'a Weak<Berth>>) -> bool {
    berths.any(|berth| berth.upgrade().is_some_and(|berth| berth.wants()))
}

/// Waits, whoever rings. False: there is nobody left.
fn wait(bells: &Receiver<()>, pause: Duration) -> bool {
    let end = Instant::now() + pause;
    loop {
        match bells.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

/// Answers calls for channels that have fallen.
///
/// # Errors
/// There is no thread left.
pub(super) fn answer(
    mut listeners: Vec<Listener>,
    secret: [u8; 32],
    berths: Vec<Weak<Berth>>,
    bells: Receiver<()>,
) -> io::Result<()> {
    let answer = log::inherited(move || {
        while bells.try_recv() != Err(TryRecvError::Disconnected) {
            match Listener::accept_any(&mut listeners, TURN) {
                Ok(None) => continue,
                Ok(Some(pending)) => {
                    let admitted = pending.establish(GREETS, |call| {
                        let berth = berths.get(usize::from(call.channel));
                        berth
                            .and_then(Weak::upgrade)
                            .filter(|berth| {
                                call.knows(&secret)
                                    && usize::from(call.channels) == berths.len()
                                    && berth.wants()
                            })
                            .map(|berth| berth.memory())
                            .ok_or_else(|| NOT_AWAITED.to_owned())
                    });
                    match admitted {
                        Ok((call, rail)) => {
                            let berth = berths.get(usize::from(call.channel));
                            if let Some(berth) = berth.and_then(Weak::upgrade) {
                                berth.put(Box::new(rail));
                            }
                        }
                        Err(error) => tracing::debug!(%error, "a call over RDMA was turned away"),
                    }
                }
                Err(error) => return tracing::info!(%error, "RDMA is not waited for any more"),
            }
        }
    });
    let thread = std::thread::Builder::new().name("rdma-answer".to_owned());
    thread.spawn(answer).map(|_| ())
}
