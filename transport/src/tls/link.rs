//! A TLS connection between its handshake and its channel: small blocking reads and writes for the greeting.

use crate::channel::{Channel, Stats};
use crate::connect::socket::Bounded;
use crate::error::Error;
use crate::region::Regions;
use crate::stream::channel::StreamChannel;
use crate::sys::uring::Uring;
use crate::tls::alert::alert_error;
use crate::tls::layer::Tls;
use crate::tls::record::{Content, MAX_RECORD, Records};

/// A TLS connection that greets.
pub(crate) struct TlsLink {
    socket: Bounded,
    pub(super) records: Records,
    /// Opened, not read.
    opened: Vec<u8>,
    /// Received, not opened.
    sealed: Vec<u8>,
}

impl TlsLink {
    pub(crate) fn new(
        socket: Bounded,
        records: Records,
        opened: Vec<u8>,
        sealed: Vec<u8>,
    ) -> TlsLink {
        TlsLink {
            socket,
            records,
            opened,
            sealed,
        }
    }

    /// Writes a few bytes.
    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let record = self.records.data(bytes)?;
        self.write_sealed(&record)
    }

    /// Writes a whole record.
    pub(super) fn write_sealed(&mut self, record: &[u8]) -> Result<(), Error> {
        self.socket.write_all(record, "greeting the peer")
    }

    /// Reads at least one byte.
    pub(crate) fn read(&mut self, to: &mut [u8], what: &'static str) -> Result<usize, Error> {
        while self.opened.is_empty() {
            self.open_next(what)?;
        }
        let n = to.len().min(self.opened.len());
        to[..n].copy_from_slice(&self.opened[..n]);
        self.opened.drain(..n);
        Ok(n)
    }

    /// Opens the next record if it is whole, or else receives more.
    fn open_next(&mut self, what: &'static str) -> Result<(), Error> {
        match Records::record_len(&self.sealed)? {
            Some(len) if self.sealed.len() >= len => {
                match self.records.open(&mut self.sealed[..len])? {
                    Content::Data(bytes) => self.opened.extend_from_slice(bytes),
                    Content::Alert(number) => return Err(alert_error(number.into())),
                    Content::Nothing => {}
                }
                self.sealed.drain(..len);
            }
            _ => {
                let filled = self.sealed.len();
                self.sealed.resize(filled + MAX_RECORD, 0);
                let read = self.socket.read(&mut self.sealed[filled..], what);
                self.sealed
                    .truncate(filled + read.as_ref().map_or(0, |n| *n));
                read?;
            }
        }
        Ok(())
    }

    /// Closes so that the peer still gets what was written.
    pub(crate) fn close_gently(mut self) {
        if let Ok(record) = self.records.close_notify() {
            let _ = self.socket.write_all(&record, "closing");
        }
        self.socket.close_gently();
    }

    /// The channel, from the first frame on.
    pub(crate) fn into_channel(self, regions: Regions) -> Result<Box<dyn Channel>, Error> {
        let driver = Uring::new(self.socket.into_socket()?)?;
        let layer = Tls::new(self.records);
        let mut channel = StreamChannel::new(driver, layer, regions, "tls", Stats::default());
        channel.feed_early(|layer, halves| {
            halves.receiver.feed(&self.opened, &mut halves.events)?;
            layer.take_early(halves, &self.sealed)
        });
        Ok(Box::new(channel))
    }
}
