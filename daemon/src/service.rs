//! The service: starting, serving, ending.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pagecopy::engine::journal::Side;
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use transport::{Listener, Security};
use uuid::Uuid;

use crate::api;
use crate::api::access::{Roles, RolesInForce};
use crate::api::types::MigrationRequest;
use crate::config::Config;
use crate::failure::{Failure, host, operator};
use crate::hooks::Hooks;
use crate::limits::{MAX_PREFLIGHTS, MAX_PREFLIGHTS_PER_PEER};
use crate::listener;
use crate::migrations::{Migration, Migrations, Request, Shown};
use crate::preflight::dirty_rate::Sampled;
use crate::preflight::memory::Reservations;
use crate::preflight::outcome::Lately;
use crate::qemu::discover;
use crate::qemu::faults::Device;
use crate::qmp::Qmp;
use crate::queue::budget::Budget;
use crate::queue::turns::Queue;
use crate::quota::Quota;
use crate::reload::{self, InForce, Trust};
use crate::session::spawned::{self, Spawning};
use crate::session::wait::{self, Refused};
use crate::session::{begin, recover};
use crate::spawn::Starter;
use crate::start::Start;
use crate::store::{Receiver, Store};
use crate::systemd;

/// How long running migrations may take to end when the daemon does.
const END_LIMIT: Duration = Duration::from_secs(15);

/// What everything in the daemon shares.
#[derive(Debug)]
pub struct Service {
    /// The configuration that the daemon was started with. What a reload may change is in `in_force`.
    pub config: Config,
    /// The configuration that is in force.
    pub in_force: InForce,
    /// What outlives the daemon.
    pub store: Store,
    /// What runs, and ran.
    pub migrations: Migrations,
    /// What those that leave may send.
    pub budget: Budget,
    /// When those that leave begin.
    pub queue: Queue,
    /// How peers are trusted.
    pub security: Trust,
    /// Who may use the API.
    pub roles: RolesInForce,
    /// Whose dirty rate is being sampled.
    pub(crate) sampled: Sampled,
    /// What preflights have predicted lately.
    pub(crate) foreseen: Lately,
    /// Memory that guests which arrive will take.
    pub(crate) reserved: Reservations,
    /// Guests that come are compared by so many at a time.
    pub(crate) compared: Semaphore,
    /// Peers that look at this host just now.
    pub(crate) looked_at: Quota,
    /// Who starts QEMUs for guests that come, if there is a policy for it.
    pub starter: Option<Starter>,
    /// Places for those that are being started, and for the migrations that they are for.
    pub(crate) spawning: Spawning,
    /// What QEMUs are lent whose page faults they could not let anybody see.
    pub userfaultfd: Device,
}

impl Service {
    /// Opens the state directory.
    ///
    /// # Errors
    /// It cannot be used.
    fn open(
        in_force: InForce,
        security: Security,
        userfaultfd: Device,
        starter: Option<Starter>,
    ) -> Result<Service, Failure> {
        let config = (*in_force.now()).clone();
        let roles = Roles::look_up(config.access.as_ref())?;
        let store = Store::open(&config.state_dir)?;
        Ok(Service {
            budget: Budget::new(config.bandwidth_limit),
            queue: Queue::new(config.max_concurrent, config.max_pending),
            config,
            in_force,
            store,
            migrations: Migrations::default(),
            security: Trust::new(security),
            roles: RolesInForce::new(roles),
            sampled: Sampled::default(),
            foreseen: Lately::default(),
            reserved: Reservations::default(),
            compared: Semaphore::new(MAX_PREFLIGHTS),
            looked_at: Quota::new(MAX_PREFLIGHTS, MAX_PREFLIGHTS_PER_PEER),
            starter,
            spawning: Spawning::default(),
            userfaultfd,
        })
    }

    /// Begins a migration from here, or has it wait for its turn.
    ///
    /// # Errors
    /// The request is wrong, the guest is already being migrated, or the queue is full.
    pub async fn begin(self: &Arc<Self>, request: MigrationRequest) -> Result<Uuid, Refused> {
        begin::check(&request)?;
        self.refuse_unsound(&request.vm, &request.qmp)?;
        wait::enter(self, request)
    }

    /// Makes a waiting QEMU the destination for a guest.
    ///
    /// # Errors
    /// QEMU cannot be reached, or is no destination; each with what to do.
    pub async fn receive(&self, receiver: Receiver) -> Result<(), Failure> {
        begin::check_name(&receiver.vm)?;
        self.refuse_in_doubt(&receiver.vm, &receiver.qmp)?;
        self.refuse_if_receiving(&receiver.vm)?;
        let qmp = Qmp::connect(&receiver.qmp).await?;
        let guest = discover::destination(&qmp).await?;
        tracing::info!(
            vm = receiver.vm, qmp = %receiver.qmp.display(), pid = guest.pid, qemu = %guest.version,
            blocks = guest.blocks.len(), "a QEMU waits for a guest"
        );
        self.store
            .receivers
            .insert(receiver)
            .map_err(|error| not_kept(&error))
    }

    /// No QEMU waits for `vm` any more. Says whether one did.
    ///
    /// # Errors
    /// The guest is arriving just now, or the disk refused.
    pub fn forget_receiver(&self, vm: &str) -> Result<bool, Failure> {
        self.refuse_if_receiving(vm)?;
        self.store
            .receivers
            .remove(vm)
            .map_err(|error| not_kept(&error))
    }

    /// The guest `vm` has arrived: its QEMU waits no longer.
    pub(crate) fn received(&self, vm: &str) {
        if let Err(error) = self.store.receivers.remove(vm) {
            tracing::warn!(vm, %error, "the receiver could not be forgotten");
        }
    }

    /// Removes the journals that nobody will ask for any more.
    pub(crate) fn prune(&self) {
        if let Err(error) = self.store.journals.prune() {
            tracing::warn!(%error, "old journals could not be removed");
        }
    }

    /// Refuses to touch a guest, or a QEMU, of which nobody knows whether the other host runs the guest.
    pub(crate) fn refuse_in_doubt(&self, vm: &str, qmp: &Path) -> Result<(), Failure> {
        let Some(Shown {
            id, vm: of, side, ..
        }) = self.migrations.in_doubt(vm, qmp)
        else {
            return Ok(());
        };
        let what = match side {
            Side::Source => "may run at the destination",
            Side::Destination => "is committed to this host, and the source may have taken it back",
        };
        Err(operator(
            format!("refused: migration {id} is in doubt here: its guest {of:?} {what}"),
            format!("decide that one first: `pagecopy status {id}` says how"),
        ))
    }

    /// A guest that is on its way is tracked by its migration.
    pub(crate) fn refuse_if_moving(&self, vm: &str) -> Result<(), Failure> {
        match self.migrations.running(vm, Side::Source) {
            None => self.refuse_if_receiving(vm),
            Some(running) => Err(operator(
                format!("{vm:?} is being migrated from here just now (migration {running})"),
                "wait for it: its progress tells how fast the guest writes (`pagecopy status`)",
            )),
        }
    }

    /// Refuses to send a guest away that must not be sent now.
    pub(crate) fn refuse_unsound(&self, vm: &str, qmp: &Path) -> Result<(), Failure> {
        self.refuse_in_doubt(vm, qmp)?;
        self.refuse_if_fetching(vm)
    }

    /// What is shown of a migration, with its place in the queue.
    pub(crate) fn shown(&self, migration: &Migration) -> Shown {
        let mut shown = migration.shown();
        shown.place = self.queue.places().get(&shown.id).copied();
        shown
    }

    /// The same of all, in the order in which they began.
    pub(crate) fn all_shown(&self) -> Vec<Shown> {
        let places = self.queue.places();
        let mut all: Vec<Shown> = (self.migrations.list().iter())
            .map(|migration| migration.shown())
            .collect();
        for shown in &mut all {
            shown.place = places.get(&shown.id).copied();
        }
        all
    }

    /// A guest that lacks pages cannot be sent on.
    fn refuse_if_fetching(&self, vm: &str) -> Result<(), Failure> {
        let running = self.migrations.running(vm, Side::Destination);
        let fetching = running
            .and_then(|id| self.migrations.side(id, Side::Destination))
            .is_some_and(|migration| migration.is_postcopy());
        if fetching {
            return Err(operator(
                format!("{vm:?} runs here and still lacks some of its memory (post-copy)"),
                "wait until its migration to this host has completed: `pagecopy status`",
            ));
        }
        Ok(())
    }

    /// A guest that arrives here just now cannot be begun with.
    pub(crate) fn refuse_if_receiving(&self, vm: &str) -> Result<(), Failure> {
        match self.migrations.running(vm, Side::Destination) {
            None => Ok(()),
            Some(running) => Err(operator(
                format!("{vm:?} is arriving here just now (migration {})", running),
                "wait for it, or cancel it with `pagecopy cancel`",
            )),
        }
    }

    /// Ends every migration: those before their commit are cancelled, the others are left to their journals.
    async fn end(&self) {
        self.queue.close();
        let running: Vec<_> = self
            .migrations
            .list()
            .into_iter()
            .filter(|migration| !migration.is_over())
            .collect();
        for migration in &running {
            migration.request(Request::Shutdown);
        }
        let all_over = async {
            for migration in &running {
                migration.wait_over().await;
            }
            self.spawning.end().await;
        };
        if tokio::time::timeout(END_LIMIT, all_over).await.is_err() {
            tracing::warn!("a migration did not end in time and is left to its journal");
        }
    }
}

fn not_kept(error: &std::io::Error) -> Failure {
    host(
        format!("the receiver could not be kept: {error}"),
        "see to the disk under state-dir",
    )
}

/// Runs the daemon: returns when SIGTERM or SIGINT has ended it in order.
///
/// # Errors
/// It cannot start, and why.
pub async fn run(start: Start) -> Result<(), Failure> {
    let listener = start.listener;
    let service = Arc::new(Service::open(
        start.in_force,
        start.security,
        start.userfaultfd,
        start.starter,
    )?);
    let (mut terminate, mut interrupt, mut hangup) = (
        on_signal(SignalKind::terminate())?,
        on_signal(SignalKind::interrupt())?,
        on_signal(SignalKind::hangup())?,
    );
    let is_passed = start.api.is_some();
    let api_socket = match start.api {
        Some(passed) => UnixListener::from_std(passed)
            .map_err(|error| host(error.to_string(), "report this"))?,
        None => api::listen(&service.config.api, service.config.access.is_some())?,
    };
    // What is taken up again is told, too.
    let hooks = Hooks::start(&service.config, service.migrations.feed())?;
    recover::recover(&service);
    spawned::recover(&service);
    wait::take_up(&service);
    service.prune();

    let (end_api, api_ended) = watch::channel(());
    let server = api::serve(
        Arc::clone(&service),
        api_socket,
        start.api_remote,
        api_ended,
    );
    let server = tokio::spawn(server);
    let end = Arc::new(AtomicBool::new(false));
    let accepting = accept(&service, listener, &end)?;
    tracing::info!(
        name = service.config.name, listen = service.config.listen, api = %service.config.api.display(),
        state_dir = %service.config.state_dir.display(), tls = service.config.tls.is_some(),
        user = service.config.user, "ready"
    );
    systemd::tell(&[NotifyState::Ready]);

    until_ended(
        [&mut terminate, &mut interrupt],
        &mut hangup,
        &service,
        &accepting,
    )
    .await;
    tracing::info!("ending");
    systemd::tell(&[NotifyState::Stopping]);
    end.store(true, Ordering::Relaxed);
    service.migrations.feed().end();
    service.end().await;
    hooks.end().await;
    // Readers of events get the end of their migration; those of one in doubt are let go.
    drop(end_api);
    if tokio::time::timeout(Duration::from_secs(1), server)
        .await
        .is_err()
    {
        tracing::debug!("an API client was still connected");
    }
    // A panic in the thread has been told already.
    let _ = tokio::task::spawn_blocking(move || accepting.join()).await;
    if !is_passed {
        // The next daemon makes its own.
        let _ = std::fs::remove_file(&service.config.api);
    }
    Ok(())
}

/// Reloads when it is told to, and tells systemd that it lives, until it is told to end.
async fn until_ended(
    [terminate, interrupt]: [&mut Signal; 2],
    hangup: &mut Signal,
    service: &Arc<Service>,
    accepting: &JoinHandle<()>,
) {
    let mut watchdog = pin!(systemd::keep_watchdog(|| !accepting.is_finished()));
    let mut is_watched = true;
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            _ = hangup.recv() => reload(service).await,
            () = &mut watchdog, if is_watched => is_watched = false,
        }
    }
}

async fn reload(service: &Arc<Service>) {
    systemd::tell_reloading();
    let reloaded = Arc::clone(service);
    // A panic in it has been told already, and all is as it was.
    let _ = tokio::task::spawn_blocking(move || reload::reload(&reloaded)).await;
    systemd::tell(&[NotifyState::Ready]);
}

fn on_signal(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| host(format!("signals cannot be taken: {error}"), "report this"))
}

fn accept(
    service: &Arc<Service>,
    listener: Listener,
    end: &Arc<AtomicBool>,
) -> Result<JoinHandle<()>, Failure> {
    let (service, end, runtime) = (
        Arc::clone(service),
        Arc::clone(end),
        tokio::runtime::Handle::current(),
    );
    std::thread::Builder::new()
        .name("accept".to_owned())
        .spawn(move || listener::listen(&service, &listener, &runtime, &end))
        .map_err(|error| {
            host(
                format!("no thread: {error}"),
                "raise the limit of processes",
            )
        })
}
