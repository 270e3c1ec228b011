//! Vectors of memory that the kernel reads or writes in one call.
//!
//! They keep their memory alive (clones of regions and of bytes, owned buffers), so that handing one to the kernel and
//! holding on to it until the kernel is done is all that safety asks for. Guest memory is copied by the kernel only, in
//! `sendmsg`, `recvmsg` or `process_vm_readv`/`_writev` on ourselves: where the file behind it is full, that is an error
//! (`EFAULT`), while the same access by this process would be a `SIGBUS` that ends it and every migration with it.

use std::io;
use std::ops::Range;

use bytes::Bytes;

use crate::limits::MAX_IOVECS;
use crate::region::{Extent, Region};
use crate::stream::sender::Pieces;

/// Memory to send, in order.
#[derive(Default)]
pub(crate) struct Gather {
    iovecs: Vec<libc::iovec>,
    regions: Vec<Region>,
    bytes: Vec<Bytes>,
    buffer: Option<Vec<u8>>,
    len: usize,
}

// SAFETY: the pointers lead into memory that the fields beside them keep alive, and those may change threads.
unsafe impl Send for Gather {}

impl Gather {
    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The vector for the kernel.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Forgets the contents, keeps the allocations.
    pub(crate) fn clear(&mut self) {
        self.iovecs.clear();
        self.regions.clear();
        self.bytes.clear();
        self.len = 0;
    }

    /// The first `len` bytes of an owned buffer, which [`take_buffer`](Self::take_buffer) gives back.
    pub(crate) fn from_buffer(buffer: Vec<u8>, len: usize) -> Gather {
        let mut gather = Gather {
            len,
            ..Gather::default()
        };
        push(&mut gather.iovecs, buffer[..len].as_ptr().cast_mut(), len);
        gather.buffer = Some(buffer);
        gather
    }

    /// The owned buffer, if it was made from one. The vector is empty then.
    pub(crate) fn take_buffer(&mut self) -> Option<Vec<u8>> {
        self.clear();
        self.buffer.take()
    }

    /// Drops `n` bytes from the front: the kernel has them.
    pub(crate) fn advance(&mut self, n: usize) {
        self.len -= consume(&mut self.iovecs, n);
    }

    /// Copies all of it to `to`, which has as many bytes. The kernel copies.
    pub(crate) fn copy_to(&self, to: &mut [&mut [u8]]) -> io::Result<()> {
        let mut local = Vec::with_capacity(to.len());
        for piece in to {
            push(&mut local, piece.as_mut_ptr(), piece.len());
        }
        // SAFETY: the local pieces are writable memory that we hold exclusively, and the kernel writes nothing else. The
        // remote pieces are only read, and the kernel checks every address.
        let n = unsafe {
            libc::process_vm_readv(
                libc::getpid(),
                local.as_ptr(),
                local.len() as _,
                self.iovecs.as_ptr(),
                self.iovecs.len() as _,
                0,
            )
        };
        whole(n, self.len)
    }
}

impl Pieces for Gather {
    fn len(&self) -> usize {
        self.len
    }

    fn is_full(&self) -> bool {
        self.iovecs.len() == MAX_IOVECS
    }

    fn push_bytes(&mut self, bytes: Bytes) {
        if !bytes.is_empty() && !self.is_full() {
            push(&mut self.iovecs, bytes.as_ptr().cast_mut(), bytes.len());
            self.len += bytes.len();
            self.bytes.push(bytes);
        }
    }

    fn push_region(&mut self, region: &Region, extents: &[Extent], skip: u64, most: usize) {
        self.regions.push(region.clone());
        self.len += push_extents(&mut self.iovecs, region, extents, skip, most, MAX_IOVECS);
    }
}

/// Where received bytes go, in order: pieces of one region, then the free part of one owned buffer.
#[derive(Default)]
pub(crate) struct Scatter {
    iovecs: Vec<libc::iovec>,
    region: Option<Region>,
    buffer: Option<Vec<u8>>,
    len: usize,
}

// SAFETY: as for `Gather`.
unsafe impl Send for Scatter {}

impl Scatter {
    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The vector for the kernel.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Forgets the contents, keeps the allocation.
    pub(crate) fn clear(&mut self) {
        self.iovecs.clear();
        self.region = None;
        self.len = 0;
    }

    /// Adds pieces of a region from byte `skip` of the first extent on. One region at a time.
    pub(crate) fn push_region(
        &mut self,
        region: &Region,
        extents: &[Extent],
        skip: u64,
        most: usize,
    ) {
        debug_assert!(self.region.is_none(), "one region at a time");
        self.region = Some(region.clone());
        // One piece is left for a buffer.
        self.len += push_extents(
            &mut self.iovecs,
            region,
            extents,
            skip,
            most,
            MAX_IOVECS - 1,
        );
    }

    /// Adds `range` of an owned buffer, which [`take_buffer`](Self::take_buffer) gives back. One buffer at a time.
    pub(crate) fn push_buffer(&mut self, mut buffer: Vec<u8>, range: Range<usize>) {
        debug_assert!(self.buffer.is_none(), "one buffer at a time");
        let free = &mut buffer[range];
        push(&mut self.iovecs, free.as_mut_ptr(), free.len());
        self.len += free.len();
        self.buffer = Some(buffer);
    }

    /// Whether it ends in an owned buffer.
    pub(crate) fn has_buffer(&self) -> bool {
        self.buffer.is_some()
    }

    /// The owned buffer, if there is one. The vector is empty then.
    pub(crate) fn take_buffer(&mut self) -> Option<Vec<u8>> {
        self.clear();
        self.buffer.take()
    }

    /// Copies `from`, at most as much as fits, into the places. The kernel copies. Returns how much it was.
    pub(crate) fn copy_from(&mut self, from: &[u8]) -> io::Result<usize> {
        let n = from.len().min(self.len);
        let local = libc::iovec {
            iov_base: from.as_ptr().cast_mut().cast(),
            iov_len: n,
        };
        // SAFETY: `local` is only read. The remote pieces are mapped memory of a region or of a buffer, which we hold;
        // nothing refers to them as Rust references, and the kernel checks every address.
        let done = unsafe {
            libc::process_vm_writev(
                libc::getpid(),
                &local,
                1,
                self.iovecs.as_ptr(),
                self.iovecs.len() as _,
                0,
            )
        };
        whole(done, n)?;
        Ok(n)
    }
}

fn push(iovecs: &mut Vec<libc::iovec>, base: *mut u8, len: usize) {
    iovecs.push(libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    });
}

/// Adds pieces for `extents`; neighbours in memory become one piece. Returns the bytes added.
fn push_extents(
    iovecs: &mut Vec<libc::iovec>,
    region: &Region,
    extents: &[Extent],
    skip: u64,
    most: usize,
    most_iovecs: usize,
) -> usize {
    let mut skip = skip;
    let mut added = 0;
    let mut end: *mut u8 = std::ptr::null_mut();
    for extent in extents {
        let rest = Extent {
            offset: extent.offset + skip,
            len: extent.len - skip,
        };
        skip = 0;
        let (Some(base), Ok(len)) = (region.address(rest), usize::try_from(rest.len)) else {
            break;
        };
        let len = len.min(most - added);
        if len == 0 {
            break;
        }
        if base == end
            && let Some(last) = iovecs.last_mut()
        {
            last.iov_len += len;
        } else if iovecs.len() < most_iovecs {
            push(iovecs, base, len);
        } else {
            break;
        }
        end = base.wrapping_add(len);
        added += len;
    }
    added
}

/// Drops `n` bytes from the front, and returns `n`.
fn consume(iovecs: &mut Vec<libc::iovec>, n: usize) -> usize {
    let mut left = n;
    let mut gone = 0;
    for iovec in iovecs.iter_mut() {
        if iovec.iov_len > left {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(left);
            iovec.iov_len -= left;
            break;
        }
        left -= iovec.iov_len;
        gone += 1;
    }
    iovecs.drain(..gone);
    n
}

/// All or an error: a copy stops short where memory cannot be had.
fn whole(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(n) if n == wanted => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
