//! New connections, and what the source does of post-copy: its memory is open to the peer's reads, or closed.

use std::time::Duration;

use pagecopy::engine::source::Input;
use pagecopy::wire::Message;
use transport::{Access, Regions};

use super::super::driver::Driver;
use super::super::env::{Env, SourceEvent};
use super::super::lane::Lane;
use super::super::mistake::Mistake;
use super::super::qemu::SourceState;
use super::super::tally::Happened;
use super::{DataLane, SourceSide};

impl SourceSide {
    /// The peer may read all of the guest's memory, which stands still.
    pub(super) fn open_reads(&mut self, env: &mut Env) {
        if env.errs(Mistake::DetachWhenMoved) && self.commit_sent {
            return;
        }
        let access = Access {
            peer_writes: false,
            peer_reads: true,
        };
        let order: Vec<usize> = (0..env.plan.blocks.len()).collect();
        let old = self
            .old
            .as_ref()
            .filter(|_| env.errs(Mistake::ServeOldCopy));
        for regions in &self.regions[1..] {
            old.unwrap_or(&self.ram).register(regions, &order, access);
        }
        self.reads_open = true;
    }

    pub(super) fn close_reads(&mut self) {
        if std::mem::take(&mut self.reads_open) {
            self.regions[1..].iter().for_each(Regions::revoke_all);
        }
    }

    /// A planted mistake: of the first page that lacks nothing is said.
    pub(super) fn forget_one(&mut self, env: &Env, message: &Message) -> Option<Message> {
        if !env.errs(Mistake::ForgotLacking) {
            return None;
        }
        match message {
            Message::Lacking {
                block,
                first,
                words,
            } if !self.forgot => {
                self.forgot = true;
                let mut words = words.clone();
                words[0] &= words[0].wrapping_sub(1);
                let (block, first) = (*block, *first);
                Some(Message::Lacking {
                    block,
                    first,
                    words,
                })
            }
            Message::LackingEnd {
                pages,
                background,
                sent,
            } => Some(Message::LackingEnd {
                pages: pages - u64::from(self.forgot),
                background: *background,
                sent: *sent,
            }),
            _ => None,
        }
    }

    /// A connection will be tried.
    pub(super) fn will_connect(&mut self, env: &mut Env, all: bool) {
        self.attempt += 1;
        let delay = env.delay(2_000);
        self.event_after(env, delay, SourceEvent::Connect(self.attempt, all));
    }

    /// A new connection is tried. Before it is one with all channels, a daemon that was started again opens the RAM files.
    pub(super) fn connect(&mut self, env: &mut Env, attempt: u32, all: bool) {
        self.said_lost = false;
        if all && self.files_gone {
            return self.say_lost(env, attempt);
        }
        if !env.wires.passable() || !env.destination_listens {
            env.tally.note(Happened::ReconnectFailed);
            // A refusal comes at once; a path that swallows everything is given up after some seconds.
            let delay = if env.wires.passable() {
                env.delay(1_000)
            } else {
                env.delay(3_000_000)
            };
            let fails = SourceEvent::ConnectFails(attempt, "the simulation refuses");
            return self.event_after(env, delay, fails);
        }
        let (ours, theirs) = if all {
            self.open_reads(env);
            if self.restarted {
                env.tally.note(Happened::ServedOn);
            }
            if self.qemu.state == SourceState::Gone {
                env.tally.note(Happened::ServedWithoutQemu);
            }
            env.wires.connect(&self.regions, &env.destination_regions)
        } else {
            env.wires.connect(&self.regions[..1], &Regions::new())
        };
        env.incoming.push_back(theirs);
        let mut lanes = ours.into_iter().map(Lane::new);
        if let Some(daemon) = &mut self.daemon {
            daemon.control = lanes.next();
            daemon.data = lanes.map(DataLane::of).collect();
        }
        self.input(env, Input::Reconnected);
    }

    /// What would be served is gone: that is said, on a connection of its own.
    fn say_lost(&mut self, env: &mut Env, attempt: u32) {
        let why = "the RAM files went with the host";
        self.input(env, Input::MemoryLost);
        if env.wires.passable() && env.destination_listens {
            let (ours, theirs) = env.wires.connect(&self.regions[..1], &Regions::new());
            env.incoming.push_back(theirs);
            if let Some(daemon) = &mut self.daemon {
                daemon.control = ours.into_iter().map(Lane::new).next();
            }
            let (id, reason) = (self.setup.id, "the host was started anew".to_owned());
            self.said_lost = true;
            self.send(env, &Message::Lost { id, reason });
            env.tally.note(Happened::SaidLost);
            // The answer is waited for.
            let unanswered = SourceEvent::ConnectRefused(attempt, why);
            return self.event_after(env, Duration::from_secs(10), unanswered);
        }
        let fails = SourceEvent::ConnectFails(attempt, why);
        self.event_after(env, Duration::ZERO, fails);
    }
}
