//! Whether the peer is still there: who was heard when, and when to ask.

use std::time::Duration;

use super::Time;
use crate::wire::Message;

/// The control channel as an engine knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Liveness {
    up: bool,
    heard: Time,
    pinged: Time,
    nonce: u64,
}

impl Liveness {
    pub(super) fn new(now: Time) -> Liveness {
        Liveness {
            up: true,
            heard: now,
            pinged: now,
            nonce: 0,
        }
    }

    /// There is no channel any more.
    pub(super) fn lost(&mut self) {
        self.up = false;
    }

    /// There is a new channel.
    pub(super) fn restored(&mut self, now: Time) {
        *self = Liveness {
            nonce: self.nonce,
            ..Liveness::new(now)
        };
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// Something came from the peer.
    pub(super) fn heard(&mut self, now: Time) {
        self.heard = now;
    }

    /// When the peer has been silent for too long.
    pub(super) fn deadline(&self, silence: Duration) -> Time {
        self.heard.after(silence)
    }

    /// When the next ping is due.
    pub(super) fn next_ping(&self, every: Duration) -> Time {
        self.pinged.after(every)
    }

    /// A ping, if one is due.
    pub(super) fn ping(&mut self, now: Time, every: Duration) -> Option<Message> {
        if !self.up || now < self.next_ping(every) {
            return None;
        }
        self.pinged = now;
        self.nonce += 1;
        Some(Message::Ping { nonce: self.nonce })
    }
}
