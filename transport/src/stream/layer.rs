//! What lies between frames and socket: nothing, or TLS.

use std::collections::VecDeque;
use std::io;

use crate::channel::Event;
use crate::error::Error;
use crate::stream::receiver::Receiver;
use crate::stream::sender::Sender;
use crate::sys::uring::{Incoming, Outgoing};

/// The two state machines of a channel, and the events that they have led to.
pub(crate) struct Halves {
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
    pub(crate) events: VecDeque<Event>,
}

/// Turns frames into what the socket carries, and back. It is asked for the next send or receive when none is in flight,
/// and told how each one ended.
pub(crate) trait Layer: Send {
    /// The next send, if there is anything to send.
    fn next_send(&mut self, halves: &mut Halves) -> Result<Option<Outgoing>, Error>;

    /// `n` bytes of the send have left.
    fn sent(&mut self, halves: &mut Halves, outgoing: Outgoing, n: usize) -> Result<(), Error>;

    /// Where the bytes of the next receive go.
    fn next_receive(&mut self, halves: &mut Halves) -> Result<Incoming, Error>;

    /// `n` bytes have arrived; zero when the receive was interrupted.
    fn received(&mut self, halves: &mut Halves, incoming: Incoming, n: usize) -> Result<(), Error>;

    /// The stream has ended: in order, or not?
    fn ended(&self, halves: &Halves) -> Error;

    /// The last bytes before the socket is closed, if the stream stands where they can be put: the text of a fault when
    /// the peer is at fault, and the layer's own goodbye.
    fn goodbye(&mut self, halves: &Halves, fault: Option<&str>) -> Vec<u8>;
}

/// The end of a stream in the middle of something.
pub(crate) fn cut_short() -> Error {
    Error::Io {
        what: "receiving from the peer",
        kind: io::ErrorKind::UnexpectedEof,
        message: "the connection ended in the middle of a frame".to_owned(),
    }
}
