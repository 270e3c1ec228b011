//! Rounds of pre-copy: send, close with a barrier, scan, decide.
//!
//! ```text
//! Draining ──▶ Sending ──▶ Closing ──▶ Resting ──▶ Scanning ──▶ switchover, the next round, or the verdict
//!    ▲                                                 │
//!    └─────────────────────────────────────────────────┘
//! ```
//!
//! No page of a round leaves before every page of the round before is in place (`BarrierReached`), so that an older
//! version never lands after a newer one on another channel.
//!
//! Ageing: a disk read by direct I/O writes into pages that the kernel pinned before they were protected, and no scan sees
//! those writes. With such disks a page found dirty by a scan is therefore only read after all disk I/O that was in flight
//! at that scan has finished (`DrainIo`), in round 0 as well. At `pre-switchover` QEMU has drained all I/O by itself.

use std::time::Duration;

use super::convergence::{Decision, RoundEnd};
use super::core::{Core, millis};
use super::heat::Scan;
use super::interface::{Input, Output};
use super::reasons::{outside, peer_stalled, stalled};
use super::switchover::Switchover;
use super::{Phase, Step};
use crate::engine::Time;
use crate::engine::end::End;
use crate::engine::event::Report;
use crate::wire::{AbortCode, Message};

/// A scan does not follow the one before earlier than this: an idle guest costs no processor time.
const SCAN_EVERY: Duration = Duration::from_millis(5);

/// A round of pre-copy.
#[derive(Debug)]
pub(super) struct Round {
    number: u32,
    stage: Stage,
    /// When the first page could be sent.
    started: Time,
    /// From then to the barrier; for the report.
    took: Duration,
    /// Bytes to send in it.
    bytes: u64,
    last_scan: Time,
    /// When something last moved on.
    moved: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Disk I/O in flight is finishing.
    Draining,
    /// Pages leave.
    Sending,
    /// Barriers are on their way.
    Closing,
    /// It is too early for a scan.
    Resting,
    /// A scan is under way.
    Scanning,
}

impl Round {
    /// Round 0: everything that the RAM files hold.
    pub(super) fn first(core: &mut Core) -> Step {
        Ok(Round::begin(core, 0, core.now))
    }

    fn begin(core: &mut Core, number: u32, last_scan: Time) -> Phase {
        core.figures.rounds = number + 1;
        let mut round = Round {
            number,
            stage: Stage::Draining,
            started: core.now,
            took: Duration::ZERO,
            bytes: core.pages.send_bytes(),
            last_scan,
            moved: core.now,
        };
        if core.setup.direct_io {
            core.out.push(Output::DrainIo);
        } else {
            round.start_sending(core);
        }
        Phase::Round(round)
    }

    fn start_sending(&mut self, core: &mut Core) {
        self.stage = Stage::Sending;
        self.started = core.now;
        core.sender.begin_round(self.number);
        self.send_on(core);
    }

    /// Sends what can be sent now; closes the round when all is.
    fn send_on(&mut self, core: &mut Core) {
        core.fill_channels();
        core.progress(self.number, self.started, self.bytes);
        if core.all_sent() {
            self.stage = Stage::Closing;
            core.send_barriers(self.number);
        }
    }

    pub(super) fn handle(mut self, core: &mut Core, input: Input) -> Step {
        match (self.stage, input) {
            (Stage::Draining, Input::IoDrained) => {
                self.moved = core.now;
                self.start_sending(core);
            }
            (
                Stage::Sending,
                Input::Pushed {
                    channel,
                    batch,
                    pushed,
                },
            ) if core.sender.pushed(channel, batch, pushed) => {
                self.moved = core.now;
                self.send_on(core);
            }
            (Stage::Sending, Input::Measured(load)) if !core.cut => {
                core.measured(self.number, load)
            }
            (_, Input::Measured(_)) => core.growth.interrupt(),
            (Stage::Closing, Input::Message(Message::BarrierReached { round }))
                if round == self.number =>
            {
                self.moved = core.now;
                self.closed(core);
            }
            (
                Stage::Scanning,
                Input::Scanned {
                    dirty,
                    took,
                    populated: _,
                },
            ) => {
                let found = core.pages.scanned(&dirty).map_err(outside)?;
                return self.decide(core, found, took);
            }
            (_, Input::Message(message)) => {
                return Err(core.out_of_place(&message, "pages are being sent"));
            }
            _ => {}
        }
        Ok(Phase::Round(self))
    }

    /// Every page of the round is in place.
    fn closed(&mut self, core: &mut Core) {
        core.closing = None;
        self.took = core.now.since(self.started);
        let sent = core.sender.round();
        core.convergence.sent(sent, self.took);
        if sent.raw_bytes > 0 {
            core.sending_time += self.took;
        }
        self.stage = Stage::Resting;
    }

    fn decide(self, core: &mut Core, found: Scan, scan_took: Duration) -> Step {
        let end = RoundEnd {
            round: self.number,
            now: core.now,
            elapsed: core.now.since(core.started),
            dirty: found,
            dirtied_in: core.now.since(self.last_scan),
            remaining: core.pages.send_bytes() + core.pages.held_bytes(),
            all_hot: core.pages.nothing_to_send() && core.pages.held_pages() > 0,
        };
        let (decision, words) = core.convergence.decide(&end);
        core.throttle(core.convergence.throttle_percent());
        self.report(core, found, scan_took, words);
        let next = self.number + 1;
        match decision {
            Decision::SwitchOver => Ok(Switchover::begin(core, next, false)),
            Decision::Postcopy => Ok(Switchover::begin(core, next, true)),
            _ if core.cut => Ok(Switchover::begin(core, next, true)),
            Decision::NextRound => Ok(Round::begin(core, next, core.now)),
            Decision::NextRoundHot => {
                core.pages.release_held();
                Ok(Round::begin(core, next, core.now))
            }
            Decision::GiveUp(failure) => Err(End::new(AbortCode::NotConverging, failure)),
        }
    }

    fn report(&self, core: &mut Core, found: Scan, scan_took: Duration, decision: String) {
        let sent = core.sender.round();
        let report = Report::Round {
            round: self.number,
            ms: millis(self.took),
            pages_sent: sent.raw_pages,
            pages_zero: sent.zero_pages,
            encoded: sent.encoded,
            pages_dirty: found.pages,
            pages_held: core.pages.held_pages(),
            scan_us: u64::try_from(scan_took.as_micros()).unwrap_or(u64::MAX),
            predicted_downtime_ms: core.convergence.predicted().map_or(0.0, millis),
            throttle_percent: core.convergence.throttle_percent(),
            decision,
        };
        core.out.push(Output::Report(report));
    }

    pub(super) fn next(&self, core: &Core) -> Time {
        let work = match self.stage {
            Stage::Resting => Some(self.last_scan.after(SCAN_EVERY)),
            Stage::Sending if core.cut => None,
            Stage::Sending => core.sender.next(&core.pages),
            Stage::Draining | Stage::Closing | Stage::Scanning => None,
        };
        let stalled = self.moved.after(core.setup.timeouts.stall);
        let limit = core
            .convergence
            .postcopy_after()
            .or(core.convergence.timeout());
        let out_of_time = limit
            .filter(|_| !core.cut)
            .map(|limit| core.started.after(limit));
        [work, out_of_time]
            .into_iter()
            .flatten()
            .fold(stalled, Time::min)
    }

    pub(super) fn on_time(mut self, core: &mut Core) -> Step {
        let elapsed = core.now.since(core.started);
        let postcopy = core.convergence.postcopy_after();
        if postcopy.is_some_and(|after| elapsed >= after) {
            core.cut = true;
        } else if let Some(failure) = core.convergence.out_of_time(elapsed)
            && !core.cut
        {
            return Err(End::new(AbortCode::NotConverging, failure));
        }
        if core.now >= self.moved.after(core.setup.timeouts.stall) {
            return Err(match self.stage {
                Stage::Draining => stalled("the guest's disk I/O did not finish"),
                Stage::Sending => peer_stalled("the destination took no page"),
                Stage::Closing => peer_stalled("the destination did not confirm a round"),
                Stage::Resting | Stage::Scanning => stalled("the scan for dirty pages did not end"),
            });
        }
        match self.stage {
            Stage::Resting if core.cut => {
                return Ok(Switchover::begin(core, self.number + 1, true));
            }
            Stage::Sending if core.cut && core.sender.idle() => self.send_on(core),
            Stage::Resting if core.now >= self.last_scan.after(SCAN_EVERY) => {
                self.stage = Stage::Scanning;
                self.moved = core.now;
                core.out.push(Output::Scan { holes: false });
            }
            Stage::Sending
                if core
                    .sender
                    .next(&core.pages)
                    .is_some_and(|next| core.now >= next) =>
            {
                self.send_on(core);
            }
            _ => {}
        }
        Ok(Phase::Round(self))
    }
}
