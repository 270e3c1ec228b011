//! Looks for the instructions in QEMU's own code that the stopped thread is to execute, and for its stack.

use std::os::unix::fs::FileExt;

use crate::host::TrackError;
use crate::host::process;

/// `syscall`.
const CALL: &[u8] = &[0x0F, 0x05];
/// `syscall; ret`.
const CALL_RETURN: &[u8] = &[0x0F, 0x05, 0xC3];
/// `mov $15, %rax; syscall`: `rt_sigreturn`, the end of every signal handler. Each C library must have it.
const SIGNAL_RETURN: &[u8] = &[0x48, 0xC7, 0xC0, 0x0F, 0x00, 0x00, 0x00, 0x0F, 0x05];
/// Most bytes of a mapping that are looked through.
const MAX_CODE: u64 = 4 << 20;

/// Addresses of instructions in the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Code {
    /// `syscall`.
    pub(super) call: u64,
    /// What [`net`](super::net) takes, if it was found.
    pub(super) net: Option<NetCode>,
}

/// Addresses of what a thread needs to get its registers back on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NetCode {
    /// `syscall; ret`.
    pub(super) call_return: u64,
    /// The end of a signal handler.
    pub(super) signal_return: u64,
    /// The main thread's stack, first address and end.
    pub(super) stack: (u64, u64),
}

/// Finds the instructions in process `pid`. The vDSO has a system call; a C library has all of them.
pub(super) fn find(pid: i32) -> Result<Code, TrackError> {
    let failed =
        |error| process::proc_error(pid, "looking for a system call instruction in QEMU", error);
    let mut mappings = process::maps(pid).map_err(failed)?;
    let mut stack = mappings
        .iter()
        .filter(|mapping| mapping.name.as_os_str() == "[stack]");
    let stack = stack
        .next()
        .map(|stack| (stack.addresses.start, stack.addresses.end));
    mappings.retain(|mapping| mapping.executable && mapping.name.as_os_str() != "[vsyscall]");
    // The vDSO first: it is small, always there and never unmapped. Then the C library, which is not unmapped either.
    mappings.sort_by_key(|mapping| {
        let name = mapping.name.file_name().unwrap_or_default();
        let name = name.as_encoded_bytes();
        match name {
            b"[vdso]" => 0,
            _ if name.starts_with(b"libc.") || name.starts_with(b"libc-") => 1,
            _ => 2,
        }
    });
    let memory = process::open_proc(pid, "mem").map_err(failed)?;
    let mut bytes = Vec::new();
    let (mut call, mut call_return, mut signal_return) = (None, None, None);
    for mapping in mappings {
        let len = (mapping.addresses.end - mapping.addresses.start).min(MAX_CODE);
        bytes.resize(usize::try_from(len).unwrap_or(0), 0);
        let start = mapping.addresses.start;
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        let address = |code| position(&bytes, code).map(|at| start + at as u64);
        call = call.or_else(|| address(CALL));
        call_return = call_return.or_else(|| address(CALL_RETURN));
        signal_return = signal_return.or_else(|| address(SIGNAL_RETURN));
        if call.is_some() && call_return.is_some() && signal_return.is_some() {
            break;
        }
    }
    let net = call_return.zip(signal_return).zip(stack);
    let net = net.map(|((call_return, signal_return), stack)| NetCode {
        call_return,
        signal_return,
        stack,
    });
    call.map(|call| Code { call, net }).ok_or_else(|| {
        TrackError::Memory(
            "no system call instruction was found in QEMU's code; is it a 64-bit x86 program?"
                .into(),
        )
    })
}

fn position(bytes: &[u8], code: &[u8]) -> Option<usize> {
    bytes.windows(code.len()).position(|window| window == code)
}
