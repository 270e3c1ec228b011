//! Frames in TLS records. The kernel copies what is sent from guest memory straight to where it is encrypted in place,
//! many records for each system call; what arrives is decrypted in place, and the kernel copies it to its final place.

use std::collections::VecDeque;

use crate::channel::Event;
use crate::error::Error;
use crate::limits::TLS_BATCH;
use crate::stream::frame::{self, Kind};
use crate::stream::layer::{Halves, Layer, cut_short};
use crate::sys::iovecs::{Gather, Scatter};
use crate::sys::uring::{Incoming, Outgoing};
use crate::tls::alert::alert_error;
use crate::tls::handshake::MAX_FLIGHT;
use crate::tls::record::{Content, HEADER_LEN, MAX_CONTENT, MAX_RECORD, OVERHEAD, Records};

/// Records in one send.
const BATCH_RECORDS: u64 = (TLS_BATCH / MAX_CONTENT) as u64;
/// Bytes of sealed records in one send.
const OUT_LEN: usize = TLS_BATCH / MAX_CONTENT * (MAX_CONTENT + OVERHEAD);
/// Bytes of received records. What is left of the last batch moves to the front.
const IN_LEN: usize = TLS_BATCH + MAX_RECORD;

const _: () = assert!(
    MAX_FLIGHT + 2 * MAX_RECORD <= IN_LEN,
    "what came with the handshake and greeting fits"
);

/// Frames in TLS records.
pub(crate) struct Tls {
    records: Records,
    plain: Gather,
    /// Free buffer for sealed records.
    out: Option<Vec<u8>>,
    /// What is left of a send that was cut short.
    rest: Option<Gather>,
    /// Reported when the send in flight is over.
    leaving: VecDeque<Event>,
    scatter: Option<Scatter>,
    /// Received bytes; those from `start` to `end` are not opened yet.
    incoming: Option<Vec<u8>>,
    start: usize,
    end: usize,
    /// The peer said that nothing follows.
    peer_closed: bool,
}

impl Tls {
    pub(crate) fn new(records: Records) -> Tls {
        Tls {
            records,
            plain: Gather::default(),
            out: Some(vec![0; OUT_LEN]),
            rest: None,
            leaving: VecDeque::new(),
            scatter: None,
            incoming: Some(vec![0; IN_LEN]),
            start: 0,
            end: 0,
            peer_closed: false,
        }
    }

    /// Takes what was received together with the greeting.
    pub(crate) fn take_early(&mut self, halves: &mut Halves, sealed: &[u8]) -> Result<(), Error> {
        let Some(mut incoming) = self.incoming.take() else {
            return Ok(());
        };
        incoming[..sealed.len()].copy_from_slice(sealed);
        self.end = sealed.len();
        let opened = self.open_all(halves, &mut incoming);
        self.incoming = Some(incoming);
        opened
    }

    /// Opens the records that are whole.
    fn open_all(&mut self, halves: &mut Halves, incoming: &mut [u8]) -> Result<(), Error> {
        while let Some(len) = Records::record_len(&incoming[self.start..self.end])? {
            if self.end - self.start < len {
                break;
            }
            if self.peer_closed {
                return Err(Error::PeerMisbehaved(
                    "bytes after the end that it announced".to_owned(),
                ));
            }
            match self
                .records
                .open(&mut incoming[self.start..self.start + len])?
            {
                Content::Data(bytes) => halves.receiver.feed(bytes, &mut halves.events)?,
                Content::Alert(0) => self.peer_closed = true,
                Content::Alert(number) => return Err(alert_error(number.into())),
                Content::Nothing => {}
            }
            self.start += len;
        }
        Ok(())
    }

    /// Copies what comes next into records and seals them.
    fn seal_batch(&mut self, halves: &mut Halves, mut out: Vec<u8>) -> Result<Gather, Error> {
        self.plain.clear();
        halves.sender.gather(&mut self.plain, TLS_BATCH);
        let len = self.plain.len();
        let records = len.div_ceil(MAX_CONTENT);
        let sealed = len + records * OVERHEAD;
        let mut contents: Vec<&mut [u8]> = Vec::with_capacity(records);
        for record in out[..sealed].chunks_mut(MAX_CONTENT + OVERHEAD) {
            let end = record.len() - (OVERHEAD - HEADER_LEN);
            contents.push(&mut record[HEADER_LEN..end]);
        }
        self.plain
            .copy_to(&mut contents)
            .map_err(|e| Error::io("reading the guest's memory to send it", &e))?;
        for record in out[..sealed].chunks_mut(MAX_CONTENT + OVERHEAD) {
            self.records.seal(record)?;
        }
        halves.sender.advance(len, &mut self.leaving);
        self.plain.clear();
        Ok(Gather::from_buffer(out, sealed))
    }
}

impl Layer for Tls {
    fn next_send(&mut self, halves: &mut Halves) -> Result<Option<Outgoing>, Error> {
        if let Some(rest) = self.rest.take() {
            return Ok(Some(Outgoing::Copied(rest)));
        }
        if halves.sender.is_empty() && !self.records.owes_update() {
            return Ok(None);
        }
        if let Some(update) = self.records.key_update(BATCH_RECORDS)? {
            let len = update.len();
            let update = Gather::from_buffer(update, len);
            return Ok(Some(Outgoing::Copied(update)));
        }
        let out = self.out.take().unwrap_or_else(|| vec![0; OUT_LEN]);
        let sealed = self.seal_batch(halves, out)?;
        Ok(Some(Outgoing::Copied(sealed)))
    }

    fn sent(&mut self, halves: &mut Halves, outgoing: Outgoing, n: usize) -> Result<(), Error> {
        // Nothing else is ever sent here.
        let Outgoing::Copied(mut gather) = outgoing else {
            return Ok(());
        };
        gather.advance(n);
        if gather.len() > 0 {
            self.rest = Some(gather);
            return Ok(());
        }
        // A buffer of another length was a key update's.
        self.out = gather
            .take_buffer()
            .filter(|buffer| buffer.len() == OUT_LEN)
            .or(self.out.take());
        halves.events.append(&mut self.leaving);
        Ok(())
    }

    fn next_receive(&mut self, _halves: &mut Halves) -> Result<Incoming, Error> {
        let mut incoming = self.incoming.take().unwrap_or_else(|| vec![0; IN_LEN]);
        incoming.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let mut scatter = self.scatter.take().unwrap_or_default();
        scatter.push_buffer(incoming, self.end..IN_LEN);
        Ok(Incoming::Copied(scatter))
    }

    fn received(&mut self, halves: &mut Halves, incoming: Incoming, n: usize) -> Result<(), Error> {
        let Incoming::Copied(mut scatter) = incoming else {
            return Ok(());
        };
        let Some(mut incoming) = scatter.take_buffer() else {
            return Ok(());
        };
        self.scatter = Some(scatter);
        self.end += n;
        let opened = self.open_all(halves, &mut incoming);
        self.incoming = Some(incoming);
        opened
    }

    fn ended(&self, halves: &Halves) -> Error {
        if self.peer_closed && halves.receiver.at_boundary() {
            Error::Closed
        } else {
            cut_short()
        }
    }

    fn goodbye(&mut self, halves: &Halves, fault: Option<&str>) -> Vec<u8> {
        if self.rest.is_some() {
            return Vec::new();
        }
        let mut bytes = Vec::new();
        if let Some(text) = fault
            && halves.sender.at_boundary()
        {
            let mut frame = frame::encode_message(Kind::Fault, text.as_bytes()).to_vec();
            frame.extend_from_slice(text.as_bytes());
            bytes.extend(self.records.data(&frame).unwrap_or_default());
        }
        bytes.extend(self.records.close_notify().unwrap_or_default());
        bytes
    }
}
