//! Post-copy in the pair's world: what lacks is copied from the source's pages while the hosts are connected, and the
//! guest writes to what is here.

use std::collections::{BTreeMap, BTreeSet};

use pagecopy::engine::bitmap::Bitmap;
use pagecopy::engine::destination::{self, Destination};
use pagecopy::engine::event::FaultFigures;
use pagecopy::engine::journal::{self, Postcopy, Record};
use pagecopy::engine::{Failure, Fault, source};
use pagecopy::wire::Standing;

use super::{Event, LATENCY, PAGE, Pair, WORK};

/// Pages that are fetched in a millisecond.
const AT_ONCE: usize = 50;

/// What outlives the daemons: the record of what was received, and what the guest did.
#[derive(Debug, Default)]
pub struct Moved {
    /// Pages that are not here.
    pub lacking: BTreeSet<usize>,
    /// What the guest has written at the destination.
    pub written: BTreeMap<usize, u64>,
    /// Bytes that the operator gave up.
    pub poisoned: u64,
    /// Whether the source's memory is open to reads.
    pub open: bool,
    /// Whether page faults wait.
    pub armed: bool,
    /// Whether pages are being fetched.
    pulling: bool,
    /// Whether a fetch is under way.
    turning: bool,
    next: usize,
}

impl Pair {
    pub(super) fn arm(&mut self, mut lacking: Bitmap) {
        let mut runs = Vec::new();
        while !lacking.is_empty() {
            lacking.take(usize::MAX, u64::MAX, &mut runs);
        }
        let pages = runs.iter().flat_map(|run| run.first..run.end());
        self.moved.armed = true;
        self.moved.lacking = pages.map(|page| usize::try_from(page).unwrap()).collect();
        let armed = destination::Input::Armed {
            pid: 1,
            inside: vec![7],
            ram: Vec::new(),
        };
        self.after(WORK, Event::ToDestination(armed));
        self.pull();
    }

    pub(super) fn pull(&mut self) {
        self.moved.pulling = true;
        if !std::mem::replace(&mut self.moved.turning, true) {
            self.after(WORK, Event::Fetch);
        }
    }

    pub(super) fn stop_pulling(&mut self) {
        self.moved.pulling = false;
    }

    /// The next pages have come.
    pub(super) fn fetch(&mut self) {
        self.moved.turning = false;
        if !self.moved.pulling || !self.link || self.destination.is_none() {
            return;
        }
        if !self.moved.open {
            // The source has given up, and that is on its way here.
            assert!(!self.destination_runs, "the guest's memory is not served");
            return;
        }
        assert!(
            !self.source_runs,
            "pages are fetched from a guest that runs"
        );
        for _ in 0..AT_ONCE {
            let Some(page) = self.moved.lacking.pop_first() else {
                break;
            };
            assert!(!self.moved.written.contains_key(&page), "fetched again");
            self.destination_pages[page] = self.source_pages[page];
        }
        if self.moved.lacking.is_empty() {
            let faults = FaultFigures {
                faults: 3,
                ..FaultFigures::default()
            };
            self.tell_destination(destination::Input::Whole { faults });
        } else {
            let bytes = self.lacks();
            let faults = FaultFigures::default();
            self.tell_destination(destination::Input::Lacks { bytes, faults });
            self.pull();
        }
    }

    pub fn lacks(&self) -> u64 {
        self.moved.lacking.len() as u64 * PAGE
    }

    pub(super) fn poison(&mut self) {
        self.moved.poisoned = self.lacks();
        self.moved.lacking.clear();
        let bytes = self.moved.poisoned;
        self.after(
            WORK,
            Event::ToDestination(destination::Input::Poisoned { bytes }),
        );
    }

    /// The guest writes where it runs, if the page is here.
    pub(super) fn guest_writes_there(&mut self) {
        for _ in 0..self.writes_per_ms {
            self.moved.next += 1;
            let page = self.moved.next * 13 % self.working_set;
            if !self.moved.lacking.contains(&page) {
                let content = 1 << 40 | self.moved.next as u64;
                self.destination_pages[page] = content;
                self.moved.written.insert(page, content);
            }
        }
    }

    /// The source's daemon has come with a new connection.
    pub(super) fn serve(&mut self) {
        let records = journal::decode(&self.destination_journal).unwrap().records;
        let served = self.destination.is_some() && self.destination_finished.is_none();
        if !served && journal::postcopy(&records) == Postcopy::Over {
            let id = self.setup.id;
            let whole = pagecopy::wire::Message::Whole { id, cost: None };
            return self.after(LATENCY, Event::ToSource(source::Input::Message(whole)));
        }
        // A daemon that is started anew looks, and finds the guest running.
        if !served && self.destination_runs {
            if !records.contains(&Record::Running) {
                self.destination_journal
                    .extend(journal::encode(&Record::Running));
            }
            self.restart_destination();
        }
        let lost = Failure::new(Fault::Network, "the source has a new connection", "");
        self.tell_destination(destination::Input::LinkLost(lost));
        let served = self.destination.is_some() && self.destination_finished.is_none();
        if !served && journal::standing_for(Some(&records)) == Standing::Committed {
            self.destination = Some(Destination::recover(self.arriving.clone(), true, self.now));
            self.destination_finished = None;
            self.stop_pulling();
        }
        if self
            .destination
            .as_ref()
            .is_some_and(Destination::takes_serve)
        {
            self.tell_destination(destination::Input::Served);
        } else {
            self.answer_query(self.setup.id);
        }
    }

    /// A daemon that is started anew and finds a guest that lacks pages.
    pub(super) fn restart_destination(&mut self) {
        let lacks = self.lacks();
        self.destination = Some(Destination::resume(self.arriving.clone(), lacks, self.now));
        self.destination_finished = None;
        self.moved.pulling = false;
    }

    /// Panics unless the guest's memory at the destination is what it must be.
    pub fn assert_whole_there(&self) {
        for (page, content) in self.destination_pages.iter().enumerate() {
            let expected = self
                .moved
                .written
                .get(&page)
                .unwrap_or(&self.source_pages[page]);
            assert_eq!(content, expected, "page {page}");
        }
    }
}
