//! The destination's session.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pagecopy::engine::destination::{Destination, Input, Output};
use pagecopy::engine::event::{Figures, Finished as EngineEnd, State};
use pagecopy::engine::journal::{Record, outcome};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId};
use pagecopy::host::ram::MappedRam;
use pagecopy::host::{Placer, Ram};
use pagecopy::memory::{BlockId, BlockSpec, Run};
use pagecopy::wire::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use transport::{Access, Channel, RegionId, Regions};

use super::{
    Broken, Clock, RESTORE_LIMIT, Teller, Worker, blocking, digests, journal_failure, link_failure,
    lock, page_digests, tell,
};
use crate::failure::host;
use crate::lane::destination::{Command, DestinationData};
use crate::lane::{Lane, LaneEvent};
use crate::migrations::{Migration, Request};
use crate::qemu::Block;
use crate::qemu::discover::map_ram;
use crate::qemu::incoming::Incoming as Qemu;
use crate::qemu::settings::Settings;
use crate::qmp::{Qmp, QmpError};
use crate::service::Service;
use crate::store::JournalFile;
use crate::sys;

/// Bytes that are allocated between two looks at whether it is still wanted.
const ALLOCATE_AT_ONCE: u64 = 32 << 20;

/// All that a session starts from, besides its engine.
pub(crate) struct Parts {
    pub(crate) id: MigrationId,
    pub(crate) service: Arc<Service>,
    pub(crate) migration: Arc<Migration>,
    pub(crate) clock: Clock,
    pub(crate) qmp: Arc<Qmp>,
    pub(crate) settings: Settings,
    pub(crate) journal: JournalFile,
    /// The waiting QEMU's RAMBlocks; none when a committed guest is taken up after a restart.
    pub(crate) blocks: Vec<Block>,
    pub(crate) control: Lane<Message>,
    pub(crate) data: Vec<Box<dyn Channel>>,
    pub(crate) regions: Regions,
}

/// A running session.
pub(crate) struct Session {
    id: MigrationId,
    service: Arc<Service>,
    migration: Arc<Migration>,
    clock: Clock,
    qmp: Arc<Qmp>,
    qemu: Arc<Qemu>,
    settings: Settings,
    journal: Arc<Mutex<JournalFile>>,
    blocks: Vec<Block>,
    control: Lane<Message>,
    /// Channels before their lanes exist, and after their lanes were parked.
    idle: Vec<Box<dyn Channel>>,
    data: Vec<Lane<Command>>,
    regions: Regions,
    memory: Option<Memory>,
    device_state: Vec<Bytes>,
    allocator: Worker,
    /// Set when the bytes have come, or never will: what is still to be allocated is left.
    stop_allocating: Arc<AtomicBool>,
    journal_worker: Worker,
    teller: Teller,
    sender: UnboundedSender<Input>,
    inputs: UnboundedReceiver<Input>,
    broken: Broken,
    /// QEMU is loading the device state.
    loading: bool,
    lanes: UnboundedReceiver<LaneEvent>,
    lane_events: UnboundedSender<LaneEvent>,
}

/// The waiting guest's RAM, numbered as the source numbers it.
#[derive(Clone)]
struct Memory {
    ram: Arc<dyn Ram>,
    placer: Arc<dyn Placer>,
    specs: Arc<[BlockSpec]>,
    mapped: MappedRam,
}

impl Session {
    /// Starts the workers. Lanes of data channels start when the RAM is ready.
    pub(crate) fn start(parts: Parts) -> Result<Session, Failure> {
        let (sender, inputs) = unbounded_channel();
        let (lane_events, lanes) = unbounded_channel();
        let mut teller = Teller::new(parts.id, Arc::clone(&parts.migration), parts.clock);
        teller.add(&parts.control);
        Ok(Session {
            id: parts.id,
            service: parts.service,
            migration: parts.migration,
            clock: parts.clock,
            qemu: Arc::new(Qemu::new(Arc::clone(&parts.qmp))),
            qmp: parts.qmp,
            settings: parts.settings,
            journal: Arc::new(Mutex::new(parts.journal)),
            blocks: parts.blocks,
            control: parts.control,
            idle: parts.data,
            data: Vec::new(),
            regions: parts.regions,
            memory: None,
            device_state: Vec::new(),
            allocator: Worker::start("allocate")?,
            stop_allocating: Arc::new(AtomicBool::new(false)),
            journal_worker: Worker::start("journal")?,
            teller,
            sender,
            inputs,
            broken: Broken::default(),
            loading: false,
            lanes,
            lane_events,
        })
    }

    /// Runs to the end of the migration. `control` are the control channel's events.
    pub(crate) async fn run(
        mut self,
        mut engine: Destination,
        mut control: UnboundedReceiver<LaneEvent>,
        mut requests: UnboundedReceiver<Request>,
    ) {
        let mut end = self.carry_out(&mut engine).await;
        let mut qmp_there = true;
        let mut link_there = true;
        while end.is_none() {
            let qmp = Arc::clone(&self.qmp);
            let broken = self.broken.overdue();
            let input = tokio::select! {
                biased;
                event = control.recv(), if link_there => {
                    link_there = !matches!(event, Some(LaneEvent::Lost(..)) | None);
                    event.and_then(|event| self.lane_input(event))
                }
                event = self.lanes.recv() => event.and_then(|event| self.lane_input(event)),
                input = self.inputs.recv() => {
                    self.loading &= !matches!(input, Some(Input::DeviceStateLoaded | Input::QemuFailed(_)));
                    input
                }
                request = requests.recv() => match request {
                    Some(Request::Cancel | Request::Shutdown) | None => Some(Input::Cancel),
                    // Only a source is ever in doubt.
                    Some(Request::Resolve(_)) => None,
                    Some(Request::Disconnect) => Some(Input::LinkLost(superseded())),
                },
                // While QEMU loads, the answer to that says more.
                () = qmp.gone(), if qmp_there && !self.loading => {
                    qmp_there = false;
                    Some(Input::QemuFailed(QmpError::Gone.into()))
                },
                () = broken => self.broken.take().map(Input::LinkLost),
                () = self.clock.sleep_until(engine.poll_timeout()) => Some(Input::Tick),
            };
            if let Some(input) = input {
                engine.handle(self.clock.now(), input);
                end = self.carry_out(&mut engine).await;
            }
        }
        if let Some(end) = end {
            self.finish(end).await;
        }
    }

    fn lane_input(&mut self, event: LaneEvent) -> Option<Input> {
        match event {
            LaneEvent::Message(message) => Some(Input::Message(message)),
            LaneEvent::Barrier {
                channel,
                round,
                zero_bytes,
            } => Some(Input::Barrier {
                channel,
                round,
                zero_bytes,
            }),
            LaneEvent::Misbehaved(what) => Some(Input::PeerMisbehaved(what)),
            LaneEvent::Lost(_, transport::Error::PeerMisbehaved(what)) => {
                Some(Input::PeerMisbehaved(what))
            }
            LaneEvent::Lost(_, error @ transport::Error::NoMemory(_)) => {
                Some(Input::HostFailed(link_failure(&error)))
            }
            LaneEvent::Lost(ChannelId(0), error) => Some(Input::LinkLost(link_failure(&error))),
            LaneEvent::Lost(_, error) => {
                self.broken.set(&error);
                None
            }
            LaneEvent::Pushed { .. } => None,
        }
    }

    async fn carry_out(&mut self, engine: &mut Destination) -> Option<EngineEnd> {
        while let Some(output) = engine.poll() {
            match output {
                Output::Finished {
                    state,
                    failure,
                    qemu_used,
                } => {
                    tracing::debug!(id = %self.migration.shown().id, qemu_used, "the destination's engine has ended");
                    return Some(EngineEnd {
                        state,
                        failure,
                        figures: Figures::default(),
                    });
                }
                Output::Send(message) => self.control.give(message),
                Output::Journal(record) => self.journal(record),
                Output::Prepare { order } => self.prepare(&order),
                Output::Allocate(runs) => self.allocate(runs),
                Output::KeepDeviceState(piece) => self.device_state.push(piece),
                Output::Digest => self.digest(),
                Output::PageDigests { block, chunk } => self.page_digests(block, chunk),
                Output::LoadDeviceState => self.load(),
                Output::RunGuest => self.run_guest(),
                Output::Report(report) => tell(&self.migration, &report),
            }
        }
        None
    }

    /// Clears the RAM, registers its regions in the source's order, and starts to take pages.
    fn prepare(&mut self, order: &[usize]) {
        let memory = match self.map(order) {
            Ok(memory) => memory,
            Err(failure) => return self.answer(Input::HostFailed(failure)),
        };
        self.memory = Some(memory.clone());
        let lanes = self.start_lanes(&memory).err();
        let regions = self.regions.clone();
        self.order(async move {
            if let Some(failure) = lanes {
                return Input::HostFailed(failure);
            }
            match blocking(move || clear_and_register(&memory, &regions)).await {
                Ok(()) => Input::Prepared,
                Err(failure) => Input::HostFailed(failure),
            }
        });
    }

    fn map(&self, order: &[usize]) -> Result<Memory, Failure> {
        let blocks: Option<Vec<Block>> = order
            .iter()
            .map(|index| self.blocks.get(*index).cloned())
            .collect();
        let blocks = blocks.ok_or_else(|| {
            host(
                "a RAMBlock that does not exist was asked for",
                "report this",
            )
        })?;
        let mapped = map_ram(&blocks, true)?;
        let specs: Arc<[BlockSpec]> = blocks.into_iter().map(|block| block.spec).collect();
        let ram: Arc<dyn Ram> = Arc::new(mapped.clone());
        let placer: Arc<dyn Placer> = Arc::new(mapped.clone());
        Ok(Memory {
            ram,
            placer,
            specs,
            mapped,
        })
    }

    /// Before the regions are registered no page can land: an early one is refused by the transport.
    fn start_lanes(&mut self, memory: &Memory) -> Result<(), Failure> {
        for (channel, number) in std::mem::take(&mut self.idle).into_iter().zip(1..) {
            let id = ChannelId(number);
            let handler =
                DestinationData::new(id, Arc::clone(&memory.specs), Arc::clone(&memory.placer));
            let sender = self.lane_events.clone();
            let events = Box::new(move |event| {
                // A session that has ended needs no events.
                let _ = sender.send(event);
            });
            let lane = Lane::start("data", id, channel, handler, events)?;
            self.teller.add(&lane);
            self.data.push(lane);
        }
        Ok(())
    }

    fn allocate(&self, runs: Vec<Run>) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let (sender, stop) = (self.sender.clone(), Arc::clone(&self.stop_allocating));
        self.allocator.run(move || {
            for piece in runs.iter().flat_map(|run| pieces(*run, &memory.specs)) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = memory.placer.allocate(piece) {
                    // A session that has ended needs no answer.
                    let _ = sender.send(Input::HostFailed(allocation_failure(&error)));
                    return;
                }
            }
        });
    }

    fn digest(&self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let blocks = memory.specs.len();
        self.order(async move {
            let digests = blocking(move || digests(&memory.ram, blocks)).await;
            digests.map_or_else(Input::HostFailed, Input::Digests)
        });
    }

    fn page_digests(&self, block: u16, chunk: u64) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        self.order(async move {
            match blocking(move || Ok(page_digests(&memory.ram, block, chunk))).await {
                Ok(digests) => Input::PageDigests {
                    block,
                    chunk,
                    digests,
                },
                Err(failure) => Input::HostFailed(failure),
            }
        });
    }

    /// The channels stay open but are no longer read, and nothing of the peer's lands any more.
    fn load(&mut self) {
        self.close_memory();
        self.loading = true;
        let lanes = std::mem::take(&mut self.data);
        let (qemu, state) = (
            Arc::clone(&self.qemu),
            std::mem::take(&mut self.device_state),
        );
        let parked =
            tokio::task::block_in_place(|| lanes.into_iter().filter_map(Lane::park).collect());
        self.idle = parked;
        self.order(async move {
            match qemu.load(&state).await {
                Ok(()) => Input::DeviceStateLoaded,
                Err(failure) => Input::QemuFailed(failure),
            }
        });
    }

    fn close_memory(&self) {
        self.regions.revoke_all();
        self.stop_allocating.store(true, Ordering::Relaxed);
    }

    fn run_guest(&self) {
        let qemu = Arc::clone(&self.qemu);
        self.order(async move {
            match qemu.run().await {
                Ok(()) => Input::GuestRunning,
                Err(failure) => Input::QemuFailed(failure),
            }
        });
    }

    fn journal(&self, record: Record) {
        let (journal, sender) = (Arc::clone(&self.journal), self.sender.clone());
        self.journal_worker.run(move || {
            let input = match lock(&journal).append(&record) {
                Ok(()) => Input::Journaled(record),
                Err(error) => Input::JournalFailed(record, journal_failure(&error)),
            };
            // A session that has ended needs no answer.
            let _ = sender.send(input);
        });
    }

    fn order(&self, work: impl Future<Output = Input> + Send + 'static) {
        let sender = self.sender.clone();
        tokio::spawn(async move {
            // A session that has ended needs no answer.
            let _ = sender.send(work.await);
        });
    }

    fn answer(&self, input: Input) {
        // The receiver lives as long as this session.
        let _ = self.sender.send(input);
    }

    /// Leaves nothing behind, then tells the end.
    async fn finish(self, end: EngineEnd) {
        self.close_memory();
        self.control.close();
        let (data, idle) = (self.data, self.idle);
        self.allocator.finish().await;
        self.journal_worker.finish().await;
        // Joining the lanes' threads may block for a moment.
        let _ = tokio::task::spawn_blocking(move || drop((data, idle))).await;
        // QEMU may be stuck, or gone.
        let _ = tokio::time::timeout(RESTORE_LIMIT, self.settings.restore(&self.qmp)).await;
        self.service.store.journals.forget_settings(self.id);
        self.service.prune();
        if end.state == State::Completed {
            self.service.received(&self.migration.shown().vm);
        }
        let here = outcome(lock(&self.journal).records());
        tracing::debug!(id = %self.migration.shown().id, ?here, "the journal's outcome");
        self.teller.publish(&end);
    }
}

fn clear_and_register(memory: &Memory, regions: &Regions) -> Result<(), Failure> {
    memory.placer.clear().map_err(|error| {
        host(
            format!("the waiting guest's RAM could not be cleared: {error}"),
            "put the RAM files on tmpfs or hugetlbfs",
        )
    })?;
    for number in (0..).take(memory.specs.len()) {
        let region = sys::region(&memory.mapped, BlockId(number))
            .ok_or_else(|| host(format!("RAMBlock {number} is not mapped"), "report this"))?;
        regions.register(
            RegionId(number.into()),
            region,
            Access {
                peer_writes: true,
                peer_reads: false,
            },
        );
    }
    Ok(())
}

/// A run in pieces of at most [`ALLOCATE_AT_ONCE`], so that allocating can be broken off.
fn pieces(run: Run, specs: &[BlockSpec]) -> impl Iterator<Item = Run> {
    let page_size = specs
        .get(usize::from(run.block.0))
        .map_or(1, |spec| spec.page_size);
    let most = (ALLOCATE_AT_ONCE / page_size).max(1);
    (run.first..run.end())
        .step_by(usize::try_from(most).unwrap_or(usize::MAX))
        .map(move |first| Run {
            first,
            pages: most.min(run.end() - first),
            ..run
        })
}

fn allocation_failure(error: &std::io::Error) -> Failure {
    host(
        format!("there is not enough memory for the guest: {error}"),
        "free memory on this host, or make the file system of the RAM files larger (its size= or the huge pages)",
    )
}

fn superseded() -> Failure {
    Failure::new(
        Fault::Network,
        "the source has lost this connection and asks on a new one",
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_run_exactly() {
        let spec = BlockSpec {
            name: "ram".to_owned(),
            size: 1 << 30,
            page_size: 4096,
        };
        let run = Run {
            block: BlockId(0),
            first: 5,
            pages: 20_000,
        };
        let pieces: Vec<Run> = pieces(run, &[spec]).collect();
        assert_eq!(
            pieces.iter().map(|piece| piece.pages).collect::<Vec<_>>(),
            [8192, 8192, 3616]
        );
        assert_eq!(pieces.first().map(|piece| piece.first), Some(5));
        assert!(
            pieces
                .windows(2)
                .all(|pair| matches!(pair, [a, b] if a.end() == b.first))
        );
        assert_eq!(pieces.last().map(Run::end), Some(run.end()));
    }
}
