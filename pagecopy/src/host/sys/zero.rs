//! Whether guest memory is zero, as fast as memory can be read.
//!
//! Three variants of one loop: 512-bit and 256-bit vectors where the processor has them, 64-bit words elsewhere. All reads
//! are volatile, since the guest may write at the same time; the answer is about some moment during the call. Each loop
//! ends at the first block of 256 bytes that is not zero. What is before the first line of 64 bytes and behind the last one
//! goes byte by byte: pages have none of it.

use std::ptr;

/// Bytes looked at between two decisions.
const STEP: usize = 256;
/// What the address and the length of a loop are multiples of.
const UNIT: usize = 64;

/// One of the loops below.
type Loop = unsafe fn(*const u8, usize) -> bool;

/// Whether `len` bytes at `at` are zero.
///
/// # Safety
/// The bytes are mapped readable for the length of the call.
pub(crate) unsafe fn is_zero(at: *const u8, len: usize) -> bool {
    // SAFETY: the loop is one that the processor has the instructions of; the memory is the caller's promise.
    unsafe { is_zero_by(fastest(), at, len) }
}

/// The best of the loops on this processor.
fn fastest() -> Loop {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return is_zero_avx512;
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return is_zero_avx2;
        }
    }
    is_zero_words
}

/// Whole lines by `lines`, the rest by bytes.
///
/// # Safety
/// As [`is_zero`]; the processor has the instructions of `lines`.
unsafe fn is_zero_by(lines: Loop, at: *const u8, len: usize) -> bool {
    let head = at.align_offset(UNIT).min(len);
    let body = (len - head) / UNIT * UNIT;
    let tail = len - head - body;
    let (middle, end) = (at.wrapping_add(head), at.wrapping_add(head + body));
    // SAFETY: the three parts make up the caller's range; the middle one begins at a multiple of 64, if it is not empty, and
    // has a multiple of 64 bytes.
    unsafe { is_zero_bytes(at, head) && lines(middle, body) && is_zero_bytes(end, tail) }
}

/// Byte by byte.
///
/// # Safety
/// As [`is_zero`].
unsafe fn is_zero_bytes(at: *const u8, len: usize) -> bool {
    // SAFETY: `byte < len`, so the byte is inside the caller's range.
    (0..len).all(|byte| unsafe { ptr::read_volatile(at.wrapping_add(byte)) } == 0)
}

/// With 64-bit words.
///
/// # Safety
/// As [`is_zero`]; address and length are multiples of 64.
unsafe fn is_zero_words(at: *const u8, len: usize) -> bool {
    let words = at.cast::<u64>();
    let mut done = 0;
    while done < len {
        let end = len.min(done + STEP);
        let mut seen = 0;
        while done < end {
            // SAFETY: `done < len`, a multiple of eight, so the word is inside the range and aligned.
            seen |= unsafe { ptr::read_volatile(words.wrapping_add(done / 8)) };
            done += 8;
        }
        if seen != 0 {
            return false;
        }
    }
    true
}

/// With 256-bit vectors.
///
/// # Safety
/// As [`is_zero`]; address and length are multiples of 64; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(at: *const u8, len: usize) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256};
    let vectors = at.cast::<__m256i>();
    let mut done = 0;
    while done < len {
        let end = len.min(done + STEP);
        let mut seen = _mm256_setzero_si256();
        while done < end {
            // SAFETY: `done < len`, a multiple of 32, so the vector is inside the range and aligned.
            let vector = unsafe { ptr::read_volatile(vectors.wrapping_add(done / 32)) };
            seen = _mm256_or_si256(seen, vector);
            done += 32;
        }
        if _mm256_testz_si256(seen, seen) == 0 {
            return false;
        }
    }
    true
}

/// With 512-bit vectors.
///
/// # Safety
/// As [`is_zero`]; address and length are multiples of 64; the processor has AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn is_zero_avx512(at: *const u8, len: usize) -> bool {
    use std::arch::x86_64::{
        __m512i, _mm512_or_si512, _mm512_setzero_si512, _mm512_test_epi64_mask,
    };
    let vectors = at.cast::<__m512i>();
    let mut done = 0;
    while done < len {
        let end = len.min(done + STEP);
        let mut seen = _mm512_setzero_si512();
        while done < end {
            // SAFETY: `done < len`, a multiple of 64, so the vector is inside the range and aligned.
            let vector = unsafe { ptr::read_volatile(vectors.wrapping_add(done / 64)) };
            seen = _mm512_or_si512(seen, vector);
            done += 64;
        }
        if _mm512_test_epi64_mask(seen, seen) != 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[repr(align(64))]
    struct Page([u8; 8192]);

    /// All variants that this processor has.
    fn answers(at: *const u8, len: usize) -> Vec<bool> {
        let mut loops: Vec<Loop> = vec![is_zero_words, fastest()];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") {
                loops.push(is_zero_avx2);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                loops.push(is_zero_avx512);
            }
        }
        // SAFETY: the callers pass a range of a live page; the features were looked up.
        let answer = |lines| unsafe { is_zero_by(lines, at, len) };
        loops.into_iter().map(answer).collect()
    }

    #[test]
    fn every_variant_sees_every_single_bit() {
        let mut page = Page([0; 8192]);
        for position in 0..4096 {
            page.0[position] = 1 << (position % 8);
            assert!(
                answers(page.0.as_ptr(), 4096).iter().all(|zero| !zero),
                "byte {position}"
            );
            page.0[position] = 0;
        }
        assert!(answers(page.0.as_ptr(), 4096).iter().all(|zero| *zero));
    }

    #[test]
    fn no_variant_looks_outside() {
        let mut page = Page([0xFF; 8192]);
        for start in 1000..1100 {
            for len in 0..200 {
                page.0[start..start + len].fill(0);
                let at = page.0[start..].as_ptr();
                assert!(
                    answers(at, len).iter().all(|zero| *zero),
                    "{len} bytes at {start}"
                );
                page.0[start..start + len].fill(0xFF);
            }
        }
    }

    proptest! {
        #[test]
        fn all_variants_say_the_same_of_any_slice(
            start in 0..300_usize,
            len in 0..2000_usize,
            set in prop::collection::vec((0..2500_usize, 1..=255_u8), 0..3),
        ) {
            let mut page = Page([0; 8192]);
            for (position, byte) in set {
                page.0[position] = byte;
            }
            let is_zero = page.0[start..start + len].iter().all(|byte| *byte == 0);
            let answers = answers(page.0[start..].as_ptr(), len);
            prop_assert!(answers.iter().all(|answer| *answer == is_zero), "{answers:?}");
        }
    }
}
