//! Guest memory that cannot be had: the file behind the mapping ends early, which the kernel treats like a full one.

#![allow(clippy::unwrap_used)]

use std::ffi::c_void;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{
    Access, Address, Channel, Error, Event, Extent, Greeting, Listener, Op, Region, RegionId,
    Regions, Security, Token, connect,
};

const PATIENCE: Duration = Duration::from_secs(10);
const LEN: usize = 1 << 20;
const REGION: RegionId = RegionId(0);

struct Mapping(*mut c_void);

// SAFETY: an address that only `drop` uses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `half_a_region`, and all regions over it are gone.
        unsafe { munmap(self.0, LEN) }.unwrap();
    }
}

/// A region of which the second half has no memory behind it.
fn half_a_region() -> Regions {
    let file = memfd_create("half", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, LEN as u64 / 2).unwrap();
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
    // SAFETY: mapped until `Mapping` is dropped; nobody but the kernel touches the second half.
    let region = unsafe { Region::new(base.cast(), LEN, Arc::new(Mapping(base))) };
    let regions = Regions::new();
    regions.register(
        REGION,
        region,
        Access {
            peer_writes: true,
            peer_reads: true,
        },
    );
    regions
}

fn whole_region() -> Regions {
    let regions = Regions::new();
    regions.register(
        REGION,
        Region::anonymous(LEN).unwrap(),
        Access {
            peer_writes: true,
            peer_reads: true,
        },
    );
    regions
}

/// One write of everything from `from` into `to`; the error at each end.
fn write_all(security: &(Security, Security), from: &Regions, to: &Regions) -> (Error, Error) {
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
            last_error(channel)
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
        (last_error(channel), acceptor.join().unwrap())
    })
}

fn last_error(mut channel: Box<dyn Channel>) -> Error {
    loop {
        match channel.poll(Some(PATIENCE)) {
            Ok(Some(Event::Sent(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => return error,
        }
    }
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
            matches!(&sent, Error::Io { what, .. } if what.contains("guest's memory")),
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
