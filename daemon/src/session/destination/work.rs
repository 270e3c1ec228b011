//! What the destination's engine asks for and that takes time. Each answers later, by an input.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pagecopy::engine::destination::Input;
use pagecopy::engine::encoding::Encodings;
use pagecopy::engine::journal::Record;
use pagecopy::engine::{ChannelId, Failure};
use pagecopy::host::{Placer, Ram};
use pagecopy::memory::{BlockId, BlockSpec, Run};
use tokio::task::JoinHandle;
use transport::{Access, Channel, RegionId, Regions};

use super::{Memory, Session};
use crate::failure::host;
use crate::lane::Lane;
use crate::lane::destination::DestinationData;
use crate::limits::MAX_ALLOCATING;
use crate::log;
use crate::qemu::Block;
use crate::qemu::discover::map_ram;
use crate::session::{blocking, digests, journal_failure, lock, page_digests};
use crate::sys;

/// Bytes that are allocated between two looks at whether it is still wanted.
const ALLOCATE_AT_ONCE: u64 = 32 << 20;

impl Session {
    /// Clears the RAM, registers its regions in the source's order, and starts to take pages.
    pub(super) fn prepare(&mut self, order: &[usize], encodings: Encodings) {
        let memory = match self.map(order) {
            Ok(memory) => memory,
            Err(failure) => return self.answer(Input::HostFailed(failure)),
        };
        self.memory = Some(memory.clone());
        self.encodings = encodings;
        let ready = Arc::new(AtomicBool::new(false));
        let channels = std::mem::take(&mut self.idle);
        let lanes = self.start_lanes(channels, 1, &memory, &ready, 0).err();
        let regions = self.regions.clone();
        self.order(async move {
            if let Some(failure) = lanes {
                return Input::HostFailed(failure);
            }
            match blocking(move || clear_and_register(&memory, &regions)).await {
                Ok(()) => {
                    ready.store(true, Ordering::Release);
                    Input::Prepared
                }
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
        let specs: Arc<[BlockSpec]> = blocks.iter().map(|block| block.spec.clone()).collect();
        let ram: Arc<dyn Ram> = Arc::new(mapped.clone());
        let placer: Arc<dyn Placer> = Arc::new(mapped.clone());
        Ok(Memory {
            ram,
            placer,
            specs,
            mapped,
            blocks,
        })
    }

    /// Before the regions are registered no page can land: an early one is refused by the transport, and what comes as a message by
    /// the lanes, until the RAM is `ready`.
    pub(super) fn start_lanes(
        &mut self,
        channels: Vec<Box<dyn Channel>>,
        first: u16,
        memory: &Memory,
        ready: &Arc<AtomicBool>,
        round: u32,
    ) -> Result<(), Failure> {
        for (channel, number) in channels.into_iter().zip(first..) {
            let id = ChannelId(number);
            let handler = DestinationData::new(
                id,
                Arc::clone(ready),
                Arc::clone(&memory.specs),
                Arc::clone(&memory.placer),
                self.encodings,
            )
            .since(round);
            let sender = self.lane_events.clone();
            let tell = move |told| {
                // A session that has ended needs no events.
                let _ = sender.send(told);
            };
            let lane = Lane::start("data", id, channel, handler, (), tell)?;
            self.teller.add_data(&lane);
            self.data.push(lane);
        }
        Ok(())
    }

    /// Where pages are written to the file, they come into being by that, and need not be cleared before.
    pub(super) fn allocate(&self, mut runs: Vec<Run>) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        runs.retain(|run| memory.mapped.written_to(run.block).is_none());
        // Allocating ahead is a help, and not needed: what does not fit is allocated when its pages arrive.
        let waiting = self.allocating.load(Ordering::Relaxed);
        if waiting + runs.len() > MAX_ALLOCATING {
            return;
        }
        let allocating = Arc::clone(&self.allocating);
        allocating.fetch_add(runs.len(), Ordering::Relaxed);
        let (sender, stop) = (self.sender.clone(), Arc::clone(&self.stop_allocating));
        self.allocator.run(move || {
            allocating.fetch_sub(runs.len(), Ordering::Relaxed);
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

    pub(super) fn digest(&self) {
        let Some(memory) = self.memory.clone() else {
            return;
        };
        let blocks = memory.specs.len();
        self.order(async move {
            let digests = blocking(move || digests(&memory.ram, blocks)).await;
            digests.map_or_else(Input::HostFailed, Input::Digests)
        });
    }

    pub(super) fn page_digests(&self, block: u16, chunk: u64) {
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
    pub(super) fn load(&mut self) {
        // With post-copy this was done before, and pages that QEMU touches now are being fetched.
        if !self.fetch.armed {
            self.close_memory();
        }
        let lanes = std::mem::take(&mut self.data);
        let (qemu, state) = (
            Arc::clone(&self.qemu),
            std::mem::take(&mut self.device_state).into_pieces(),
        );
        let parked =
            tokio::task::block_in_place(|| lanes.into_iter().filter_map(Lane::park).collect());
        self.idle = parked;
        self.load = Some(self.order(async move {
            match qemu.load(&state).await {
                Ok(()) => Input::DeviceStateLoaded,
                Err(failure) => Input::QemuFailed(failure),
            }
        }));
    }

    pub(super) fn close_memory(&self) {
        self.regions.revoke_all();
        self.stop_allocating.store(true, Ordering::Relaxed);
    }

    pub(super) fn run_guest(&self) {
        let qemu = Arc::clone(&self.qemu);
        self.order(async move {
            match qemu.run().await {
                Ok(()) => Input::GuestRunning,
                Err(failure) => Input::QemuFailed(failure),
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
            let _ = sender.send(input);
        });
    }

    fn order(&self, work: impl Future<Output = Input> + Send + 'static) -> JoinHandle<()> {
        let sender = self.sender.clone();
        log::spawn(async move {
            // A session that has ended needs no answer.
            let _ = sender.send(work.await);
        })
    }

    pub(super) fn answer(&self, input: Input) {
        // The receiver lives as long as this session.
        let _ = self.sender.send(input);
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
fn pieces(run: Run, specs: &[BlockSpec]) -> impl Iterator<Item = Run> + use<> {
    let spec = specs.get(usize::from(run.block.0));
    run.pieces(ALLOCATE_AT_ONCE, spec.map_or(1, |spec| spec.page_size))
}

pub(super) fn allocation_failure(error: &std::io::Error) -> Failure {
    host(
        format!("there is not enough memory for the guest: {error}"),
        "free memory on this host, or make the file system of the RAM files larger (its size= or the huge pages)",
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
