//! A disk read by direct I/O whose data come when the test says so.
//!
//! Direct I/O pins the pages that it will write into and then lets the device write there, past every page table. io_uring's
//! fixed buffers are pinned in the same way, and a read from a pipe into one waits for its data as a read from a disk does.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::Map;

/// A read in flight. Its pages are pinned until it is finished or dropped.
pub struct DiskRead {
    ring: IoUring,
    disk: File,
    len: usize,
    /// What the kernel reads from; open as long as the read is in flight.
    _source: File,
}

impl DiskRead {
    /// Pins `len` bytes of `map` (at most a pipe's 4096) and starts to read into them.
    pub fn start(map: &Map, offset: u64, len: usize) -> DiskRead {
        let (source, disk) = super::super::pipe();
        let at = map.at(offset..offset + len as u64);
        let mut ring = IoUring::new(2).unwrap();
        let buffer = libc::iovec {
            iov_base: at.cast(),
            iov_len: len,
        };
        // SAFETY: checked to be inside the mapping, which lives as long as its process.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
        let fd = types::Fd(source.as_raw_fd());
        let read = opcode::ReadFixed::new(fd, at, u32::try_from(len).unwrap(), 0).build();
        // SAFETY: the buffer is the registered one; the pipe outlives the ring's use of it.
        unsafe { ring.submission().push(&read) }.unwrap();
        ring.submit().unwrap();
        DiskRead {
            ring,
            disk,
            len,
            _source: source,
        }
    }

    /// Has the data come, all of them `byte`; returns when they have landed.
    pub fn finish(mut self, byte: u8) {
        self.disk.write_all(&vec![byte; self.len]).unwrap();
        self.ring.submit_and_wait(1).unwrap();
        let landed = self.ring.completion().next().unwrap().result();
        assert_eq!(usize::try_from(landed), Ok(self.len));
    }
}
