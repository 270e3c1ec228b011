//! Slowing the guest where pre-copy falls behind: its vCPUs that write stand still for a share of their time.

use std::sync::Arc;

use pagecopy::engine::event::Report;
use pagecopy::host::throttle::{Holder, Throttle};

use super::Session;
use crate::failure::{Failure, Shown};
use crate::log;
use crate::qemu::discover::track_failure;
use crate::qemu::vcpus::vcpus;
use crate::qmp::Qmp;
use crate::session::{blocking, tell};

impl Session {
    /// The guest's writers lose so much of their time from now on; with 0, none, at once.
    pub(super) fn throttle(&mut self, percent: u32) {
        match &self.throttle {
            _ if percent == 0 => self.throttle = None,
            Some(throttle) => throttle.set(percent),
            None => self.begin_to_throttle(percent),
        }
    }

    fn begin_to_throttle(&mut self, percent: u32) {
        let (Some(qmp), Some(guest)) = (self.qmp.clone(), &self.guest) else {
            return;
        };
        let throttle = Throttle::new(percent);
        let (holder, pid, migration) = (throttle.holder(), guest.pid, Arc::clone(&self.migration));
        // Should it be lifted before it has begun, it does not begin.
        self.throttle = Some(throttle);
        log::spawn(async move {
            if let Err(failure) = hold(&qmp, pid, holder).await {
                let text = format!("the guest cannot be slowed: {}", Shown(&failure));
                tell(&migration, &Report::Notice { text });
            }
        });
    }
}

async fn hold(qmp: &Qmp, pid: i32, holder: Holder) -> Result<(), Failure> {
    let vcpus = vcpus(qmp).await?;
    let threads: Vec<u32> = vcpus.iter().map(|vcpu| vcpu.thread).collect();
    blocking(move || holder.start(pid, &threads).map_err(track_failure)).await
}
