//! Post-copy at the source's session: its memory is open to the destination's reads, over a connection that is made again
//! when it breaks. The channels answer by themselves.

use std::sync::Arc;

use pagecopy::engine::Timeouts;
use pagecopy::engine::event::Report;
use pagecopy::engine::source::Input;
use pagecopy::host::ram::MappedRam;
use pagecopy::memory::{BlockId, BlockSpec};
use pagecopy::wire::{AbortCode, Message};
use transport::{Access, Address, Channel, RegionId};

use super::{Incoming, Session};
use crate::dial::{Unreached, dial};
use crate::failure::Failure;
use crate::log;
use crate::nic::default_channels;
use crate::session::recover::served;
use crate::session::telling::ask;
use crate::session::{Broken, lock, tell};
use crate::sys;

/// Connections over RDMA that may break before the rest goes over TCP.
const RDMA_ATTEMPTS: u32 = 3;

/// The guest's memory, to be read by the destination.
pub(super) struct Served {
    pub(super) mapped: MappedRam,
    pub(super) specs: Arc<[BlockSpec]>,
}

impl Session {
    /// From now on the destination may read all RAM, what somebody waits for over the first data channel.
    pub(super) fn open_reads(&mut self) {
        let Some(served) = &self.served else { return };
        self.serves = true;
        self.share.serve();
        self.data.first().inspect(|lane| lane.hurry());
        let access = Access {
            peer_writes: false,
            peer_reads: true,
        };
        for number in (0..).take(served.specs.len()) {
            if let Some(region) = sys::region(&served.mapped, BlockId(number)) {
                self.regions
                    .register(RegionId(number.into()), region, access);
            }
        }
    }

    /// What has gone out on the data channels.
    pub(super) fn read(&self) -> Input {
        let moved = self.data.iter().map(|lane| lane.moved().sent());
        Input::Read { bytes: moved.sum() }
    }

    /// Makes control and data channels anew. Where the memory is not there, the destination is told instead.
    pub(super) fn connect_all(&mut self) {
        self.connection += 1;
        self.control = None;
        self.broken = Broken::default();
        if self.served.is_none() {
            let found = tokio::task::block_in_place(|| served(lock(&self.journal).records()));
            match found {
                Ok(memory) => self.take_memory(memory),
                Err(failure) => return self.tell_lost(failure),
            }
        }
        let mut lanes = std::mem::take(&mut self.data);
        lanes.extend(self.coming.take(0));
        if lanes.first().is_some_and(|lane| lane.kind() == "rdma") {
            self.broken_rdma += 1;
            if self.broken_rdma >= RDMA_ATTEMPTS {
                self.target.rdma = None;
            }
        }
        self.open_reads();
        let (target, sender, regions) = (
            self.target.clone(),
            self.sender.clone(),
            self.regions.clone(),
        );
        let (attempt, migration) = (self.connection, Arc::clone(&self.migration));
        log::spawn(async move {
            // Joining the lanes' threads may block for a moment.
            let _ = log::spawn_blocking(move || drop(lanes)).await;
            let wanted = |address: &Address| default_channels(address, true) + 1;
            let dialled = dial(&target, wanted, &regions).await;
            let dialled = dialled.map(|dialled| {
                if let Some(text) = dialled.notice {
                    tell(&migration, &Report::Notice { text });
                }
                dialled.channels
            });
            let _ = sender.send(Incoming::ConnectedAll(attempt, dialled));
        });
    }

    /// Says at the destination that the memory is gone, which then knows what to tell its people.
    fn tell_lost(&self, failure: Failure) {
        let (target, sender, id) = (self.target.clone(), self.sender.clone(), self.id);
        let attempt = self.connection;
        // A session that has ended needs no word.
        let _ = sender.send(Incoming::Engine(Input::MemoryLost));
        log::spawn(async move {
            let reason = failure.what.clone();
            let silence = Timeouts::default().silence;
            let (heard, answers) = match ask(Message::Lost { id, reason }, &target, silence).await {
                Ok(answer) => {
                    // It may end the matter: nothing lacks there any more, say.
                    let input = match answer {
                        Message::Abort {
                            code: AbortCode::Qemu,
                            reason,
                        } => Input::GuestEnded { reason },
                        answer => Input::Message(answer),
                    };
                    // A session that has ended needs no word.
                    let _ = sender.send(Incoming::Engine(input));
                    ("the destination knows".to_owned(), true)
                }
                Err(unreached) => (unreached.failure.what, unreached.answers),
            };
            let what = format!("{}; {heard}; what to do: {}", failure.what, failure.remedy);
            let failure = Failure { what, ..failure };
            let unreached = Unreached { failure, answers };
            // A session that has ended needs no word.
            let _ = sender.send(Incoming::ConnectedAll(attempt, Err(unreached)));
        });
    }

    pub(super) fn start_all(&mut self, channels: Vec<Box<dyn Channel>>) -> Result<(), Failure> {
        let mut channels = channels.into_iter();
        if let Some(control) = channels.next() {
            self.start_control(control)?;
        }
        self.start_data(channels)?;
        self.data.first().inspect(|lane| lane.hurry());
        Ok(())
    }
}
