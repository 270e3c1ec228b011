//! Post-copy at the destination's session: who serves the guest's page faults, over which connection.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::bitmap::Bitmap;
use pagecopy::engine::destination::{Destination, Input};
use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::journal::{RamFile, Record};
use pagecopy::engine::{Failure, Fault, MigrationId};
use pagecopy::host::pager::share_out;
use pagecopy::host::process;
use pagecopy::host::ram::MappedRam;
use pagecopy::host::received::Received;
use pagecopy::host::track::TrackedBlock;
use pagecopy::memory::{BlockId, BlockSpec};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use transport::{Access, Channel, RegionId, Regions};
use uuid::Uuid;

use super::Session;
use crate::failure::{Shown, host};
use crate::lane::{Lane, Told};
use crate::log;
use crate::pull::{FaultReport, Guest, Pull, PullEvent, Released};
use crate::qemu::Block;
use crate::qemu::discover::track_failure;
use crate::qemu::faults::take_back;
use crate::qemu::vcpus::vcpus;
use crate::service::Service;
use crate::session::arrive::{Visit, VisitParts};
use crate::session::{blocking, link_failure};
use crate::sys;

/// A pager serves so many vCPUs.
const VCPUS_A_PAGER: usize = 32;
/// How long a QEMU may take to name its vCPUs.
const NAMING_LIMIT: Duration = Duration::from_secs(30);
/// Pagers of the largest guest.
const MOST_PAGERS: usize = 8;

/// What came of work in the background.
pub(super) enum Done {
    /// Page faults wait.
    Armed(Result<Pull, Failure>),
    /// QEMU's memory was let go of. The channels stay open until the source has heard of it.
    Released(Released),
    /// So many bytes that lacked were poisoned, and QEMU's memory was let go of.
    Poisoned(u64),
    /// They could not be.
    NotPoisoned(Box<Pull>, Failure),
}

/// The post-copy of a session.
pub(super) struct Fetch {
    pub(super) pull: Option<Pull>,
    pub(super) events: UnboundedReceiver<PullEvent>,
    sender: UnboundedSender<PullEvent>,
    pub(super) done: UnboundedReceiver<Done>,
    finished: UnboundedSender<Done>,
    /// The guest's RAM, to be fetched into.
    ram: Option<(MappedRam, Arc<[BlockSpec]>)>,
    /// Data channels that the source has come with.
    next: Vec<Box<dyn Channel>>,
    /// What the faults cost, once they are over.
    pub(super) report: Option<FaultReport>,
    /// The faults, when everything is here and QEMU's memory is being let go of.
    over: Option<FaultFigures>,
    /// Page faults wait, or will.
    pub(super) armed: bool,
    /// They are being made to wait in the background.
    arming: bool,
}

impl Fetch {
    pub(super) fn new(taken_over: Option<TakenOver>) -> Fetch {
        let (finished, done) = unbounded_channel();
        let armed = taken_over.is_some();
        let (pull, ram, channel) = match taken_over {
            Some(TakenOver {
                pid: _,
                pull,
                ram,
                specs,
                events,
                sender,
            }) => (Some(pull), Some((ram, specs)), (sender, events)),
            None => (None, None, unbounded_channel()),
        };
        Fetch {
            pull,
            events: channel.1,
            sender: channel.0,
            done,
            finished,
            ram,
            next: Vec::new(),
            report: None,
            over: None,
            armed,
            arming: false,
        }
    }

    /// Waits until nothing is being armed any more: what a session does not know of it cannot let go of.
    pub(super) async fn armed_or_not(&mut self) {
        if !std::mem::take(&mut self.arming) {
            return;
        }
        if let Some(Done::Armed(Ok(pull))) = self.done.recv().await {
            self.pull = Some(pull);
        }
    }

    /// Whether every page has come, and is recorded as received.
    pub(super) fn all_here(&self) -> bool {
        match &self.pull {
            Some(pull) => pull.progress().0 == 0,
            None => self.over.is_some(),
        }
    }

    /// What the end of the migration says of the faults.
    pub(super) fn faults(&self) -> Option<FaultReport> {
        self.pull
            .as_ref()
            .map(Pull::report)
            .or_else(|| self.report.clone())
    }
}

impl Session {
    /// Makes page faults wait, and begins to serve them and to fetch over the data channels that there are.
    pub(super) fn arm(&mut self, lacking: Bitmap, background: Option<u64>) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        (self.fetch.armed, self.fetch.arming) = (true, true);
        self.close_memory();
        let lanes = std::mem::take(&mut self.data);
        let channels =
            tokio::task::block_in_place(|| lanes.into_iter().filter_map(Lane::park).collect());
        open_for_fetching(&self.regions, &memory.mapped, memory.specs.len());
        self.fetch.ram = Some((memory.mapped.clone(), Arc::clone(&memory.specs)));
        let (qmp, pid, id) = (Arc::clone(&self.qmp), self.pid, self.id);
        let (service, blocks) = (Arc::clone(&self.service), memory.blocks);
        let (events, finished) = (self.fetch.sender.clone(), self.fetch.finished.clone());
        log::spawn(async move {
            let lend = service.userfaultfd.lend(&qmp, pid);
            let (vcpus, device) = tokio::join!(vcpus(&qmp), lend);
            // Without them faults are counted together.
            let vcpus = vcpus.unwrap_or_default();
            let device = match device {
                Ok(device) => device,
                Err(failure) => {
                    // A session that has ended needs no word.
                    let _ = finished.send(Done::Armed(Err(failure)));
                    return;
                }
            };
            let armed = blocking(move || {
                let received = service
                    .store
                    .journals
                    .create_received(id)
                    .and_then(|file| Received::create(&file, id, &memory.specs))
                    .map_err(|error| received_failure(&error))?;
                let shares = share_out(&tracked(&blocks), pagers(vcpus.len()));
                let guest = Guest {
                    specs: memory.specs,
                    ram: memory.mapped,
                    received,
                    background,
                };
                let mut pull = Pull::arm((pid, device), shares, guest, lacking, events)?;
                pull.vcpus().name(vcpus);
                pull.start(channels)?;
                Ok(pull)
            });
            let armed = armed.await;
            take_back(&qmp, device).await;
            // A session that has ended drops it.
            let _ = finished.send(Done::Armed(armed));
        });
    }

    /// What came of arming, releasing and poisoning.
    pub(super) fn done(&mut self, done: Done) -> Input {
        self.fetch.arming = false;
        match done {
            Done::Armed(Ok(pull)) => {
                let inside = pull.inside();
                self.fetch.pull = Some(pull);
                let blocks = self.memory.as_ref().map(|memory| &memory.blocks);
                let ram = blocks.map_or_else(Vec::new, |blocks| {
                    blocks.iter().map(Block::ram_file).collect()
                });
                Input::Armed {
                    pid: self.pid,
                    inside,
                    ram,
                }
            }
            Done::Armed(Err(failure)) => Input::HostFailed(failure),
            Done::Released(released) => {
                let Released {
                    channels,
                    faults,
                    report,
                } = released;
                self.teller.ended_over(channels.iter().map(|it| it.kind()));
                self.idle = channels;
                self.fetch.report = Some(report);
                Input::Whole { faults }
            }
            Done::Poisoned(bytes) => Input::Poisoned { bytes },
            Done::NotPoisoned(pull, failure) => {
                self.fetch.pull = Some(*pull);
                Input::HostFailed(failure)
            }
        }
    }

    /// What the threads that fetch have said.
    pub(super) fn pull_event(&mut self, event: PullEvent) -> Option<Input> {
        match event {
            PullEvent::AllHere => {
                let pull = self.fetch.pull.take()?;
                self.fetch.report = Some(pull.report());
                self.fetch.over = Some(pull.progress().1);
                let finished = self.fetch.finished.clone();
                log::spawn_blocking(move || {
                    // A session that has ended needs no word.
                    let _ = finished.send(Done::Released(pull.release()));
                });
                None
            }
            PullEvent::Broken(transport::Error::PeerMisbehaved(what)) => {
                Some(Input::PeerMisbehaved(what))
            }
            PullEvent::Broken(error @ transport::Error::NoMemory(_)) => {
                Some(Input::PullFailed(link_failure(&error)))
            }
            PullEvent::Broken(error) => {
                self.broken.set(&error);
                None
            }
            PullEvent::Failed(failure) => Some(Input::PullFailed(failure)),
        }
    }

    /// After a takeover: learns which threads are the guest's vCPUs, as soon as QEMU can say so. It may wait for a page.
    pub(super) fn name_vcpus(&self) {
        if let Some(pull) = &self.fetch.pull {
            let (qmp, names) = (Arc::clone(&self.qmp), pull.vcpus());
            log::spawn(async move {
                if let Ok(Ok(vcpus)) = tokio::time::timeout(NAMING_LIMIT, vcpus(&qmp)).await {
                    names.name(vcpus);
                }
            });
        }
    }

    /// How fetching stands. To let go of a large guest's memory takes a while.
    pub(super) fn lacks(&self) -> Option<Input> {
        let Some(pull) = &self.fetch.pull else {
            let faults = self.fetch.over?;
            return Some(Input::Lacks { bytes: 0, faults });
        };
        self.migration.measured(pull.report());
        let (bytes, faults) = pull.progress();
        Some(Input::Lacks { bytes, faults })
    }

    /// Lets go of the connection.
    pub(super) fn stop_pulling(&mut self) {
        self.broken.take();
        if let Some(control) = self.control.take() {
            control.close();
        }
        self.fetch.next.clear();
        if let Some(pull) = &mut self.fetch.pull {
            tokio::task::block_in_place(|| pull.stop());
        }
    }

    /// The source has come again. Returns its control channel's events if the engine can go on with it.
    pub(super) fn served(
        &mut self,
        engine: &Destination,
        visit: Visit,
    ) -> Option<UnboundedReceiver<Told>> {
        if !engine.takes_serve() {
            visit.answer_from_journal(self.id);
            return None;
        }
        let VisitParts {
            control,
            events,
            data,
            regions,
        } = visit.into_parts();
        if let Some(before) = self.control.replace(control) {
            before.close();
        }
        self.broken.take();
        if let Some((mapped, specs)) = &self.fetch.ram {
            open_for_fetching(&regions, mapped, specs.len());
        }
        self.regions = regions;
        self.fetch.next = data;
        Some(events)
    }

    /// A post-copy that is taken up with the source's connection there: fetching begins before QEMU is asked anything.
    pub(super) fn served_at_once(&mut self) -> bool {
        if !self.fetch.armed || self.idle.is_empty() {
            return false;
        }
        if let Some((mapped, specs)) = &self.fetch.ram {
            open_for_fetching(&self.regions, mapped, specs.len());
        }
        self.fetch.next = std::mem::take(&mut self.idle);
        true
    }

    /// Fetches on, over the connection that has come.
    pub(super) fn pull(&mut self) {
        let channels = std::mem::take(&mut self.fetch.next);
        let Some(pull) = &mut self.fetch.pull else {
            return;
        };
        if let Err(failure) = tokio::task::block_in_place(|| pull.start(channels)) {
            // The receiver lives as long as this session.
            let _ = self.fetch.sender.send(PullEvent::Failed(failure));
        }
    }

    /// The guest goes on without what lacks.
    pub(super) fn poison(&mut self) {
        let Some(pull) = self.fetch.pull.take() else {
            return;
        };
        self.fetch.report = Some(pull.report());
        let finished = self.fetch.finished.clone();
        log::spawn_blocking(move || {
            let done = match pull.poison() {
                Ok(bytes) => {
                    pull.release();
                    Done::Poisoned(bytes)
                }
                Err(failure) => Done::NotPoisoned(Box::new(pull), failure),
            };
            // A session that has ended needs no word.
            let _ = finished.send(done);
        });
    }
}

/// The page faults of a guest that a daemon before this one served.
pub(crate) struct TakenOver {
    pid: i32,
    pull: Pull,
    ram: MappedRam,
    specs: Arc<[BlockSpec]>,
    events: UnboundedReceiver<PullEvent>,
    sender: UnboundedSender<PullEvent>,
}

impl TakenOver {
    /// Takes them over, by the journal: QEMU may not answer on its monitor.
    ///
    /// # Errors
    /// They cannot be; the guest goes on to wait.
    pub(crate) fn new(
        service: &Service,
        id: MigrationId,
        records: &[Record],
    ) -> Result<TakenOver, Failure> {
        let Armed {
            pid,
            inside,
            specs,
            blocks,
            background,
        } = Armed::by(records)?;
        let mapped = crate::qemu::discover::map_ram(&blocks, true)?;
        let specs: Arc<[BlockSpec]> = specs.into();
        let received = service
            .store
            .journals
            .received(id)
            .and_then(|file| Received::open(&file, id, &specs))
            .map_err(|error| received_failure(&error))?;
        let shares = share_out(&tracked(&blocks), inside.len());
        let (sender, events) = unbounded_channel();
        let guest = Guest {
            specs: Arc::clone(&specs),
            ram: mapped.clone(),
            received,
            background,
        };
        let pull = Pull::adopt(pid, shares, inside, guest, sender.clone())?;
        Ok(TakenOver {
            pid,
            pull,
            ram: mapped,
            specs,
            events,
            sender,
        })
    }

    /// QEMU's process.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets go of QEMU's memory: the guest never runs here.
    pub(crate) fn release(self) {
        self.pull.release();
    }

    /// Bytes that the guest lacks.
    pub(crate) fn lacks(&self) -> u64 {
        self.pull.progress().0
    }
}

/// Whether the guest of that journal lacks nothing, by the record of what was received, which outlives daemons. Where that
/// cannot be told, it does lack something.
pub(crate) fn has_all(service: &Service, id: MigrationId, records: &[Record]) -> bool {
    let specs = records.iter().find_map(|record| match record {
        Record::Armed { blocks, .. } => Some(blocks),
        _ => None,
    });
    let received = specs.map(|specs| {
        let file = service.store.journals.received(id)?;
        Received::open(&file, id, specs).map(|received| {
            let mut missing = Vec::new();
            received.missing(&mut missing);
            missing.is_empty()
        })
    });
    match received {
        Some(Ok(all)) => all,
        Some(Err(error)) => {
            let failure = received_failure(&error);
            tracing::warn!(id = %Uuid::from_bytes(id.0), failure = %Shown(&failure), "whether it lacks memory is not known");
            false
        }
        None => false,
    }
}

/// Whether the QEMU of that journal has ended, and its guest with it: no process of that number has its RAM files mapped. Where
/// that cannot be seen, it has not.
pub(crate) fn has_ended(records: &[Record]) -> bool {
    let armed = records.iter().find_map(|record| match record {
        Record::Armed { pid, ram, .. } => Some((*pid, ram)),
        _ => None,
    });
    armed.is_some_and(|(pid, ram)| match process::maps(pid) {
        Ok(maps) => !maps.iter().any(|mapping| {
            ram.iter()
                .any(|file| (file.device, file.inode) == (mapping.device, mapping.inode))
        }),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    })
}

/// The QEMU whose page faults wait, by the journal.
struct Armed<'a> {
    pid: i32,
    /// Its userfaultfds, by their numbers in QEMU's process.
    inside: &'a [i32],
    specs: &'a [BlockSpec],
    /// Where it has its RAM now.
    blocks: Vec<Block>,
    /// Bytes a second that nobody waits for.
    background: Option<u64>,
}

impl<'a> Armed<'a> {
    /// # Errors
    ///
    /// The journal names none, or that QEMU is not there any more.
    fn by(records: &'a [Record]) -> Result<Self, Failure> {
        let armed = records.iter().find_map(|record| match record {
            Record::Armed {
                pid,
                inside,
                ram,
                blocks,
                background,
                ..
            } => Some((*pid, inside, ram, blocks, *background)),
            _ => None,
        });
        let (pid, inside, ram, specs, background) =
            armed.ok_or_else(|| host("the journal names no userfaultfd", "report this"))?;
        let blocks = specs
            .iter()
            .zip(ram)
            .map(|(spec, file)| find(pid, spec, file))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            pid,
            inside,
            specs,
            blocks,
            background,
        })
    }
}

/// Where QEMU has a RAMBlock, by the journal.
fn find(pid: i32, spec: &BlockSpec, file: &RamFile) -> Result<Block, Failure> {
    let mapping =
        process::find_mapping(pid, file.path.as_ref(), spec.size).map_err(track_failure)?;
    if (mapping.device, mapping.inode) != (file.device, file.inode) {
        return Err(Failure::new(
            Fault::Qemu,
            format!("process {pid} is not the guest's QEMU any more"),
            "the guest ended with its QEMU: start it anew",
        ));
    }
    Ok(Block {
        spec: spec.clone(),
        mapping,
        // It holds the guest's, and is not cleared any more.
        preallocated: false,
    })
}

/// How many pagers serve a guest.
fn pagers(vcpus: usize) -> usize {
    vcpus.div_ceil(VCPUS_A_PAGER).clamp(1, MOST_PAGERS)
}

fn tracked(blocks: &[Block]) -> Vec<TrackedBlock> {
    (0..)
        .zip(blocks)
        .map(|(number, block)| TrackedBlock {
            block: BlockId(number),
            address: block.mapping.address,
            len: block.mapping.len,
            page_size: block.mapping.page_size,
        })
        .collect()
}

/// Replies to our reads may land in all RAM; nothing else of the peer's may.
fn open_for_fetching(regions: &Regions, ram: &MappedRam, blocks: usize) {
    let access = Access {
        peer_writes: false,
        peer_reads: false,
    };
    for number in (0..).take(blocks) {
        if let Some(region) = sys::region(ram, BlockId(number)) {
            regions.register(RegionId(number.into()), region, access);
        }
    }
}

fn received_failure(error: &std::io::Error) -> Failure {
    host(
        format!("what of the guest's memory has come cannot be recorded: {error}"),
        "see to the disk under state-dir",
    )
}
