//! `ptrace` of one thread, x86-64.
//!
//! The kernel ties a traced thread to the *thread* that traces it: all calls on one [`Traced`] come from the thread that
//! made it (the type is neither `Send` nor `Sync`).
//!
//! Nothing here allocates or takes a lock, the errors included: some of it runs in a [`survivor`](super::survivor).

use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::time::{Duration, Instant};

/// `NT_X86_XSTATE`: the vector registers, as XSAVE lays them out.
const NT_X86_XSTATE: usize = 0x202;
/// `NT_X86_SHSTK`: there is one only for a thread with a shadow stack. Since Linux 6.6.
const NT_X86_SHSTK: usize = 0x204;
/// The longest uninterrupted wait for a stop that has a deadline: should its signal ever be missing, this is the delay.
const LONGEST_NAP: Duration = Duration::from_millis(20);
/// `PTRACE_GET_RSEQ_CONFIGURATION`, since Linux 5.13.
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420F;

#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

const _: () = assert!(size_of::<RseqConfiguration>() == 24);
const _: () = assert!(size_of::<libc::user_regs_struct>() == 27 * 8);

/// Registers of a thread.
pub(crate) type Registers = libc::user_regs_struct;

/// Why a traced thread stands still, or that it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// By our interrupt.
    Interrupt,
    /// About to execute a system call.
    Call,
    /// A signal is about to be delivered; resuming must pass it on.
    Signal(i32),
    /// The whole process was stopped by a signal (SIGSTOP and the like).
    Group(i32),
    /// The thread has ended.
    Gone,
}

/// A thread that this thread traces. Dropping it does not detach: that takes a stopped thread.
#[derive(Debug)]
pub(crate) struct Traced {
    tid: i32,
    _one_thread: PhantomData<*mut ()>,
}

impl Traced {
    /// `PTRACE_SEIZE`: the thread goes on, and would go on if this process were killed.
    pub(crate) fn seize(tid: i32) -> io::Result<Traced> {
        // So that a stop at a system call differs from a SIGTRAP. `PTRACE_O_EXITKILL` is what must not be set.
        let options = usize::try_from(libc::PTRACE_O_TRACESYSGOOD).unwrap_or(0);
        request(libc::PTRACE_SEIZE, tid, 0, options)?;
        Ok(Traced {
            tid,
            _one_thread: PhantomData,
        })
    }

    /// `PTRACE_INTERRUPT`: a stop will follow, also when the thread stands still and is resumed.
    pub(crate) fn interrupt(&self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)
    }

    /// Waits for the next stop, until `deadline` (`ETIMEDOUT`) if there is one.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> io::Result<Stop> {
        let options = libc::__WALL | deadline.map_or(0, |_| libc::WNOHANG);
        loop {
            let mut status = 0;
            // SAFETY: `status` is a local integer that the call fills.
            let result = unsafe { libc::waitpid(self.tid, &raw mut status, options) };
            if result == self.tid {
                return Ok(stop_of(status));
            }
            if let (0, Some(deadline)) = (result, deadline) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
                }
                sleep_until_child_signal(left.min(LONGEST_NAP));
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ECHILD) => return Ok(Stop::Gone),
                _ => return Err(error),
            }
        }
    }

    /// Its number.
    pub(crate) fn tid(&self) -> i32 {
        self.tid
    }

    /// Why it stands still; `None` while it runs. Does not wait, and what is seen stays to be seen: a signal that is about to be
    /// delivered still is if this thread ends now.
    pub(crate) fn standing(&self) -> io::Result<Option<Stop>> {
        let Ok(id) = libc::id_t::try_from(self.tid) else {
            return Ok(Some(Stop::Gone));
        };
        let options = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT | libc::WNOHANG | libc::__WALL;
        // SAFETY: the structure is plain numbers, for which zero is a value, and the call fills it.
        let (result, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let result = libc::waitid(libc::P_PID, id, &raw mut info, options);
            (result, info)
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
                _ => Err(error),
            };
        }
        // SAFETY: `waitid` has filled both, with zeroes where nothing is to be told.
        let (who, status) = unsafe { (info.si_pid(), info.si_status()) };
        Ok(match info.si_code {
            _ if who == 0 => None,
            libc::CLD_TRAPPED | libc::CLD_STOPPED => Some(stop_of(status << 8 | 0x7f)),
            _ => Some(Stop::Gone),
        })
    }

    /// Takes note that it has ended, so that nothing of it remains.
    pub(crate) fn bury(&self) {
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(self.tid, ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
    }

    /// Reads the registers of the stopped thread.
    pub(crate) fn registers(&self) -> io::Result<Registers> {
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        request(
            libc::PTRACE_GETREGS,
            self.tid,
            0,
            ptr::from_mut(&mut registers) as usize,
        )?;
        Ok(registers)
    }

    /// Sets the registers of the stopped thread.
    pub(crate) fn set_registers(&self, registers: &Registers) -> io::Result<()> {
        request(
            libc::PTRACE_SETREGS,
            self.tid,
            0,
            ptr::from_ref(registers) as usize,
        )
    }

    /// Lets the thread go on until its next system call.
    pub(crate) fn resume_to_call(&self) -> io::Result<()> {
        request(libc::PTRACE_SYSCALL, self.tid, 0, 0)
    }

    /// Lets the thread go on, still traced, with `signal` delivered (0 is none).
    pub(crate) fn resume(&self, signal: i32) -> io::Result<()> {
        request(
            libc::PTRACE_CONT,
            self.tid,
            0,
            usize::try_from(signal).unwrap_or(0),
        )
    }

    /// Ends the tracing of the stopped thread; it goes on, with `signal` delivered (0 is none).
    pub(crate) fn detach(&self, signal: i32) -> io::Result<()> {
        request(
            libc::PTRACE_DETACH,
            self.tid,
            0,
            usize::try_from(signal).unwrap_or(0),
        )
    }

    /// Address of the thread's restartable-sequence area (`struct rseq`), when it has registered one.
    pub(crate) fn rseq_area(&self) -> Option<u64> {
        let mut configuration = RseqConfiguration::default();
        let pointer = ptr::from_mut(&mut configuration) as usize;
        // The request answers with the size that it has filled, which `request` does not look at: a kernel that knows
        // less leaves the pointer zero.
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            size_of::<RseqConfiguration>(),
            pointer,
        )
        .ok()?;
        (configuration.pointer != 0).then_some(configuration.pointer)
    }

    /// Reads the vector registers of the stopped thread, in the layout of XSAVE, into `state`; the bytes that there are.
    pub(crate) fn vector_state(&self, state: &mut [u8]) -> io::Result<usize> {
        let mut vector = libc::iovec {
            iov_base: state.as_mut_ptr().cast(),
            iov_len: state.len(),
        };
        let data = (&raw mut vector) as usize;
        request(libc::PTRACE_GETREGSET, self.tid, NT_X86_XSTATE, data)?;
        Ok(vector.iov_len.min(state.len()))
    }

    /// Whether the thread has a shadow stack of return addresses.
    pub(crate) fn has_shadow_stack(&self) -> bool {
        let mut pointer = 0_u64;
        let mut vector = libc::iovec {
            iov_base: (&raw mut pointer).cast(),
            iov_len: size_of::<u64>(),
        };
        let data = (&raw mut vector) as usize;
        request(libc::PTRACE_GETREGSET, self.tid, NT_X86_SHSTK, data).is_ok()
    }

    /// The signals that the stopped thread has blocked, one bit each.
    pub(crate) fn signal_mask(&self) -> io::Result<u64> {
        let mut mask = 0_u64;
        let data = (&raw mut mask) as usize;
        request(libc::PTRACE_GETSIGMASK, self.tid, size_of::<u64>(), data)?;
        Ok(mask)
    }

    /// Reads the process's memory at `address`; false when not all of it is there.
    pub(crate) fn read_memory(&self, address: u64, into: &mut [u8]) -> bool {
        let (ours, theirs) = (
            vector_of(into.as_mut_ptr(), into.len()),
            at(address, into.len()),
        );
        // SAFETY: our side is `into`; the other process's memory is only read.
        let read = unsafe {
            libc::process_vm_readv(self.tid, &raw const ours, 1, &raw const theirs, 1, 0)
        };
        usize::try_from(read) == Ok(into.len())
    }

    /// Writes the process's memory at `address` where the process itself could; false when that was not possible for all
    /// of it.
    pub(crate) fn write_memory(&self, address: u64, from: &[u8]) -> bool {
        let (ours, theirs) = (
            vector_of(from.as_ptr().cast_mut(), from.len()),
            at(address, from.len()),
        );
        // SAFETY: our side is `from`, only read. What is written in the other process is the business of `attach`.
        let written = unsafe {
            libc::process_vm_writev(self.tid, &raw const ours, 1, &raw const theirs, 1, 0)
        };
        usize::try_from(written) == Ok(from.len())
    }
}

fn vector_of(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

/// A range of the other process, whose addresses are plain numbers here.
fn at(address: u64, len: usize) -> libc::iovec {
    vector_of(
        ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0)),
        len,
    )
}

/// Sleeps until a child changes state, at most for `limit`. The caller has SIGCHLD blocked, so none is missed.
fn sleep_until_child_signal(limit: Duration) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: limit.min(Duration::from_millis(999)).subsec_nanos().into(),
    };
    // SAFETY: all three structures are local, and the set is initialised by `sigemptyset`.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigtimedwait(&raw const set, ptr::null_mut(), &raw const time);
    }
}

/// The signal number of a stop at a system call, by `PTRACE_O_TRACESYSGOOD`.
const CALL: i32 = libc::SIGTRAP | 0x80;

/// What `waitpid` said.
fn stop_of(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone;
    }
    let signal = libc::WSTOPSIG(status);
    match (status >> 16, signal) {
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Stop::Interrupt,
        (libc::PTRACE_EVENT_STOP, _) => Stop::Group(signal),
        (_, CALL) => Stop::Call,
        _ => Stop::Signal(signal),
    }
}

/// One ptrace request whose answer is success or an error.
fn request(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests used in this file read or write this process's memory only through `data`, which is then the
    // address of a live structure of the kernel's layout (sizes asserted above; an `iovec` names its own). What they do to the other process is the
    // business of `attach`.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
