//! Guest memory that cannot be had: the file behind the mapping ends early, which the kernel treats like a full one.

#![allow(clippy::unwrap_used)]

use std::ffi::c_void;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{
    Access, Address, Channel, Error, Event, Extent, Greeting, Listener, Op, Region, RegionId,
    Regions, Security, Token, connect,
};

const PATIENCE: Duration = Duration::from_secs(10);
const LEN: usize = 1 << 20;
const REGION: RegionId = RegionId(0);
const FULL: Access = Access {
    peer_writes: true,
    peer_reads: true,
};

struct Mapping(*mut c_void);

// SAFETY: an address that only `drop` uses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `mapped`, and all regions over it are gone.
        unsafe { munmap(self.0, LEN) }.unwrap();
    }
}

/// A region of which the second half has no memory behind it.
fn half_a_region() -> Regions {
    let regions = Regions::new();
    let (region, file) = mapped(LEN / 2);
    regions.register(REGION, region.sent_from(file), FULL);
    regions
}

/// A region, and the file that is mapped, which has so many bytes.
fn mapped(len: usize) -> (Region, Arc<File>) {
    let file = File::from(memfd_create("mapped", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len as u64).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        mmap(
            std::ptr::null_mut(),
            LEN,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )
    }
    .unwrap();
    // SAFETY: mapped until `Mapping` is dropped; nobody but the kernel touches what is behind the end of the file.
    let region = unsafe { Region::new(base.cast(), LEN, Arc::new(Mapping(base))) };
    (region, Arc::new(file))
}

fn whole_region() -> Regions {
    let regions = Regions::new();
    regions.register(REGION, Region::anonymous(LEN).unwrap(), FULL);
    regions
}

/// One write of everything from `from` into `to`; the error at each end, of which the sending one has none if it has sent all.
fn write_all(
    security: &(Security, Security),
    from: &Regions,
    to: &Regions,
) -> (Option<Error>, Error) {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let address = listener.local_address();
    let greeting = Greeting {
        session: [0; 16],
        channel: 0,
        channels: 1,
    };
    std::thread::scope(|scope| {
        let acceptor = scope.spawn(|| {
            let pending = listener.accept(PATIENCE).unwrap().unwrap();
            let (_, _, channel) = pending
                .establish(&security.1, PATIENCE, |_, _| Ok(to.clone()))
                .unwrap();
            match last(channel) {
                Err(error) => error,
                Ok(event) => panic!("{event:?}"),
            }
        });
        let (mut channel, _) = connect(&address, &security.0, &greeting, from, PATIENCE).unwrap();
        let extents = vec![Extent {
            offset: 0,
            len: LEN as u64,
        }];
        channel
            .submit(
                Token(1),
                Op::Write {
                    region: REGION,
                    extents,
                },
            )
            .unwrap();
        (last(channel).err(), acceptor.join().unwrap())
    })
}

/// What happens on a channel, which is closed then.
fn last(mut channel: Box<dyn Channel>) -> Result<Option<Event>, Error> {
    channel.poll(Some(PATIENCE))
}

fn securities() -> [(Security, Security); 2] {
    [
        (Security::Plaintext, Security::Plaintext),
        crate::tls::tests::securities(),
    ]
}

#[test]
fn a_destination_without_memory_says_so() {
    for security in securities() {
        let (_, received) = write_all(&security, &whole_region(), &half_a_region());
        assert!(matches!(received, Error::NoMemory(_)), "{received:?}");
    }
}

#[test]
fn a_source_without_memory_fails_and_lives() {
    for security in securities() {
        let (sent, received) = write_all(&security, &half_a_region(), &whole_region());
        assert!(
            matches!(&sent, Some(Error::Io { what, .. }) if what.contains("guest's memory")),
            "{sent:?}"
        );
        assert!(
            matches!(
                received,
                Error::Io {
                    kind: ErrorKind::UnexpectedEof,
                    ..
                }
            ),
            "{received:?}"
        );
    }
}

#[test]
fn what_is_written_to_the_file_is_in_the_mapping() {
    for security in securities() {
        let from = whole_region();
        let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251).to_le_bytes()[0]).collect();
        from.get(REGION).unwrap().0.copy_in(0, &bytes);
        let (region, file) = mapped(LEN);
        let to = Regions::new();
        to.register(REGION, region.clone().backed_by(file), FULL);
        let (_, received) = write_all(&security, &from, &to);
        assert!(matches!(received, Error::Closed), "{received:?}");
        let mut got = vec![0; LEN];
        region.copy_out(0, &mut got);
        assert!(got == bytes);
    }
}

/// As one that is full: a write of no more than what there is room for.
#[test]
fn a_file_that_takes_nothing_is_blamed_on_this_host() {
    for security in securities() {
        let (region, file) = mapped(LEN);
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let to = Regions::new();
        to.register(REGION, region.backed_by(Arc::new(read_only)), FULL);
        let (_, received) = write_all(&security, &whole_region(), &to);
        assert!(
            matches!(&received, Error::NoMemory(what) if what.contains("the guest's RAM")),
            "{received:?}"
        );
    }
}
