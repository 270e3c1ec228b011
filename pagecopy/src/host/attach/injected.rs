//! One thread of another process, stopped, that executes system calls for us. x86-64.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::host::TrackError;
use crate::host::process::{self, Process};
use crate::host::sys::ptrace::{Registers, Stop, Traced};

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0F, 0x05];
/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;
/// `orig_rax` of a thread that is not in a system call: the kernel restarts nothing.
const NO_SYSCALL: u64 = u64::MAX;
/// Signals, or restartable sequences, that may come in between before the attach is given up.
const MAX_RETRIES: u32 = 64;
/// Most bytes of code looked through for the instruction.
const MAX_CODE: u64 = 4 << 20;

/// Address of a `syscall` instruction in process `pid`. The vDSO has one; a C library has many.
pub(super) fn find_syscall(pid: i32) -> Result<u64, TrackError> {
    let failed =
        |error| process::proc_error(pid, "looking for a system call instruction in QEMU", error);
    let mut code = process::maps(pid).map_err(failed)?;
    code.retain(|mapping| mapping.executable && mapping.name.as_os_str() != "[vsyscall]");
    // The vDSO first: it is small, always there and never unmapped.
    code.sort_by_key(|mapping| mapping.name.as_os_str() != "[vdso]");
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed)?;
    let mut bytes = Vec::new();
    for mapping in code {
        let len = (mapping.addresses.end - mapping.addresses.start).min(MAX_CODE);
        bytes.resize(usize::try_from(len).unwrap_or(0), 0);
        if memory
            .read_exact_at(&mut bytes, mapping.addresses.start)
            .is_err()
        {
            continue;
        }
        if let Some(at) = bytes
            .windows(SYSCALL.len())
            .position(|window| window == SYSCALL)
        {
            return Ok(mapping.addresses.start + at as u64);
        }
    }
    Err(TrackError::Memory(
        "no system call instruction was found in QEMU's code; is it a 64-bit x86 program?".into(),
    ))
}

/// Where the thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Runs; only a stop can be asked for.
    Running,
    /// Stands still with its own registers; `0` is the signal that resuming it must deliver, 0 for none.
    Stopped(i32),
    /// Stands still with our registers.
    Borrowed,
    /// Has ended, or is traced no more.
    Released,
}

/// A traced main thread of a process. However it is dropped, the thread gets its registers back and goes on.
#[derive(Debug)]
pub(super) struct StoppedThread<'a> {
    process: &'a Process,
    traced: Traced,
    place: Place,
    /// The thread's own registers; meaningful while `Borrowed`.
    own: Option<Registers>,
}

impl<'a> StoppedThread<'a> {
    /// Starts tracing; the thread still runs.
    pub(super) fn seize(process: &'a Process) -> Result<StoppedThread<'a>, TrackError> {
        let pid = process.pid();
        if let Some(tracer) = process::tracer_of(pid) {
            return Err(traced_already(pid, &tracer));
        }
        let traced = Traced::seize(pid).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => TrackError::Gone(pid),
            Some(libc::EPERM) => match process::tracer_of(pid) {
                Some(tracer) => traced_already(pid, &tracer),
                None => TrackError::Permission(not_permitted(pid)),
            },
            _ => TrackError::System {
                what: "tracing QEMU's main thread",
                source: error,
            },
        })?;
        let thread = StoppedThread {
            process,
            traced,
            place: Place::Running,
            own: None,
        };
        // The id was looked up a second time by `seize`. It still means the process that is held, if that one lives.
        if !process.is_alive() {
            return Err(TrackError::Gone(pid));
        }
        Ok(thread)
    }

    /// Stops the thread where it can be given other registers.
    pub(super) fn stop(&mut self) -> Result<(), TrackError> {
        for _ in 0..MAX_RETRIES {
            match self.place {
                Place::Running => self.interrupt()?,
                // Its handler runs first, on the thread's own registers.
                Place::Stopped(signal) if signal != 0 => self.resume(signal)?,
                Place::Stopped(_) => {
                    let registers = self.registers()?;
                    if registers.cs != USER_CS {
                        return Err(TrackError::Memory("QEMU is not a 64-bit program".into()));
                    }
                    if !self.in_restartable_sequence(&registers) {
                        self.own = Some(registers);
                        return Ok(());
                    }
                    self.resume(0)?;
                }
                Place::Borrowed => self.give_back()?,
                Place::Released => return Err(TrackError::Gone(self.process.pid())),
            }
        }
        Err(TrackError::Busy(
            "QEMU's main thread is flooded with signals; try again".into(),
        ))
    }

    /// Has the stopped thread execute system call `number` with one argument, and gives the answer.
    pub(super) fn call(
        &mut self,
        instruction: u64,
        number: i64,
        argument: u64,
    ) -> Result<i64, TrackError> {
        for _ in 0..MAX_RETRIES {
            if self.place != Place::Stopped(0) {
                self.stop()?;
            }
            let Some(own) = self.own else {
                return Err(TrackError::Gone(self.process.pid()));
            };
            let borrowed = Registers {
                rip: instruction,
                rax: number.cast_unsigned(),
                rdi: argument,
                orig_rax: NO_SYSCALL,
                ..own
            };
            self.place = Place::Borrowed;
            self.check(self.traced.set_registers(&borrowed))?;
            self.check(self.traced.step())?;
            let stop = self.check(self.traced.wait())?;
            if stop == Stop::Gone {
                self.place = Place::Released;
                return Err(TrackError::Gone(self.process.pid()));
            }
            let after = self.registers()?;
            self.give_back()?;
            if let Stop::Signal(signal) = stop {
                self.place = Place::Stopped(signal);
            }
            // `syscall` changes the instruction pointer only when it is executed.
            if after.rip != instruction {
                return Ok(after.rax.cast_signed());
            }
        }
        Err(TrackError::Busy(
            "QEMU's main thread is flooded with signals; try again".into(),
        ))
    }

    /// Lets the thread go.
    pub(super) fn release(mut self) -> Result<(), TrackError> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<(), TrackError> {
        if self.place == Place::Borrowed {
            self.give_back()?;
        }
        if self.place == Place::Running {
            // Only a stopped thread can be detached from.
            self.interrupt()?;
        }
        if let Place::Stopped(signal) = self.place {
            self.check(self.traced.detach(signal))?;
            self.place = Place::Released;
        }
        Ok(())
    }

    /// Asks for a stop and waits for one.
    fn interrupt(&mut self) -> Result<(), TrackError> {
        self.check(self.traced.interrupt())?;
        self.place = match self.check(self.traced.wait())? {
            Stop::Interrupt => Place::Stopped(0),
            // Not one of ours: somebody else's SIGTRAP, which the thread is to have.
            Stop::Trap => Place::Stopped(libc::SIGTRAP),
            Stop::Signal(signal) => Place::Stopped(signal),
            Stop::Group(signal) => {
                self.place = Place::Stopped(0);
                return Err(TrackError::Busy(format!(
                    "QEMU's process was stopped by signal {signal}; let it go on with SIGCONT, then try again"
                )));
            }
            Stop::Gone => {
                self.place = Place::Released;
                return Err(TrackError::Gone(self.process.pid()));
            }
        };
        Ok(())
    }

    fn resume(&mut self, signal: i32) -> Result<(), TrackError> {
        self.check(self.traced.resume(signal))?;
        self.place = Place::Running;
        Ok(())
    }

    /// Gives the thread its own registers back.
    fn give_back(&mut self) -> Result<(), TrackError> {
        if let Some(own) = &self.own {
            self.check(self.traced.set_registers(own))?;
        }
        self.place = Place::Stopped(0);
        Ok(())
    }

    fn registers(&self) -> Result<Registers, TrackError> {
        self.check(self.traced.registers())
    }

    /// Whether the thread is inside a restartable sequence (glibc's per-CPU operations): moving its instruction pointer
    /// would take the kernel's protection off the rest of the sequence.
    fn in_restartable_sequence(&self, registers: &Registers) -> bool {
        if registers.orig_rax != NO_SYSCALL {
            return false;
        }
        let Some(area) = self.traced.rseq_area() else {
            return false;
        };
        // `rseq_cs` is at offset 8 of `struct rseq`; not zero while a sequence may be under way.
        let mut section = [0; 8];
        File::open(format!("/proc/{}/mem", self.process.pid()))
            .and_then(|memory| memory.read_exact_at(&mut section, area + 8))
            .is_ok_and(|()| section != [0; 8])
    }

    /// An error of ptrace in words: the thread can end at any time.
    fn check<T>(&self, result: io::Result<T>) -> Result<T, TrackError> {
        result.map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => TrackError::Gone(self.process.pid()),
            _ => TrackError::System {
                what: "tracing QEMU's main thread",
                source,
            },
        })
    }
}

impl Drop for StoppedThread<'_> {
    fn drop(&mut self) {
        // Errors mean that the thread has ended. And the kernel detaches when the tracing thread ends.
        let _ = self.let_go();
    }
}

fn traced_already(pid: i32, tracer: &process::ProcessName) -> TrackError {
    TrackError::Busy(format!(
        "QEMU (process {pid}) is traced by {} (process {}); end that first",
        tracer.name, tracer.pid
    ))
}

/// Why tracing may be refused.
fn not_permitted(pid: i32) -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let yama = match scope.trim() {
        "3" => {
            "; kernel.yama.ptrace_scope is 3, which forbids tracing altogether until the next boot"
        }
        "1" | "2" => "; kernel.yama.ptrace_scope asks for that capability, too",
        _ => "",
    };
    format!(
        "tracing process {pid} was refused; the daemon needs CAP_SYS_PTRACE in QEMU's user namespace, and no security policy \
         (SELinux, AppArmor) against it{yama}"
    )
}
