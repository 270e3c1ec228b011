//! A data channel at the source: batches out, split into raw bytes and zero runs.
//!
//! A page is tested and read after its dirty bit was cleared: a write that comes in between sets the bit again, and the
//! page goes once more in a later round.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use pagecopy::engine::ChannelId;
use pagecopy::engine::source::{Batch, Pushed};
use pagecopy::engine::split::split;
use pagecopy::host::Ram;
use pagecopy::limits::MAX_RUNS;
use pagecopy::memory::{BlockId, BlockSpec};
use pagecopy::wire::Message;
use transport::limits::{MAX_EXTENTS, MAX_PAYLOAD};
use transport::{Extent, Op, RegionId, Token};

use super::{Events, Handler, LaneEvent, Ops};

/// What the session asks of a data channel.
#[derive(Debug)]
pub enum Command {
    /// Send these pages; answered by [`LaneEvent::Pushed`].
    Push(Batch),
    /// Send this behind them.
    Send(Message),
}

/// Splits and sends.
pub struct SourceData {
    id: ChannelId,
    specs: Arc<[BlockSpec]>,
    ram: Arc<dyn Ram>,
    /// Batches under way, by their last operation. Operations leave in order.
    batches: VecDeque<(Token, u64, Pushed)>,
}

impl SourceData {
    /// For channel `id`, reading from `ram`.
    pub fn new(id: ChannelId, specs: Arc<[BlockSpec]>, ram: Arc<dyn Ram>) -> SourceData {
        SourceData {
            id,
            specs,
            ram,
            batches: VecDeque::new(),
        }
    }

    fn push(&mut self, batch: &Batch, ops: &mut Ops) {
        let split = split(&batch.runs, &self.specs, |block, offset, len| {
            self.ram.is_zero(block, offset, len)
        });
        let pushed = Pushed {
            raw_bytes: split.raw_bytes(),
            zero_bytes: split.zero_bytes(&self.specs),
        };
        let mut last = None;
        for runs in split.zero.chunks(MAX_RUNS) {
            last = Some(ops.push(Op::Send(Message::Zero(runs.to_vec()).encode())));
        }
        for (block, extents) in writes(&split.raw) {
            last = Some(ops.push(Op::Write {
                region: RegionId(block.0.into()),
                extents,
            }));
        }
        // The engine makes no empty batch; one would be answered by the operation before it, if there is any.
        let last = last.unwrap_or(Token(0));
        self.batches.push_back((last, batch.id, pushed));
    }
}

impl Handler for SourceData {
    type Command = Command;

    fn command(&mut self, command: Command, ops: &mut Ops) {
        match command {
            Command::Push(batch) => self.push(&batch, ops),
            Command::Send(message) => {
                ops.push(Op::Send(message.encode()));
            }
        }
    }

    fn sent(&mut self, token: Token, events: &Events) {
        while let Some((last, batch, pushed)) = self.batches.front().copied() {
            if last > token {
                return;
            }
            self.batches.pop_front();
            events.tell(LaneEvent::Pushed {
                channel: self.id,
                batch,
                pushed,
            });
        }
    }

    fn message(&mut self, _message: Bytes, _events: &Events) -> Result<(), String> {
        Err(format!(
            "a message on data channel {}, where the destination sends none",
            self.id.0
        ))
    }
}

/// Groups extents into writes of one block each, within the transport's limits.
fn writes(raw: &[(BlockId, u64, u64)]) -> Vec<(BlockId, Vec<Extent>)> {
    let mut writes: Vec<(BlockId, Vec<Extent>)> = Vec::new();
    let mut room = 0;
    for &(block, mut offset, mut len) in raw {
        while len > 0 {
            let fits = writes
                .last()
                .is_some_and(|(b, e)| *b == block && e.len() < MAX_EXTENTS)
                && room > 0;
            if !fits {
                writes.push((block, Vec::new()));
                room = MAX_PAYLOAD;
            }
            let part = len.min(room);
            if let Some((_, extents)) = writes.last_mut() {
                extents.push(Extent { offset, len: part });
            }
            (offset, len, room) = (offset + part, len - part, room - part);
        }
    }
    writes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_keep_to_the_limits() {
        let raw = [
            (BlockId(0), 0, 3 << 20),
            (BlockId(0), 8 << 20, 3 << 20),
            (BlockId(1), 0, 4096),
        ];
        let writes = writes(&raw);
        let extent = |offset, len| Extent { offset, len };
        let first = (
            BlockId(0),
            vec![extent(0, 3 << 20), extent(8 << 20, 1 << 20)],
        );
        assert_eq!(
            writes,
            [
                first,
                (BlockId(0), vec![extent(9 << 20, 2 << 20)]),
                (BlockId(1), vec![extent(0, 4096)]),
            ]
        );
    }

    #[test]
    fn many_small_extents_make_several_writes() {
        let raw: Vec<_> = (0..1025)
            .map(|page| (BlockId(0), page * 8192, 4096))
            .collect();
        let lens: Vec<usize> = writes(&raw)
            .iter()
            .map(|(_, extents)| extents.len())
            .collect();
        assert_eq!(lens, [MAX_EXTENTS, MAX_EXTENTS, 1]);
    }
}
