//! One channel with the queue of the thread that would own it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use transport::mem::MemChannel;
use transport::{Channel, Error, Event, Op, SubmitError, Token};

use super::rng::Rng;

/// What a lane reports.
#[derive(Debug)]
pub(super) enum Report {
    /// A message came.
    Message(Bytes),
    /// The last operation of that batch was handed over.
    BatchSent(u64),
    /// All that was asked for under that number has come.
    Fetched(u64),
}

/// A channel, and operations that it has no room for yet.
#[derive(Debug)]
pub(super) struct Lane {
    channel: MemChannel,
    queue: VecDeque<(Op, Option<u64>)>,
    next_token: u64,
    under_way: BTreeMap<Token, Option<u64>>,
    /// Operations of each batch that are not handed over yet.
    left: BTreeMap<u64, usize>,
}

impl Lane {
    /// Nothing queued.
    pub(super) fn new(channel: MemChannel) -> Lane {
        Lane {
            channel,
            queue: VecDeque::new(),
            next_token: 0,
            under_way: BTreeMap::new(),
            left: BTreeMap::new(),
        }
    }

    /// Queues `op`, of `batch` if it is of one. A failed channel swallows it: `poll` says why.
    pub(super) fn enqueue(&mut self, op: Op, batch: Option<u64>) -> Result<(), String> {
        if let Some(batch) = batch {
            *self.left.entry(batch).or_default() += 1;
        }
        self.queue.push_back((op, batch));
        self.submit()
    }

    /// Bytes that have gone out.
    pub(super) fn sent(&self) -> u64 {
        self.channel.stats().sent
    }

    /// The next report, if there is one.
    pub(super) fn poll(&mut self) -> Result<Option<Report>, Error> {
        while let Some(event) = self.channel.poll(Some(Duration::ZERO))? {
            match event {
                Event::Message(bytes) => return Ok(Some(Report::Message(bytes))),
                Event::Fetched(token) => {
                    let request = self.under_way.remove(&token).flatten();
                    self.submit().map_err(Error::Misuse)?;
                    if let Some(request) = request.filter(|request| self.op_left(*request)) {
                        return Ok(Some(Report::Fetched(request)));
                    }
                }
                Event::Sent(token) => {
                    let batch = self.under_way.remove(&token).flatten();
                    self.submit().map_err(Error::Misuse)?;
                    if let Some(batch) = batch.filter(|batch| self.op_left(*batch)) {
                        return Ok(Some(Report::BatchSent(batch)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Counts an operation of `batch` off; true when it was the last.
    fn op_left(&mut self, batch: u64) -> bool {
        let Some(left) = self.left.get_mut(&batch) else {
            return false;
        };
        *left -= 1;
        if *left == 0 {
            self.left.remove(&batch);
            return true;
        }
        false
    }

    fn submit(&mut self) -> Result<(), String> {
        while let Some((op, batch)) = self.queue.pop_front() {
            let token = Token(self.next_token);
            match self.channel.submit(token, op) {
                Ok(()) => {
                    self.next_token += 1;
                    self.under_way.insert(token, batch);
                }
                Err(SubmitError::Full(op)) => {
                    self.queue.push_front((op, batch));
                    return Ok(());
                }
                Err(SubmitError::Closed) => return Ok(()),
                Err(SubmitError::Invalid(why)) => return Err(why.to_owned()),
            }
        }
        Ok(())
    }
}

/// What the lanes of a connection report next and which one does, 0 for the control channel; a different one is asked
/// first each time.
pub(super) fn next_report<'a>(
    rng: &mut Rng,
    control: &'a mut Option<Lane>,
    data: impl Iterator<Item = &'a mut Lane>,
) -> Option<(usize, Result<Report, Error>)> {
    let mut lanes: Vec<&mut Lane> = control.iter_mut().chain(data).collect();
    let count = lanes.len().max(1);
    let first = rng.index(count);
    (0..lanes.len()).find_map(|step| {
        let channel = (first + step) % count;
        let report = lanes.get_mut(channel)?.poll().transpose()?;
        Some((channel, report))
    })
}
