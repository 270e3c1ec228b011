//! The system calls of the tests that need `unsafe`: a forked process, a mapping shared with it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation
)]

pub mod disk_read;

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory shared with another process. All access is volatile.
pub struct Map {
    base: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; access is volatile.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    pub fn shared(file: BorrowedFd<'_>, len: usize) -> Map {
        use rustix::mm::{MapFlags, ProtFlags};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks an address that nothing uses.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                access,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                0,
            )
        };
        Map {
            base: base.unwrap().cast(),
            len,
        }
    }

    pub fn address(&self) -> u64 {
        self.base as u64
    }

    pub fn len(&self) -> u64 {
        self.len as u64
    }

    fn at(&self, range: Range<u64>) -> *mut u8 {
        assert!(range.end <= self.len as u64);
        self.base.wrapping_add(range.start as usize)
    }

    pub fn write_byte(&self, offset: u64, byte: u8) {
        // SAFETY: checked to be inside the mapping.
        unsafe { ptr::write_volatile(self.at(offset..offset + 1), byte) }
    }

    pub fn read_byte(&self, offset: u64) -> u8 {
        // SAFETY: checked to be inside the mapping.
        unsafe { ptr::read_volatile(self.at(offset..offset + 1)) }
    }

    pub fn write_word(&self, offset: u64, word: u64) {
        // SAFETY: checked to be inside the mapping; the tests' offsets are multiples of eight.
        unsafe { ptr::write_volatile(self.at(offset..offset + 8).cast(), word) }
    }

    pub fn read_word(&self, offset: u64) -> u64 {
        // SAFETY: as in `write_word`.
        unsafe { ptr::read_volatile(self.at(offset..offset + 8).cast()) }
    }

    pub fn copy_out(&self, offset: u64, into: &mut [u8]) {
        let from = self.at(offset..offset + into.len() as u64);
        // SAFETY: checked to be inside the mapping; the target is private.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    pub fn copy_in(&self, offset: u64, from: &[u8]) {
        let into = self.at(offset..offset + from.len() as u64);
        // SAFETY: checked to be inside the mapping; the bytes come from elsewhere.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    /// Has the kernel write `len` bytes at `offset`, read from a descriptor.
    pub fn read_into(&self, from: BorrowedFd<'_>, offset: u64, len: usize) {
        let at = self.at(offset..offset + len as u64);
        // SAFETY: checked to be inside the mapping.
        let read = unsafe { libc::read(from.as_raw_fd(), at.cast(), len) };
        assert_eq!(usize::try_from(read), Ok(len));
    }

    pub fn drop_pages(&self, offset: u64, len: u64) {
        let at = self.at(offset..offset + len);
        // SAFETY: checked to be inside the mapping; a shared file keeps its contents.
        let result = unsafe { libc::madvise(at.cast(), len as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }

    /// Punches the pages out of the file.
    pub fn remove_pages(&self, offset: u64, len: u64) {
        let at = self.at(offset..offset + len);
        // SAFETY: checked to be inside the mapping; what reads there later reads zeroes.
        let result = unsafe { libc::madvise(at.cast(), len as usize, libc::MADV_REMOVE) };
        assert_eq!(result, 0);
    }

    /// Unmaps it; nobody uses it afterwards.
    pub fn unmap(&self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        self.unmap();
    }
}

/// A forked process, killed and waited for on drop.
pub struct Child {
    pub pid: i32,
}

/// Forks a process that runs `work` on its first (and only) thread and exits.
pub fn fork(work: impl FnOnce()) -> Child {
    // SAFETY: glibc makes its own locks usable in the child of a threaded process; the child runs `work` and leaves by
    // `_exit`, so nothing of the parent's state is torn down twice.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: a plain request to be killed when the parent is.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            exit(if outcome.is_ok() { 0 } else { 101 });
        }
        pid => {
            assert!(pid > 0, "fork failed");
            Child { pid }
        }
    }
}

/// Leaves a forked process.
pub fn exit(status: i32) -> ! {
    // SAFETY: ends the process without running anything.
    unsafe { libc::_exit(status) }
}

impl Child {
    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: our own child, not waited for yet.
        unsafe { libc::kill(self.pid, signal) };
    }

    /// Waits for a change of state that `options` ask for; gives the status of `waitpid`.
    pub fn wait(&self, options: i32) -> i32 {
        let mut status = 0;
        // SAFETY: fills a local integer.
        unsafe { libc::waitpid(self.pid, &raw mut status, options) };
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait(libc::__WALL);
    }
}

pub fn become_nobody() {
    // SAFETY: plain system calls. `setuid` of all threads is glibc's.
    unsafe {
        assert_eq!(libc::setgid(65534), 0);
        assert_eq!(libc::setuid(65534), 0);
    }
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

/// How often the handler of `interval_timer` ran.
pub fn signals_handled() -> u64 {
    HANDLED.load(Ordering::Relaxed)
}

/// An interval timer, and a handler for its signal that counts.
pub fn interval_timer(microseconds: i64) {
    extern "C" fn count(_: i32) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }
    let interval = libc::timeval {
        tv_sec: 0,
        tv_usec: microseconds,
    };
    let timer = libc::itimerval {
        it_interval: interval,
        it_value: interval,
    };
    // SAFETY: the handler touches nothing; the structures are valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut());
    }
}

/// A raw system call that gives the kernel's answer (negative error numbers included).
pub fn raw_syscall(number: i64, arguments: [usize; 5]) -> i64 {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the tests pass calls that wait and nothing else, with pointers to live structures.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e) };
    if answer < 0 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        answer
    }
}

/// Computes on all general registers for `rounds` rounds; the answer depends on each step having been right.
#[cfg(target_arch = "x86_64")]
pub fn churn_registers(rounds: u64) -> [u64; 8] {
    let mut state: [u64; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    // SAFETY: arithmetic on registers only; the flags are declared changed.
    unsafe {
        std::arch::asm!(
            "2:",
            "add {a}, {b}", "rol {a}, 7", "xor {c}, {a}", "add {d}, {c}", "rol {d}, 13",
            "xor r8, {d}", "add r9, r8", "rol r9, 21", "xor r10, r9", "add r11, r10",
            "xor {b}, r11", "rol {b}, 3",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) state[0],
            b = inout(reg) state[1],
            c = inout(reg) state[2],
            d = inout(reg) state[3],
            inout("r8") state[4],
            inout("r9") state[5],
            inout("r10") state[6],
            inout("r11") state[7],
            n = inout(reg) rounds => _,
        );
    }
    state
}

/// Whether vector registers, and the 128 bytes below the stack pointer that belong to a running function, keep what is
/// put there for `rounds` rounds.
#[cfg(target_arch = "x86_64")]
pub fn vectors_and_red_zone_hold(rounds: u64) -> bool {
    if !std::arch::is_x86_feature_detected!("avx") {
        return true;
    }
    let before: [u64; 4] = [0x0123_4567, 0x89AB_CDEF, 0xFEDC_BA98, 0x7654_3210];
    let mut after = [[0_u64; 4]; 3];
    let mut stack = [0_u64; 3];
    // SAFETY: the processor has AVX. The compiler keeps nothing below the stack pointer here, for the block may push.
    unsafe {
        std::arch::asm!(
            "vmovups ymm0, [{before}]", "vmovups ymm7, [{before}]", "vmovups ymm15, [{before}]",
            "mov [rsp - 8], {word}", "mov [rsp - 64], {word}", "mov [rsp - 128], {word}",
            "2:",
            "dec {n}",
            "jnz 2b",
            "vmovups [{after}], ymm0", "vmovups [{after} + 32], ymm7", "vmovups [{after} + 64], ymm15",
            "mov {word}, [rsp - 8]", "mov [{stack}], {word}",
            "mov {word}, [rsp - 64]", "mov [{stack} + 8], {word}",
            "mov {word}, [rsp - 128]", "mov [{stack} + 16], {word}",
            "vzeroupper",
            before = in(reg) before.as_ptr(),
            after = in(reg) after.as_mut_ptr(),
            stack = in(reg) stack.as_mut_ptr(),
            word = inout(reg) 0x5AFE_u64 => _,
            n = inout(reg) rounds => _,
            out("xmm0") _,
            out("xmm7") _,
            out("xmm15") _,
        );
    }
    after == [before; 3] && stack == [0x5AFE; 3]
}

/// Runs `work` with the stack pointer at `top`, a multiple of 16 in memory that nobody uses.
#[cfg(target_arch = "x86_64")]
pub fn on_stack(top: u64, work: extern "C" fn(RawFd), argument: RawFd) {
    assert_eq!(top % 16, 0);
    // SAFETY: r12 outlives the call, by the calling convention; `work` cannot unwind. The caller vouches for the memory.
    unsafe {
        std::arch::asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {work}",
            "mov rsp, r12",
            top = in(reg) top,
            work = in(reg) work,
            in("edi") argument,
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

/// The socket with this number, which nothing else owns.
pub fn stream(socket: RawFd) -> UnixStream {
    // SAFETY: the tests pass what `into_raw_fd` gave.
    unsafe { UnixStream::from_raw_fd(socket) }
}

/// Closes a descriptor that nothing in this program owns.
pub fn close(descriptor: RawFd) {
    // SAFETY: what another process has opened here; no object of this one has it.
    assert_eq!(unsafe { libc::close(descriptor) }, 0);
}

/// Stops this process until somebody lets it go on.
pub fn stop_oneself() {
    // SAFETY: a plain signal to oneself.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Traces a process, as a debugger would.
pub fn trace(pid: i32) {
    // SAFETY: touches no memory.
    let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0_usize, 0_usize) };
    assert_eq!(result, 0);
}
