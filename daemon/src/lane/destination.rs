//! A data channel at the destination: the transport places the bytes; encoded pages, zero runs and barriers are ours.

use std::sync::Arc;

use bytes::Bytes;
use pagecopy::engine::ChannelId;
use pagecopy::engine::encoding::Encodings;
use pagecopy::host::Placer;
use pagecopy::host::decode::{DecodeError, Decoder};
use pagecopy::memory::BlockSpec;
use pagecopy::wire::Message;
use transport::Token;

use super::{Events, Handler, LaneEvent, Ops};

/// Places encoded pages and zero runs, and reports barriers behind them.
pub struct DestinationData {
    id: ChannelId,
    decoder: Decoder,
    /// There is no place here: the session knows, and what follows is left.
    full: bool,
    specs: Arc<[BlockSpec]>,
    placer: Arc<dyn Placer>,
    zero_bytes: u64,
}

/// Nothing is ever sent on it.
#[derive(Debug)]
pub enum Command {}

impl DestinationData {
    /// For channel `id`, placing into `placer`. `specs` are in the order of the source's numbers.
    pub fn new(
        id: ChannelId,
        specs: Arc<[BlockSpec]>,
        placer: Arc<dyn Placer>,
        encodings: Encodings,
    ) -> DestinationData {
        DestinationData {
            id,
            decoder: Decoder::new(encodings, Arc::clone(&specs)),
            full: false,
            specs,
            placer,
            zero_bytes: 0,
        }
    }
}

impl Handler for DestinationData {
    type Command = Command;

    fn command(&mut self, command: Command, _ops: &mut Ops) {
        match command {}
    }

    fn sent(&mut self, _token: Token, _events: &Events) {}

    fn message(&mut self, message: Bytes, events: &Events) -> Result<(), String> {
        match Message::decode(&message).map_err(|error| error.to_string())? {
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
            other => Err(format!("{} on data channel {}", other.name(), self.id.0)),
        }
    }
}
