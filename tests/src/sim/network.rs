//! The network between the two hosts: transport's `mem` network, with stalls, silence and new beginnings.
//!
//! A connection that has lost bytes is silent for good, as TCP is when the path is gone: bytes never go missing from the
//! middle of a stream. So silence is not the loss of single messages here. The network that the connections are on is
//! simply never advanced again, and connections made after the path has healed are on another one.

use pagecopy::engine::Time;
use transport::Regions;
use transport::mem::{Faults, MemChannel, Network};

use super::plan::{Path, Side};
use super::rng::Rng;

/// All paths between the two hosts.
#[derive(Debug)]
pub(super) struct Wires {
    network: Network,
    faults: Faults,
    rng: Rng,
    /// Nothing that is on `network` now will ever arrive.
    silent: bool,
    /// The silence will end.
    heals: bool,
    /// Nothing moves until then.
    stalled_until: Option<Time>,
    /// For how many reasons what each side sends does not arrive.
    one_way: [u32; 2],
    /// The network's own time is the world's less this: the stalls so far, or the beginning of a new network.
    behind: u64,
    /// The world's time up to which `network` was advanced.
    advanced: Time,
}

impl Wires {
    /// Sound, at time `now`.
    pub(super) fn new(mut rng: Rng, path: Path, now: Time) -> Wires {
        let faults = Faults {
            delay_min: path.delay_min,
            delay_max: path.delay_max,
            bytes_per_second: path.bytes_per_second,
            piece: path.piece,
        };
        let network = Network::new(rng.bits(), faults.clone());
        Wires {
            network,
            faults,
            rng,
            silent: false,
            heals: false,
            stalled_until: None,
            one_way: [0; 2],
            behind: now.0,
            advanced: now,
        }
    }

    /// Whether new connections can be made now.
    pub(super) fn passable(&self) -> bool {
        !self.silent && self.stalled_until.is_none() && self.one_way == [0; 2]
    }

    /// A connection: the ends of its channels at the source, which send from the regions given for each, and at the
    /// destination.
    pub(super) fn connect(
        &self,
        source: &[Regions],
        destination: &Regions,
    ) -> (Vec<MemChannel>, Vec<MemChannel>) {
        source
            .iter()
            .map(|regions| self.network.pair(regions, destination))
            .unzip()
    }

    /// Whether the path is there, or will be again without anybody's help.
    pub(super) fn reachable(&self) -> bool {
        !self.silent || self.heals
    }

    /// When something happens on the network next.
    pub(super) fn next_event(&self) -> Option<Time> {
        if self.silent {
            return None;
        }
        if self.stalled_until.is_some() {
            return self.stalled_until;
        }
        let next = Time(self.network.next_event()?.saturating_add(self.behind));
        Some(next.max(self.advanced))
    }

    /// Lets all happen that does until `now`.
    pub(super) fn advance_to(&mut self, now: Time) {
        if self.stalled_until.is_some_and(|end| end <= now) {
            self.stalled_until = None;
            self.behind += now.since_nanos(self.advanced);
            self.advanced = now;
        }
        if !self.silent && self.stalled_until.is_none() {
            self.network.advance_to(now.0 - self.behind);
            self.advanced = now;
        }
    }

    /// Breaks every connection; both sides see it.
    pub(super) fn cut(&mut self) {
        self.network.cut();
    }

    /// Breaks the channel of that number, counted around among all there have been.
    pub(super) fn cut_channel(&mut self, number: usize) {
        let number = number % self.network.channels().max(1);
        self.network.cut_where(|channel, _| channel == number);
    }

    /// Breaks every connection, and only that side sees it.
    pub(super) fn cut_seen_only_by(&mut self, side: Side) {
        self.network.cut_where(|_, end| end == side as usize);
    }

    /// What that side sends does not arrive, until [`Wires::heal_one_way`] has been called as often.
    pub(super) fn silence_one_way(&mut self, side: Side) {
        self.one_way[side as usize] += 1;
        self.network.blackhole_from(side as usize, true);
    }

    /// See [`Wires::silence_one_way`].
    pub(super) fn heal_one_way(&mut self, side: Side) {
        let reasons = &mut self.one_way[side as usize];
        *reasons = reasons.saturating_sub(1);
        self.network.blackhole_from(side as usize, *reasons > 0);
    }

    /// How many writes had left in part when their channel ended.
    pub(super) fn partial_writes(&self) -> u64 {
        self.network.partial_writes()
    }

    /// Holds everything until `end`.
    pub(super) fn stall_until(&mut self, end: Time) {
        self.stalled_until = self.stalled_until.max(Some(end));
    }

    /// What is on the way is lost, and so is all that follows; until the path `heals`, or for good.
    pub(super) fn silence(&mut self, heals: bool) {
        self.silent = true;
        self.heals |= heals;
    }

    /// Connections can be made again; those of before stay silent.
    pub(super) fn heal(&mut self, now: Time) {
        if self.silent {
            self.network = Network::new(self.rng.bits(), self.faults.clone());
            for side in [Side::Source, Side::Destination] {
                self.network
                    .blackhole_from(side as usize, self.one_way[side as usize] > 0);
            }
            self.silent = false;
            self.heals = false;
            self.stalled_until = None;
            self.behind = now.0;
            self.advanced = now;
        }
    }
}

/// Nanoseconds between two instants.
trait SinceNanos {
    fn since_nanos(self, earlier: Time) -> u64;
}

impl SinceNanos for Time {
    fn since_nanos(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
