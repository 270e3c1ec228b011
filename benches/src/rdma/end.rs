//! The near end of a channel, and what it measures.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ::tests::real::cpu_seconds;
use bytes::Bytes;
use transport::rdma::{self, Call, Memory, Settings};
use transport::{
    Access, Address, Channel, Event, Extent, Greeting, Op, Region, RegionId, Regions, Security,
    connect,
};

use super::talk::{Answer, Ask, PATIENCE, hear, say, submit};

const MIB: u64 = 1 << 20;
/// Bytes of the memory at each end.
const LEN: u64 = 64 * MIB;
const REGION: RegionId = RegionId(1);
/// Operations under way, of a MiB each.
const DEPTH: usize = 8;
/// A page.
const PAGE: u64 = 4096;
/// Latencies that are not counted, before those that are: keys are asked for, memory is registered.
const WARM: usize = 50;

/// What both ends call each other by.
pub(super) const CALL: Call = Call {
    secret: [0x42; 32],
    channel: 0,
    channels: 1,
};
const GREETING: Greeting = Greeting {
    session: [7; 16],
    channel: 0,
    channels: 1,
};

/// Whether messages may be of that size.
pub(super) fn is_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (PAGE..=MIB).contains(&bytes)
}

/// Memory that the other end may write and read. No page of it is missing when it is measured.
pub(super) fn memory() -> Regions {
    let regions = Regions::new();
    let region = Region::anonymous(usize::try_from(LEN).unwrap_or(0)).expect("64 MiB of memory");
    let some = vec![0x5a; usize::try_from(MIB).unwrap_or(0)];
    for offset in (0..LEN).step_by(some.len()) {
        region.copy_in(offset, &some);
    }
    let full = Access {
        peer_writes: true,
        peer_reads: true,
    };
    regions.register(REGION, region, full);
    regions
}

/// The far end, as it is asked.
pub(super) struct Far(Box<dyn Channel>);

impl Far {
    pub(super) fn dial(address: SocketAddr) -> Result<Far, String> {
        let address = Address::Tcp(address);
        let nothing = Regions::new();
        let made = connect(
            &address,
            &Security::Plaintext,
            &GREETING,
            &nothing,
            PATIENCE,
        );
        made.map(|(channel, _)| Far(channel))
            .map_err(|error| format!("{address:?}: {error} (is `--listen` running there?)"))
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> Result<Answer, String> {
        say(self.0.as_mut(), ask)?;
        match hear(self.0.as_mut(), Some(PATIENCE))? {
            Answer::Failed(why) => Err(format!("the far end: {why}")),
            answer => Ok(answer),
        }
    }

    fn cpu(&mut self) -> Result<f64, String> {
        match self.ask(&Ask::Cpu)? {
            Answer::Cpu(seconds) => Ok(seconds),
            other => Err(format!("the far end answers {other:?}")),
        }
    }
}

/// What moving much of it came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bulk {
    /// MiB in a second.
    pub(super) mib_s: f64,
    /// Seconds of CPU for a GiB, of the near end's process and the far end's.
    pub(super) cpu: [f64; 2],
}

/// One channel.
pub(super) struct Near {
    channel: Box<dyn Channel>,
    /// Operations that have not ended.
    under_way: usize,
}

impl Near {
    /// Opens a channel to the far end.
    pub(super) fn open(far: &mut Far, regions: &Regions, rdma: bool) -> Result<Near, String> {
        let address = match far.ask(&Ask::Channel { rdma })? {
            Answer::Listening(address) => address,
            other => return Err(format!("the far end answers {other:?}")),
        };
        let made = if rdma {
            let memory = Memory::new(regions, Settings::default());
            let channel = rdma::connect(address, &CALL, &memory, PATIENCE);
            channel.map(|channel| Box::new(channel) as Box<dyn Channel>)
        } else {
            let (tcp, plain) = (Address::Tcp(address), Security::Plaintext);
            connect(&tcp, &plain, &GREETING, regions, PATIENCE).map(|(channel, _)| channel)
        };
        let channel = made.map_err(|error| error.to_string())?;
        Ok(Near {
            channel,
            under_way: 0,
        })
    }

    /// Moves memory for so long in messages of `size` bytes.
    pub(super) fn bulk(
        &mut self,
        far: &mut Far,
        write: bool,
        size: u64,
        time: Duration,
    ) -> Result<Bulk, String> {
        // All of it once: what is asked for and registered once is no part of it.
        for op in operations(write, size).take(usize::try_from(LEN / MIB).unwrap_or(0)) {
            self.operate(op)?;
        }
        self.drain(write)?;
        let (own, theirs, begun) = (cpu_seconds(std::process::id()), far.cpu()?, Instant::now());
        let mut moved = 0;
        for op in operations(write, size).cycle() {
            if begun.elapsed() >= time {
                break;
            }
            self.operate(op)?;
            moved += MIB;
        }
        self.drain(write)?;
        let seconds = begun.elapsed().as_secs_f64();
        let own = cpu_seconds(std::process::id()) - own;
        let theirs = far.cpu()? - theirs;
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let mib = moved as f64 / MIB as f64;
        Ok(Bulk {
            mib_s: mib / seconds,
            cpu: [own, theirs].map(|cpu| cpu * 1024.0 / mib),
        })
    }

    /// Begins an operation, when few enough are under way.
    fn operate(&mut self, op: Op) -> Result<(), String> {
        let ended = submit(self.channel.as_mut(), op)?;
        self.under_way = (self.under_way + 1).saturating_sub(ended);
        while self.under_way >= DEPTH {
            self.event()?;
        }
        Ok(())
    }

    fn event(&mut self) -> Result<(), String> {
        match self.channel.poll(Some(PATIENCE)) {
            Ok(Some(Event::Sent(_) | Event::Fetched(_))) => {
                self.under_way = self.under_way.saturating_sub(1);
                Ok(())
            }
            Ok(Some(Event::Message(_))) => Err("a message that was not asked for".to_owned()),
            Ok(None) => Err("nothing moves any more".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits until all has landed.
    fn drain(&mut self, write: bool) -> Result<(), String> {
        while self.under_way > 0 {
            self.event()?;
        }
        if !write {
            return Ok(());
        }
        submit(self.channel.as_mut(), Op::Send(Bytes::from_static(b"?")))?;
        loop {
            match self.channel.poll(Some(PATIENCE)) {
                Ok(Some(Event::Message(_))) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) => return Err("what was written does not land".to_owned()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Microseconds for each of the pages that are read one after the other.
    pub(super) fn pages(&mut self, time: Duration) -> Result<Vec<f64>, String> {
        let mut all = Vec::new();
        let mut begun = Instant::now();
        let pages = LEN / PAGE;
        let mut page = 0;
        while all.len() <= WARM || begun.elapsed() < time {
            if all.len() == WARM {
                begun = Instant::now();
            }
            // Here and there.
            page = (page + 7919) % pages;
            let asked = Instant::now();
            let extents = vec![Extent {
                offset: page * PAGE,
                len: PAGE,
            }];
            let region = REGION;
            submit(self.channel.as_mut(), Op::Read { region, extents })?;
            self.under_way = 1;
            self.event()?;
            all.push(asked.elapsed().as_secs_f64() * 1e6);
        }
        Ok(all.split_off(WARM))
    }
}

/// The whole of the memory in pieces of `size` bytes, a MiB of them at a time.
fn operations(write: bool, size: u64) -> impl Iterator<Item = Op> + Clone {
    (0..LEN / MIB).map(move |mib| {
        // Every other piece from the front, then the rest: no two of them are neighbours.
        let pieces = MIB / size;
        let place = move |n: u64| (n * 2) % pieces + n * 2 / pieces;
        let extents = (0..pieces)
            .map(|n| Extent {
                offset: mib * MIB + place(n) * size,
                len: size,
            })
            .collect();
        let region = REGION;
        match write {
            true => Op::Write { region, extents },
            false => Op::Read { region, extents },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memory_is_moved_once() {
        for size in [PAGE, 65536, MIB] {
            let mut seen = vec![0; usize::try_from(LEN / size).unwrap_or(0)];
            for op in operations(true, size) {
                let Op::Write { extents, .. } = op else {
                    panic!("a write was asked for")
                };
                for extent in extents {
                    assert_eq!((extent.offset % size, extent.len), (0, size));
                    seen[usize::try_from(extent.offset / size).unwrap_or(0)] += 1;
                }
            }
            assert!(seen.iter().all(|times| *times == 1), "{size}");
        }
    }

    #[test]
    fn sizes_are_powers_of_two_up_to_a_mebibyte() {
        assert!([4096, 8192, MIB].into_iter().all(is_size));
        assert!(![0, 2048, 5000, 2 * MIB].into_iter().any(is_size));
    }
}
