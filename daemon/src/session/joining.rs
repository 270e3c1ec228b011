//! A source that is sending pages has made data channels more: they are given to the session that receives the guest, which keeps
//! them until the source says on its own control channel that they are its.

use std::fmt;

use pagecopy::engine::MigrationId;
use pagecopy::wire::{Message, Secret};
use transport::{Channel, Regions};

use super::answer::live;
use super::arrive::Visit;
use crate::migrations::Request;

/// Data channels that want to join a migration.
pub(crate) struct Joining {
    first: u16,
    key: Secret,
    visit: Box<Visit>,
}

impl fmt::Debug for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joining")
            .field("first", &self.first)
            .field("visit", &self.visit)
            .finish_non_exhaustive()
    }
}

/// What the session keeps of them.
pub(crate) struct Kept {
    /// The number that the first gets.
    pub(crate) first: u16,
    /// What they are known by.
    pub(crate) key: Secret,
    /// In order.
    pub(crate) channels: Vec<Box<dyn Channel>>,
    /// What they give access to: nothing yet.
    pub(crate) regions: Regions,
}

impl Visit {
    /// Gives the channels to the migration that they are for. Only the peer that it came from may.
    pub(super) fn join(self, id: MigrationId, first: u16, key: Secret) {
        let what = "data channels that join";
        let foreign = self.refuse_foreign(id, &what);
        let migration = live(&self.service, id).filter(|_| foreign.is_none());
        let joining = Joining {
            first,
            key,
            visit: Box::new(self),
        };
        match migration {
            // Should its session have ended, the channels are closed.
            Some(migration) => {
                migration.request(Request::Join(joining));
            }
            None => {
                joining.refuse("this host receives no such migration from this peer".to_owned())
            }
        }
    }
}

impl Joining {
    /// They are closed, and the source is told why.
    pub(crate) fn refuse(self, reason: String) {
        let parts = self.visit.into_parts();
        parts.control.give(Message::ChannelsTaken {
            first: self.first,
            taken: false,
            reason,
        });
        parts.control.close();
    }

    /// How many there are.
    pub(crate) fn channels(&self) -> usize {
        self.visit.channels()
    }

    /// They are kept, and the source is told so.
    pub(crate) fn keep(self) -> Kept {
        let parts = self.visit.into_parts();
        parts.control.give(Message::ChannelsTaken {
            first: self.first,
            taken: true,
            reason: String::new(),
        });
        parts.control.close();
        Kept {
            first: self.first,
            key: self.key,
            channels: parts.data,
            regions: parts.regions,
        }
    }
}
