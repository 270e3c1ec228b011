//! One end of a channel of the in-process network.

use std::fmt;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Duration;

use crate::channel::{Channel, Event, Op, Stats, SubmitError, Token};
use crate::error::Error;
use crate::limits::MAX_QUEUED;
use crate::mem::network::Network;
use crate::mem::pipe::Item;
use crate::stream::channel::{check_extents, check_message};

/// One end of a channel. `poll` never waits: time passes only in [`Network::advance_to`].
pub struct MemChannel {
    network: Network,
    end: usize,
}

impl fmt::Debug for MemChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemChannel")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl MemChannel {
    pub(super) fn new(network: Network, end: usize) -> MemChannel {
        MemChannel { network, end }
    }
}

/// Wakes one end.
struct EndWaker {
    network: Network,
    end: usize,
}

impl Wake for EndWaker {
    fn wake(self: Arc<Self>) {
        self.network.lock().ends[self.end].woken = true;
    }
}

impl Channel for MemChannel {
    fn submit(&mut self, token: Token, op: Op) -> Result<(), SubmitError> {
        let mut state = self.network.lock();
        let end = &state.ends[self.end];
        if end.failed.is_some() {
            return Err(SubmitError::Closed);
        }
        if end.pending >= MAX_QUEUED {
            return Err(SubmitError::Full(op));
        }
        let item = match op {
            Op::Write { region, extents } => {
                let from = check_extents(&end.regions, region, &extents)?;
                Item::Write {
                    token,
                    from,
                    region,
                    extents,
                }
            }
            Op::Read { region, extents } => {
                check_extents(&end.regions, region, &extents)?;
                Item::Request {
                    token,
                    region,
                    extents,
                }
            }
            Op::Send(message) => {
                check_message(&message)?;
                Item::Message { token, message }
            }
        };
        state.ends[self.end].pending += 1;
        state.send(self.end, item);
        Ok(())
    }

    fn poll(&mut self, _timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let mut state = self.network.lock();
        let end = &mut state.ends[self.end];
        if let Some(event) = end.events.pop_front() {
            return Ok(Some(event));
        }
        end.woken = false;
        match &end.failed {
            Some(error) => Err(error.clone()),
            None => Ok(None),
        }
    }

    fn pause(&mut self, _paused: bool) {}

    fn waker(&self) -> Waker {
        Waker::from(Arc::new(EndWaker {
            network: self.network.clone(),
            end: self.end,
        }))
    }

    fn stats(&self) -> Stats {
        self.network.lock().ends[self.end].stats
    }

    fn kind(&self) -> &'static str {
        "mem"
    }
}

impl Drop for MemChannel {
    fn drop(&mut self) {
        self.network.lock().close(self.end);
    }
}
