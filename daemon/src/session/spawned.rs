//! What becomes of the QEMUs that were started here for guests: one whose guest is committed stays, whatever happens; any other is
//! ended with its migration, its files with it, by this daemon or the one after it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pagecopy::engine::MigrationId;
use pagecopy::engine::journal::{Outcome, Postcopy, Record, Side, is_settled, outcome, postcopy};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use uuid::Uuid;

use super::{blocking, lock};
use crate::failure::{Failure, Shown, host};
use crate::limits::MAX_SPAWNING;
use crate::log;
use crate::qemu::status::query_status;
use crate::qmp::Qmp;
use crate::service::Service;
use crate::spawn;
use crate::store::SpawnedQemu;

/// How long a QEMU that is to be ended may take to say whether its guest runs.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// Places for QEMUs that are started, each until its migration has ended.
#[derive(Debug)]
pub(crate) struct Spawning {
    places: Arc<Semaphore>,
    active: Mutex<BTreeSet<MigrationId>>,
    ending: watch::Sender<bool>,
}

impl Default for Spawning {
    fn default() -> Spawning {
        Spawning {
            places: Arc::new(Semaphore::new(MAX_SPAWNING as usize)),
            active: Mutex::default(),
            ending: watch::channel(false).0,
        }
    }
}

/// A place, given back on drop.
#[derive(Debug)]
pub(crate) struct Place {
    service: Arc<Service>,
    id: MigrationId,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.service.spawning.active().remove(&self.id);
    }
}

impl Spawning {
    /// A place for the QEMU of `id`, if there is one left and the daemon is not ending.
    pub(super) fn place(service: &Arc<Service>, id: MigrationId) -> Option<Place> {
        let this = &service.spawning;
        let permit = Arc::clone(&this.places).try_acquire_owned().ok()?;
        if *this.ending.borrow() || !this.active().insert(id) {
            return None;
        }
        Some(Place {
            service: Arc::clone(service),
            id,
            _permit: permit,
        })
    }

    /// Comes when the daemon ends.
    pub(super) async fn ending(&self) {
        // An error would say that the sender is gone, which is this one.
        let _ = self.ending.subscribe().wait_for(|ending| *ending).await;
    }

    /// The daemon ends: returns when everything that was started and is not needed has been ended.
    pub(crate) async fn end(&self) {
        self.ending.send_replace(true);
        // Only a closed one refuses.
        let _ = self.places.acquire_many(MAX_SPAWNING).await;
    }

    fn active(&self) -> MutexGuard<'_, BTreeSet<MigrationId>> {
        lock(&self.active)
    }
}

/// After a restart, and now and then: looks at every QEMU that was ever started here.
pub(crate) fn recover(service: &Arc<Service>) {
    let found = match service.store.spawned.list() {
        Ok(found) => found,
        Err(error) => {
            return tracing::error!(%error, "the QEMUs that were started here cannot be listed");
        }
    };
    for id in found {
        if service.spawning.active().contains(&id) {
            continue;
        }
        // Now, and not in the background: once old journals are removed, this is all that says it.
        let verdict = judge(service, id);
        let service = Arc::clone(service);
        log::spawn_for(id, async move {
            carry_out(&service, id, verdict).await;
        });
    }
}

/// Decides about the QEMU that was started for `id`, if there is one, and does it.
pub(crate) async fn settle(service: &Arc<Service>, id: MigrationId) {
    let verdict = judge(service, id);
    carry_out(service, id, verdict).await;
}

#[derive(Debug)]
enum Verdict {
    /// There is none, or it is not to be touched, which was told.
    Nothing,
    /// Its guest is here. It may have ended since.
    Stays(SpawnedQemu),
    /// Its guest is not here and never will be; `decided` by a journal, or there never was one.
    Ends { spawned: SpawnedQemu, decided: bool },
}

/// What the journal says. One that was left open is aborted first, for good.
fn judge(service: &Service, id: MigrationId) -> Verdict {
    let uuid = Uuid::from_bytes(id.0);
    let spawned = match service.store.spawned.get(id) {
        Ok(Some(spawned)) => spawned,
        Ok(None) => return Verdict::Nothing,
        Err(error) => {
            tracing::error!(id = %uuid, %error, "what was started cannot be read: a person has to look");
            return Verdict::Nothing;
        }
    };
    if spawned.arrived {
        return Verdict::Stays(spawned);
    }
    let mut journaled = true;
    let mut decided = || -> std::io::Result<Option<bool>> {
        let journals = &service.store.journals;
        let Some(records) = journals.read(id, Side::Destination)? else {
            journaled = false;
            return Ok(Some(false));
        };
        match outcome(&records) {
            Outcome::Here => Ok(Some(true)),
            Outcome::NotHere => Ok(Some(false)),
            Outcome::Open => {
                let live = service.migrations.side(uuid, Side::Destination);
                if live.is_some_and(|migration| !migration.is_over()) {
                    return Ok(None);
                }
                journals
                    .reopen(id, Side::Destination)?
                    .append(&Record::Aborted)?;
                Ok(Some(false))
            }
        }
    };
    match decided() {
        Ok(Some(true)) => match service.store.spawned.arrived(&spawned) {
            Ok(()) => Verdict::Stays(spawned),
            Err(error) => {
                tracing::error!(id = %uuid, %error, "that the guest has come could not be written down");
                Verdict::Nothing
            }
        },
        Ok(Some(false)) => Verdict::Ends {
            spawned,
            decided: journaled,
        },
        Ok(None) => Verdict::Nothing,
        Err(error) => {
            tracing::error!(id = %uuid, %error, "nothing is decided about the QEMU that was started: the journal cannot be used");
            Verdict::Nothing
        }
    }
}

async fn carry_out(service: &Arc<Service>, id: MigrationId, verdict: Verdict) {
    let done = match verdict {
        Verdict::Nothing => return,
        Verdict::Stays(spawned) => tidy(service, id, &spawned).await,
        Verdict::Ends { spawned, decided } => end(service, id, &spawned, decided).await,
    };
    if let Err(failure) = done {
        tracing::error!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "a QEMU that was started here is left");
    }
}

/// A guest that is here stays. When its QEMU has ended by itself, its RAM files and all else go, unless a migration needs them.
async fn tidy(service: &Service, id: MigrationId, spawned: &SpawnedQemu) -> Result<(), Failure> {
    let uuid = spawned.id;
    let running = blocking(move || {
        spawn::processes(uuid)
            .map_err(|error| host(error.to_string(), "see that /proc can be read"))
    });
    if !running.await?.is_empty() || is_needed(service, &spawned.qmp) {
        return Ok(());
    }
    if !starter(service)?.tidy(uuid).await? {
        service.store.spawned.forget(id);
        tracing::info!(id = %uuid, vm = spawned.vm, "the QEMU that was started for this guest has ended");
    }
    Ok(())
}

/// Whether a guest that left by the QEMU at `qmp` may still need its memory.
fn is_needed(service: &Service, qmp: &Path) -> bool {
    let journals = &service.store.journals;
    let Ok(listed) = journals.list() else {
        return true;
    };
    let sources = listed.into_iter().filter(|(_, side)| *side == Side::Source);
    sources
        .into_iter()
        .any(|(id, side)| match journals.read(id, side) {
            Ok(Some(records)) => {
                let of_it = matches!(records.first(), Some(Record::Begun { qmp: of, .. }) if Path::new(of) == qmp);
                of_it && (!is_settled(&records) || postcopy(&records) == Postcopy::Open)
            }
            Ok(None) => false,
            Err(_) => true,
        })
}

async fn end(
    service: &Service,
    id: MigrationId,
    spawned: &SpawnedQemu,
    decided: bool,
) -> Result<(), Failure> {
    // What the journal says is enough. But somebody may have run the guest by hand, and it is not ours to end then.
    if has_guest(&spawned.qmp, decided).await {
        return Err(host(
            format!(
                "its guest {:?} runs here, and the journal says that it never came",
                spawned.vm
            ),
            "somebody has run it by QEMU's monitor: see that it runs nowhere else, and end it by hand",
        ));
    }
    starter(service)?.end(spawned.id).await?;
    service.store.spawned.forget(id);
    tracing::info!(id = %spawned.id, vm = spawned.vm, "the QEMU that was started for this guest is ended, and its files are removed");
    Ok(())
}

/// Whether a guest runs in it; or, where no journal says that none came, whether it has one at all.
async fn has_guest(qmp: &Path, decided: bool) -> bool {
    let asked = async {
        let qmp = Qmp::connect(qmp).await.ok()?;
        query_status(&qmp).await.ok()
    };
    let status = timeout(ASK_LIMIT, asked).await.ok().flatten();
    status.is_some_and(|it| {
        let waits = matches!(it.status.as_str(), "inmigrate" | "prelaunch");
        it.running || (!decided && !waits)
    })
}

/// Who starts and ends QEMUs.
///
/// # Errors
/// Nobody does: there is no policy.
pub(super) fn starter(service: &Service) -> Result<&spawn::Starter, Failure> {
    service.starter.as_ref().ok_or_else(|| {
        crate::failure::operator(
            "this host starts no QEMU for guests that come: it has no policy for it",
            "name one by spawn-policy in pagecopyd's configuration there, and start pagecopyd again; or start the \
             destination's QEMU by hand, and use `pagecopy receive`",
        )
    })
}
