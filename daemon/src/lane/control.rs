//! The control channel: messages both ways.

use std::collections::VecDeque;

use bytes::Bytes;
use pagecopy::wire::Message;
use transport::{Op, Token};

use super::{Events, Handler, LaneEvent, Ops};
use crate::limits::MAX_UNANSWERED;

/// Encodes and decodes; decides nothing about what is said, only that a peer that asks takes the answers, too: it could
/// make this side's queue grow without end otherwise.
#[derive(Debug, Default)]
pub struct Control {
    /// Pings and queries whose answers have not left.
    unanswered: usize,
    /// Answers under way.
    answers: VecDeque<Token>,
}

impl Handler for Control {
    type Command = Message;

    fn command(&mut self, message: Message, ops: &mut Ops) {
        let is_answer = matches!(message, Message::Pong { .. } | Message::Answer { .. });
        let token = ops.push(Op::Send(message.encode()));
        if is_answer {
            self.answers.push_back(token);
        }
    }

    fn sent(&mut self, token: Token, _events: &Events) {
        if self.answers.front() == Some(&token) {
            self.answers.pop_front();
            self.unanswered = self.unanswered.saturating_sub(1);
        }
    }

    fn message(&mut self, message: Bytes, events: &Events) -> Result<(), String> {
        let message = Message::decode(&message).map_err(|error| error.to_string())?;
        if matches!(
            message,
            Message::Ping { .. } | Message::Query { .. } | Message::Withdrawn { .. }
        ) {
            self.unanswered += 1;
            if self.unanswered > MAX_UNANSWERED {
                return Err(format!(
                    "more than {MAX_UNANSWERED} pings and queries at a time, without taking the answers"
                ));
            }
        }
        events.tell(LaneEvent::Message(message));
        Ok(())
    }
}
