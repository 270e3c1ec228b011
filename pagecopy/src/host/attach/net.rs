//! The safety net under a thread that has our registers: should its tracer be killed right then, it gets its own
//! registers back by itself.
//!
//! Below the thread's stack pointer, where a signal handler's frame would be, lies such a frame with the thread's own
//! registers. The injected system call is one that a `ret` follows; the return address is that of the C library's end of a
//! signal handler, `rt_sigreturn`. So a thread that nobody stops any more executes the injected call, returns, and has the
//! kernel restore it from the frame, as after any signal. A thread whose tracer lives never gets past the call, and gets
//! its registers from the tracer: the frame, in unused stack, is forgotten.
//!
//! The difference for a thread that has saved itself: a system call that the stop interrupted restarts, but one with a
//! timeout of the kind that the kernel itself keeps track of (`poll`, `nanosleep`) ends with EINTR, as under a debugger.
//! And the injected descriptor, if it was just made, stays open there; nothing is registered with it.
//!
//! Where the net cannot be spread the attach does without: a shadow stack checks return addresses; the instructions were
//! not found; the processor has no XSAVE (none that runs KVM guests today lacks it); or the thread is not on the stack that
//! the kernel gave it, as in a coroutine, and what lies below its stack pointer may be somebody's.

use std::arch::x86_64::__cpuid_count;

use super::code::NetCode;
use super::injected::NO_SYSCALL;
use crate::host::sys::ptrace::{Registers, Traced};

/// Bytes below the stack pointer that belong to the running function (System V ABI, x86-64).
const RED_ZONE: u64 = 128;
/// Room for the vector registers; AMX's make up half of it.
const MAX_VECTORS: usize = 16 << 10;
/// `struct rt_sigframe` up to its `siginfo`, which `rt_sigreturn` does not look at: the return address and a `ucontext`.
const FRAME: usize = 8 + 304;
/// Offsets in it: `uc_flags`, `ss_flags` of `uc_stack`, `uc_mcontext`, `uc_sigmask`.
const FLAGS: usize = 8;
const STACK_FLAGS: usize = 32;
const CONTEXT: usize = 48;
const SIGNAL_MASK: usize = 304;
/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`: the frame has extended state and a stack segment.
const ALL_THERE: u64 = 7;
/// Flags of an alternate signal stack that the kernel refuses, and therefore leaves the thread's as it is.
const NO_STACK_CHANGE: u64 = 0x7F;

/// XSAVE's area: the software's bytes, the header's bit mask of components, the header's end.
const SOFTWARE: usize = 464;
const COMPONENTS: usize = 512;
const HEADER_END: usize = 576;
/// `FP_XSTATE_MAGIC1` and, behind the area, `FP_XSTATE_MAGIC2`.
const MAGIC_1: u64 = 0x4650_5853;
const MAGIC_2: u32 = 0x4650_5845;

/// Answers of an interrupted system call that the kernel restarts (`linux/errno.h`): ERESTARTSYS, ERESTARTNOINTR,
/// ERESTARTNOHAND; and the one that it restarts from where it was.
const RESTARTS: [i64; 3] = [-512, -513, -514];
const RESTARTS_WITHIN: i64 = -516;
/// Bytes of `syscall`.
const CALL_LEN: u64 = 2;

/// The frame, and where it lies.
#[derive(Debug)]
pub(super) struct Net {
    bytes: Box<[u8]>,
    vectors: Box<[u8]>,
    /// Ends of XSAVE's components in its area, by number.
    ends: [usize; 64],
    /// Instruction and stack pointer of a thread that is to fall into the net.
    start: Option<(u64, u64)>,
}

impl Net {
    /// Prepares the room: nothing is allocated later.
    pub(super) fn new() -> Net {
        let mut ends = [HEADER_END; 64];
        for (number, end) in (0..).zip(&mut ends).skip(2) {
            // Leaf 13: size and offset of the component, in eax and ebx.
            let leaf = __cpuid_count(13, number);
            *end = HEADER_END.max(leaf.eax.saturating_add(leaf.ebx) as usize);
        }
        Net {
            bytes: vec![0; FRAME + MAX_VECTORS + 128].into(),
            vectors: vec![0; MAX_VECTORS].into(),
            ends,
            start: None,
        }
    }

    /// Makes the memory this process's own, after a fork and before time counts.
    pub(super) fn touch(&mut self) {
        self.bytes.fill(0);
        self.vectors.fill(0);
    }

    /// Where a thread starts that is to be caught, instruction and stack pointer; `None` without a net.
    pub(super) fn start(&self) -> Option<(u64, u64)> {
        self.start
    }

    /// Spreads the net under a stopped thread with registers `own`.
    pub(super) fn spread(&mut self, thread: &Traced, code: Option<NetCode>, own: &Registers) {
        self.start = code.and_then(|code| {
            let frame = self.frame(thread, code, own)?;
            Some((code.call_return, frame))
        });
    }

    /// Writes the frame into the thread's stack; its address.
    fn frame(&mut self, thread: &Traced, code: NetCode, own: &Registers) -> Option<u64> {
        if thread.has_shadow_stack() {
            return None;
        }
        let there = thread.vector_state(&mut self.vectors).ok()?;
        let vectors = self.vectors.get_mut(..there)?;
        let size = finish_vectors(vectors, &self.ends)?;
        // From the top: the area of XSAVE at a multiple of 64, its end mark behind it, the rest below.
        let top = own.rsp.checked_sub(RED_ZONE)?;
        let area = top.checked_sub(size as u64 + 4)? & !63;
        let frame = area.checked_sub(FRAME as u64)? & !15;
        if frame < code.stack.0 || own.rsp >= code.stack.1 {
            return None;
        }
        let gap = usize::try_from(area - frame).ok()?;

        let bytes = self.bytes.get_mut(..gap + size + 4)?;
        put(bytes, 0, code.signal_return);
        put(bytes, FLAGS, ALL_THERE);
        put(bytes, STACK_FLAGS, NO_STACK_CHANGE);
        for (index, word) in (0..).zip(context(&resumed(own), area)) {
            put(bytes, CONTEXT + index * 8, word);
        }
        put(bytes, SIGNAL_MASK, thread.signal_mask().ok()?);
        bytes
            .get_mut(gap..gap + size)?
            .copy_from_slice(vectors.get(..size)?);
        bytes
            .get_mut(gap + size..)?
            .copy_from_slice(&MAGIC_2.to_le_bytes());
        thread.write_memory(frame, bytes).then_some(frame)
    }
}

/// Makes the vector registers, as `ptrace` gives them, what a signal frame has; the bytes that belong to it.
fn finish_vectors(vectors: &mut [u8], ends: &[usize; 64]) -> Option<usize> {
    let mask = vectors.get(COMPONENTS..COMPONENTS + 8)?;
    // x87 and SSE always belong to it.
    let components = u64::from_le_bytes(mask.try_into().ok()?) | 3;
    let used = ends.iter().enumerate();
    let used = used.filter(|(number, _)| components >> number & 1 == 1);
    let size = used.map(|(_, end)| *end).max()?;
    // The kernel takes no more than the thread's own share of the area, which ends with the components in use at the
    // earliest; those beyond it are in their initial state, to which it sets them.
    let software = vectors.get_mut(SOFTWARE..COMPONENTS)?;
    software.fill(0);
    put(software, 0, MAGIC_1 | (size as u64 + 4) << 32);
    put(software, 8, components);
    put(software, 16, size as u64);
    (size <= vectors.len()).then_some(size)
}

/// The registers with which the thread is to go on: an interrupted system call restarts as the kernel would have it.
fn resumed(own: &Registers) -> Registers {
    let answer = own.rax.cast_signed();
    if own.orig_rax == NO_SYSCALL {
        *own
    } else if RESTARTS.contains(&answer) {
        Registers {
            rax: own.orig_rax,
            rip: own.rip.wrapping_sub(CALL_LEN),
            ..*own
        }
    } else if answer == RESTARTS_WITHIN {
        // `rt_sigreturn` makes the kernel forget where it was.
        Registers {
            rax: i64::from(-libc::EINTR).cast_unsigned(),
            ..*own
        }
    } else {
        *own
    }
}

/// `struct sigcontext_64` up to `fpstate`, which is at `area`.
fn context(own: &Registers, area: u64) -> [u64; 24] {
    // cs, gs, fs, ss of 16 bits each; the kernel takes the first and the last.
    let segments = (own.cs & 0xFFFF) | (own.ss & 0xFFFF) << 48;
    [
        own.r8, own.r9, own.r10, own.r11, own.r12, own.r13, own.r14, own.r15, own.rdi, own.rsi,
        own.rbp, own.rbx, own.rdx, own.rax, own.rcx, own.rsp, own.rip, own.eflags, segments, 0, 0,
        0, 0, area,
    ]
}

/// Puts a number into its place. All places are constants inside the frame.
fn put(bytes: &mut [u8], at: usize, word: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}
