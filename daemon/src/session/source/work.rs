//! What the source's engine asks for and that takes time. Each answers later, by an input.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagecopy::engine::journal::Record;
use pagecopy::engine::source::{Input, Populated};
use pagecopy::engine::{Failure, Fault};
use pagecopy::host::Tracker;
use pagecopy::host::track::UffdTracker;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::holes::Holes;
use super::{Incoming, Session};
use crate::failure::host;
use crate::log;
use crate::qemu::discover::{track_failure, unchanged};
use crate::qemu::outgoing::Outgoing;
use crate::qmp::Qmp;
use crate::session::{blocking, digests, journal_failure, lock, page_digests};

/// During pre-copy the guest is looked at again at most this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it may take until it is noticed that a QEMU that failed has ended.
const GONE_GRACE: Duration = Duration::from_millis(100);

impl Session {
    pub(super) fn attach(&self) {
        let (Some(tracker), Some(holes)) = (self.tracker.clone(), self.holes.clone()) else {
            return;
        };
        let sender = self.sender.clone();
        self.memory_worker.run(move || {
            answer(&sender, attach(&mut lock(&tracker), &mut lock(&holes)));
        });
    }

    pub(super) fn scan(&self, holes: bool) {
        let (Some(tracker), Some(list)) = (self.tracker.clone(), self.holes.clone()) else {
            return;
        };
        let sender = self.sender.clone();
        self.memory_worker.run(move || {
            let list = holes.then_some(&*list);
            answer(&sender, scan(&mut lock(&tracker), list));
        });
    }

    /// What the RAM files hold is listed again if that has changed, which the stop is spared then.
    fn list_again(&self) -> oneshot::Receiver<()> {
        let (done, listed) = oneshot::channel();
        if let Some(holes) = self.holes.clone() {
            self.memory_worker.run(move || {
                lock(&holes).list_again();
                // A session that has ended does not wait.
                let _ = done.send(());
            });
        }
        listed
    }

    /// `transaction` drains all disks before its actions, of which there are none here.
    /// `tests/tests/unseen.rs` holds each QEMU to it. QEMU keeps its big lock meanwhile, so a guest that touches a device
    /// waits as long as the slowest request that is in flight.
    pub(super) fn drain_io(&self) {
        let Some(qmp) = self.qmp.clone() else { return };
        self.order(async move {
            match qmp
                .execute("transaction", serde_json::json!({ "actions": [] }))
                .await
            {
                Ok(_) => Input::IoDrained,
                Err(error) => Input::HostFailed(error.into()),
            }
        });
    }

    /// During pre-copy, beside the scans: the sooner it is noticed, the less is sent for nothing.
    pub(super) fn look_sometimes(&mut self) {
        let (Some(qmp), Some(guest)) = (self.qmp.clone(), self.guest.clone()) else {
            return;
        };
        if self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let sender = self.sender.clone();
        log::spawn(async move {
            // That QEMU cannot be asked is noticed by whoever has to.
            if let Err(failure) = unchanged(&qmp, &guest).await
                && failure.fault == Fault::Operator
            {
                // A session that has ended needs no answer.
                let _ = sender.send(Incoming::Engine(Input::HostFailed(failure)));
            }
        });
    }

    /// The last look, with the guest still running.
    pub(super) fn look_again(&self) {
        let (Some(qmp), Some(guest)) = (self.qmp.clone(), self.guest.clone()) else {
            return;
        };
        let listed = self.list_again();
        self.order(async move {
            // Without an answer there is no list, and none is needed.
            let (looked, _) = tokio::join!(unchanged(&qmp, &guest), listed);
            match looked {
                Ok(()) => Input::Unchanged,
                Err(failure) => Input::HostFailed(failure),
            }
        });
    }

    pub(super) fn stop_guest(&self) {
        let Some(outgoing) = self.outgoing.clone() else {
            return;
        };
        self.order(async move {
            match outgoing.stop().await {
                Ok(()) => Input::GuestStopped,
                Err(failure) => Input::QemuFailed(failure),
            }
        });
    }

    pub(super) fn save_device_state(&self) {
        let Some(outgoing) = self.outgoing.clone() else {
            return;
        };
        let sender = self.sender.clone();
        self.order(async move {
            let forward = |piece| {
                // A session that has ended needs no device state.
                let _ = sender.send(Incoming::Engine(Input::DeviceState(piece)));
            };
            match outgoing.save(forward).await {
                Ok(()) => Input::DeviceStateSaved,
                Err(failure) => Input::QemuFailed(failure),
            }
        });
    }

    pub(super) fn resume_guest(&self) {
        let (outgoing, qmp) = (self.outgoing.clone(), self.qmp.clone());
        let (shown, begun) = (self.migration.shown(), Instant::now());
        self.order(async move {
            let id = shown.id;
            let resumed = match outgoing {
                Some(outgoing) => outgoing.resume().await,
                None => resume_anew(&shown.qmp).await,
            };
            match resumed {
                Ok(()) => {
                    tracing::info!(%id, ms = begun.elapsed().as_secs_f64() * 1e3, "the guest runs on here");
                    Input::GuestResumed
                }
                Err(failure) => {
                    tracing::error!(%id, what = failure.what, "the guest could not be taken back");
                    // The end of QEMU may be noticed a moment after its silence.
                    let gone = async {
                        match qmp {
                            Some(qmp) => timeout(GONE_GRACE, qmp.gone()).await.is_ok(),
                            None => false,
                        }
                    };
                    if gone.await {
                        Input::GuestLost
                    } else {
                        Input::ResumeFailed(failure)
                    }
                }
            }
        });
    }

    pub(super) fn digest(&self) {
        let Some((ram, blocks)) = self.ram.clone() else {
            return;
        };
        self.order(async move {
            let digests = blocking(move || digests(&ram, blocks)).await;
            digests.map_or_else(Input::HostFailed, Input::Digests)
        });
    }

    pub(super) fn page_digests(&self, block: u16, chunk: u64) {
        let Some((ram, _)) = self.ram.clone() else {
            return;
        };
        self.order(async move {
            match blocking(move || Ok(page_digests(&ram, block, chunk))).await {
                Ok(digests) => Input::PageDigests {
                    block,
                    chunk,
                    digests,
                },
                Err(failure) => Input::HostFailed(failure),
            }
        });
    }

    pub(super) fn journal(&self, record: Record) {
        let (journal, sender) = (Arc::clone(&self.journal), self.sender.clone());
        self.journal_worker.run(move || {
            let input = match lock(&journal).append(&record) {
                Ok(()) => Input::Journaled(record),
                Err(error) => Input::JournalFailed(record, journal_failure(&error)),
            };
            // A session that has ended needs no answer.
            let _ = sender.send(Incoming::Engine(input));
        });
    }

    /// Does `work` in the background; its result is the engine's next input.
    fn order(&self, work: impl Future<Output = Input> + Send + 'static) {
        let sender = self.sender.clone();
        log::spawn(async move {
            // A session that has ended needs no answer.
            let _ = sender.send(Incoming::Engine(work.await));
        });
    }
}

/// Takes the guest back after a restart of the daemon.
async fn resume_anew(qmp: &Path) -> Result<(), Failure> {
    Outgoing::new(Arc::new(Qmp::connect(qmp).await?))
        .resume()
        .await
}

fn attach(tracker: &mut UffdTracker, holes: &mut Holes) -> Result<Input, Failure> {
    holes.watch();
    tracker.arm().map_err(track_failure)?;
    let populated = holes.list().map_err(|error| ram_failure(&error))?;
    let stopped = tracker
        .attach_figures()
        .map(|figures| figures.stopped)
        .unwrap_or_default();
    Ok(Input::Attached { stopped, populated })
}

fn scan(tracker: &mut UffdTracker, holes: Option<&Mutex<Holes>>) -> Result<Input, Failure> {
    let begun = Instant::now();
    let mut dirty = Vec::new();
    tracker.scan(&mut dirty).map_err(track_failure)?;
    let populated = match holes {
        Some(holes) => lock(holes)
            .at_the_stop()
            .map_err(|error| ram_failure(&error))?,
        None => Populated::NotAsked,
    };
    Ok(Input::Scanned {
        dirty,
        populated,
        took: begun.elapsed(),
    })
}

fn answer(sender: &UnboundedSender<Incoming>, result: Result<Input, Failure>) {
    // A session that has ended needs no answer.
    let _ = sender.send(Incoming::Engine(result.unwrap_or_else(Input::HostFailed)));
}

fn ram_failure(error: &std::io::Error) -> Failure {
    host(
        format!("the guest's RAM file cannot be asked what it holds: {error}"),
        "put it on tmpfs or hugetlbfs",
    )
}
