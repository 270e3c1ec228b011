//! Encoders alone: 256 KiB of pages, as one message carries them, in bytes of guest memory a second.
//!
//! `cargo bench -p benches --bench encoders`. The pages are text-like: sixteen words of each, in any order.

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make public functions without words

use std::hint::black_box;
use std::io;
use std::sync::{Arc, Mutex};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pagecopy::engine::encoding::policy::Choice;
use pagecopy::engine::encoding::versions::Versions;
use pagecopy::host::encode::Encoder;
use pagecopy::host::{Digest, Ram};
use pagecopy::limits::MAX_ENCODED;
use pagecopy::memory::{BlockId, Piece, Run};

/// Memory that is one message of pages.
struct Pages(Vec<u8>);

impl Pages {
    fn text() -> Pages {
        let mut state = 1_u64;
        let words = (0..MAX_ENCODED / 8).flat_map(|word| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let page = (word as u64 / 512).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            page.rotate_left(u32::try_from(state >> 60).unwrap() * 4)
                .to_le_bytes()
        });
        Pages(words.collect())
    }
}

impl Ram for Pages {
    fn populated(&self, _: &mut Vec<Run>) -> io::Result<()> {
        Ok(())
    }

    fn is_zero(&self, _: BlockId, _: u64, _: u64) -> bool {
        false
    }

    fn read(&self, _: BlockId, offset: u64, into: &mut [u8]) {
        let at = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.0[at..at + into.len()]);
    }

    fn digests(&self, _: BlockId) -> io::Result<Vec<Digest>> {
        Ok(Vec::new())
    }

    fn page_digests(&self, _: BlockId, _: u64) -> Vec<Digest> {
        Vec::new()
    }
}

fn encoders(c: &mut Criterion) {
    let pages = Pages::text();
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Bytes(MAX_ENCODED as u64));
    let whole = vec![Piece {
        offset: 0,
        len: MAX_ENCODED as u64,
    }];
    for level in [-4, 1, 3, 5] {
        let mut encoder = Encoder::new(Arc::new(Mutex::new(Versions::new(0))));
        let choice = Choice {
            zstd: Some(level),
            delta: false,
        };
        group.bench_function(format!("zstd {level}"), |b| {
            b.iter(|| {
                black_box(encoder.encode(
                    &pages,
                    1,
                    choice,
                    BlockId(0),
                    whole.clone(),
                    &mut Vec::new(),
                ))
            });
        });
    }
    let mut encoder = Encoder::new(Arc::new(Mutex::new(Versions::new(1 << 20))));
    let choice = Choice {
        zstd: None,
        delta: true,
    };
    let mut round = 1;
    group.bench_function("delta, nothing changed", |b| {
        b.iter(|| {
            round += 1;
            black_box(encoder.encode(
                &pages,
                round,
                choice,
                BlockId(0),
                whole.clone(),
                &mut Vec::new(),
            ))
        });
    });
    group.finish();
}

criterion_group!(benches, encoders);
criterion_main!(benches);
