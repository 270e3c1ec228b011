//! Measures one data channel of the source: what left, how long that took, and what encoding cost, in windows for the policy.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pagecopy::engine::encoding::policy::Window;
use pagecopy::host::encode::Cost;
use transport::Token;

/// A window ends when so many bytes of pages have left, …
const WINDOW_BYTES: u64 = 4 << 20;
/// … and so long has passed.
const WINDOW_TIME: Duration = Duration::from_millis(30);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Meter {
    /// Operations under way: their bytes on the wire, and those of the pages in them.
    under_way: VecDeque<(Token, u64, u64)>,
    queued: u64,
    window: Window,
    since: Instant,
    /// Of the time since then: there was nothing to send.
    idle: Duration,
    /// What was sent in another way than now is not counted: the last of it.
    settling: Option<Token>,
}

impl Meter {
    /// Nothing was sent.
    pub(super) fn new() -> Meter {
        Meter {
            under_way: VecDeque::new(),
            queued: 0,
            window: Window::default(),
            since: Instant::now(),
            idle: Duration::ZERO,
            settling: None,
        }
    }

    /// An operation with so many bytes on the wire, of pages of so many.
    pub(super) fn queue(&mut self, token: Token, wire: u64, pages: u64) {
        self.under_way.push_back((token, wire, pages));
        self.queued += wire;
    }

    /// Bytes that wait to be sent.
    pub(super) fn queued(&self) -> u64 {
        self.queued
    }

    /// Pages go another way from now on: what is under way went the old one.
    pub(super) fn settle(&mut self) {
        self.settling = self.under_way.back().map(|(token, ..)| *token);
        self.restart();
    }

    /// What encoding has cost.
    pub(super) fn spent(&mut self, cost: &Cost) {
        self.window.compressing += cost.compressing;
        self.window.compressed.0 += cost.compressed.0;
        self.window.compressed.1 += cost.compressed.1;
        self.window.comparing += cost.comparing;
        self.window.compared += cost.compared;
    }

    /// The channel was waited for.
    pub(super) fn waited(&mut self, took: Duration) {
        if self.under_way.is_empty() {
            self.idle += took;
        } else {
            self.window.waited += took;
        }
    }

    /// All up to `token` have left.
    pub(super) fn sent(&mut self, token: Token) {
        while let Some((first, wire, pages)) = self.under_way.front().copied()
            && first <= token
        {
            self.under_way.pop_front();
            self.queued -= wire;
            match self.settling {
                Some(last) if first < last => {}
                Some(_) => {
                    self.settling = None;
                    self.restart();
                }
                None => {
                    self.window.sent += wire;
                    self.window.bytes += pages;
                }
            }
        }
    }

    /// The window, if it is over.
    pub(super) fn window(&mut self) -> Option<Window> {
        if self.settling.is_some() || self.window.bytes < WINDOW_BYTES {
            return None;
        }
        let busy = self.since.elapsed().saturating_sub(self.idle);
        if busy < WINDOW_TIME {
            return None;
        }
        let window = Window {
            busy,
            ..self.window
        };
        self.restart();
        Some(window)
    }

    fn restart(&mut self) {
        self.window = Window::default();
        self.since = Instant::now();
        self.idle = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_the_old_way_is_not_counted() {
        let mut meter = Meter::new();
        meter.queue(Token(1), 100, 100);
        meter.queue(Token(2), 100, 100);
        meter.settle();
        meter.queue(Token(5), 30, 8 << 20);
        assert_eq!(meter.queued(), 230);
        meter.sent(Token(2));
        assert!(meter.window().is_none());
        std::thread::sleep(WINDOW_TIME);
        meter.sent(Token(5));
        let window = meter.window();
        assert_eq!(
            window.map(|window| (window.sent, window.bytes)),
            Some((30, 8 << 20))
        );
        assert_eq!(meter.queued(), 0);
        assert!(meter.window().is_none(), "a new one has begun");
    }

    #[test]
    fn waiting_counts_while_something_is_under_way() {
        let mut meter = Meter::new();
        meter.waited(Duration::from_secs(5));
        assert_eq!(
            (meter.idle, meter.window.waited),
            (Duration::from_secs(5), Duration::ZERO)
        );
        meter.queue(Token(0), 1, 1);
        meter.waited(Duration::from_secs(7));
        assert_eq!(meter.window.waited, Duration::from_secs(7));
    }
}
