//! The plan of a seed.

use pagecopy::memory::BlockSpec;

use super::clock::Rate;
use super::disk::Temper;
use super::fault;
use super::guest::{Habits, Pattern};
use super::plan::{Host, How, Path, Plan, Theme, Wanted};
use super::rng::Rng;

impl Plan {
    /// The plan of a seed's run.
    pub fn of(seed: u64) -> Plan {
        Plan::with(Theme::of(seed), seed)
    }

    /// The plan of a seed's run, if its theme were this one.
    pub fn with(theme: Theme, seed: u64) -> Plan {
        let mut rng = Rng::new(seed).stream("plan");
        let blocks = blocks(&mut rng);
        let bytes: u64 = blocks.iter().map(|block| block.size).sum();
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        rng.shuffle(&mut order);
        let direct_io = theme == Theme::DirectIo
            || (!matches!(theme, Theme::Quiet | Theme::PostCopy) && rng.chance(200));
        let rough = match theme {
            Theme::Faults | Theme::Chaos | Theme::Torn => rng.chance(300),
            _ => false,
        };
        let mut plan = Plan {
            chance: rng.bits(),
            order,
            data_channels: u16::try_from(rng.between(1, 5)).unwrap_or(1),
            direct_io,
            fixed_downtime_us: rng.spread(1_000, 20_000),
            wanted: wanted(&mut rng, theme),
            habits: habits(&mut rng, &blocks, direct_io),
            network: network(&mut rng, bytes),
            device_state: device_state(&mut rng),
            buffered: rng.chance(500),
            work_us: rng.spread(1, 500),
            source: host(&mut rng, rough),
            destination: host(&mut rng, rough),
            operator: rng.chance(800),
            faults: fault::faults(&mut rng, theme),
            blocks,
        };
        if theme.is_postcopy() {
            plan.let_the_guest_go_first(&mut rng, theme);
        }
        if theme == Theme::Crashes && rng.chance(500) {
            plan.let_a_daemon_die(&mut rng);
        }
        if theme == Theme::Chaos && rng.chance(300) {
            plan.faults.truncate(1);
            plan.faults.extend(fault::decisions_in_doubt(&mut rng));
        }
        // Last, so that the rest of a seed's plan does not depend on it.
        plan.wanted.encoded = rng.chance(400);
        plan.wanted.versions = rng.spread(1, 100);
        plan.wanted.throttle |= rng.chance(400);
        if rng.chance(150) {
            plan.faults.extend(fault::set(&mut rng));
        }
        plan
    }

    /// The guest goes before its memory, at once, after some rounds, or when it will not do otherwise.
    fn let_the_guest_go_first(&mut self, rng: &mut Rng, theme: Theme) {
        self.data_channels = self.data_channels.max(2);
        self.wanted.verify = false;
        self.wanted.how = match rng.below(10) {
            0..4 => How::Postcopy,
            4..6 => How::HybridRounds(u32::try_from(rng.between(1, 3)).unwrap_or(1)),
            6 => How::HybridTime(rng.spread(100, 50_000)),
            7 => How::Hybrid,
            _ => How::Auto,
        };
        if self.wanted.how == How::Auto || rng.chance(100) {
            // By hand, in the middle of a round.
            self.faults.extend(fault::by_hand(rng));
        }
        if rng.chance(850) {
            // All of the RAM in 20 ms to two seconds: there is a time in which it lacks pages.
            let bytes: u64 = self.blocks.iter().map(|block| block.size).sum();
            self.network.bytes_per_second = Some((bytes / 2).max(1) * rng.spread(1, 100));
        }
        self.habits.processors = rng.between(1, 4);
        self.habits.touches = rng.pick(&[0, 100, 3_000, 30_000, 300_000]);
        if theme == Theme::Torn && rng.chance(500) {
            self.faults.truncate(rng.index(2));
            self.faults.splice(0..0, fault::death_in_postcopy(rng));
            // So that there is much to be fetched, and time for it.
            self.wanted.how = How::Postcopy;
            self.habits.touched_percent = self.habits.touched_percent.max(60);
            let bytes: u64 = self.blocks.iter().map(|block| block.size).sum();
            self.network.bytes_per_second = Some((bytes / 2).max(1) * rng.spread(1, 10));
        }
    }

    /// A daemon dies at one output of all that there are, and the run is made so that the output is given.
    fn let_a_daemon_die(&mut self, rng: &mut Rng) {
        let (output, faults) = fault::death_at_any_output(rng);
        self.faults.truncate(1);
        self.faults.splice(0..0, faults);
        self.wanted.verify |= output.contains("Digest");
        self.wanted.quit_source |= output == "QuitGuest";
        self.direct_io |= output == "DrainIo";
        self.operator |= output == "Journal(TakenBack)";
        if output == "Throttle" {
            self.let_it_fall_behind(rng);
        }
    }

    /// The guest writes more than the link carries, and is slowed.
    fn let_it_fall_behind(&mut self, rng: &mut Rng) {
        self.wanted.throttle = true;
        self.wanted.max_rounds = 30;
        self.wanted.timeout_us = None;
        self.wanted.downtime_limit_us = rng.spread(20_000, 50_000);
        self.fixed_downtime_us = rng.spread(1_000, 5_000);
        self.habits.pattern = Pattern::Uniform;
        self.habits.writes = 400_000;
        self.habits.touched_percent = 100;
        // All of the RAM in a tenth of a second to a whole one.
        let bytes: u64 = self.blocks.iter().map(|block| block.size).sum();
        let channels = u64::from(self.data_channels.max(1));
        self.network.bytes_per_second = Some((bytes / channels).max(1) * rng.spread(1, 10));
        self.wanted.bandwidth_limit = None;
    }
}

fn blocks(rng: &mut Rng) -> Vec<BlockSpec> {
    let count = rng.pick(&[1, 1, 1, 2, 3]);
    // Now and then all of them are of huge pages, and enough that a channel is full.
    let huge = rng.chance(10);
    (0..count)
        .map(|number| {
            let (page_size, pages) = match rng.below(100) {
                _ if huge => (2 << 20, 6 / count),
                0..2 => (2 << 20, 1),
                _ => (4096, rng.spread(8, 384 / count)),
            };
            BlockSpec {
                name: format!("ram{number}"),
                size: pages * page_size,
                page_size,
            }
        })
        .collect()
}

fn wanted(rng: &mut Rng, theme: Theme) -> Wanted {
    let quiet = matches!(theme, Theme::Quiet | Theme::PostCopy);
    Wanted {
        downtime_limit_us: rng.spread(if quiet { 50_000 } else { 10_000 }, 300_000),
        bandwidth_limit: rng.chance(150).then(|| rng.spread(4 << 20, 1 << 30)),
        max_rounds: u32::try_from(rng.between(2, 30)).unwrap_or(30),
        timeout_us: rng.chance(200).then(|| rng.spread(100_000, 60_000_000)),
        throttle: false,
        verify: theme == Theme::Verify || rng.chance(100),
        quit_source: rng.chance(200),
        how: How::Precopy,
        encoded: false,
        versions: 64,
    }
}

fn habits(rng: &mut Rng, blocks: &[BlockSpec], direct_io: bool) -> Habits {
    let pages: u64 = blocks.iter().map(BlockSpec::pages).sum();
    let hot = usize::try_from(rng.spread(1, pages.max(2) / 2)).unwrap_or(1);
    Habits {
        pattern: rng.pick(&[
            Pattern::Uniform,
            Pattern::HotSpot { pages: hot },
            Pattern::Sequential,
        ]),
        writes: rng.pick(&[0, 100, 1_000, 5_000, 20_000, 100_000, 400_000]),
        punches: rng.pick(&[0, 0, 50, 1_000]),
        reads: if direct_io { rng.spread(50, 20_000) } else { 0 },
        longest_read_us: rng.spread(200, 50_000),
        touched_percent: rng.between(0, 100),
        processors: 1,
        touches: 1_000,
    }
}

fn network(rng: &mut Rng, bytes: u64) -> Path {
    let delay_min = rng.spread(200, 20_000);
    Path {
        delay_min,
        delay_max: delay_min + rng.spread(1_000, 300_000),
        // The whole RAM in 1 ms to half a second, or as fast as can be.
        bytes_per_second: rng.chance(700).then(|| bytes * rng.spread(2, 1_000)),
        piece: rng
            .pick(&[1024, 4096, 16 << 10, 256 << 10])
            .max(bytes / 512),
    }
}

/// Mostly a few hundred bytes; sometimes more than one message takes.
fn device_state(rng: &mut Rng) -> usize {
    let most = if rng.chance(30) { 600_000 } else { 20_000 };
    usize::try_from(rng.spread(1, most)).unwrap_or(0)
}

fn host(rng: &mut Rng, rough: bool) -> Host {
    Host {
        operation_us: rng.spread(50, 3_000),
        qemu_us: rng.spread(100, 10_000),
        operation_fails: if rough { rng.pick(&[0, 5, 30]) } else { 0 },
        qemu_fails: if rough { rng.pick(&[0, 20, 100]) } else { 0 },
        disk: Temper {
            sync_us: rng.spread(50, 10_000),
            refuses: if rough { rng.pick(&[0, 20, 200]) } else { 0 },
        },
        // Real clocks differ by some millionths; here sometimes by hundredths.
        clock: Rate {
            epoch_s: rng.spread(1, 100_000_000),
            ppm: i64::try_from(rng.spread(1, 50_000)).unwrap_or(0) * rng.pick(&[-1, 0, 1]),
        },
    }
}
