//! No layer at all: the kernel takes bytes from guest memory and puts them there.
//!
//! Headers, tables and short messages go through a small buffer, the inbox, so that one receive may bring several. While
//! a payload is expected the receive is given its final places first and the inbox behind them; or a larger inbox alone, where
//! the payload is to be written to a file.

use crate::error::Error;
use crate::limits::{INBOX_LEN, MAX_SEND_BYTES};
use crate::stream::frame::{self, Kind};
use crate::stream::layer::{Halves, Layer, cut_short};
use crate::sys::iovecs::{Gather, Scatter};

/// Frames as they are.
pub(crate) struct Plain {
    /// Kept between sends and receives for their allocations.
    gather: Option<Gather>,
    scatter: Option<Scatter>,
    inbox: Option<Vec<u8>>,
    /// Bytes of the receive in flight that belong to final places; the inbox takes the rest.
    direct: usize,
}

impl Plain {
    pub(crate) fn new() -> Plain {
        Plain {
            gather: None,
            scatter: None,
            inbox: None,
            direct: 0,
        }
    }
}

impl Layer for Plain {
    fn next_send(&mut self, halves: &mut Halves) -> Result<Option<Gather>, Error> {
        if halves.sender.is_empty() {
            return Ok(None);
        }
        let mut gather = self.gather.take().unwrap_or_default();
        halves.sender.gather(&mut gather, MAX_SEND_BYTES);
        Ok(Some(gather))
    }

    fn sent(&mut self, halves: &mut Halves, mut gather: Gather, n: usize) -> Result<(), Error> {
        gather.clear();
        self.gather = Some(gather);
        halves.sender.advance(n, &mut halves.events);
        Ok(())
    }

    fn next_receive(&mut self, halves: &mut Halves) -> Result<Scatter, Error> {
        let mut scatter = self.scatter.take().unwrap_or_default();
        halves.receiver.direct(&mut scatter)?;
        self.direct = scatter.len();
        if !scatter.has_buffer() {
            let len = halves.receiver.look_ahead();
            let mut inbox = self.inbox.take().unwrap_or_default();
            if inbox.len() < len {
                inbox.resize(len.max(INBOX_LEN), 0);
            }
            scatter.push_buffer(inbox, 0..len);
        }
        Ok(scatter)
    }

    fn received(
        &mut self,
        halves: &mut Halves,
        mut scatter: Scatter,
        n: usize,
    ) -> Result<(), Error> {
        let direct = n.min(self.direct);
        if self.direct > 0 {
            halves
                .receiver
                .landed(&mut scatter, direct, &mut halves.events)?;
        }
        if let Some(inbox) = scatter.take_buffer() {
            let fed = halves
                .receiver
                .feed(&inbox[..n - direct], &mut halves.events);
            self.inbox = Some(inbox);
            fed?;
        }
        scatter.clear();
        self.scatter = Some(scatter);
        Ok(())
    }

    fn ended(&self, halves: &Halves) -> Error {
        if halves.receiver.at_boundary() {
            Error::Closed
        } else {
            cut_short()
        }
    }

    fn goodbye(&mut self, halves: &Halves, fault: Option<&str>) -> Vec<u8> {
        match fault {
            Some(text) if halves.sender.at_boundary() => {
                let mut bytes = frame::encode_message(Kind::Fault, text.as_bytes()).to_vec();
                bytes.extend_from_slice(text.as_bytes());
                bytes
            }
            _ => Vec::new(),
        }
    }
}
