//! Other limits for a migration that is under way.

use pagecopy::engine::source::Input;
use tokio::sync::oneshot;

use super::super::change;
use super::Session;
use crate::api::types::ChangeRequest;
use crate::migrations::Decided;

impl Session {
    /// Other limits are the engine's to take; a priority is nobody's but the host's.
    pub(super) fn change(
        &mut self,
        change: ChangeRequest,
        reply: oneshot::Sender<Decided>,
    ) -> Option<Input> {
        match change::of_engine(&change) {
            None => {
                self.changed(&change);
                // Whoever asked may have left.
                let _ = reply.send(Ok("the migration goes on with its new priority".to_owned()));
                None
            }
            Some(limits) => self.asked(reply).then(|| {
                self.changing = Some(change);
                Input::Change(limits)
            }),
        }
    }

    /// It is so from now on.
    pub(super) fn changed(&self, change: &ChangeRequest) {
        if let Some(limit) = change.bandwidth_limit {
            self.share.limit(limit);
        }
        if let Some(priority) = change.priority {
            self.share.weigh(priority);
            self.migration.set_priority(priority);
        }
    }
}
