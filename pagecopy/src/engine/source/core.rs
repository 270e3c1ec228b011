//! What every phase of the source shares: set-up, pages, channels, figures, the outputs not yet taken, and the rules that
//! hold in every phase before `Commit`.

use std::time::Duration;

use super::convergence::{Convergence, Policy};
use super::growth::Growth;
use super::heat::Pages;
use super::interface::{Change, Input, Mode, Output, Setup};
use super::reasons::by_peer;
use super::sender::Sender;
use crate::engine::doubt::refuse;
use crate::engine::end::End;
use crate::engine::event::{Figures, Finished, Progress, Report, State, Switch};
use crate::engine::journal::Record;
use crate::engine::liveness::Liveness;
use crate::engine::outbox::Outbox;
use crate::engine::{Failure, Fault, Time};
use crate::wire::{AbortCode, Message};

/// Progress is reported at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// What the journal says about the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// Nothing, and nothing was ordered.
    None,
    /// `CommitIntent` is ordered and may be on disk.
    Ordered,
    /// `CommitIntent` is on disk.
    Written,
    /// `RolledBack` is on disk behind it.
    Withdrawn,
}

/// Shared by all phases.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) setup: Setup,
    pub(super) now: Time,
    pub(super) out: Outbox<Output>,
    pub(super) started: Time,
    pub(super) pages: Pages,
    pub(super) sender: Sender,
    /// Data channels that come and go.
    pub(super) growth: Growth,
    /// The round whose barriers were sent and are not known to be reached.
    pub(super) closing: Option<u32>,
    pub(super) convergence: Convergence,
    pub(super) link: Liveness,
    pub(super) figures: Figures,
    /// When `StopGuest` was ordered: from then on the guest may stand still.
    pub(super) stop_ordered: Option<Time>,
    pub(super) intent: Intent,
    /// Whether both sides can do post-copy and the operator wants it in some case.
    pub(super) postcopy: bool,
    /// The round is cut short: the guest goes first.
    pub(super) cut: bool,
    /// The guest will depend, or depends, on the memory here.
    pub(super) serves: bool,
    /// Whether the operator may have limited what of post-copy nobody waits for: a daemon that was started anew does not know.
    pub(super) limits_background: bool,
    /// What the post-copy began with, if that is known.
    pub(super) switch: Option<Switch>,
    /// Whether there are data channels.
    pub(super) has_data: bool,
    /// Time in which pages were sent, for the goodput.
    pub(super) sending_time: Duration,
    /// Percent of its time for which the guest is kept from writing now.
    throttled: u32,
    progress_at: Time,
}

impl Core {
    pub(super) fn new(setup: Setup, now: Time) -> Core {
        let ram_bytes = setup.blocks.iter().map(|block| block.size).sum();
        Core {
            now,
            out: Outbox::new(),
            started: now,
            pages: Pages::new(&setup.blocks),
            sender: Sender::new(setup.data_channels, setup.options.bandwidth_limit, now),
            growth: Growth::new(setup.data_channels, setup.options.channels, now),
            closing: None,
            convergence: Convergence::new(&setup.options, setup.fixed_downtime, ram_bytes),
            link: Liveness::new(now),
            figures: Figures::default(),
            stop_ordered: None,
            intent: Intent::None,
            postcopy: false,
            cut: false,
            serves: false,
            limits_background: setup.options.background_limit.is_some(),
            switch: None,
            has_data: true,
            sending_time: Duration::ZERO,
            throttled: 0,
            progress_at: Time(0),
            setup,
        }
    }

    pub(super) fn send(&mut self, message: Message) {
        self.out.push(Output::Send(message));
    }

    /// The guest goes before its memory.
    pub(super) fn switch_over(&mut self, switch: Switch) {
        self.switch = Some(switch);
        self.figures.switched(switch);
        let mode = switch.way();
        self.out
            .push(Output::Report(Report::Switched { mode, switch }));
    }

    /// From now on the guest is kept from writing for so much of its time; 0 lifts that.
    pub(super) fn throttle(&mut self, percent: u32) {
        if percent == self.throttled {
            return;
        }
        self.throttled = percent;
        self.figures.throttle_percent = self.figures.throttle_percent.max(percent);
        self.out.push(Output::Throttle { percent });
        self.out.push(Output::Report(Report::Throttle {
            throttle_percent: percent,
        }));
    }

    /// What became of the operator's decision.
    pub(super) fn decided(&mut self, result: Result<&str, Failure>) {
        self.out.push(Output::Decided(result.map(str::to_owned)));
    }

    /// The last output (unless in doubt).
    pub(super) fn finish(&mut self, state: State, failure: Option<Failure>) {
        self.out.enter(state);
        self.figures.total_ms = millis(self.now.since(self.started));
        let sent = self.sender.total();
        self.figures.pages_sent = sent.raw_pages;
        self.figures.pages_zero = sent.zero_pages;
        self.figures.encoded = sent.encoded;
        let seconds = self.sending_time.as_secs_f64();
        self.figures.goodput_mbit_s = if seconds > 0.0 {
            sent.raw_bytes as f64 * 8.0 / 1e6 / seconds
        } else {
            0.0
        };
        let figures = self.figures.clone();
        self.out.push(Output::Finished(Finished {
            state,
            failure,
            figures,
        }));
    }

    /// Puts batches under way, unless the round is cut short.
    pub(super) fn fill_channels(&mut self) {
        if self.cut {
            return;
        }
        let pushes = self
            .sender
            .fill(self.now, &mut self.pages, &self.setup.blocks);
        self.out.extend(pushes);
    }

    /// Whether every page of the round has left, or the round is cut short and what was under way has.
    pub(super) fn all_sent(&self) -> bool {
        (self.cut || self.pages.nothing_to_send()) && self.sender.idle()
    }

    /// Closes the round on every data channel.
    pub(super) fn send_barriers(&mut self, round: u32) {
        self.closing = Some(round);
        let barriers = self
            .sender
            .channels()
            .map(|c| Output::SendOn(c, Message::Barrier { round }));
        self.out.extend(barriers);
    }

    /// The rules before `Commit` that are the same in every phase. Returns the input if it is for the phase itself.
    pub(super) fn before_commit(&mut self, input: Input) -> Result<Option<Input>, End> {
        match input {
            Input::Cancel => Err(End::cancelled(
                "the operator cancelled the migration",
                "nothing: the guest runs on here",
            )),
            Input::LinkLost(failure) => {
                self.link_lost();
                Err(End::new(AbortCode::Host, failure))
            }
            Input::HostFailed(failure) => Err(End::new(AbortCode::Host, failure)),
            Input::QemuFailed(failure) => Err(End::new(AbortCode::Qemu, failure)),
            Input::JournalFailed(_, failure) => Err(End::new(AbortCode::Host, failure)),
            Input::Message(message) => {
                self.link.heard(self.now);
                self.message_before_commit(message)
            }
            Input::Resolve(_) => {
                self.nothing_to_resolve(
                    "this migration is not in doubt",
                    "wait for it, or cancel it",
                );
                Ok(None)
            }
            Input::StartPostcopy => {
                self.start_postcopy();
                Ok(None)
            }
            Input::Change(change) => {
                self.change(change);
                Ok(None)
            }
            Input::Recover => {
                self.nothing_to_resolve("this migration is under way", "wait for it");
                Ok(None)
            }
            Input::Tick => Ok(None),
            Input::ChannelsOpened { first, key } => {
                self.channels_opened(first, key);
                Ok(None)
            }
            Input::ChannelsRefused { first, reason } => {
                self.channels_refused(first, &reason);
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }

    /// The destination has said whether it can do post-copy.
    pub(super) fn agree_on_postcopy(&mut self, can: bool) {
        let mode = self.setup.options.mode;
        self.postcopy = can;
        self.cut = can && mode == Mode::Postcopy;
        self.convergence.allow(match mode {
            Mode::Auto { postcopy: true } if can => Policy::RatherThanFail,
            Mode::Hybrid(after) if can => Policy::When(after),
            _ => Policy::Never,
        });
    }

    /// The connection is gone, with all of its channels.
    pub(super) fn link_lost(&mut self) {
        self.link.lost();
        self.has_data = false;
    }

    /// The operator wants other limits. Once the guest is switched over there is nothing left that they would bound.
    fn change(&mut self, change: Change) {
        if self.out.state() == State::Completing {
            return self.nothing_to_resolve(
                "the guest is being handed over at this moment",
                "nothing: what it was to be limited by is over",
            );
        }
        let options = &mut self.setup.options;
        if let Some(limit) = change.downtime_limit {
            options.downtime_limit = limit;
        }
        if let Some(limit) = change.bandwidth_limit {
            options.bandwidth_limit = limit;
            self.sender.limit(limit, self.now);
        }
        self.convergence
            .limits(options.downtime_limit, options.bandwidth_limit);
        self.decided(Ok("the migration goes on under its new limits"));
    }

    /// The operator does not want to wait for the rounds.
    fn start_postcopy(&mut self) {
        if self.out.state() != State::Migrating {
            return self.nothing_to_resolve(
                "pages are not being sent at this moment",
                "see `pagecopy status`, and try again while it says `migrating`",
            );
        }
        if !self.postcopy {
            return self.nothing_to_resolve(
                "this migration cannot become a post-copy: it was begun without, or the destination cannot",
                "cancel it, and migrate with --mode hybrid or --mode postcopy",
            );
        }
        self.cut = true;
        self.decided(Ok("the guest goes first: its memory follows"));
    }

    fn message_before_commit(&mut self, message: Message) -> Result<Option<Input>, End> {
        match message {
            Message::Ping { nonce } => {
                self.send(Message::Pong { nonce });
                Ok(None)
            }
            Message::Pong { .. } => Ok(None),
            Message::Abort { code, reason } => Err(by_peer(code, &reason)),
            Message::ChannelsTaken {
                first,
                taken,
                reason,
            } => {
                self.channels_taken(first, taken, &reason)?;
                Ok(None)
            }
            other => Ok(Some(Input::Message(other))),
        }
    }

    /// Refuses a decision where there is no doubt.
    pub(super) fn nothing_to_resolve(&mut self, what: &str, remedy: &str) {
        self.decided(Err(refuse(what, remedy)));
    }

    /// Asks whether the peer is there, and gives up when it has been silent for too long.
    pub(super) fn watch_peer(&mut self) -> Result<(), End> {
        let timeouts = self.setup.timeouts;
        if self.now >= self.link.deadline(timeouts.silence) {
            return Err(End::new(
                AbortCode::TimedOut,
                Failure::new(
                    Fault::Network,
                    format!(
                        "the destination has not answered for {:.1} s",
                        timeouts.silence.as_secs_f64()
                    ),
                    "check the network between the hosts and the destination's pagecopyd, then migrate again",
                ),
            ));
        }
        if let Some(ping) = self.link.ping(self.now, timeouts.ping_every) {
            self.send(ping);
        }
        Ok(())
    }

    /// When [`Core::watch_peer`] has something to do.
    pub(super) fn next_watch(&self) -> Time {
        let timeouts = self.setup.timeouts;
        self.link
            .deadline(timeouts.silence)
            .min(self.link.next_ping(timeouts.ping_every))
    }

    /// Orders a record.
    pub(super) fn journal(&mut self, record: Record) {
        self.out.push(Output::Journal(record));
    }

    /// Reports where the round stands, not too often.
    pub(super) fn progress(&mut self, round: u32, round_started: Time, round_bytes: u64) {
        if self.now < self.progress_at {
            return;
        }
        self.progress_at = self.now.after(PROGRESS_EVERY);
        let left = self.pages.send_bytes();
        let sent = self.sender.round();
        let seconds = self.now.since(round_started).as_secs_f64();
        let goodput = if seconds > 0.0 {
            sent.raw_bytes as f64 / seconds
        } else {
            self.convergence.goodput()
        };
        let done = round_bytes.saturating_sub(left);
        let percent = (done * 100).checked_div(round_bytes).unwrap_or(100);
        let progress = Progress {
            round,
            remaining_bytes: left + self.pages.held_bytes(),
            total_bytes: self.setup.blocks.iter().map(|block| block.size).sum(),
            percent: u32::try_from(percent).unwrap_or(100),
            goodput_bytes_s: whole(goodput),
            dirty_bytes_s: whole(self.convergence.dirty_rate()),
            predicted_downtime_ms: self.convergence.predicted().map(millis),
            throttle_percent: self.throttled,
            channels: self.sender.count(),
            encoded: self.sender.total().encoded,
            eta_s: (done > 0 && seconds > 0.0).then(|| left as f64 * seconds / done as f64),
        };
        self.out.push(Output::Report(Report::Progress(progress)));
    }

    /// A peer that sent what it may not.
    pub(super) fn out_of_place(&self, message: &Message, phase: &str) -> End {
        End::protocol(format!(
            "the destination sent {} while {phase}",
            message.name()
        ))
    }
}

/// Milliseconds with fractions.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A figure for people without its fraction; `as` saturates.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and figures are not negative"
)]
fn whole(value: f64) -> u64 {
    value as u64
}
