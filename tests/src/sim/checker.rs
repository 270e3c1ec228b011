//! The invariants, watched while a run goes on. What they forbid is in the texts of the violations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::{ChannelId, Time};
use pagecopy::limits::{MAX_BATCH_BYTES, MAX_BATCHES_PER_CHANNEL};

use super::plan::Side;
use super::ram::{SLOTS, SimRam};

/// From a failure that the source notices before `Commit` until its guest runs again.
const ROLLBACK_LIMIT: Duration = Duration::from_millis(100);

/// Bytes of pages that a channel was given and has not read for the last time: 8 MiB. Of all channels together it is so
/// much for each.
pub const CHANNEL_LIMIT: u64 = MAX_BATCHES_PER_CHANNEL as u64 * MAX_BATCH_BYTES;

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
    /// The guest has run at the destination.
    arrived: bool,
    /// It has ended there with its QEMU, and lacked memory then.
    ended_lacking: bool,
    /// The destination's slots as last looked at, in the source's order of pages.
    seen: Vec<u64>,
    /// Scratch for the next look.
    looked: Vec<u64>,
    /// The destination's RAM when its device state began to be loaded.
    loaded: Option<u64>,
    /// Bytes, by channel.
    in_flight: BTreeMap<ChannelId, u64>,
    /// The most that were on any channel.
    most_in_flight: u64,
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
            arrived: false,
            ended_lacking: false,
            seen,
            looked: Vec::new(),
            loaded: None,
            in_flight: BTreeMap::new(),
            most_in_flight: 0,
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

    /// Whether the guest has run at the destination.
    pub(super) fn arrived(&self) -> bool {
        self.arrived
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
            Side::Destination => {
                // What ran here once may be stopped by an operator and be started again; it differs then by right.
                if !self.arrived {
                    self.compare();
                }
                self.arrived = true;
            }
        }
    }

    /// The guest starts at the destination and lacks pages: what it touches is looked at as it does.
    pub(super) fn started_lacking(&mut self) {
        self.running[Side::Destination as usize] = true;
        if self.running == [true, true] {
            self.violate("two guests run".into());
        }
        self.arrived = true;
    }

    /// The guest ends with its QEMU at the destination, before all of its memory has come.
    pub(super) fn ended_lacking(&mut self) {
        self.ended_lacking = true;
    }

    /// Somebody is told that the migration is completed. `lost`: the destination's QEMU was made to end.
    pub(super) fn told_completed(&mut self, who: &str, lost: bool) {
        if !self.arrived || !(self.runs(Side::Destination) || lost) {
            self.violate(format!(
                "{who} says completed, and the guest does not run at the destination"
            ));
        }
        if self.ended_lacking {
            self.violate(format!(
                "{who} says completed, and the guest has ended before all of its memory had come"
            ));
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
        match self.destination_ram.versions(&self.order, &mut looked) {
            Err(foreign) => self.violate(foreign),
            Ok(()) => self.compare_with_seen(&looked),
        }
        self.looked = looked;
    }

    fn compare_with_seen(&mut self, looked: &[u64]) {
        // A zero says no version. It is right if the page was made zero after what was seen here.
        if let Some((page, old)) = self.source_ram.zero_by_mistake(looked, &self.seen) {
            self.violate(format!(
                "page {page} was version {old} and is zero, though it was not since"
            ));
        }
        let mut back = None;
        for (slot, (new, old)) in looked.iter().zip(&mut self.seen).enumerate() {
            if *new >= *old {
                *old = *new;
            } else if *new > 0 {
                back = back.or(Some((slot / 8, *old, *new)));
            }
        }
        if let Some((page, old, new)) = back {
            self.violate(format!("page {page} went back from version {old} to {new}"));
        }
    }

    /// A batch was given to a channel.
    pub(super) fn pushed(&mut self, channel: ChannelId, bytes: u64) {
        if bytes > MAX_BATCH_BYTES {
            self.violate(format!(
                "a batch of {bytes} bytes, {MAX_BATCH_BYTES} at most"
            ));
        }
        let in_flight = self.in_flight.entry(channel).or_default();
        *in_flight += bytes;
        let in_flight = *in_flight;
        self.most_in_flight = self.most_in_flight.max(in_flight);
        if in_flight > CHANNEL_LIMIT {
            self.violate(format!(
                "{in_flight} bytes are in flight on {channel:?}, {CHANNEL_LIMIT} at most"
            ));
        }
    }

    /// A channel is done with a batch.
    pub(super) fn push_ended(&mut self, channel: ChannelId, bytes: u64) {
        if let Some(in_flight) = self.in_flight.get_mut(&channel) {
            *in_flight = in_flight.saturating_sub(bytes);
        }
    }

    /// The most bytes that were in flight on any channel.
    pub(super) fn most_in_flight(&self) -> u64 {
        self.most_in_flight
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

    /// That side's daemon stands still for a time: it can do nothing.
    pub(super) fn held(&mut self, side: Side, time: Duration) {
        if side == Side::Source {
            self.rollback_by = self.rollback_by.map(|by| by.after(time));
        }
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
