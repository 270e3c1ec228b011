//! Digests of RAM that nobody writes, to compare two sides: BLAKE3, cut to 16 bytes.
//!
//! Bytes are copied out of the mapping and hashed in the copy. Holes are digested as the zeroes that they read as, without being
//! touched: the digest of a page that is absent equals that of a page full of zeroes.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{MappedBlock, as_usize};
use crate::host::{Digest, threads};
use crate::limits::DIGEST_CHUNK;

/// Bytes copied out at a time: they stay in the second-level cache until they are hashed.
const COPY: usize = 128 << 10;

static ZEROES: [u8; COPY] = [0; COPY];

/// What a block holds, to be asked for by range.
struct Layout(Vec<Range<u64>>);

impl Layout {
    /// Lists what the block holds.
    fn of(block: &MappedBlock) -> io::Result<Layout> {
        let mut extents = Vec::new();
        block.populated(|extent| extents.push(extent))?;
        Ok(Layout(extents))
    }

    /// Takes all of the block for data.
    fn everything(block: &MappedBlock) -> Layout {
        Layout(std::iter::once(0..block.spec.size).collect())
    }

    /// The extents that reach into `range`.
    fn within(&self, range: &Range<u64>) -> &[Range<u64>] {
        let first = self.0.partition_point(|extent| extent.end <= range.start);
        let end = self.0.partition_point(|extent| extent.start < range.end);
        &self.0[first..end.max(first)]
    }
}

/// Digests of every chunk of a block, by as many threads as there are cores.
pub(super) fn chunks(block: &MappedBlock) -> io::Result<Vec<Digest>> {
    let layout = Layout::of(block)?;
    let count = block.spec.size.div_ceil(DIGEST_CHUNK);
    let next = AtomicU64::new(0);
    let work = |_| {
        let mut buffer = vec![0; COPY];
        let mut done = Vec::new();
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= count {
                return done;
            }
            done.push((
                chunk,
                digest(block, &layout, &chunk_range(block, chunk), &mut buffer),
            ));
        }
    };
    let done = threads::on_each(threads::cores(), work);
    let mut digests: Vec<(u64, Digest)> = done.into_iter().flatten().collect();
    digests.sort_unstable_by_key(|(chunk, _)| *chunk);
    Ok(digests.into_iter().map(|(_, digest)| digest).collect())
}

/// Digests of every page of a chunk; none for a chunk beyond the end.
pub(super) fn pages(block: &MappedBlock, chunk: u64) -> Vec<Digest> {
    // Where the file cannot be asked, everything is read: slower, and with the same digests.
    let layout = Layout::of(block).unwrap_or_else(|_| Layout::everything(block));
    let range = chunk_range(block, chunk);
    let mut buffer = vec![0; COPY];
    let mut digests = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start + block.spec.page_size);
        digests.push(digest(block, &layout, &(start..end), &mut buffer));
        start = end;
    }
    digests
}

/// The bytes of chunk `chunk`; empty when it is beyond the end.
fn chunk_range(block: &MappedBlock, chunk: u64) -> Range<u64> {
    let size = block.spec.size;
    let start = chunk.saturating_mul(DIGEST_CHUNK).min(size);
    start..size.min(start + DIGEST_CHUNK)
}

/// The digest of `range`.
fn digest(block: &MappedBlock, layout: &Layout, range: &Range<u64>, buffer: &mut [u8]) -> Digest {
    static EMPTY_CHUNK: OnceLock<Digest> = OnceLock::new();
    if range.end - range.start == DIGEST_CHUNK && layout.within(range).is_empty() {
        return *EMPTY_CHUNK.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            hash_zeroes(&mut hasher, DIGEST_CHUNK);
            finish(&hasher)
        });
    }
    let mut hasher = blake3::Hasher::new();
    let mut start = range.start;
    for data in layout.within(range) {
        let data = data.start.max(range.start)..data.end.min(range.end);
        hash_zeroes(&mut hasher, data.start - start);
        let mut at = data.start;
        while at < data.end {
            let step = as_usize(data.end - at).min(buffer.len());
            let bytes = &mut buffer[..step];
            block.map.copy_out(as_usize(at), bytes);
            hasher.update(bytes);
            at += step as u64;
        }
        start = data.end;
    }
    hash_zeroes(&mut hasher, range.end - start);
    finish(&hasher)
}

fn finish(hasher: &blake3::Hasher) -> Digest {
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Digest(short)
}

fn hash_zeroes(hasher: &mut blake3::Hasher, len: u64) {
    let mut rest = as_usize(len);
    while rest > 0 {
        let step = rest.min(ZEROES.len());
        hasher.update(&ZEROES[..step]);
        rest -= step;
    }
}
