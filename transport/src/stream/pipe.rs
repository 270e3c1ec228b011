//! A pipe between a region's file and a socket: pages go from the file to the network without being copied, and come from there with
//! one copy, by the kernel.
//!
//! A `splice` from a file into a pipe puts references to the file's pages there, and one from the pipe into a socket hands them to
//! the network, which reads them when it sends (splice(2)). No processor touches the bytes on the way, on any link, and nothing has to
//! be pinned or waited for, as with `MSG_ZEROCOPY`. What the guest writes meanwhile may or may not go along: its dirty bit is set
//! again, as with a torn page.
//!
//! The other way, what has arrived goes from the socket to the pipe by reference, and from there into the file as a write does.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::backing::each_run;
use crate::region::{Extent, Region};
use crate::stream::sender::Pieces;

/// Sizes asked for, in bytes: twice a megabyte's pages, so that a megabyte and its header go at once, or what anybody may have
/// (`/proc/sys/fs/pipe-max-size`). Less is not worth it.
const SIZES: [usize; 2] = [2 << 20, 1 << 20];

/// A file whose first bytes are those of a region, and which pages may be taken from.
#[derive(Debug)]
pub(crate) struct Outlet {
    file: Arc<File>,
    /// The file system does not do it.
    refused: AtomicBool,
}

impl Outlet {
    pub(crate) fn new(file: Arc<File>) -> Outlet {
        Outlet {
            file,
            refused: AtomicBool::new(false),
        }
    }

    /// Whether there is any use in trying.
    pub(crate) fn is_open(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }
}

/// Pages, and a few bytes between them, on their way to a socket.
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes in it.
    len: usize,
    /// It took less than it was given.
    full: bool,
}

impl Pipe {
    /// An empty pipe, or none where this process may not have one that is large enough.
    pub(crate) fn new() -> Option<Pipe> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        SIZES
            .iter()
            .find(|size| fcntl_setpipe_size(&write, **size).is_ok())?;
        Some(Pipe {
            read,
            write,
            len: 0,
            full: false,
        })
    }

    /// Bytes in it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The end that the socket reads from.
    pub(crate) fn read_end(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    /// The socket has taken `n` bytes.
    pub(crate) fn taken(&mut self, n: usize) {
        self.len -= n;
        self.full = false;
    }

    /// Takes at most `most` bytes that have arrived at `socket`, which has some. Returns how many; none: its end.
    pub(crate) fn receive(&mut self, socket: impl AsFd, most: usize) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let n = splice(socket, None, &self.write, None, most, flags)?;
        self.len += n;
        Ok(n)
    }

    /// Moves `len` bytes of it to `offset` of `file`: the kernel copies them there. On an error some of them have gone.
    pub(crate) fn move_to(&mut self, file: &File, mut offset: u64, len: usize) -> io::Result<()> {
        let mut left = len.min(self.len);
        while left > 0 {
            let flags = SpliceFlags::MOVE;
            match retry_on_intr(|| splice(&self.read, None, file, Some(&mut offset), left, flags))?
            {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => {
                    left -= n;
                    self.taken(n);
                }
            }
        }
        Ok(())
    }

    /// All bytes in it.
    pub(crate) fn read_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        let mut got = 0;
        while got < bytes.len() {
            match retry_on_intr(|| read(&self.read, &mut bytes[got..]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => got += n,
            }
        }
        self.taken(got);
        Ok(bytes)
    }

    /// Puts `len` bytes of `file` from `offset` on into it, or as many as it has room for.
    fn push_file(&mut self, file: &File, mut offset: u64, len: usize) -> Result<(), Errno> {
        let mut left = len;
        // A splice may stop short of both ends, and goes on then.
        while left > 0 && !self.full {
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            match retry_on_intr(|| splice(file, Some(&mut offset), &self.write, None, left, flags))
            {
                Ok(0) => return Err(Errno::NODATA),
                Ok(n) => {
                    self.len += n;
                    left -= n;
                }
                Err(Errno::AGAIN) => self.full = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Pieces for Pipe {
    fn len(&self) -> usize {
        self.len
    }

    fn is_full(&self) -> bool {
        self.full
    }

    fn push_bytes(&mut self, bytes: Bytes) {
        if !bytes.is_empty() && !self.full {
            // Nothing went where there is no room.
            let n = retry_on_intr(|| write(&self.write, &bytes)).unwrap_or(0);
            self.len += n;
            self.full = n < bytes.len();
        }
    }

    fn push_region(&mut self, region: &Region, extents: &[Extent], skip: u64, most: usize) {
        let Some(outlet) = region.outlet() else {
            self.full = true;
            return;
        };
        let put = each_run(extents, skip, most, |offset, len| {
            Ok(self.push_file(&outlet.file, offset, len)?)
        });
        if put.is_err() {
            // Whoever copies instead meets the same error again, or none.
            outlet.refused.store(true, Ordering::Relaxed);
            self.full = true;
        }
    }
}

#[cfg(test)]
mod tests;
