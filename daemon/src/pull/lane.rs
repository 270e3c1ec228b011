//! A thread for each data channel of a post-copy: it asks for pages and places what comes.
//!
//! The first channel is for pages that somebody waits for, so that they stand in no queue of ours; now and then a page that
//! nobody waits for goes the same way, to see what it takes. The others carry the rest, as much at a time as keeps the link
//! full.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pagecopy::engine::pull::{Class, Request};
use pagecopy::memory::BlockSpec;
use transport::{Channel, Error, Event, Extent, Op, RegionId, SubmitError, Token};

use super::shared::Shared;
use super::{LOOK_EVERY, PullEvent};
use crate::sys;

/// Pages that somebody waits for are asked for all at once, up to so many: the transport's limit.
const DEMANDS: usize = transport::limits::MAX_QUEUED - 1;

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// What somebody waits for.
    Demand,
    /// Everything else.
    Rest,
}

pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) specs: Arc<[BlockSpec]>,
    pub(super) channel: Box<dyn Channel>,
    pub(super) role: Role,
    pub(super) stop: Arc<AtomicBool>,
}

struct Flight {
    request: Request,
    asked: Instant,
    bytes: u64,
}

impl Lane {
    /// Runs until it is told to stop, and gives the channel back; or until the channel breaks.
    pub(super) fn run(mut self) -> Option<Box<dyn Channel>> {
        match self.fetch() {
            Ok(()) => {
                // Nobody looks at it any more: nothing of the peer's may land.
                self.channel.pause(true);
                Some(self.channel)
            }
            Err(error) => {
                self.shared.tell(PullEvent::Broken(error));
                None
            }
        }
    }

    fn fetch(&mut self) -> Result<(), Error> {
        // It was, while its regions were being closed to the peer's writes.
        self.channel.pause(false);
        if self.role == Role::Demand {
            sys::take_short_turns();
        }
        let mut flights = BTreeMap::<Token, Flight>::new();
        let (mut under_way, mut refused) = (0, None);
        while !self.stop.load(Ordering::Relaxed) {
            while let Some((request, op)) = refused
                .take()
                .or_else(|| self.next(under_way, flights.len()))
            {
                let (token, bytes) = (Token(request.id), self.bytes(&request));
                let asked = Instant::now();
                match self.channel.submit(token, op) {
                    Ok(()) => {
                        under_way += bytes;
                        flights.insert(
                            token,
                            Flight {
                                request,
                                asked,
                                bytes,
                            },
                        );
                    }
                    Err(SubmitError::Full(op)) => {
                        refused = Some((request, op));
                        break;
                    }
                    Err(SubmitError::Invalid(what)) => return Err(Error::Misuse(what.to_owned())),
                    // The poll that follows says why.
                    Err(SubmitError::Closed) => break,
                }
            }
            let idle = match self.role {
                Role::Demand if flights.len() < DEMANDS => self.shared.until_probe(),
                Role::Demand => LOOK_EVERY,
                Role::Rest => self.shared.idle(),
            };
            match self.channel.poll(Some(idle))? {
                Some(Event::Fetched(token)) => {
                    if let Some(flight) = flights.remove(&token) {
                        under_way -= flight.bytes;
                        match self.role {
                            Role::Demand => self.shared.on_page(flight.asked),
                            Role::Rest => self.shared.on_reply(flight.asked, flight.bytes),
                        }
                        self.shared.arrived(&flight.request, flight.asked);
                    }
                }
                Some(Event::Message(_)) => {
                    return Err(Error::PeerMisbehaved(
                        "a message on a data channel, where only replies come".to_owned(),
                    ));
                }
                Some(Event::Sent(_)) | None => {}
            }
        }
        Ok(())
    }

    fn next(&self, under_way: u64, flights: usize) -> Option<(Request, Op)> {
        let request = match self.role {
            Role::Demand if flights < DEMANDS => {
                self.shared.next_demand().or_else(|| self.shared.probe())?
            }
            Role::Rest => self.shared.next_ahead(under_way)?,
            Role::Demand => return None,
        };
        // Who waits is never limited.
        if request.class != Class::Demand {
            self.shared.spend(self.bytes(&request));
        }
        let op = self.read(&request)?;
        Some((request, op))
    }

    fn read(&self, request: &Request) -> Option<Op> {
        let block = request.runs.first()?.block;
        let page = self.page_size(request);
        let extents = request
            .runs
            .iter()
            .map(|run| Extent {
                offset: run.first * page,
                len: run.pages * page,
            })
            .collect();
        Some(Op::Read {
            region: RegionId(block.0.into()),
            extents,
        })
    }

    fn bytes(&self, request: &Request) -> u64 {
        let pages: u64 = request.runs.iter().map(|run| run.pages).sum();
        pages * self.page_size(request)
    }

    /// A request is of one block.
    fn page_size(&self, request: &Request) -> u64 {
        let block = request
            .runs
            .first()
            .map_or(0, |run| usize::from(run.block.0));
        self.specs.get(block).map_or(0, |spec| spec.page_size)
    }
}
