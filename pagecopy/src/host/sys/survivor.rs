//! A child process that finishes a piece of work even if this process is killed meanwhile, and lays the result down for it.
//!
//! The child has its own copy of the memory, so that neither the death of this process nor what the out-of-memory killer
//! does to it (it ends every process that shares the victim's memory) touches the child. It shares the descriptor table:
//! what it opens is open here, and open as long as one of the two lives. It leads a process group of its own, so that a signal to this process's group or from its
//! terminal does not reach it; it has every signal blocked, asks the kernel to spare it when memory runs out, and asks for
//! the processor ahead of all ordinary programs, for somebody waits. What it asks for takes capabilities (CAP_SYS_RESOURCE,
//! CAP_SYS_NICE), and it does without where it is refused.
//!
//! Its end sends no signal, and only a wait that asks for such children finds it: nobody else's handling of SIGCHLD sees it.
//!
//! **What the child may do**: other threads of this process do not exist in it, but the locks they held do, for ever. So
//! the work takes no lock, allocates nothing (the allocator has locks), logs nothing, cannot panic, and drops no descriptor
//! that it has not opened itself (that would close it in this process). Breaking these rules hangs the child; it does not
//! make memory unsafe. The answer is made of numbers and descriptors, for there are two memories.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

const WORKING: u32 = 0;
/// The answer is there; the parent takes it.
const DONE: u32 = 1;
/// The parent has given up; the child takes the answer back.
const GIVEN_UP: u32 = 2;

/// What became of the work.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    /// It was done.
    Done(T),
    /// The child ended without an answer: it was killed.
    Killed,
    /// The child still works. It finishes on its own, and takes its answer back.
    Late,
}

/// A child process at work.
#[derive(Debug)]
pub(crate) struct Survivor<T> {
    handle: OwnedFd,
    note: Note<T>,
}

impl<T> Survivor<T> {
    /// Starts a child that does `work`, which obeys the rules above. An answer that nobody waits for any more is dropped
    /// by the child, and with it what it has opened.
    ///
    /// # Errors
    /// No process, descriptor or memory is left.
    pub(crate) fn start(work: &mut impl FnMut() -> T) -> io::Result<Survivor<T>> {
        let note = Note::new()?;
        let mut handle = -1;
        let flags = libc::CLONE_FILES | libc::CLONE_PIDFD;
        // Before the child exists, for it must not run handlers: they would act on what it shares with this process.
        let masked = Masked::all();
        // SAFETY: without CLONE_VM this is a fork: the child goes on here on its own copy of this stack, and leaves by
        // `_exit` without returning. The kernel writes the new descriptor into `handle`. No exit signal is asked for.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut handle, 0, 0) };
        if pid == 0 {
            prepare();
            drop(note.lay_down(work()));
            // SAFETY: ends the child without running anything of its parent's.
            unsafe { libc::_exit(0) }
        }
        let failed = io::Error::last_os_error();
        drop(masked);
        if pid < 0 {
            return Err(failed);
        }
        // SAFETY: a new descriptor that the kernel made for this process and that nothing else knows.
        let handle = unsafe { OwnedFd::from_raw_fd(handle) };
        Ok(Survivor { handle, note })
    }

    /// Waits for the child's end, or `limit`.
    pub(crate) fn wait(self, limit: Duration) -> Outcome<T> {
        if !self.ends_within(limit) && self.note.give_up() {
            let handle = self.handle;
            // It stays a zombie until this process ends if no thread can be had: the lesser evil.
            let _ = thread::Builder::new()
                .name("attach-reaper".into())
                .spawn(move || reap(&handle));
            return Outcome::Late;
        }
        reap(&self.handle);
        self.note.take().map_or(Outcome::Killed, Outcome::Done)
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            // A pidfd becomes readable when its process ends.
            let mut polled = [PollFd::new(&self.handle, PollFlags::IN)];
            match rustix::event::poll(&mut polled, Some(&timeout)) {
                Ok(0) => return false,
                Err(rustix::io::Errno::INTR) => {}
                // An error leaves only the wait itself.
                Ok(_) | Err(_) => return true,
            }
        }
    }
}

/// The child's first steps: out of the way of what is meant for its parent.
fn prepare() {
    // Cannot fail in a process that leads no session.
    let _ = rustix::process::setpgid(None, None);
    // SAFETY: a plain name; the default action is a valid one, and this changes the child's own table only; a valid
    // priority. A SIGCHLD that is ignored, or not sent for stops, would not end a tracer's sleep.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"pagecopy-attach".as_ptr());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGCHLD, &raw const action, ptr::null_mut());
        // On a machine whose processors are all busy this is what keeps the median below a time slice.
        let priority = libc::sched_param { sched_priority: 1 };
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority);
    }
    // "Never", also where a whole control group is ended at once (memory.oom.group).
    let path = c"/proc/self/oom_score_adj";
    if let Ok(file) = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&file, b"-1000");
    }
}

/// Waits for the child's end and removes it from the process table.
fn reap(handle: &OwnedFd) {
    let id = libc::id_t::try_from(handle.as_raw_fd()).unwrap_or(libc::id_t::MAX);
    loop {
        // SAFETY: zero is a value of this structure of numbers, which the call fills. `__WALL`, for it has no exit signal.
        let result = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let options = libc::WEXITED | libc::__WALL;
            libc::waitid(libc::P_PIDFD, id, &raw mut info, options)
        };
        if result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return;
        }
    }
}

/// Every signal blocked in this thread until the drop.
struct Masked(libc::sigset_t);

impl Masked {
    fn all() -> Masked {
        // SAFETY: both sets are local and initialised by the calls; the call cannot fail with these arguments.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Masked(before)
        }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        // SAFETY: puts back a mask that the kernel gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

/// What both processes see.
#[derive(Debug)]
struct Shared<T> {
    state: AtomicU32,
    answer: UnsafeCell<MaybeUninit<T>>,
}

/// A page of memory shared by both processes, in which the child leaves its answer. Unmapped on drop, for one process.
#[derive(Debug)]
struct Note<T>(NonNull<Shared<T>>);

impl<T> Note<T> {
    const LEN: usize = 4096;

    fn new() -> io::Result<Note<T>> {
        const {
            assert!(size_of::<Shared<T>>() <= Self::LEN && align_of::<Shared<T>>() <= Self::LEN);
        };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks an address that nothing uses.
        let page = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), Self::LEN, access, MapFlags::SHARED)?
        };
        // The page is zero: `WORKING`, and no answer yet.
        NonNull::new(page.cast())
            .map(Note)
            .ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    fn shared(&self) -> &Shared<T> {
        // SAFETY: a live mapping, large and aligned enough, whose zeros are a valid `Shared`.
        unsafe { self.0.as_ref() }
    }

    /// The child's side. The answer is back if the parent has given up.
    fn lay_down(&self, answer: T) -> Result<(), T> {
        let place = self.shared().answer.get();
        // SAFETY: only the child writes, once, and the parent reads only after `DONE`.
        unsafe { (*place).write(answer) };
        if self.leave(DONE) {
            return Ok(());
        }
        // SAFETY: written just now; the parent, which has given up, does not take it.
        Err(unsafe { (*place).assume_init_read() })
    }

    /// The parent's side. False if the answer was there first.
    fn give_up(&self) -> bool {
        self.leave(GIVEN_UP)
    }

    fn leave(&self, state: u32) -> bool {
        self.shared()
            .state
            .compare_exchange(WORKING, state, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The parent's side, when the child has ended.
    fn take(self) -> Option<T> {
        let done = self.shared().state.load(Ordering::Acquire) == DONE;
        // SAFETY: `DONE` is set after the answer was written, by this same program; taking the note takes it only once.
        done.then(|| unsafe { (*self.shared().answer.get()).assume_init_read() })
    }
}

impl<T> Drop for Note<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), Self::LEN) };
    }
}
