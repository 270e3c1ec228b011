//! Post-copy at the source's session: its memory is open to the destination's reads, over a connection that is made again
//! when it breaks. The channels answer by themselves.

use std::sync::Arc;

use pagecopy::host::ram::MappedRam;
use pagecopy::memory::{BlockId, BlockSpec};
use transport::{Access, Address, Channel, RegionId};

use super::{Incoming, Session};
use crate::dial::dial;
use crate::failure::Failure;
use crate::nic::{POSTCOPY_CHANNELS, default_channels};
use crate::session::Broken;
use crate::sys;

/// The guest's memory, to be read by the destination.
pub(super) struct Served {
    pub(super) mapped: MappedRam,
    pub(super) specs: Arc<[BlockSpec]>,
}

impl Session {
    /// From now on the destination may read all RAM, what somebody waits for over the first data channel.
    pub(super) fn open_reads(&self) {
        let Some(served) = &self.served else { return };
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

    /// Makes control and data channels anew.
    pub(super) fn connect_all(&mut self) {
        self.connection += 1;
        self.control = None;
        self.broken = Broken::default();
        let lanes = std::mem::take(&mut self.data);
        self.open_reads();
        let (target, sender, regions) = (
            self.target.clone(),
            self.sender.clone(),
            self.regions.clone(),
        );
        let attempt = self.connection;
        tokio::spawn(async move {
            // Joining the lanes' threads may block for a moment.
            let _ = tokio::task::spawn_blocking(move || drop(lanes)).await;
            let wanted = |address: &Address| default_channels(address).max(POSTCOPY_CHANNELS) + 1;
            let dialled = dial(&target, wanted, &regions).await;
            let _ = sender.send(Incoming::ConnectedAll(
                attempt,
                dialled.map(|(channels, _)| channels),
            ));
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
