//! The file behind a region, written to instead of the mapping.
//!
//! A page that is not there yet costs a page fault, and is cleared before it is overwritten, when bytes are put into a mapping of
//! it. A write to the file of all of the page does without both: on tmpfs that takes about half of the processor time. But
//! the kernel lets one write at a time into a file, and where a host has many channels at work that would be too slow for
//! all of them: so one writes, one waits for that, and the others use the mapping meanwhile. So does whoever has little to
//! write, which a page fault may wait for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::region::Extent;
use crate::stream::pipe::Pipe;

/// Those who write and who wait for their turn.
const MOST: usize = 2;
/// Fewer bytes wait for nobody.
const SHORT: usize = 64 << 10;

/// A file whose first bytes are those of a region, and which takes writes.
#[derive(Debug)]
pub(crate) struct Backing {
    file: Arc<File>,
    /// Who writes or waits now.
    users: AtomicUsize,
    turn: Mutex<()>,
    /// Its file system takes nothing out of a pipe.
    refuses_pipes: AtomicBool,
}

impl Backing {
    pub(crate) fn new(file: Arc<File>) -> Backing {
        Backing {
            file,
            users: AtomicUsize::new(0),
            turn: Mutex::new(()),
            refuses_pipes: AtomicBool::new(false),
        }
    }

    /// Whether there is any use in trying [`write_pipe`](Self::write_pipe).
    pub(crate) fn takes_pipes(&self) -> bool {
        !self.refuses_pipes.load(Ordering::Relaxed)
    }

    /// Whether a write would have to wait for more than one other.
    pub(crate) fn is_busy(&self) -> bool {
        self.users.load(Ordering::Relaxed) >= MOST
    }

    /// Writes `bytes`, at most as many as `extents` have from byte `skip` of the first of them on. Returns how many those were;
    /// nothing is written, and it is `None`, when too many others are at it, or one is and there is little to write.
    pub(crate) fn write(
        &self,
        extents: &[Extent],
        skip: u64,
        bytes: &[u8],
    ) -> Option<io::Result<usize>> {
        self.in_turn(bytes.len(), |file| {
            let mut left = bytes;
            each_run(extents, skip, bytes.len(), |offset, len| {
                let (these, behind) = left.split_at(len);
                left = behind;
                file.write_all_at(these, offset)
            })
        })
    }

    /// The same with all that is in `pipe`. `None`, and the pipe as it was, also where the file system cannot do it.
    pub(crate) fn write_pipe(
        &self,
        extents: &[Extent],
        skip: u64,
        pipe: &mut Pipe,
    ) -> Option<io::Result<usize>> {
        let whole = pipe.len();
        let written = self.in_turn(whole, |file| {
            each_run(extents, skip, whole, |offset, len| {
                pipe.move_to(file, offset, len)
            })
        })?;
        let refused = matches!(&written, Err(e) if e.kind() == io::ErrorKind::InvalidInput);
        if refused && pipe.len() == whole {
            self.refuses_pipes.store(true, Ordering::Relaxed);
            return None;
        }
        Some(written)
    }

    fn in_turn<T>(&self, bytes: usize, write: impl FnOnce(&File) -> T) -> Option<T> {
        let _user = self.enter()?;
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::WouldBlock) if bytes < SHORT => return None,
            Err(_) => self.turn.lock().unwrap_or_else(PoisonError::into_inner),
        };
        Some(write(&self.file))
    }

    fn enter(&self) -> Option<User<'_>> {
        let enter = |users| (users < MOST).then_some(users + 1);
        self.users
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter)
            .ok()?;
        Some(User(&self.users))
    }
}

/// Somebody who writes or waits, until it is dropped.
struct User<'a>(&'a AtomicUsize);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Calls `each` for the first `bytes` bytes of `extents` from byte `skip` of the first of them on, for neighbours at once. Returns how
/// many those were.
pub(crate) fn each_run(
    extents: &[Extent],
    skip: u64,
    bytes: usize,
    mut each: impl FnMut(u64, usize) -> io::Result<()>,
) -> io::Result<usize> {
    let mut left = bytes;
    let mut extents = extents.iter().peekable();
    let mut skip = skip;
    while let Some(first) = extents.next().filter(|_| left > 0) {
        let offset = first.offset + skip;
        let mut len = first.len - std::mem::take(&mut skip);
        while let Some(next) = extents.next_if(|next| next.offset == offset + len) {
            len += next.len;
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(left);
        each(offset, len)?;
        left -= len;
    }
    Ok(bytes - left)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn file() -> Arc<File> {
        Arc::new(memfd_create("backing", MemfdFlags::CLOEXEC).unwrap().into())
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn bytes_go_where_the_extents_are() {
        let extent = |offset, len| Extent { offset, len };
        let extents = [extent(8, 3), extent(11, 2), extent(2, 2), extent(20, 1)];
        for cut in 0..=8 {
            let file = file();
            let backing = Backing::new(Arc::clone(&file));
            let bytes = b"abcdefgh";
            let first = backing.write(&extents, 0, &bytes[..cut]).unwrap().unwrap();
            assert_eq!(first, cut);
            // As the receiver steps on.
            let (mut at, mut skip) = (0, 0);
            crate::stream::sender::skip(&extents, cut as u64, &mut at, &mut skip);
            let second = backing.write(&extents[at..], skip, &bytes[cut..]).unwrap();
            assert_eq!(second.unwrap(), 8 - cut);
            let mut expected = vec![0; 21];
            expected[8..13].copy_from_slice(b"abcde");
            expected[2..4].copy_from_slice(b"fg");
            expected[20] = b'h';
            assert_eq!(contents(&file), expected, "{cut}");
        }
        // More than there is room for is left.
        let backing = Backing::new(file());
        let written = backing.write(&extents[3..], 0, b"xyz").unwrap();
        assert_eq!(written.unwrap(), 1);
    }

    #[test]
    fn one_writes_one_waits_and_the_others_are_sent_away() {
        let backing = Backing::new(file());
        let extents = [Extent { offset: 0, len: 1 }];
        let first = backing.enter().unwrap();
        assert!(!backing.is_busy());
        let second = backing.enter().unwrap();
        assert!(backing.is_busy() && backing.write(&extents, 0, b"x").is_none());
        drop(first);
        assert!(backing.write(&extents, 0, b"x").unwrap().is_ok());
        drop(second);
        assert!(!backing.is_busy());
        let turn = backing.turn.lock().unwrap();
        assert!(backing.write(&extents, 0, b"x").is_none());
        drop(turn);
        assert!(backing.write(&extents, 0, b"x").unwrap().is_ok());
    }
}
