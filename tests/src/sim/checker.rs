//! The invariants, watched while a run goes on. What they forbid is in the texts of the violations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::{ChannelId, Time};
use pagecopy::limits::MAX_BATCHES_PER_CHANNEL;

use super::plan::Side;
use super::ram::{SLOTS, SimRam};

/// From a failure that the source notices before `Commit` until its guest runs again.
const ROLLBACK_LIMIT: Duration = Duration::from_millis(100);

/// An invariant that a run broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which, in words with figures.
    pub what: String,
}

/// What is known of both sides.
#[derive(Debug)]
pub(super) struct Checker {
    source_ram: Arc<SimRam>,
    destination_ram: Arc<SimRam>,
    order: Vec<usize>,
    running: [bool; 2],
    /// The destination's slots as last looked at, in the source's order of pages.
    seen: Vec<u64>,
    /// Scratch for the next look.
    looked: Vec<u64>,
    /// The destination's RAM when its device state began to be loaded.
    loaded: Option<u64>,
    in_flight: BTreeMap<ChannelId, usize>,
    rollback_by: Option<Time>,
    violation: Option<Violation>,
}

impl Checker {
    /// The guest runs at the source.
    pub(super) fn new(
        source_ram: Arc<SimRam>,
        destination_ram: Arc<SimRam>,
        order: Vec<usize>,
    ) -> Checker {
        let seen = vec![0; source_ram.pages() * usize::try_from(SLOTS).unwrap_or(0)];
        Checker {
            source_ram,
            destination_ram,
            order,
            running: [true, false],
            seen,
            looked: Vec::new(),
            loaded: None,
            in_flight: BTreeMap::new(),
            rollback_by: None,
            violation: None,
        }
    }

    /// Notes a broken invariant; the first one counts.
    pub(super) fn violate(&mut self, what: String) {
        self.violation.get_or_insert(Violation { what });
    }

    /// The first broken invariant.
    pub(super) fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// Whether the guest runs at `side`.
    pub(super) fn runs(&self, side: Side) -> bool {
        self.running[side as usize]
    }

    /// The guest stands or is gone at `side`.
    pub(super) fn stopped(&mut self, side: Side) {
        self.running[side as usize] = false;
    }

    /// The guest starts at `side`.
    pub(super) fn started(&mut self, side: Side) {
        self.running[side as usize] = true;
        if self.running == [true, true] {
            self.violate("two guests run".into());
        }
        match side {
            Side::Source => self.rollback_by = None,
            Side::Destination => self.compare(),
        }
    }

    /// The guest's RAM at the destination is that of the source, byte for byte.
    fn compare(&mut self) {
        if let Some((block, page)) = self
            .source_ram
            .first_difference(&self.destination_ram, &self.order)
        {
            self.violate(format!(
                "the guest starts and page {page} of block {block} differs from the source's"
            ));
        }
        self.compare_with_loaded();
    }

    fn compare_with_loaded(&mut self) {
        if self
            .loaded
            .is_some_and(|digest| digest != self.destination_ram.version_digest(&self.order))
        {
            self.violate(
                "something was placed in RAM after QEMU began to load the device state".into(),
            );
        }
    }

    /// The destination's RAM has been cleared for a transfer.
    pub(super) fn cleared(&mut self) {
        self.seen.fill(0);
        self.loaded = None;
    }

    /// QEMU begins to load device state that belongs to RAM of digest `expected`.
    pub(super) fn load_begins(&mut self, expected: u64) {
        let digest = self.destination_ram.version_digest(&self.order);
        self.loaded = Some(digest);
        if digest != expected {
            self.violate("device state is loaded over RAM that is not the guest's".into());
        }
    }

    /// QEMU has loaded it.
    pub(super) fn load_ended(&mut self) {
        self.compare_with_loaded();
    }

    /// Looks at all pages of the destination: none may be older than it was.
    pub(super) fn look_at_versions(&mut self) {
        let mut looked = std::mem::take(&mut self.looked);
        if let Err(foreign) = self.destination_ram.versions(&self.order, &mut looked) {
            self.violate(foreign);
        } else {
            for (slot, (new, old)) in looked.iter().zip(&mut self.seen).enumerate() {
                let page = slot / 8;
                if *new == 0 {
                    // A zero says no version. It is right if the page was made zero after what was seen here.
                    if *old > self.source_ram.punched(page) {
                        let text = format!(
                            "page {page} was version {old} and is zero, though it was not since"
                        );
                        self.violation.get_or_insert(Violation { what: text });
                    }
                } else if new < old {
                    let text = format!("page {page} went back from version {old} to {new}");
                    self.violation.get_or_insert(Violation { what: text });
                } else {
                    *old = *new;
                }
            }
        }
        self.looked = looked;
    }

    /// A batch was given to a channel.
    pub(super) fn pushed(&mut self, channel: ChannelId) {
        let in_flight = self.in_flight.entry(channel).or_default();
        *in_flight += 1;
        if *in_flight > MAX_BATCHES_PER_CHANNEL {
            self.violate(format!(
                "more than {MAX_BATCHES_PER_CHANNEL} batches are under way on {channel:?}"
            ));
        }
    }

    /// A channel is done with a batch.
    pub(super) fn push_ended(&mut self, channel: ChannelId) {
        if let Some(in_flight) = self.in_flight.get_mut(&channel) {
            *in_flight -= 1;
        }
    }

    /// The connection with all its batches is gone.
    pub(super) fn pushes_lost(&mut self) {
        self.in_flight.clear();
    }

    /// The source's engine was told of a failure before `Commit`: its guest must run soon.
    pub(super) fn failure_noticed(&mut self, now: Time) {
        if !self.runs(Side::Source) {
            self.rollback_by = self.rollback_by.or(Some(now.after(ROLLBACK_LIMIT)));
        }
    }

    /// There is an excuse for not rolling back quickly: `Commit` was sent, or QEMU itself failed.
    pub(super) fn rollback_excused(&mut self) {
        self.rollback_by = None;
    }

    /// Time passes.
    pub(super) fn tick(&mut self, now: Time) {
        if self.rollback_by.is_some_and(|limit| now > limit) {
            self.violate(format!(
                "the guest stands for more than {ROLLBACK_LIMIT:?} after a failure"
            ));
        }
    }
}
