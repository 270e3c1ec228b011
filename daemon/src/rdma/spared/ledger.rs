//! What was handed to a queue pair and has not ended: which of it has arrived, when the peer says how many messages came.

use std::collections::VecDeque;

use transport::{Op, Token};

/// What became of what was under way.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) arrived: Vec<Token>,
    /// To be done once more, in order.
    pub(super) again: Vec<(Token, Op)>,
}

/// Operations under way, in order.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: VecDeque<Entry>,
    /// Messages that were handed over, …
    sent: u64,
    /// … and those whose end was reported: the peer's device has them.
    ended: u64,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    op: Op,
    /// The message that this is, or that comes behind it: when it has arrived, so has this.
    message: u64,
}

impl Ledger {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// An operation was handed over.
    pub(super) fn add(&mut self, token: Token, op: Op) {
        let message = self.sent + 1;
        self.sent += u64::from(matches!(op, Op::Send(_)));
        self.entries.push_back(Entry { token, op, message });
    }

    /// One has ended. They mostly do so in order.
    pub(super) fn ended(&mut self, token: Token) {
        if let Some(at) = self.entries.iter().position(|entry| entry.token == token)
            && let Some(entry) = self.entries.remove(at)
        {
            self.ended += u64::from(matches!(entry.op, Op::Send(_)));
        }
    }

    /// The queue pair is no more, and `received` messages came: what has arrived, and what has to go again, in order.
    /// Begins anew. None: the peer cannot have received so many, or has lost some.
    pub(super) fn settle(&mut self, received: u64) -> Option<Settled> {
        let Ledger {
            entries,
            sent,
            ended,
        } = std::mem::take(self);
        if received < ended || received > sent {
            return None;
        }
        let mut settled = Settled::default();
        for Entry { token, op, message } in entries {
            // What a read fetches comes the other way, and says nothing about what this side sent, nor that about it.
            if message <= received && !matches!(op, Op::Read { .. }) {
                settled.arrived.push(token);
            } else {
                settled.again.push((token, op));
            }
        }
        Some(settled)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bytes::Bytes;
    use transport::{Extent, RegionId};

    use super::*;

    fn write() -> Op {
        let extents = vec![Extent { offset: 0, len: 1 }];
        let region = RegionId(0);
        Op::Write { region, extents }
    }

    fn read() -> Op {
        let extents = vec![Extent { offset: 0, len: 1 }];
        let region = RegionId(0);
        Op::Read { region, extents }
    }

    fn message() -> Op {
        Op::Send(Bytes::from_static(b"m"))
    }

    /// Write, message, read, write, message, write: tokens 0 to 5.
    fn six() -> Ledger {
        let mut ledger = Ledger::default();
        let ops = [write(), message(), read(), write(), message(), write()];
        for (token, op) in (0..).map(Token).zip(ops) {
            ledger.add(token, op);
        }
        ledger
    }

    fn settled(mut ledger: Ledger, received: u64) -> Option<(Vec<u64>, Vec<u64>)> {
        let Settled { arrived, again } = ledger.settle(received)?;
        assert_eq!((ledger.len(), ledger.sent), (0, 0));
        let arrived = arrived.into_iter().map(|token| token.0).collect();
        Some((
            arrived,
            again.into_iter().map(|(token, _)| token.0).collect(),
        ))
    }

    #[test]
    fn what_is_before_the_last_message_that_came_has_arrived_but_for_reads() {
        assert_eq!(settled(six(), 0), Some((vec![], vec![0, 1, 2, 3, 4, 5])));
        assert_eq!(settled(six(), 1), Some((vec![0, 1], vec![2, 3, 4, 5])));
        assert_eq!(settled(six(), 2), Some((vec![0, 1, 3, 4], vec![2, 5])));
    }

    #[test]
    fn no_more_came_than_was_sent_and_no_less_than_was_reported() {
        assert_eq!(settled(six(), 3), None);
        let mut ledger = six();
        ledger.ended(Token(0));
        ledger.ended(Token(1));
        assert_eq!(ledger.len(), 4);
        assert_eq!(settled(ledger, 0), None);
        let mut ledger = six();
        for token in 0..2 {
            ledger.ended(Token(token));
        }
        assert_eq!(settled(ledger, 1), Some((vec![], vec![2, 3, 4, 5])));
    }
}
