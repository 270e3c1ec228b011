//! A data channel at the destination: the transport places the bytes; encoded pages, zero runs and barriers are ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use pagecopy::engine::ChannelId;
use pagecopy::engine::encoding::Encodings;
use pagecopy::host::Placer;
use pagecopy::host::decode::{DecodeError, Decoder};
use pagecopy::memory::BlockSpec;
use pagecopy::wire::Message;
use transport::Token;

use super::{Events, Handler, LaneEvent, Ops, Over};

/// Places encoded pages and zero runs, and reports barriers behind them.
pub struct DestinationData {
    id: ChannelId,
    /// The guest's RAM is clear: before that nothing may come, for it would be cleared away.
    ready: Arc<AtomicBool>,
    decoder: Decoder,
    /// There is no place here: the session knows, and what follows is left.
    full: bool,
    specs: Arc<[BlockSpec]>,
    placer: Arc<dyn Placer>,
    zero_bytes: u64,
    /// `Leave` has come.
    left: bool,
}

/// Nothing is ever sent on it.
#[derive(Debug)]
pub enum Command {}

impl DestinationData {
    /// For channel `id`, placing into `placer` once that is `ready`. `specs` are in the order of the source's numbers.
    pub fn new(
        id: ChannelId,
        ready: Arc<AtomicBool>,
        specs: Arc<[BlockSpec]>,
        placer: Arc<dyn Placer>,
        encodings: Encodings,
    ) -> DestinationData {
        DestinationData {
            id,
            ready,
            decoder: Decoder::new(encodings, Arc::clone(&specs)),
            full: false,
            specs,
            placer,
            zero_bytes: 0,
            left: false,
        }
    }

    /// One that joins while `round` is under way: all before it is in place.
    #[must_use]
    pub fn since(mut self, round: u32) -> DestinationData {
        if let Some(before) = round.checked_sub(1) {
            self.decoder.barrier(before);
        }
        self
    }
}

impl Handler for DestinationData {
    type Command = Command;

    fn command(&mut self, command: Command, _ops: &mut Ops) {
        match command {}
    }

    fn sent(&mut self, _token: Token, _events: &Events) {}

    fn over(&self) -> Option<Over> {
        self.left.then_some(Over::Received)
    }

    fn message(&mut self, message: Bytes, events: &Events) -> Result<(), String> {
        let message = Message::decode(&message).map_err(|error| error.to_string())?;
        if !self.ready.load(Ordering::Acquire) {
            let (name, id) = (message.name(), self.id.0);
            return Err(format!("{name} on data channel {id} before Accept"));
        }
        match message {
            Message::Zero(runs) => {
                for run in runs {
                    self.placer.zero(run).map_err(|error| error.to_string())?;
                    let page_size = self
                        .specs
                        .get(usize::from(run.block.0))
                        .map_or(0, |spec| spec.page_size);
                    self.zero_bytes += run.pages * page_size;
                }
                Ok(())
            }
            message @ (Message::Copied { .. } | Message::Deltas { .. }) => {
                if self.full {
                    return Ok(());
                }
                match self.decoder.take(&message, &*self.placer) {
                    Ok(()) => Ok(()),
                    Err(DecodeError::Peer(what)) => Err(what),
                    Err(DecodeError::Host(error)) => {
                        self.full = true;
                        events.tell(LaneEvent::NoPlace(error));
                        Ok(())
                    }
                }
            }
            Message::Barrier { round } => {
                // Not all before it is in place.
                if self.full {
                    return Ok(());
                }
                self.decoder.barrier(round);
                let zero_bytes = std::mem::take(&mut self.zero_bytes);
                events.tell(LaneEvent::Barrier {
                    channel: self.id,
                    round,
                    zero_bytes,
                });
                Ok(())
            }
            // Not all before it is in place.
            Message::Leave { .. } if self.full => Ok(()),
            Message::Leave { round } => {
                self.left = true;
                let channel = self.id;
                events.tell(LaneEvent::Left { channel, round });
                Ok(())
            }
            other => Err(format!("{} on data channel {}", other.name(), self.id.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::OpenOptions;
    use std::task::Waker;

    use pagecopy::host::ram::MappedRam;
    use pagecopy::memory::{BlockId, Run};

    use super::*;
    use crate::lane::Backlog;

    /// A page that a source zeroes before this side has cleared its RAM, and after it.
    #[test]
    fn what_comes_before_the_ram_is_clear_is_refused_and_not_placed() {
        let path = std::env::temp_dir().join(format!("pagecopy-early-{}", std::process::id()));
        std::fs::write(&path, [7; 2 * 4096]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let spec = BlockSpec {
            name: "ram".to_owned(),
            size: 2 * 4096,
            page_size: 4096,
        };
        let ram = MappedRam::map([(spec.clone(), Arc::new(file.unwrap()))], true).unwrap();
        let first = || std::fs::read(&path).unwrap()[..4096].to_vec();
        let ready = Arc::new(AtomicBool::new(false));
        let mut data = DestinationData::new(
            ChannelId(2),
            Arc::clone(&ready),
            [spec].into(),
            Arc::new(ram),
            Encodings::default(),
        );
        let events = Events {
            tell: Box::new(|_| ()),
            backlog: Arc::new(Backlog {
                count: 0.into(),
                waker: Waker::noop().clone(),
            }),
        };
        let run = Run {
            block: BlockId(0),
            first: 0,
            pages: 1,
        };
        for message in [Message::Barrier { round: 0 }, Message::Zero(vec![run])] {
            let refused = data.message(message.encode(), &events).unwrap_err();
            assert!(
                refused.ends_with("on data channel 2 before Accept"),
                "{refused}"
            );
        }
        assert_eq!(first(), [7; 4096]);
        ready.store(true, Ordering::Release);
        data.message(Message::Zero(vec![run]).encode(), &events)
            .unwrap();
        assert_eq!(first(), [0; 4096]);
        std::fs::remove_file(path).unwrap();
    }
}
