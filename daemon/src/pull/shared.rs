//! What the threads of a post-copy share: which page is where, and how one becomes the guest's.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::pull::pace::Pace;
use pagecopy::engine::pull::{Answer, Arrival, Class, Puller, Request};
use pagecopy::engine::{Failure, Time};
use pagecopy::host::pager::UffdPager;
use pagecopy::host::ram::MappedRam;
use pagecopy::host::received::Received;
use pagecopy::host::{DemandFault, Pager, PagerError, Placer};
use pagecopy::memory::{BlockId, BlockSpec, Run};
use tokio::sync::mpsc::UnboundedSender;

use super::latency::{FaultReport, Latencies, Vcpus, Waited};
use super::unread::Reader;
use super::{PullEvent, pager_failure};
use crate::failure::host;
use crate::queue::budget::Share;
use crate::sys;

/// Shared by all threads.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Of the connection that there is, if it has channels for what nobody waits for.
    pace: Mutex<Option<Pace>>,
    /// The operator's limit of what nobody waits for.
    limit: Share,
    /// When its clock began.
    begun: Instant,
    page_bytes: u64,
    pub(super) received: Received,
    pub(super) pagers: Vec<UffdPager>,
    pub(super) ram: MappedRam,
    /// Wakes the channel on which pages go that somebody waits for; none without a connection.
    demand: Mutex<Option<Waker>>,
    /// The threads that do not fetch end.
    pub(super) end: AtomicBool,
    events: UnboundedSender<PullEvent>,
    latencies: Latencies,
}

struct State {
    puller: Puller,
    /// Pages that somebody waits for, and the thread that does.
    waiting: BTreeMap<(BlockId, u64, u32), Waiting>,
    /// Everything is here, and that was told.
    told_whole: bool,
}

/// Since when a page is waited for.
#[derive(Clone, Copy)]
struct Waiting {
    /// The fault was read.
    since: Instant,
    /// How long it lay unread before.
    unread: Duration,
}

impl Shared {
    pub(super) fn new(
        specs: &[BlockSpec],
        puller: Puller,
        received: Received,
        pagers: Vec<UffdPager>,
        ram: MappedRam,
        background: Option<u64>,
        events: UnboundedSender<PullEvent>,
    ) -> Shared {
        let page_bytes = specs.iter().map(|spec| spec.page_size).max().unwrap_or(0);
        Shared {
            pace: Mutex::new(None),
            limit: Share::alone(background),
            begun: Instant::now(),
            page_bytes,
            state: Mutex::new(State {
                puller,
                waiting: BTreeMap::new(),
                told_whole: false,
            }),
            received,
            pagers,
            ram,
            demand: Mutex::new(None),
            end: AtomicBool::new(false),
            events,
            latencies: Latencies::new(),
        }
    }

    /// Reads and answers the page faults of one pager, until the end.
    pub(super) fn serve_faults(&self, pager: &UffdPager) {
        sys::take_short_turns();
        let (mut reader, mut faults) = (Reader::new(), Vec::new());
        while !self.end.load(Ordering::Relaxed) {
            let unread = match reader.read(pager, &mut faults, super::LOOK_EVERY) {
                Ok(unread) => unread,
                // Whoever watches QEMU notices.
                Err(PagerError::Gone(_)) => return,
                Err(error) => return self.fail(pager_failure(&error)),
            };
            let mut wanted = false;
            for fault in faults.drain(..) {
                match self.fault(fault, unread) {
                    Answer::Map => self.map_here(pager, fault.block, fault.page),
                    Answer::Fetch => wanted = true,
                    Answer::Wait => {}
                }
            }
            if wanted {
                self.wake_demand();
            }
        }
    }

    fn fault(&self, fault: DemandFault, unread: Duration) -> Answer {
        let mut state = self.state();
        let answer = state.puller.fault(fault.block, fault.page);
        if answer != Answer::Map {
            let since = Instant::now();
            state
                .waiting
                .entry((fault.block, fault.page, fault.thread))
                .or_insert(Waiting { since, unread });
        }
        answer
    }

    /// A page that is here already, or that was a hole at the source: then it is zero.
    fn map_here(&self, pager: &UffdPager, block: BlockId, page: u64) {
        let run = Run {
            block,
            first: page,
            pages: 1,
        };
        let mapped = match pager.map(run) {
            Err(PagerError::NotInFile(_)) => match self.ram.allocate(run) {
                Ok(()) => pager.map(run),
                Err(error) => {
                    return self.fail(host(
                        format!("there is no memory for a page of the guest: {error}"),
                        "free memory on this host: the guest waits for it",
                    ));
                }
            },
            mapped => mapped,
        };
        self.mapped(mapped);
    }

    /// What to fetch next, of what somebody waits for.
    pub(super) fn next_demand(&self) -> Option<Request> {
        self.state().puller.next(Class::Demand)
    }

    /// A page that nobody waits for, to see what one takes now that somebody does.
    pub(super) fn probe(&self) -> Option<Request> {
        let now = self.time(Instant::now());
        if self.limit.wait().is_some() {
            return None;
        }
        let due = lock(&self.pace).as_mut()?.probe(now);
        due.then(|| self.state().puller.next_ahead(0)).flatten()
    }

    /// What to fetch next, of what nobody waits for, on a channel on which so many bytes are on their way.
    pub(super) fn next_ahead(&self, under_way: u64) -> Option<Request> {
        if self.limit.wait().is_some() {
            return None;
        }
        let bytes = lock(&self.pace).as_mut()?.may_request(under_way)?;
        let most = self.limit.quantum().unwrap_or(bytes);
        self.state().puller.next_ahead(bytes.min(most))
    }

    /// So many bytes that nobody waits for are being asked for.
    pub(super) fn spend(&self, bytes: u64) {
        self.limit.spend(bytes);
    }

    /// How long a channel for what nobody waits for may sleep when nothing comes.
    pub(super) fn idle(&self) -> Duration {
        self.limit
            .wait()
            .map_or(super::LOOK_EVERY, |wait| wait.min(super::LOOK_EVERY))
    }

    /// A page came on the channel for those that somebody waits for.
    pub(super) fn on_page(&self, asked: Instant) {
        if let Some(pace) = &mut *lock(&self.pace) {
            pace.on_probe(self.time(Instant::now()), self.time(asked));
        }
    }

    /// So many bytes that nobody waited for came at once.
    pub(super) fn on_reply(&self, asked: Instant, bytes: u64) {
        let now = self.time(Instant::now());
        let sooner = lock(&self.pace)
            .as_mut()
            .is_some_and(|pace| pace.on_reply(now, self.time(asked), bytes));
        if sooner {
            self.wake_demand();
        }
    }

    /// How long the channel for what somebody waits for may sleep when nothing comes: until its next probe.
    pub(super) fn until_probe(&self) -> Duration {
        let now = self.time(Instant::now());
        let probe = lock(&self.pace)
            .as_mut()
            .and_then(|pace| pace.probe_in(now));
        let wait = probe.map(|wait| self.limit.wait().map_or(wait, |limit| limit.max(wait)));
        wait.map_or(super::LOOK_EVERY, |wait| wait.min(super::LOOK_EVERY))
    }

    fn time(&self, at: Instant) -> Time {
        Time::default().after(at.saturating_duration_since(self.begun))
    }

    /// The bytes of a request are in the file, at the places where they belong. They become the guest's: marked first, so
    /// that a successor never fetches them again, and then mapped.
    pub(super) fn arrived(&self, request: &Request, asked: Instant) {
        let here = Instant::now();
        for run in &request.runs {
            if self.received.insert(*run).is_err() {
                return self.fail(host("a page outside the guest was fetched", "report this"));
            }
        }
        let Some(arrival) = self.state().puller.arrived(request.id) else {
            return;
        };
        for run in mapped_now(&arrival) {
            for pager in &self.pagers {
                self.mapped(pager.map(run));
            }
        }
        self.account(&arrival, asked, here);
    }

    fn account(&self, arrival: &Arrival, asked: Instant, here: Instant) {
        let now = Instant::now();
        let mut state = self.state();
        let mut over = Vec::new();
        for run in &arrival.runs {
            let range = (run.block, run.first, 0)..(run.block, run.end(), 0);
            let served: Vec<_> = state.waiting.range(range).map(|(who, _)| *who).collect();
            for who in served {
                let Some(Waiting { since, unread }) = state.waiting.remove(&who) else {
                    continue;
                };
                let asked = asked.max(since);
                over.push(Waited {
                    thread: who.2,
                    read: unread,
                    queue: asked - since,
                    wire: here.saturating_duration_since(asked),
                    place: now.saturating_duration_since(here.max(since)),
                });
            }
        }
        self.latencies.record(over);
        if state.puller.is_whole() && !std::mem::replace(&mut state.told_whole, true) {
            // A session that has ended needs no events.
            let _ = self.events.send(PullEvent::AllHere);
        }
    }

    /// The connection is gone, and its threads have ended: what was on its way is asked for anew, first of all what
    /// somebody waits for.
    pub(super) fn lost(&self) {
        *lock(&self.demand) = None;
        let mut state = self.state();
        state.puller.lost();
        let waiting = state.waiting.keys().map(|(block, page, _)| (*block, *page));
        let mut waiting: Vec<_> = waiting.collect();
        waiting.dedup();
        for (block, page) in waiting {
            state.puller.fault(block, page);
        }
    }

    /// There is a connection, with so many channels for what nobody waits for.
    pub(super) fn connected(&self, demand: Waker, channels: usize) {
        *lock(&self.pace) = (channels > 0).then(|| Pace::new(channels, self.page_bytes));
        demand.wake_by_ref();
        *lock(&self.demand) = Some(demand);
    }

    fn wake_demand(&self) {
        if let Some(waker) = &*lock(&self.demand) {
            waker.wake_by_ref();
        }
    }

    /// What lacks for good is poisoned: who waits for it, or touches it later, gets a memory error. Returns bytes.
    pub(super) fn poison(&self) -> Result<u64, PagerError> {
        let bytes = self.lacks();
        let mut missing = Vec::new();
        self.received.missing(&mut missing);
        for run in missing {
            for pager in &self.pagers {
                pager.poison(run)?;
            }
        }
        Ok(bytes)
    }

    pub(super) fn lacks(&self) -> u64 {
        self.state().puller.lacking_bytes()
    }

    /// Whether there was nothing to fetch from the start: then nothing ever arrives that would say so.
    pub(super) fn tell_if_whole(&self) {
        let mut state = self.state();
        if state.puller.is_whole() && !std::mem::replace(&mut state.told_whole, true) {
            // A session that has ended needs no events.
            let _ = self.events.send(PullEvent::AllHere);
        }
    }

    pub(super) fn figures(&self) -> FaultFigures {
        let waiting = self.state().waiting.len() as u64;
        self.latencies.figures(waiting)
    }

    pub(super) fn vcpus(&self) -> Vcpus {
        self.latencies.vcpus()
    }

    pub(super) fn report(&self) -> FaultReport {
        let prefetched = self.state().puller.prefetched();
        FaultReport {
            prefetch_windows: prefetched.windows,
            prefetch_hits: prefetched.hits,
            ..self.latencies.report()
        }
    }

    fn mapped(&self, result: Result<(), PagerError>) {
        match result {
            // Whoever watches QEMU notices.
            Ok(()) | Err(PagerError::Gone(_)) => {}
            Err(error) => self.fail(pager_failure(&error)),
        }
    }

    pub(super) fn fail(&self, failure: Failure) {
        // A session that has ended needs no events.
        let _ = self.events.send(PullEvent::Failed(failure));
    }

    pub(super) fn tell(&self, event: PullEvent) {
        // A session that has ended needs no events.
        let _ = self.events.send(event);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// The runs of an arrival without the page that is held back.
fn mapped_now(arrival: &Arrival) -> Vec<Run> {
    let mut runs = Vec::with_capacity(arrival.runs.len() + 1);
    for run in &arrival.runs {
        let held = arrival
            .held
            .filter(|(block, page)| *block == run.block && (run.first..run.end()).contains(page));
        let parts = match held {
            Some((_, page)) => [(run.first, page), (page + 1, run.end())],
            None => [(run.first, run.end()), (0, 0)],
        };
        for (first, end) in parts {
            if first < end {
                runs.push(Run {
                    block: run.block,
                    first,
                    pages: end - first,
                });
            }
        }
    }
    runs
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
