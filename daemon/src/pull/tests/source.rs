//! A source for the tests of fetching: memory whose every page tells its number, and threads that answer reads of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use transport::{
    Access, Address, Channel, Greeting, Listener, Region, RegionId, Regions, Security, connect,
};

use super::LIMIT;
use super::host_support::PAGE;

/// What a page holds at the source; never zero.
pub(super) fn byte(page: u64) -> u8 {
    u8::try_from(page % 251 + 1).unwrap()
}

/// One side's ends of a connection's data channels.
type Ends = Vec<Box<dyn Channel>>;

/// A source that listens on a unix socket.
pub(super) struct Source {
    memory: Region,
    listener: Listener,
    pub(super) path: PathBuf,
}

impl Source {
    pub(super) fn new(pages: u64) -> Source {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pagecopy-pull-{}-{number}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let memory = Region::anonymous(usize::try_from(pages * PAGE).unwrap()).unwrap();
        for page in 0..pages {
            let bytes = vec![byte(page); usize::try_from(PAGE).unwrap()];
            memory.copy_in(page * PAGE, &bytes);
        }
        Source {
            memory,
            listener: Listener::bind(&Address::Unix(path.clone())).unwrap(),
            path,
        }
    }

    /// Takes `count` channels that somebody dials meanwhile.
    pub(super) fn accept(&self, count: u16) -> Ends {
        let one = |_| {
            let pending = self.listener.accept(LIMIT).unwrap().expect("nobody dials");
            let regions = Regions::new();
            let access = Access {
                peer_writes: false,
                peer_reads: true,
            };
            regions.register(RegionId(0), self.memory.clone(), access);
            let admit = |_: &Greeting, _: &transport::Peer| Ok(regions);
            pending
                .establish(&Security::Plaintext, LIMIT, admit)
                .unwrap()
                .2
        };
        (0..count).map(one).collect()
    }

    /// A new connection: the destination's ends, and the source's.
    pub(super) fn connection(&self, count: u16, regions: &Regions) -> (Ends, Ends) {
        thread::scope(|scope| {
            let accepted = scope.spawn(|| self.accept(count));
            let dialled = dial(self.path.clone(), count, regions);
            (dialled, accepted.join().unwrap())
        })
    }
}

/// Dials a source; the replies land in `regions`.
pub(super) fn dial(path: PathBuf, count: u16, regions: &Regions) -> Ends {
    let address = Address::Unix(path);
    let one = |channel| {
        let greeting = Greeting {
            session: [9; 16],
            channel,
            channels: count,
        };
        connect(&address, &Security::Plaintext, &greeting, regions, LIMIT)
            .unwrap()
            .0
    };
    (0..count).map(one).collect()
}

/// Threads that answer reads, one for each channel. Dropped, they end and their channels close.
pub(super) struct Serving {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Box<dyn Channel>>>,
}

impl Serving {
    pub(super) fn new(channels: Ends) -> Serving {
        let stop = Arc::new(AtomicBool::new(false));
        let serve = |mut channel: Box<dyn Channel>| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                let look = Some(Duration::from_millis(10));
                while !stop.load(Ordering::Relaxed) && channel.poll(look).is_ok() {}
                channel
            })
        };
        Serving {
            threads: channels.into_iter().map(serve).collect(),
            stop,
        }
    }

    /// Answers nothing more, and says nothing of it either: the channels stay open.
    pub(super) fn silence(mut self) -> Ends {
        self.end()
    }

    fn end(&mut self) -> Ends {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.threads.drain(..).map(|thread| thread.join().unwrap());
        ended.collect()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end();
    }
}
