//! Whether guest memory is zero, as fast as memory can be read.
//!
//! Three variants of one loop: 512-bit and 256-bit vectors where the processor has them, 64-bit words elsewhere. All reads
//! are volatile, since the guest may write at the same time; the answer is about some moment during the call. Each loop
//! ends at the first block of 256 bytes that is not zero.

use std::ptr;

/// Bytes looked at between two decisions.
const STEP: usize = 256;
/// What the address and the length are multiples of.
const UNIT: usize = 64;

/// Whether `len` bytes at `at` are zero.
///
/// # Panics
/// When `at` or `len` is not a multiple of 64.
///
/// # Safety
/// The bytes are mapped readable for the length of the call.
pub(crate) unsafe fn is_zero(at: *const u8, len: usize) -> bool {
    assert!(
        at.addr().is_multiple_of(UNIT) && len.is_multiple_of(UNIT),
        "guest memory is tested in lines"
    );
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions; the memory is the caller's promise.
            return unsafe { is_zero_avx512(at, len) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { is_zero_avx2(at, len) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { is_zero_words(at, len) }
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
    use super::*;

    #[repr(align(64))]
    struct Page([u8; 8192]);

    /// All variants that this processor has.
    fn answers(at: *const u8, len: usize) -> Vec<bool> {
        let mut answers = Vec::new();
        // SAFETY: the callers pass a range of a live page; the features are looked up.
        unsafe {
            answers.push(is_zero(at, len));
            answers.push(is_zero_words(at, len));
            #[cfg(target_arch = "x86_64")]
            {
                if std::arch::is_x86_feature_detected!("avx2") {
                    answers.push(is_zero_avx2(at, len));
                }
                if std::arch::is_x86_feature_detected!("avx512f") {
                    answers.push(is_zero_avx512(at, len));
                }
            }
        }
        answers
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
        let mut page = Page([0; 8192]);
        for units in 0..=10 {
            let (start, len) = (1024, units * UNIT);
            page.0[start - 1] = 0xFF;
            page.0[start + len] = 0xFF;
            let at = page.0[start..].as_ptr();
            assert!(answers(at, len).iter().all(|zero| *zero), "{len} bytes");
            page.0[start + len] = 0;
        }
    }
}
