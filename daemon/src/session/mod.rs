//! Sessions: one for each migration and side, which owns an engine, tells it what happens and does what it decides.
//!
//! A session is one task. Whatever takes time is done elsewhere and comes back as an input: QEMU's orders in tasks, the
//! pages in the lanes' threads, scans and journal records in a worker thread each, which keeps their order.

pub(crate) mod arrive;
pub(crate) mod begin;
mod destination;
pub(crate) mod recover;
mod source;
mod teller;
mod worker;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::engine::Time;
use pagecopy::host::Ram;
use pagecopy::memory::BlockId;
use transport::Error;

use crate::failure::{Failure, Fault, host};

pub(crate) use teller::{CANCELLED, Teller, end_early, tell};
pub(crate) use worker::Worker;

/// The engines' clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn now(self) -> Time {
        Time::default().after(self.0.elapsed())
    }

    /// Sleeps until `time`, or for ever when there is none.
    pub(crate) async fn sleep_until(self, time: Option<Time>) {
        match time {
            Some(time) => {
                tokio::time::sleep_until((self.0 + time.since(Time::default())).into()).await
            }
            None => std::future::pending().await,
        }
    }

    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

/// Why a connection could not be made or broke, as a failure.
pub(crate) fn link_failure(error: &Error) -> Failure {
    let (fault, remedy) = match error {
        Error::Closed => (
            Fault::PeerHost,
            "see the other host's pagecopyd: it ended, or gave up (its log says why)",
        ),
        Error::Io { .. } => (
            Fault::Network,
            "check the network and that pagecopyd runs on the other host",
        ),
        Error::NoMemory(_) => (
            Fault::ThisHost,
            "free memory on this host (the file system of the RAM files is full?)",
        ),
        Error::PeerMisbehaved(_) => (
            Fault::PeerHost,
            "run the same version of pagecopyd on both hosts",
        ),
        Error::PeerIncompatible(_) => (
            Fault::Operator,
            "use TLS on both hosts or on neither, and versions of pagecopyd that fit",
        ),
        Error::Refused(_) => (
            Fault::PeerHost,
            "see the other host's configuration (its [tls] allow list) and log",
        ),
        Error::Denied(_) => (
            Fault::PeerHost,
            "see what the peer asked for; it was told the same",
        ),
        Error::Untrusted(_) => (
            Fault::Operator,
            "check [tls] of both hosts: certificates signed by the other's ca, in date, with a DNS name on its allow list",
        ),
        Error::Misuse(_) => (Fault::ThisHost, "report this"),
    };
    Failure::new(fault, error.to_string(), remedy)
}

/// Digests of all RAM, by block.
pub(crate) fn digests(ram: &Arc<dyn Ram>, blocks: usize) -> Result<Vec<Vec<[u8; 16]>>, Failure> {
    let of_block = |block: usize| {
        let block = BlockId(u16::try_from(block).unwrap_or(u16::MAX));
        let digests = ram.digests(block).map_err(|error| {
            host(
                format!("the digests of RAM could not be taken: {error}"),
                "see the kernel's log",
            )
        })?;
        Ok(digests.into_iter().map(|digest| digest.0).collect())
    };
    (0..blocks).map(of_block).collect()
}

/// Digests of the pages of a chunk.
pub(crate) fn page_digests(ram: &Arc<dyn Ram>, block: u16, chunk: u64) -> Vec<[u8; 16]> {
    ram.page_digests(BlockId(block), chunk)
        .into_iter()
        .map(|digest| digest.0)
        .collect()
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
