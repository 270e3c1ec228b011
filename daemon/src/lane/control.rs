//! The control channel: messages both ways.

use bytes::Bytes;
use pagecopy::wire::Message;
use transport::{Op, Token};

use super::{Events, Handler, LaneEvent, Ops};

/// Encodes and decodes; decides nothing.
#[derive(Debug)]
pub struct Control;

impl Handler for Control {
    type Command = Message;

    fn command(&mut self, message: Message, ops: &mut Ops) {
        ops.push(Op::Send(message.encode()));
    }

    fn sent(&mut self, _token: Token, _events: &Events) {}

    fn message(&mut self, message: Bytes, events: &Events) -> Result<(), String> {
        let message = Message::decode(&message).map_err(|error| error.to_string())?;
        events(LaneEvent::Message(message));
        Ok(())
    }
}
