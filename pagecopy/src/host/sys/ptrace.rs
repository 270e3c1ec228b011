//! `ptrace` of one thread, x86-64.
//!
//! The kernel ties a traced thread to the *thread* that traces it: all calls on one [`Traced`] come from the thread that
//! made it (the type is neither `Send` nor `Sync`).

use std::io;
use std::marker::PhantomData;
use std::ptr;

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
    /// By a single step (or by a SIGTRAP of somebody else: the registers tell).
    Trap,
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
    /// `PTRACE_SEIZE` without options: the thread goes on, and would go on if this process were killed.
    pub(crate) fn seize(tid: i32) -> io::Result<Traced> {
        request(libc::PTRACE_SEIZE, tid, 0, 0)?;
        Ok(Traced {
            tid,
            _one_thread: PhantomData,
        })
    }

    /// `PTRACE_INTERRUPT`: a stop will follow.
    pub(crate) fn interrupt(&self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)
    }

    /// Waits for the next stop.
    pub(crate) fn wait(&self) -> io::Result<Stop> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is a local integer that the call fills.
            let result = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL) };
            if result == self.tid {
                return Ok(stop_of(status));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ECHILD) => return Ok(Stop::Gone),
                _ => return Err(error),
            }
        }
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

    /// Lets the thread execute one instruction; a stop will follow.
    pub(crate) fn step(&self) -> io::Result<()> {
        request(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)
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
}

/// What `waitpid` said.
fn stop_of(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone;
    }
    let signal = libc::WSTOPSIG(status);
    match (status >> 16, signal) {
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Stop::Interrupt,
        (libc::PTRACE_EVENT_STOP, _) => Stop::Group(signal),
        (_, libc::SIGTRAP) => Stop::Trap,
        _ => Stop::Signal(signal),
    }
}

/// One ptrace request whose answer is success or an error.
fn request(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests used in this file read or write this process's memory only through `data`, which is then the
    // address of a live structure of the kernel's layout (sizes asserted above). What they do to the other process is the
    // business of `attach`.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
