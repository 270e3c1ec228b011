//! Fetching what the guest lacks: the real puller and its pace over the data channels, the record of what was received, and
//! page faults. The daemon can die between any two steps of a page: read, marked as received, mapped.

use std::collections::BTreeMap;
use std::time::Duration;

use pagecopy::engine::Fault as Blame;
use pagecopy::engine::Time;
use pagecopy::engine::bitmap::Bitmap;
use pagecopy::engine::destination::Input;
use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::pull::pace::{MAX_WINDOW_BYTES, Pace};
use pagecopy::engine::pull::{Answer, Arrival, Class, Puller, Request};
use pagecopy::limits::MAX_BATCH_BYTES;
use pagecopy::memory::{BlockId, Run};
use transport::{Access, Extent, Op, RegionId};

use super::super::arrived::Pager;
use super::super::driver::Driver;
use super::super::env::{Death, DestinationEvent, DestinationStep, Env, Event, failure};
use super::super::mistake::Mistake;
use super::super::names;
use super::super::plan::Side;
use super::super::qemu::DestinationState;
use super::super::tally::Happened;
use super::DestinationSide;

/// Requests under way for pages that somebody waits for.
const URGENT_AT_ONCE: usize = 4;
/// Bytes of a probe. A larger page is no probe here.
const PAGE: u64 = 4096;
/// How often it is said what lacks.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// What a daemon knows of what it fetches.
pub(super) struct Pull {
    puller: Puller,
    pace: Pace,
    /// The connection is there, and the engine wants it used.
    on: bool,
    /// Requests under way: when, bytes, and by which data channel.
    reads: BTreeMap<u64, (Time, u64, usize)>,
    /// The engine has been told that nothing lacks.
    said_whole: bool,
}

impl Pull {
    fn new(specs: &[pagecopy::memory::BlockSpec], lacking: &[Run]) -> Option<Pull> {
        Some(Pull {
            puller: Puller::new(specs, lacking).ok()?,
            pace: Pace::new(1, PAGE),
            on: false,
            reads: BTreeMap::new(),
            said_whole: false,
        })
    }

    fn on_lane(&self, lane: usize) -> usize {
        self.reads.values().filter(|read| read.2 == lane).count()
    }

    /// Bytes under way of what nobody waits for.
    fn background(&self) -> u64 {
        let rest = self.reads.values().filter(|read| read.2 > 0);
        rest.map(|read| read.1).sum()
    }
}

impl DestinationSide {
    /// Page faults are made to wait.
    pub(super) fn arm(&mut self, env: &mut Env, lacking: Bitmap) {
        if env.operation_fails(Side::Destination) {
            let why = failure(Blame::ThisHost, "page faults cannot be made to wait");
            return self.input(env, Input::HostFailed(why));
        }
        let mut runs = Vec::new();
        let mut rest = lacking;
        while !rest.is_empty() {
            rest.take(usize::MAX, u64::MAX, &mut runs);
        }
        let mut received = vec![true; self.ram.pages()];
        for page in runs.iter().flat_map(|run| self.pages_of(run)) {
            received[page] = false;
        }
        self.received = Some(received);
        self.pager = Some(Pager::new(self.ram.pages()));
        self.close_to_writes(env);
        self.serve_faults(env);
        if let Some(pull) = self.pull() {
            pull.on = true;
        }
        env.guest_lacks = true;
        env.tally.note(Happened::WentFirst);
        self.input(env, armed());
        self.pull_on(env);
    }

    /// The peer may not write any more; replies to reads still land.
    pub(super) fn close_to_writes(&mut self, env: &Env) {
        let access = Access {
            peer_writes: false,
            peer_reads: false,
        };
        self.ram.register(&self.regions, &env.plan.order, access);
    }

    /// The daemon begins, or begins again, to answer page faults.
    pub(super) fn serve_faults(&mut self, env: &mut Env) {
        let lacking = self.lacking_runs(env);
        let specs = self.arrived.specs();
        if let Some(daemon) = &mut self.daemon {
            daemon.pull = Pull::new(&specs, &lacking);
        }
        self.event_after(env, SAY_EVERY, DestinationEvent::Say);
        self.fault_anew(env);
        self.event_after(env, Duration::from_micros(1), DestinationEvent::PullOn);
    }

    /// Another engine, of a guest that was `armed`, wants to hear of it, too, when nothing lacks.
    pub(super) fn tell_again(&mut self, env: &mut Env, armed: bool) {
        if armed && self.pull().is_none() {
            self.serve_faults(env);
        }
        if let Some(pull) = self.pull() {
            pull.said_whole = false;
        }
        self.event_after(env, Duration::ZERO, DestinationEvent::PullOn);
    }

    /// What the record of received pages says is missing, in the source's numbers.
    fn lacking_runs(&self, env: &Env) -> Vec<Run> {
        let all = env.errs(Mistake::ForgotReceived) && self.host.generation > 0;
        let received = self.received.as_deref().unwrap_or_default();
        let mut runs: Vec<Run> = Vec::new();
        for (page, _) in received
            .iter()
            .enumerate()
            .filter(|(_, here)| all || !**here)
        {
            let (block, index) = self.arrived.place_of(page);
            match runs.last_mut() {
                Some(run) if usize::from(run.block.0) == block && run.end() == index => {
                    run.pages += 1;
                }
                _ => runs.push(Run {
                    block: BlockId(u16::try_from(block).unwrap_or(u16::MAX)),
                    first: index,
                    pages: 1,
                }),
            }
        }
        runs
    }

    /// Bytes that the guest lacks.
    pub(super) fn lacks(&self) -> u64 {
        let received = self.received.as_deref().unwrap_or_default();
        let missing = received.iter().enumerate().filter(|(_, here)| !**here);
        missing.map(|(page, _)| self.arrived.page_size(page)).sum()
    }

    fn pull(&mut self) -> Option<&mut Pull> {
        self.daemon.as_mut()?.pull.as_mut()
    }

    fn pages_of(&self, run: &Run) -> std::ops::Range<usize> {
        let first = self.arrived.number(run.block, run.first);
        first..first + usize::try_from(run.pages).unwrap_or(0)
    }

    /// Whoever waits is told to fault anew: the daemon has forgotten, or is another one.
    fn fault_anew(&mut self, env: &mut Env) {
        let mut waiting = self.arrived.waits_for();
        if let Some((_, devices)) = &self.loads_when {
            waiting.extend(devices);
        }
        self.faults(env, &waiting);
    }

    /// New page faults of the guest or of QEMU reach the daemon, if there is one.
    pub(super) fn faults(&mut self, env: &mut Env, pages: &[usize]) {
        if self.daemon.is_none() {
            return;
        }
        for page in pages {
            let delay = env.delay(30);
            self.event_after(env, delay, DestinationEvent::PageFault(*page));
        }
    }

    pub(super) fn page_fault(&mut self, env: &mut Env, page: usize) {
        if !self.pager.as_ref().is_some_and(Pager::armed) {
            return;
        }
        let (block, index) = self.arrived.place_of(page);
        let block = BlockId(u16::try_from(block).unwrap_or(u16::MAX));
        let Some(pull) = self.pull() else { return };
        env.note(
            "destination",
            format_args!("page fault at page {index} of block {}", block.0),
        );
        match pull.puller.fault(block, index) {
            Answer::Map => self.map(env, &[page]),
            Answer::Wait => env.tally.note(Happened::WaitedOnItsWay),
            Answer::Fetch => env.tally.note(Happened::Waited),
        }
        self.pull_on(env);
    }

    /// The engine lets go of the connection.
    pub(super) fn stop_pulling(&mut self, env: &mut Env) {
        if let Some(daemon) = &mut self.daemon {
            daemon.data.clear();
            daemon.control = None;
            if let Some(pull) = &mut daemon.pull {
                pull.on = false;
                pull.reads.clear();
                pull.puller.lost();
            }
        }
        env.tally.note(Happened::Interrupted);
        self.fault_anew(env);
    }

    /// The engine wants to fetch over the connection that has come.
    pub(super) fn pull_again(&mut self, env: &mut Env) {
        if let Some(daemon) = &mut self.daemon {
            let served = std::mem::take(&mut daemon.served);
            daemon.data = served.into_iter().map(super::DataLane::of).collect();
            if let Some(pull) = &mut daemon.pull {
                pull.on = true;
                pull.pace = Pace::new(1, PAGE);
                pull.reads.clear();
                pull.puller.lost();
            }
        }
        env.tally.note(Happened::FetchedOn);
        self.fault_anew(env);
        self.pull_on(env);
    }

    /// Asks for as much as may be under way; says so when nothing lacks.
    pub(super) fn pull_on(&mut self, env: &mut Env) {
        while let Some((lane, request)) = self.next_request(env) {
            if self.dies_at(env, "Read") {
                return;
            }
            self.read(env, lane, &request);
        }
        self.end_if_whole(env);
    }

    fn next_request(&mut self, env: &Env) -> Option<(usize, Request)> {
        let now = env.now();
        let daemon = self.daemon.as_mut()?;
        let lanes = daemon.data.len();
        let pull = daemon.pull.as_mut().filter(|pull| pull.on && lanes > 1)?;
        if pull.on_lane(0) < URGENT_AT_ONCE
            && let Some(request) = pull.puller.next(Class::Neighbour)
        {
            return Some((0, request));
        }
        if pull.on_lane(0) == 0
            && pull.pace.probe(now)
            && let Some(request) = pull.puller.next_within(Class::Rest, PAGE)
        {
            return Some((0, request));
        }
        let most = pull.pace.may_request(pull.background())?;
        let lane = (1..lanes).min_by_key(|lane| pull.on_lane(*lane))?;
        let request = pull.puller.next_within(Class::Rest, most)?;
        Some((lane, request))
    }

    fn read(&mut self, env: &mut Env, lane: usize, request: &Request) {
        let mut extents = Vec::new();
        let mut bytes = 0;
        let mut region = RegionId(0);
        for run in &request.runs {
            for page in self.pages_of(run) {
                if self
                    .pager
                    .as_ref()
                    .is_some_and(|pager| pager.is_mapped(page))
                {
                    env.checker.violate(format!(
                        "page {page} is fetched, and the guest may have written it"
                    ));
                }
            }
            region = RegionId(u32::from(run.block.0));
            let size = self.arrived.page_size(self.arrived.number(run.block, 0));
            let extent = Extent {
                offset: run.first * size,
                len: run.pages * size,
            };
            bytes += extent.len;
            extents.push(extent);
        }
        let now = env.now();
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        if let Some(pull) = &mut daemon.pull {
            pull.reads.insert(request.id, (now, bytes, lane));
            let flying = pull.background();
            let limit = MAX_WINDOW_BYTES.max(pull.pace.window_bytes()) + MAX_BATCH_BYTES;
            if pull.puller.flying_bytes() > limit + 4 * MAX_BATCH_BYTES
                || flying > pull.pace.window_bytes() + MAX_BATCH_BYTES
            {
                env.checker
                    .violate(format!("{flying} bytes are asked for at once"));
            }
        }
        let op = Op::Read { region, extents };
        if let Err(why) = daemon.data[lane].lane.enqueue(op, Some(request.id)) {
            env.checker.violate(format!("a read is refused: {why}"));
        }
    }

    /// All bytes of a request are in the RAM file.
    pub(super) fn fetched(&mut self, env: &mut Env, id: u64) {
        let now = env.now();
        let Some(pull) = self.pull() else { return };
        match pull.reads.remove(&id) {
            Some((sent_at, PAGE, 0)) => pull.pace.on_probe(now, sent_at),
            Some((sent_at, bytes, 1..)) => {
                pull.pace.on_reply(now, sent_at, bytes);
            }
            _ => {}
        }
        let Some(Arrival { runs, held }) = pull.puller.arrived(id) else {
            return env
                .checker
                .violate("a reply came that nobody waits for".into());
        };
        let held = held.map(|(block, page)| self.arrived.number(block, page));
        let pages: Vec<usize> = runs.iter().flat_map(|run| self.pages_of(run)).collect();
        let mapped: Vec<usize> = pages
            .iter()
            .copied()
            .filter(|page| Some(*page) != held)
            .collect();
        if env.errs(Mistake::MarkAfterMap) {
            if self.dies_at(env, "Map") {
                return;
            }
            self.map(env, &mapped);
            self.event_after(env, Duration::from_millis(3), DestinationEvent::Mark(pages));
        } else {
            if self.dies_at(env, "Mark") {
                return;
            }
            self.mark(&pages);
            if self.dies_at(env, "Map") {
                return;
            }
            self.map(env, &mapped);
        }
        self.pull_on(env);
    }

    pub(super) fn mark(&mut self, pages: &[usize]) {
        if let Some(received) = &mut self.received {
            for page in pages {
                received[*page] = true;
            }
        }
    }

    fn map(&mut self, env: &mut Env, pages: &[usize]) {
        let Some(pager) = &mut self.pager else { return };
        for page in pages {
            pager.map(*page);
        }
        self.go_on(env);
    }

    /// Whoever waited for something that can be touched now goes on.
    pub(super) fn go_on(&mut self, env: &mut Env) {
        let Some(pager) = &self.pager else { return };
        if self.qemu.state == DestinationState::Gone {
            return;
        }
        if let Err(wrong) = self.arrived.go_on(pager) {
            env.checker.violate(format!("the guest reads: {wrong}"));
        }
        if let Some((command, pages)) = &self.loads_when
            && pages.iter().all(|page| pager.open(*page))
        {
            let (command, step) = (*command, DestinationStep::Loaded);
            self.loads_when = None;
            env.agenda.after(
                Duration::from_micros(10),
                Event::DestinationQemu(command, step),
            );
        }
    }

    fn end_if_whole(&mut self, env: &mut Env) {
        // A daemon whose session is still to come tells it then.
        if self.state().is_none() {
            return;
        }
        let Some(pull) = self.pull() else { return };
        if !pull.puller.is_whole() || std::mem::replace(&mut pull.said_whole, true) {
            return;
        }
        if self.dies_at(env, "Release") {
            return;
        }
        self.check_all(env);
        self.release(env);
        env.tally.note(Happened::BecameWhole);
        let faults = FaultFigures::default();
        self.input(env, Input::Whole { faults });
    }

    /// Every page is what it must be.
    fn check_all(&mut self, env: &mut Env) {
        let Some(pager) = &self.pager else { return };
        // What was given up before it ran is compared with nothing.
        if self.qemu.state != DestinationState::Running {
            return;
        }
        if let Some(wrong) = self.arrived.wrong_page(pager, |_| true) {
            env.checker
                .violate(format!("the guest is whole, and {wrong}"));
        }
    }

    /// QEMU's memory is let go of: nothing waits any more.
    pub(super) fn release(&mut self, env: &mut Env) {
        if let Some(pager) = &mut self.pager {
            pager.release();
        }
        env.guest_lacks = false;
        self.go_on(env);
    }

    /// What lacks is poisoned.
    pub(super) fn poison(&mut self, env: &mut Env) {
        let delay = env.operation(Side::Destination);
        if env.operation_fails(Side::Destination) {
            let why = failure(Blame::ThisHost, "nothing can be poisoned");
            return self.answer_after(env, delay, Input::HostFailed(why));
        }
        let bytes = self.lacks();
        let received = self.received.as_deref().unwrap_or_default().to_vec();
        if let Some(pager) = &mut self.pager {
            for page in (0..received.len()).filter(|page| !received[*page]) {
                pager.poison(page);
            }
        }
        if let Some(daemon) = &mut self.daemon {
            daemon.pull = None;
        }
        self.release(env);
        env.tally.note(Happened::Poisoned);
        self.answer_after(env, delay, Input::Poisoned { bytes });
    }

    /// It is said what lacks, as long as something may.
    pub(super) fn say(&mut self, env: &mut Env) {
        let bytes = self.lacks();
        let Some(pull) = self.pull() else { return };
        if pull.said_whole {
            return;
        }
        let faults = FaultFigures::default();
        self.input(env, Input::Lacks { bytes, faults });
        self.event_after(env, SAY_EVERY, DestinationEvent::Say);
    }

    /// A step of fetching is taken: whether the daemon dies of it. Before and after are the same here, as nothing is done
    /// in between by anybody else.
    fn dies_at(&mut self, env: &mut Env, step: &'static str) -> bool {
        match env.output_given(Side::Destination, names::of_step(step)) {
            Some(Death { host, restart, .. }) => {
                self.die(env, restart, host);
                true
            }
            None => false,
        }
    }
}

/// The answer to `Arm`.
pub(super) fn armed() -> Input {
    Input::Armed {
        pid: 1,
        inside: vec![7],
        ram: Vec::new(),
    }
}
