//! Beginning a migration at the source: all that is looked at and made before there is an engine.
//!
//! Nothing of QEMU is changed before everything else has worked, and a failure here leaves nothing behind.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagecopy::engine::channels::Bounds;
use pagecopy::engine::encoding::policy;
use pagecopy::engine::encoding::versions::Versions;
use pagecopy::engine::event::Report;
use pagecopy::engine::journal::{Record, Side};
#[cfg(feature = "steps")]
use pagecopy::engine::source::Output;
use pagecopy::engine::source::{self, After, Options, Setup, Source};
use pagecopy::engine::{Failure, MigrationId, Timeouts};
use pagecopy::host::Ram;
use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::limits::{MAX_DATA_CHANNELS, MAX_NAME};
use pagecopy::memory::{BlockId, BlockSpec};
use tokio::sync::mpsc::UnboundedReceiver;
use transport::{Access, Address, Channel, RegionId, Regions};

use super::arrive::Over;
use super::source::{Memory, Parts, Session};
use super::{CANCELLED, Clock, journal_failure, spawn, wait};
use crate::api::types::{Channels, Compress, MigrationRequest, Mode, Throttle};
use crate::config::Config;
use crate::dial::{Target, dial};
use crate::failure::{host, operator};
use crate::lane::source::Encoding;
use crate::limits::MAX_DELTA_CACHE;
use crate::migrations::{Migration, Request};
use crate::names;
use crate::nic::{POSTCOPY_CHANNELS, cores, default_channels};
use crate::preflight::outcome::Foresight;
use crate::preflight::start;
use crate::qemu::discover::{self, map_ram, track_failure};
use crate::qemu::settings::{Role, Settings};
use crate::qemu::{Block, Guest};
use crate::qmp::Qmp;
use crate::queue::turns::Place;
use crate::rdma::{Hearer, Question, Way};
use crate::service::Service;
use crate::store::JournalFile;
use crate::sys;

/// The longest downtime, unless the operator says otherwise.
pub(crate) const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// Rounds without convergence, unless the operator says otherwise.
pub(crate) const MAX_ROUNDS: u32 = 30;

/// Checks what can be checked without doing anything.
///
/// # Errors
/// What is wrong with the request.
pub(crate) fn check(request: &MigrationRequest) -> Result<(), Failure> {
    check_name(&request.vm)?;
    if !request.to.starts_with("unix:") {
        crate::dial::check_host_port(&request.to)?;
    }
    let refuse = |what: &str, remedy: &str| Err(operator(what, remedy));
    let number = request.channels.and_then(Channels::number);
    if number.is_some_and(|number| number == 0 || number > MAX_DATA_CHANNELS) {
        return refuse(
            "the number of channels is out of range",
            &format!("use 1 to {MAX_DATA_CHANNELS} channels"),
        );
    }
    if request.max_rounds == Some(0) {
        return refuse("no rounds are allowed", "use --max-rounds 1 or more");
    }
    if matches!(request.mode, Mode::Hybrid | Mode::Postcopy) {
        if request.throttle == Some(Throttle::Auto) {
            return refuse(
                "with this mode the guest goes first, and is never slowed",
                "leave --throttle out, or use --mode precopy or auto",
            );
        }
        if request.verify {
            return refuse(
                "--verify compares both memories before the guest runs, and with this mode they are not both there then",
                "leave --verify out, or use --mode precopy",
            );
        }
        if number.is_some_and(|number| number < POSTCOPY_CHANNELS) {
            return refuse(
                "this mode needs a data channel for the pages that the guest waits for, and another for the rest",
                "use --channels 2 or more",
            );
        }
    }
    let after = (request.postcopy_after_rounds, request.postcopy_after_ms);
    if after != (None, None) && request.mode != Mode::Hybrid {
        return refuse(
            "when the guest goes first was said, and not that it does",
            "add --mode hybrid, or leave --postcopy-after out",
        );
    }
    if request
        .delta_cache
        .is_some_and(|bytes| bytes > MAX_DELTA_CACHE)
    {
        return refuse(
            "the memory for versions of pages is out of range",
            &format!("use --delta-cache {} GiB or less", MAX_DELTA_CACHE >> 30),
        );
    }
    check_limits(
        request.downtime_limit_ms,
        request.priority,
        &[
            request.bandwidth_limit,
            request.postcopy_bandwidth_limit,
            request.timeout_ms,
        ],
    )
}

/// Checks what may be changed later, too.
///
/// # Errors
/// What is out of its range.
pub(super) fn check_limits(
    downtime_limit_ms: Option<f64>,
    priority: i32,
    limits: &[Option<u64>],
) -> Result<(), Failure> {
    if downtime_limit_ms.is_some_and(|ms| !(ms > 0.0 && ms <= 3_600_000.0)) {
        return Err(operator(
            "the downtime limit is out of range",
            "use more than 0 ms and at most an hour",
        ));
    }
    if !(-100..=100).contains(&priority) {
        return Err(operator(
            "the priority is out of range",
            "use a priority from -100 to 100; 0 is what it is when left out",
        ));
    }
    if limits.contains(&Some(0)) {
        return Err(operator(
            "a limit of zero lets nothing pass",
            "leave the limit out, or make it larger",
        ));
    }
    Ok(())
}

/// Checks a guest's name.
///
/// # Errors
/// It is empty or too long, or no text for a log and a terminal. It may look like a path: nothing takes it for one.
pub(crate) fn check_name(vm: &str) -> Result<(), Failure> {
    if vm.is_empty() || vm.len() > MAX_NAME || vm.chars().any(char::is_control) {
        return Err(operator(
            "the name of the guest is empty or too long, or has control characters in it",
            format!("use 1 to {MAX_NAME} bytes of text"),
        ));
    }
    Ok(())
}

/// Migrates one guest away, from its place in the queue to the end.
pub(crate) async fn migrate(
    service: Arc<Service>,
    id: MigrationId,
    migration: Arc<Migration>,
    mut request: MigrationRequest,
    mut requests: UnboundedReceiver<Request>,
    place: Place,
) {
    let _over = Over(Arc::clone(&migration));
    if !wait::turn(&service, id, &migration, &mut request, &mut requests, place).await {
        return;
    }
    let clock = Clock::start();
    let foresight = Foresight::of(&request, &service);
    // Looking changes nothing and may be broken off at any moment; what follows may not.
    let looked = tokio::select! {
        looked = look(&service, id, &migration, &request) => looked,
        () = cancelled(&mut requests) => Err(operator(CANCELLED, "nothing: the guest runs on here")),
    };
    let prepared = match looked {
        Ok(looked) => looked.prepare(&service, id, &request).await,
        Err(failure) => Err(failure),
    };
    wait::forget(&service, id);
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => return super::end_early(id, &migration, &failure),
    };
    if let Some(foresight) = foresight.and_then(|it| it.of_memory(&prepared.memory.specs)) {
        migration.foresee(foresight);
    }
    let setup = prepared.setup;
    let share = service
        .budget
        .share(request.priority, request.bandwidth_limit);
    let encoding = encoding(
        &request,
        &service.in_force.now(),
        share.rate(),
        setup.data_channels,
    );
    let parts = Parts {
        id,
        service,
        migration: Arc::clone(&migration),
        clock,
        qmp: Some(prepared.qmp),
        guest: Some(prepared.guest),
        settings: prepared.settings,
        journal: prepared.journal,
        target: prepared.target,
        memory: Some(prepared.memory),
        encoding,
        share,
        channels: prepared.channels,
    };
    match Session::start(parts) {
        Ok(session) => session.run(Source::new(setup, clock.now()), requests).await,
        Err(failure) => super::end_early(id, &migration, &failure),
    }
}

/// Waits until it is to end.
async fn cancelled(requests: &mut UnboundedReceiver<Request>) {
    while let Request::Change(_, reply) = asked(requests).await {
        let beginning = operator("the migration is just beginning", "try again in a moment");
        // Whoever asked may have left.
        let _ = reply.send(Err(beginning));
    }
}

/// What is asked of a migration before its session: to end, or to change.
pub(super) async fn asked(requests: &mut UnboundedReceiver<Request>) -> Request {
    loop {
        match requests.recv().await {
            Some(asked @ (Request::Cancel | Request::Shutdown | Request::Change(..))) => {
                return asked;
            }
            Some(_) => {}
            None => return Request::Shutdown,
        }
    }
}

/// What was found and made without changing anything.
struct Looked {
    qmp: Arc<Qmp>,
    guest: Guest,
    target: Target,
    memory: Memory,
    channels: Vec<Box<dyn Channel>>,
    data_channels: u16,
}

/// All that a session needs.
struct Prepared {
    setup: Setup,
    qmp: Arc<Qmp>,
    guest: Guest,
    settings: Settings,
    journal: JournalFile,
    target: Target,
    memory: Memory,
    channels: Vec<Box<dyn Channel>>,
}

async fn look(
    service: &Service,
    id: MigrationId,
    migration: &Arc<Migration>,
    request: &MigrationRequest,
) -> Result<Looked, Failure> {
    let qmp = Arc::new(Qmp::connect(&request.qmp).await?);
    let guest = discover::source(&qmp).await?;
    service.sampled.refuse(guest.pid)?;
    let memory = memory(&guest)?;
    let mut target = Target {
        to: request.to.clone(),
        security: service.security.clone(),
        rdma: None,
        names: Vec::new(),
    };
    let wanted = request.channels.and_then(Channels::number);
    let may_be_postcopy = !matches!(
        mode(request, service.in_force.now().allow_postcopy),
        source::Mode::Precopy | source::Mode::Auto { postcopy: false }
    );
    let with_control = move |address: &Address| {
        wanted.unwrap_or_else(|| default_channels(address, may_be_postcopy)) + 1
    };
    let mut notice = None;
    let told = Arc::clone(migration);
    let question = Question {
        transport: request.transport,
        pin: request.rdma_pin,
        allowed: &service.in_force.now().rdma,
        bytes: memory.specs.iter().map(|spec| spec.size).sum(),
        is_read: may_be_postcopy,
        hearer: Hearer::new(move |text| super::tell(&told, &Report::Notice { text })),
    };
    match question.decide(&qmp).await? {
        Way::Rdma(plan) => target.rdma = Some(*plan),
        Way::Tcp(why) => notice = why,
    }
    // What QEMU is like is found out while the connection is made.
    let (dialled, own) = tokio::join!(
        dial(&target, with_control, &memory.regions),
        start::own(service, request, &qmp, &guest),
    );
    let dialled = dialled?;
    let (channels, peer) = (dialled.channels, dialled.peer);
    if let Some(text) = dialled.notice.or(notice) {
        super::tell(migration, &Report::Notice { text });
    }
    // Whoever is connected to later must be the same.
    target.names = names::of(&service.in_force.now(), &peer);
    let tell = |text| super::tell(migration, &Report::Notice { text });
    let channels = match start::may_begin(request, own, channels, tell).await? {
        Some(channels) => channels,
        // The connection has ended with the question.
        None => dial(&target, with_control, &memory.regions).await?.channels,
    };
    if let Some(plan) = &mut target.rdma {
        // What has begun goes on over what there is.
        plan.must = false;
    }
    let channels = match request.spawn {
        true => spawn::ask(service, id, request, &qmp, &guest, channels).await?,
        false => channels,
    };
    let data_channels = u16::try_from(channels.len().saturating_sub(1)).unwrap_or(u16::MAX);
    tracing::info!(
        vm = request.vm, pid = guest.pid, qemu = %guest.version, blocks = guest.blocks.len(),
        direct_io = guest.direct_io, peer = peer.address, peer_names = ?peer.names, data_channels,
        "the guest wants to leave"
    );
    Ok(Looked {
        qmp,
        guest,
        target,
        memory,
        channels,
        data_channels,
    })
}

impl Looked {
    /// Begins the journal and changes QEMU's settings, in this order.
    async fn prepare(
        self,
        service: &Service,
        id: MigrationId,
        request: &MigrationRequest,
    ) -> Result<Prepared, Failure> {
        let setup = Setup {
            id,
            vm: request.vm.clone(),
            host: service.config.name.clone(),
            blocks: self.memory.specs.to_vec(),
            ram: self.guest.blocks.iter().map(Block::ram_file).collect(),
            direct_io: self.guest.direct_io,
            data_channels: self.data_channels,
            fixed_downtime: service.store.downtime.get(),
            options: Options {
                channels: growth(request, &self.channels),
                ..options(request, &service.in_force.now())
            },
            timeouts: Timeouts::default(),
        };
        let begun = Record::Begun {
            id,
            side: Side::Source,
            vm: request.vm.clone(),
            qmp: request.qmp.display().to_string(),
            peer: request.to.clone(),
            names: self.target.names.clone(),
        };
        let journals = &service.store.journals;
        let settings = Settings::read(&self.qmp, Role::Source).await?;
        #[cfg(feature = "steps")]
        crate::steps::reached(Side::Source, &Output::Journal(begun.clone())).await;
        let mut journal = journals
            .create(id, Side::Source, &begun)
            .map_err(|error| journal_failure(&error))?;
        let kept = journals.keep_settings(id, &settings);
        let changed = match kept.map_err(|error| journal_failure(&error)) {
            Ok(()) => settings.change(&self.qmp).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = changed {
            settings.restore(&self.qmp).await;
            journals.forget_settings(id);
            // Without the record a restarted daemon looks after the guest, which does no harm.
            let _ = journal.append(&Record::RolledBack);
            return Err(failure);
        }
        let Looked {
            qmp,
            guest,
            target,
            memory,
            channels,
            ..
        } = self;
        Ok(Prepared {
            setup,
            qmp,
            guest,
            settings,
            journal,
            target,
            memory,
            channels,
        })
    }
}

fn memory(guest: &Guest) -> Result<Memory, Failure> {
    let mapped = map_ram(&guest.blocks, false)?;
    let specs: Arc<[BlockSpec]> = guest
        .blocks
        .iter()
        .map(|block| block.spec.clone())
        .collect();
    let tracked = guest
        .blocks
        .iter()
        .zip(0..)
        .map(|(block, number)| tracked(block, number))
        .collect();
    let tracker = UffdTracker::new(guest.pid, tracked).map_err(track_failure)?;
    let regions = Regions::new();
    for number in (0..).take(specs.len()) {
        let region = sys::region(&mapped, BlockId(number))
            .ok_or_else(|| host(format!("RAMBlock {number} is not mapped"), "report this"))?;
        // Our side writes from it; the peer may do nothing to it.
        regions.register(
            RegionId(number.into()),
            region,
            Access {
                peer_writes: false,
                peer_reads: false,
            },
        );
    }
    let ram: Arc<dyn Ram> = Arc::new(mapped.clone());
    Ok(Memory {
        ram,
        mapped,
        tracker: Some(tracker),
        regions,
        specs,
    })
}

/// How a RAMBlock is tracked.
pub(crate) fn tracked(block: &Block, number: u16) -> TrackedBlock {
    TrackedBlock {
        block: BlockId(number),
        address: block.mapping.address,
        len: block.mapping.len,
        page_size: block.mapping.page_size,
    }
}

fn mode(request: &MigrationRequest, allowed: bool) -> source::Mode {
    match request.mode {
        Mode::Precopy => source::Mode::Precopy,
        Mode::Postcopy => source::Mode::Postcopy,
        Mode::Auto => source::Mode::Auto {
            postcopy: (allowed || request.allow_postcopy) && !request.verify,
        },
        Mode::Hybrid => source::Mode::Hybrid(
            match (request.postcopy_after_rounds, request.postcopy_after_ms) {
                (Some(rounds), _) => After::Rounds(rounds),
                (None, Some(ms)) => After::Time(Duration::from_millis(ms)),
                (None, None) => After::Auto,
            },
        ),
    }
}

fn compress(request: &MigrationRequest, config: &Config) -> policy::Compress {
    match request.compress.unwrap_or(config.compress) {
        Compress::Off => policy::Compress::Off,
        Compress::Zstd => policy::Compress::Zstd,
        Compress::Delta => policy::Compress::Delta,
        Compress::Auto => policy::Compress::Auto,
    }
}

/// The bandwidth is shared by the channels. The memory for versions is only asked for where there may be deltas.
fn encoding(
    request: &MigrationRequest,
    config: &Config,
    bandwidth: Option<u64>,
    data_channels: u16,
) -> Encoding {
    let compress = compress(request, config);
    let cache = if compress.encodings().delta {
        request.delta_cache.unwrap_or(config.delta_cache)
    } else {
        0
    };
    Encoding {
        compress,
        cap: bandwidth.map(|limit| limit / u64::from(data_channels.max(1))),
        versions: Arc::new(Mutex::new(Versions::new(cache))),
    }
}

/// Between which numbers of data channels is chosen while pages are sent, where the operator wants that. Over RDMA a queue pair is no
/// stream, and there are as many as there were.
fn growth(request: &MigrationRequest, channels: &[Box<dyn Channel>]) -> Option<Bounds> {
    let data = channels.get(1..).unwrap_or_default();
    let over_rdma = data.iter().any(|channel| channel.kind() == "rdma");
    let is_open =
        matches!(request.channels, Some(Channels::Measured(_))) && !over_rdma && !data.is_empty();
    let first = u16::try_from(data.len()).unwrap_or(u16::MAX);
    is_open.then(|| Bounds::of(first, cores()))
}

fn options(request: &MigrationRequest, config: &Config) -> Options {
    Options {
        downtime_limit: request
            .downtime_limit_ms
            .map_or(DOWNTIME_LIMIT, |ms| Duration::from_secs_f64(ms / 1e3)),
        bandwidth_limit: request.bandwidth_limit,
        background_limit: request.postcopy_bandwidth_limit.or(request.bandwidth_limit),
        max_rounds: request.max_rounds.unwrap_or(MAX_ROUNDS),
        throttle: request.throttle.unwrap_or(config.throttle) == Throttle::Auto,
        timeout: request.timeout_ms.map(Duration::from_millis),
        compress: compress(request, config),
        mode: mode(request, config.allow_postcopy),
        verify: request.verify,
        quit_source: request.quit_source,
        channels: None,
    }
}
