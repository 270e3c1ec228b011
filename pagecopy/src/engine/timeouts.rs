//! How long the engines wait for what.

use std::time::Duration;

/// How long an engine waits before it gives up, and how often it does what it repeats. The defaults suit real hosts; a
/// test may shorten them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Before `Commit`, the peer may be silent for this long on the control channel.
    pub silence: Duration,
    /// The source sends a `Ping` when it has sent none for this long; less than a third of `silence`.
    pub ping_every: Duration,
    /// The destination may take this long to make ready: clearing its RAM takes long when it holds much.
    pub prepare: Duration,
    /// In pre-copy, something of ours or the peer's (a push, a barrier, a scan, attaching) must end within this.
    pub stall: Duration,
    /// From the order to stop the guest until `Commit` can be sent. `--verify` and a long downtime limit add to it.
    pub switchover: Duration,
    /// In the switchover, something must have moved on within this.
    pub progress: Duration,
    /// From `Commit` until `Running`. Then the source is in doubt.
    pub running: Duration,
    /// From the order to resume the guest until it runs.
    pub resume: Duration,
    /// In doubt: wait this long after the first failed attempt to reach the peer, then twice as long each time…
    pub reconnect_first: Duration,
    /// …up to this. Also how often a peer is asked again that cannot tell yet.
    pub reconnect_most: Duration,
    /// In post-copy: wait this long before the first attempt to reach the destination again, then twice as long each
    /// time…
    pub serve_first: Duration,
    /// …up to this.
    pub serve_most: Duration,
    /// In post-copy: a destination that lacks pages, says so, and has read none for so long does not go on.
    pub unread: Duration,
    /// The same where the operator may have limited what nobody waits for: a page takes its time then.
    pub unread_limited: Duration,
    /// The destination, committed: wait this long before the next attempt to run the guest.
    pub run_again: Duration,
    /// The destination, committed: after so long without success, leave it to the operator.
    pub run_most: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            silence: Duration::from_secs(10),
            ping_every: Duration::from_secs(1),
            prepare: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            switchover: Duration::from_secs(10),
            progress: Duration::from_secs(3),
            running: Duration::from_secs(5),
            resume: Duration::from_secs(30),
            reconnect_first: Duration::from_secs(1),
            reconnect_most: Duration::from_secs(30),
            serve_first: Duration::from_millis(100),
            serve_most: Duration::from_secs(5),
            unread: Duration::from_secs(10),
            unread_limited: Duration::from_secs(60),
            run_again: Duration::from_secs(1),
            run_most: Duration::from_secs(30),
        }
    }
}
