//! A file of 64-bit words, mapped and shared with whoever maps it next.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Bytes of a word.
const WORD: u64 = u64::BITS as u64 / 8;

/// The words of a file from an offset on. What is written outlives this process: it is in the file at once.
#[derive(Debug)]
pub(crate) struct SharedWords {
    map: MmapRaw,
    words: usize,
}

impl SharedWords {
    /// Maps `words` words of `file` from `offset` (a multiple of 4096) on. The file must have them.
    pub(crate) fn new(file: &File, offset: u64, words: usize) -> io::Result<SharedWords> {
        let end = (words as u64)
            .checked_mul(WORD)
            .and_then(|bytes| bytes.checked_add(offset));
        if words == 0 || end.is_none_or(|end| file.metadata().is_ok_and(|data| data.len() < end)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = words * size_of::<AtomicU64>();
        let map = MmapOptions::new().offset(offset).len(len).map_raw(file)?;
        Ok(SharedWords { map, words })
    }

    /// Sets bits of a word, which is given as it was before. What this thread has written is seen by whoever sees the bits.
    pub(crate) fn set(&self, index: usize, bits: u64) -> u64 {
        self.word(index).fetch_or(bits, Ordering::Release)
    }

    /// A word.
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.words
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "no such word");
        let word = self
            .map
            .as_mut_ptr()
            .cast::<AtomicU64>()
            .wrapping_add(index);
        // SAFETY: inside the mapping, which lives as long as `self` and begins at a page, so the word is aligned. It is only
        // ever accessed as an atomic, by this process and by any other that maps the file as this type does.
        unsafe { &*word }
    }
}
