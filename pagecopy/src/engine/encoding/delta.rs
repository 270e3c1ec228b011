//! A page as what differs from another version of it: XBZRLE's idea, in words and cache lines.
//!
//! ```text
//! crc32c of the page that results, u32 | lines that differ, u64 | for each of them: words that differ, u8 | the words, u64 each
//! ```
//!
//! A page that did not change is 12 bytes; one with one word changed, 21. Comparing goes by lines of 64 bytes, which
//! compilers make vector instructions of. The checksum is of the result, so that a delta against another version than the one it
//! was made from ends in an error, never in a wrong page.

use super::{Page, UNIT};

/// Bytes of a line.
const LINE: usize = 64;
/// Bytes of a word.
const WORD: usize = 8;
/// Bytes of a delta in which nothing differs.
pub const SMALLEST: usize = 4 + 8;

const _: () = assert!(UNIT / LINE == u64::BITS as usize);

/// Why bytes are no delta of a page. The sender's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It ends inside a field.
    #[error("a delta is cut short")]
    Truncated,
    /// A line is said to differ, and no word in it.
    #[error("a delta names a line in which no word differs")]
    EmptyLine,
    /// The result is not the page that was sent.
    #[error("a delta does not fit the version of the page that is here")]
    Misfit,
}

/// Appends the delta from `base` to `page` to `out`, if it has at most `limit` bytes. False: it would have more, and `out` is
/// as before.
pub fn encode(base: &Page, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.extend_from_slice(&crc32c::crc32c(page).to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    let mut lines = 0_u64;
    for (number, (old, new)) in base
        .chunks_exact(LINE)
        .zip(page.chunks_exact(LINE))
        .enumerate()
    {
        if old == new {
            continue;
        }
        lines |= 1 << number;
        encode_line(old, new, out);
        if out.len() - start > limit {
            out.truncate(start);
            return false;
        }
    }
    out[start + 4..start + SMALLEST].copy_from_slice(&lines.to_le_bytes());
    if out.len() - start > limit {
        out.truncate(start);
        return false;
    }
    true
}

fn encode_line(old: &[u8], new: &[u8], out: &mut Vec<u8>) {
    let at = out.len();
    out.push(0);
    let mut words = 0;
    for (number, (old, new)) in old
        .chunks_exact(WORD)
        .zip(new.chunks_exact(WORD))
        .enumerate()
    {
        if old != new {
            words |= 1 << number;
            out.extend_from_slice(new);
        }
    }
    out[at] = words;
}

/// Takes one delta off the front of `input` and makes of `page`, the version before, the one after.
///
/// # Errors
/// [`DeltaError`]; what is in `page` then means nothing.
pub fn apply(page: &mut Page, input: &mut &[u8]) -> Result<(), DeltaError> {
    let crc = u32::from_le_bytes(take(input)?);
    let mut lines = u64::from_le_bytes(take(input)?);
    while lines != 0 {
        let line = lines.trailing_zeros() as usize * LINE;
        lines &= lines - 1;
        let [mut words] = take(input)?;
        if words == 0 {
            return Err(DeltaError::EmptyLine);
        }
        while words != 0 {
            let at = line + words.trailing_zeros() as usize * WORD;
            words &= words - 1;
            page[at..at + WORD].copy_from_slice(&take::<WORD>(input)?);
        }
    }
    if crc32c::crc32c(page) == crc {
        Ok(())
    } else {
        Err(DeltaError::Misfit)
    }
}

fn take<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], DeltaError> {
    let (head, tail) = input.split_first_chunk().ok_or(DeltaError::Truncated)?;
    *input = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn page(words: &[(usize, u64)]) -> Box<Page> {
        let mut page = Box::new([0x5A; UNIT]);
        for (at, word) in words {
            let at = at % (UNIT / WORD) * WORD;
            page[at..at + WORD].copy_from_slice(&word.to_le_bytes());
        }
        page
    }

    fn words() -> impl Strategy<Value = Vec<(usize, u64)>> {
        prop::collection::vec((0..UNIT / WORD, any::<u64>()), 0..600)
    }

    proptest! {
        #[test]
        fn applied_to_its_base_it_is_the_page(old in words(), new in words()) {
            let (base, page) = (page(&old), page(&new));
            let mut out = vec![1, 2, 3];
            prop_assert!(encode(&base, &page, 2 * UNIT, &mut out));
            out.push(9);
            let (mut result, mut input) = (base, &out[3..]);
            prop_assert_eq!(apply(&mut result, &mut input), Ok(()));
            prop_assert!(result == page);
            prop_assert_eq!(input, [9]);
        }

        #[test]
        fn hostile_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut page = page(&[]);
            let _ = apply(&mut page, &mut bytes.as_slice());
        }

        #[test]
        fn a_limit_is_kept_and_nothing_is_left_behind(new in words(), limit in 0..UNIT) {
            let (base, page) = (page(&[]), page(&new));
            let mut out = vec![7];
            let fits = encode(&base, &page, limit, &mut out);
            let kept = if fits { out.len() - 1 <= limit } else { out == [7] };
            prop_assert!(kept);
        }
    }

    #[test]
    fn what_hardly_changed_is_small() {
        let base = page(&[]);
        let mut out = Vec::new();
        assert!(encode(&base, &base, UNIT, &mut out));
        assert_eq!(out.len(), SMALLEST);
        out.clear();
        assert!(encode(&base, &page(&[(511, 1)]), UNIT, &mut out));
        assert_eq!(out.len(), 21);
    }

    #[test]
    fn another_version_does_not_fit() {
        let (base, page, other) = (page(&[]), page(&[(3, 1)]), page(&[(100, 8)]));
        let mut out = Vec::new();
        assert!(encode(&base, &page, UNIT, &mut out));
        let mut result = other;
        assert_eq!(
            apply(&mut result, &mut out.as_slice()),
            Err(DeltaError::Misfit)
        );
    }

    #[test]
    fn a_line_without_words_is_refused() {
        let bytes = [[0; 4].as_slice(), &1_u64.to_le_bytes(), &[0]].concat();
        assert_eq!(
            apply(&mut page(&[]), &mut bytes.as_slice()),
            Err(DeltaError::EmptyLine)
        );
    }
}
