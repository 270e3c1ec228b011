//! A data channel at the source: batches out, split into bytes, zero runs and encoded pages.
//!
//! A page is tested and read after its dirty bit was cleared: a write that comes in between sets the bit again, and the
//! page goes once more in a later round.
//!
//! Pages are encoded here, in the channel's own thread, a message at a time and never far ahead of what the link takes.
//!
//! Here a bandwidth limit is kept to the byte: pages are taken from the migration's share as they are submitted, in small
//! pieces, and what has gone beyond (headers, encryption) is taken when it has. When the destination reads, what somebody
//! waits for goes at once, on the first channel; on the others a share that is used up makes its requests wait, but not for
//! long: somebody may have come to wait for what was asked for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pagecopy::engine::ChannelId;
use pagecopy::engine::encoding::policy::{Choice, Compress, Policy};
use pagecopy::engine::encoding::versions::Versions;
use pagecopy::engine::source::{Batch, Pushed};
use pagecopy::engine::split::{Split, split};
use pagecopy::host::Ram;
use pagecopy::host::encode::{Encoder, Part, chunks_of};
use pagecopy::limits::{MAX_ENCODED, MAX_RUNS};
use pagecopy::memory::{BlockId, BlockSpec, Piece};
use pagecopy::wire::Message;
use transport::limits::{MAX_EXTENTS, MAX_PAYLOAD};
use transport::{Extent, Op, RegionId, Token};

use super::meter::Meter;
use super::{Events, Handler, LaneEvent, Ops, Over};
use crate::queue::budget::Share;

/// Encoded bytes that may wait for the link.
const MAX_AHEAD: u64 = 1 << 20;

/// The channel on which the destination reads what somebody waits for.
const FAULTS: ChannelId = ChannelId(1);

/// Where a share may be used up by reads, they are counted so often …
const READS: Duration = Duration::from_micros(500);
/// … and so often while there are none.
const NO_READS: Duration = Duration::from_millis(5);
/// After so long without an answer on a channel its next request is taken, whatever is left of the share.
const LONGEST_HOLD: Duration = Duration::from_secs(2);

/// What the session asks of a data channel.
#[derive(Debug)]
pub enum Command {
    /// Send these pages; answered by [`LaneEvent::Pushed`].
    Push(Batch),
    /// Send this behind them.
    Send(Message),
}

/// How the pages of a migration are encoded.
#[derive(Clone, Debug)]
pub struct Encoding {
    /// What the operator wants.
    pub compress: Compress,
    /// Bytes a second that a channel may send; none is unlimited.
    pub cap: Option<u64>,
    /// What was sent last on all channels.
    pub versions: Arc<Mutex<Versions>>,
}

impl Encoding {
    /// Pages go as they are.
    pub fn none() -> Encoding {
        Encoding {
            compress: Compress::Off,
            cap: None,
            versions: Arc::new(Mutex::new(Versions::new(0))),
        }
    }
}

/// Splits, encodes and sends.
pub struct SourceData {
    id: ChannelId,
    specs: Arc<[BlockSpec]>,
    ram: Arc<dyn Ram>,
    /// What is still to be sent.
    work: VecDeque<Work>,
    /// Batches under way, by their last operation. Operations leave in order.
    batches: VecDeque<(Token, u64, Pushed)>,
    encoding: Encoding,
    encoder: Encoder,
    share: Arc<Share>,
    /// Bytes that were taken from it.
    taken: u64,
    /// It is used up until then.
    until: Option<Instant>,
    /// Something has gone over the channel just now that was not taken before.
    reads: bool,
    /// When something last went over the channel.
    went: Instant,
    /// `Leave` and its round, under way; behind it goes nothing.
    leaves: Option<(Token, u32)>,
    /// It has left.
    left: bool,
    /// Made when the first batch says what was agreed on.
    policy: Option<Policy>,
    /// How pages went last.
    choice: Choice,
    meter: Meter,
}

enum Work {
    Message(Message),
    Batch(Batch),
    /// A batch of which some has been sent.
    Rest(Rest),
}

/// What is left of a batch that goes encoded.
struct Rest {
    batch: u64,
    round: u32,
    chunks: VecDeque<(BlockId, Vec<Piece>)>,
    pushed: Pushed,
    last: Option<Token>,
}

impl SourceData {
    /// For channel `id`, reading from `ram`.
    pub fn new(
        id: ChannelId,
        specs: Arc<[BlockSpec]>,
        ram: Arc<dyn Ram>,
        encoding: Encoding,
        share: Arc<Share>,
    ) -> SourceData {
        SourceData {
            id,
            specs,
            ram,
            work: VecDeque::new(),
            batches: VecDeque::new(),
            encoder: Encoder::new(Arc::clone(&encoding.versions)),
            encoding,
            share,
            taken: 0,
            until: None,
            reads: false,
            went: Instant::now(),
            leaves: None,
            left: false,
            policy: None,
            choice: Choice::default(),
            meter: Meter::new(),
        }
    }

    /// How pages of `round` go now.
    fn choose(&mut self, round: u32) -> Choice {
        let choice = self
            .policy
            .as_ref()
            .map_or_else(Choice::default, |policy| policy.choice(round));
        if choice.zstd.is_some() != self.choice.zstd.is_some() {
            self.meter.settle();
        }
        self.choice = choice;
        choice
    }

    /// Whether the link's rate is being found out.
    fn learns(&self) -> bool {
        self.policy.as_ref().is_some_and(Policy::learns)
    }

    fn begin(&mut self, batch: &Batch, ops: &mut Ops) {
        let Encoding { compress, cap, .. } = self.encoding;
        let policy = || Policy::new(compress, batch.encodings, cap);
        self.policy.get_or_insert_with(policy);
        let split = split(&batch.runs, &self.specs, |block, offset, len| {
            self.ram.is_zero(block, offset, len)
        });
        let mut rest = Rest {
            batch: batch.id,
            round: batch.round,
            chunks: VecDeque::new(),
            pushed: Pushed {
                zero_bytes: split.zero_bytes(&self.specs),
                ..Pushed::default()
            },
            last: None,
        };
        self.send_zeroes(&split, ops, &mut rest);
        self.sample(&split);
        let quantum = self.share.quantum();
        let plain = self.choose(batch.round) == Choice::default() && !self.learns();
        if plain && quantum.is_none() {
            self.send_as_it_is(&split, ops, &mut rest);
            self.end(&rest);
        } else {
            rest.chunks = chunks_of(&split.raw, quantum.unwrap_or(MAX_ENCODED as u64)).into();
            self.go_on(rest, ops);
        }
    }

    fn send_zeroes(&mut self, split: &Split, ops: &mut Ops, rest: &mut Rest) {
        self.encoder.forget(split.zero_pieces(&self.specs));
        for runs in split.zero.chunks(MAX_RUNS) {
            rest.last = Some(ops.push(Op::Send(Message::Zero(runs.to_vec()).encode())));
        }
    }

    /// Straight from the guest's memory.
    fn send_as_it_is(&mut self, split: &Split, ops: &mut Ops, rest: &mut Rest) {
        let pieces = split.raw.iter();
        self.encoder
            .forget(pieces.map(|&(block, offset, len)| (block, Piece { offset, len })));
        for (block, extents) in writes(&split.raw) {
            self.write(block, extents, ops, rest);
        }
    }

    fn write(&mut self, block: BlockId, extents: Vec<Extent>, ops: &mut Ops, rest: &mut Rest) {
        let bytes = extents.iter().map(|extent| extent.len).sum();
        let region = RegionId(block.0.into());
        let token = ops.push(Op::Write { region, extents });
        self.meter.queue(token, bytes, bytes);
        self.taken += bytes;
        rest.pushed.raw_bytes += bytes;
        rest.last = Some(token);
    }

    /// What of these pages another way would make, now and then.
    fn sample(&mut self, split: &Split) {
        let (Some(policy), Some((block, offset, len))) = (&mut self.policy, split.raw.first())
        else {
            return;
        };
        let Some(level) = policy.sample() else { return };
        let piece = Piece {
            offset: *offset,
            len: *len,
        };
        let sample = self
            .encoder
            .sample(&*self.ram, *block, piece, level, self.choice.zstd);
        if let Some((sent, took)) = sample.found {
            policy.sampled(sample.bytes, sent, took, sample.current);
        }
    }

    /// Encodes one message more of `rest`, if it may go now. With the last one it ends: its last operation has not left then.
    fn go_on(&mut self, mut rest: Rest, ops: &mut Ops) {
        let Some((_, pieces)) = rest.chunks.front() else {
            return self.end(&rest);
        };
        let pages: u64 = pieces.iter().map(|piece| piece.len).sum();
        if let Some(wait) = self.share.take(pages) {
            self.until = Some(Instant::now() + wait);
            return self.work.push_front(Work::Rest(rest));
        }
        let Some((block, pieces)) = rest.chunks.pop_front() else {
            return;
        };
        let before = self.taken;
        let choice = self.choose(rest.round);
        let mut parts = Vec::new();
        let cost = self
            .encoder
            .encode(&*self.ram, rest.round, choice, block, pieces, &mut parts);
        self.meter.spent(&cost);
        rest.pushed.encoded = rest.pushed.encoded.and(cost.encoded);
        for part in parts {
            match part {
                Part::AsItIs(block, pieces) => {
                    let extents = pieces.iter().map(|piece| Extent {
                        offset: piece.offset,
                        len: piece.len,
                    });
                    self.write(block, extents.collect(), ops, &mut rest);
                }
                Part::Message(message, pages) => {
                    let bytes = message.encode();
                    let wire = bytes.len() as u64;
                    let token = ops.push(Op::Send(bytes));
                    self.meter.queue(token, wire, pages);
                    self.taken += wire;
                    rest.last = Some(token);
                }
            }
        }
        rest.pushed.raw_bytes += cost.copied;
        self.share.refund(pages.saturating_sub(self.taken - before));
        if rest.chunks.is_empty() {
            self.end(&rest);
        } else {
            self.work.push_front(Work::Rest(rest));
        }
    }

    fn end(&mut self, rest: &Rest) {
        // The engine makes no empty batch; one would be answered by the operation before it, if there is any.
        let last = rest.last.unwrap_or(Token(0));
        self.batches.push_back((last, rest.batch, rest.pushed));
    }
}

impl Handler for SourceData {
    type Command = Command;

    fn command(&mut self, command: Command, _ops: &mut Ops) {
        self.work.push_back(match command {
            Command::Push(batch) => Work::Batch(batch),
            Command::Send(message) => Work::Message(message),
        });
    }

    fn produce(&mut self, ops: &mut Ops) -> bool {
        if self.until.is_some_and(|until| until > Instant::now()) {
            return false;
        }
        self.until = None;
        let careful = self.choice != Choice::default() || self.learns();
        if careful && self.meter.queued() >= MAX_AHEAD {
            return false;
        }
        match self.work.pop_front() {
            Some(Work::Message(message)) => {
                let token = ops.push(Op::Send(message.encode()));
                if let Message::Leave { round } = message {
                    self.leaves = Some((token, round));
                }
            }
            Some(Work::Batch(batch)) => self.begin(&batch, ops),
            Some(Work::Rest(rest)) => self.go_on(rest, ops),
            None => return false,
        }
        self.until.is_none()
    }

    fn wait(&self) -> Option<Duration> {
        if let Some(until) = self.until {
            return Some(until.saturating_duration_since(Instant::now()));
        }
        // The channel answers reads by itself, and comes back to be looked at only then.
        let looks = self.share.is_serving() && self.share.quantum().is_some();
        looks.then_some(if self.reads { READS } else { NO_READS })
    }

    fn hold(&self) -> Option<Duration> {
        let holds =
            self.share.is_serving() && self.id != FAULTS && self.went.elapsed() < LONGEST_HOLD;
        holds.then(|| self.share.wait()).flatten()
    }

    fn is_held(&self) -> bool {
        self.until.is_some()
    }

    fn over(&self) -> Option<Over> {
        self.left.then_some(Over::Sent)
    }

    fn moved(&mut self, sent: u64) {
        let more = sent.saturating_sub(self.taken);
        self.taken += more;
        self.reads = more > 0;
        if self.reads {
            self.went = Instant::now();
        }
        match more {
            0 => {}
            _ if self.share.is_serving() && self.id == FAULTS => self.share.spend_at_once(more),
            _ => self.share.spend(more),
        }
    }

    fn waited(&mut self, took: Duration) {
        self.meter.waited(took);
    }

    fn sent(&mut self, token: Token, events: &Events) {
        self.meter.sent(token);
        if let (Some(policy), Some(window)) = (&mut self.policy, self.meter.window()) {
            policy.window(&window);
        }
        while let Some((last, batch, pushed)) = self.batches.front().copied() {
            if last > token {
                break;
            }
            self.batches.pop_front();
            events.tell(LaneEvent::Pushed {
                channel: self.id,
                batch,
                pushed,
            });
        }
        if let Some((_, round)) = self.leaves.filter(|(last, _)| *last <= token) {
            self.left = true;
            let channel = self.id;
            events.tell(LaneEvent::Left { channel, round });
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
