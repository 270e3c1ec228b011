//! No layer at all: the kernel takes bytes from guest memory and puts them there. Long pieces of a file it does not even copy.
//!
//! Headers, tables and short messages go through a small buffer, the inbox, so that one receive may bring several. While
//! a payload is expected the receive is given its final places first and the inbox behind them; or a larger inbox alone, where
//! the payload is to be written to a file.

use crate::error::Error;
use crate::limits::{INBOX_LEN, MAX_SEND_BYTES};
use crate::stream::frame::{self, Kind};
use crate::stream::layer::{Halves, Layer, cut_short};
use crate::stream::pipe::Pipe;
use crate::stream::sender::Sender;
use crate::sys::iovecs::{Gather, Scatter};
use crate::sys::uring::{Incoming, Outgoing};

/// Frames as they are.
pub(crate) struct Plain {
    /// Kept between sends and receives for their allocations.
    gather: Option<Gather>,
    leaving: Spare,
    arriving: Spare,
    scatter: Option<Scatter>,
    inbox: Option<Vec<u8>>,
    /// Bytes of the receive in flight that belong to final places; the inbox takes the rest.
    direct: usize,
}

impl Plain {
    pub(crate) fn new() -> Plain {
        Plain {
            gather: None,
            leaving: Spare::Unneeded,
            arriving: Spare::Unneeded,
            scatter: None,
            inbox: None,
            direct: 0,
        }
    }

    /// What comes next, in a pipe, if it is better spliced.
    fn fill_pipe(&mut self, sender: &Sender) -> Option<Pipe> {
        // What a send that was cut short has left there comes before anything else.
        let left = matches!(&self.leaving, Spare::Kept(pipe) if pipe.len() > 0);
        if !left && !sender.is_long() {
            return None;
        }
        let mut pipe = self.leaving.take()?;
        if !left {
            sender.splice(&mut pipe);
        }
        if pipe.len() == 0 {
            self.leaving.keep(pipe);
            return None;
        }
        Some(pipe)
    }
}

/// A pipe that is made when it is needed, and kept.
enum Spare {
    Unneeded,
    Kept(Pipe),
    /// It is in use, or could not be had, and is not asked for again.
    Gone,
}

impl Spare {
    fn take(&mut self) -> Option<Pipe> {
        match std::mem::replace(self, Spare::Gone) {
            Spare::Unneeded => Pipe::new(),
            Spare::Kept(pipe) => Some(pipe),
            Spare::Gone => None,
        }
    }

    fn keep(&mut self, pipe: Pipe) {
        *self = Spare::Kept(pipe);
    }

    fn is_gone(&self) -> bool {
        matches!(self, Spare::Gone)
    }
}

impl Layer for Plain {
    fn next_send(&mut self, halves: &mut Halves) -> Result<Option<Outgoing>, Error> {
        if halves.sender.is_empty() {
            return Ok(None);
        }
        if let Some(pipe) = self.fill_pipe(&halves.sender) {
            return Ok(Some(Outgoing::Spliced(pipe)));
        }
        let mut gather = self.gather.take().unwrap_or_default();
        if self.leaving.is_gone() {
            halves.sender.gather(&mut gather, MAX_SEND_BYTES);
        } else {
            halves.sender.gather_short(&mut gather);
        }
        Ok(Some(Outgoing::Copied(gather)))
    }

    fn sent(&mut self, halves: &mut Halves, outgoing: Outgoing, n: usize) -> Result<(), Error> {
        halves.sender.advance(n, &mut halves.events);
        match outgoing {
            Outgoing::Copied(mut gather) => {
                gather.clear();
                self.gather = Some(gather);
            }
            Outgoing::Spliced(mut pipe) => {
                pipe.taken(n);
                self.leaving.keep(pipe);
            }
        }
        Ok(())
    }

    fn next_receive(&mut self, halves: &mut Halves) -> Result<Incoming, Error> {
        if let Some(most) = halves.receiver.spliced()
            && let Some(pipe) = self.arriving.take()
        {
            return Ok(Incoming::Spliced(pipe, most));
        }
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
        Ok(Incoming::Copied(scatter))
    }

    fn received(&mut self, halves: &mut Halves, incoming: Incoming, n: usize) -> Result<(), Error> {
        let mut scatter = match incoming {
            Incoming::Copied(scatter) => scatter,
            Incoming::Spliced(mut pipe, _) => {
                let fed = halves.receiver.feed_pipe(&mut pipe, &mut halves.events);
                self.arriving.keep(pipe);
                return fed;
            }
        };
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
