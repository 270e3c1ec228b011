//! One thread of another process, stopped, that executes system calls for us. x86-64.
//!
//! Runs in a [`survivor`](crate::host::sys::survivor) and obeys its rules: no allocation, no lock, no panic, no logging.

use std::io;
use std::time::Instant;

use super::code::Code;
use super::fault::Fault;
use super::net::Net;
use crate::host::process::Process;
use crate::host::sys::ptrace::{Registers, Stop, Traced};

/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;
/// `orig_rax` of a thread that is not in a system call: the kernel restarts nothing.
pub(super) const NO_SYSCALL: u64 = u64::MAX;
/// Signals, or restartable sequences, that may come in between before the attach is given up.
const MAX_RETRIES: u32 = 64;

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

/// A traced main thread of a process. However it is dropped, the thread gets its registers back; one that stands still
/// goes on then, and one that runs is let go of by the kernel when the tracing process ends.
#[derive(Debug)]
pub(super) struct StoppedThread<'a> {
    traced: Traced,
    code: Code,
    /// Room for the safety net, prepared by the caller.
    net: &'a mut Net,
    place: Place,
    /// The thread's own registers; meaningful while `Borrowed`.
    own: Option<Registers>,
    /// Until when the thread may take to stop.
    deadline: Instant,
}

impl<'a> StoppedThread<'a> {
    /// Starts tracing; the thread still runs.
    pub(super) fn seize(
        process: &Process,
        code: Code,
        net: &'a mut Net,
        deadline: Instant,
    ) -> Result<StoppedThread<'a>, Fault> {
        let traced = Traced::seize(process.pid()).map_err(|error| Fault::Seize(number(&error)))?;
        // The id was looked up a second time by `seize`. It still means the process that is held, if that one lives.
        if !process.is_alive() {
            return Err(Fault::Gone);
        }
        Ok(StoppedThread {
            traced,
            code,
            net,
            place: Place::Running,
            own: None,
            deadline,
        })
    }

    /// Stops the thread where it can be given other registers.
    pub(super) fn stop(&mut self) -> Result<(), Fault> {
        for _ in 0..MAX_RETRIES {
            match self.place {
                Place::Running => self.interrupt()?,
                // Its handler runs first, on the thread's own registers.
                Place::Stopped(signal) if signal != 0 => self.resume(signal)?,
                Place::Stopped(_) => {
                    let registers = self.traced.registers().map_err(trace)?;
                    if registers.cs != USER_CS {
                        return Err(Fault::Not64Bit);
                    }
                    if !self.in_restartable_sequence(&registers) {
                        self.own = Some(registers);
                        self.net.spread(&self.traced, self.code.net, &registers);
                        return Ok(());
                    }
                    self.resume(0)?;
                }
                Place::Borrowed => self.give_back()?,
                Place::Released => return Err(Fault::Gone),
            }
        }
        Err(Fault::Signals)
    }

    /// Has the stopped thread execute system call `call` with three arguments, and gives the answer.
    pub(super) fn call(&mut self, call: i64, arguments: [u64; 3]) -> Result<i64, Fault> {
        let [rdi, rsi, rdx] = arguments;
        for _ in 0..MAX_RETRIES {
            if self.place != Place::Stopped(0) {
                self.stop()?;
            }
            let Some(own) = self.own else {
                return Err(Fault::Gone);
            };
            let (rip, rsp) = self.net.start().unwrap_or((self.code.call, own.rsp));
            let borrowed = Registers {
                rip,
                rsp,
                rax: call.cast_unsigned(),
                rdi,
                rsi,
                rdx,
                orig_rax: NO_SYSCALL,
                ..own
            };
            self.place = Place::Borrowed;
            self.traced.set_registers(&borrowed).map_err(trace)?;
            if let Some(answer) = self.execute()? {
                return Ok(answer);
            }
        }
        Err(Fault::Signals)
    }

    /// Lets the thread, which stands at the call, execute it; `None` when a signal came first. Its own registers are back
    /// in place afterwards.
    ///
    /// Not by a single step: a thread whose tracer dies keeps the trap flag, and dies of the trap.
    fn execute(&mut self) -> Result<Option<i64>, Fault> {
        self.traced.resume_to_call().map_err(trace)?;
        let mut stop = self.wait(None)?;
        let mut answer = None;
        if stop == Stop::Call {
            // The stop that this asks for comes right after the call. Unlike a stop at the call's end it is one where the
            // kernel restarts an interrupted call when the thread goes on with its own registers.
            self.traced.interrupt().map_err(trace)?;
            self.traced.resume(0).map_err(trace)?;
            stop = self.wait(None)?;
            let after = self.traced.registers().map_err(trace)?;
            answer = Some(after.rax.cast_signed());
        }
        self.give_back()?;
        if let Stop::Signal(signal) = stop {
            self.place = Place::Stopped(signal);
        }
        Ok(answer)
    }

    /// Lets the thread go.
    pub(super) fn release(mut self) -> Result<(), Fault> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<(), Fault> {
        if self.place == Place::Borrowed {
            self.give_back()?;
        }
        if let Place::Stopped(signal) = self.place {
            self.traced.detach(signal).map_err(trace)?;
            self.place = Place::Released;
        }
        Ok(())
    }

    /// Asks for a stop and waits for one.
    fn interrupt(&mut self) -> Result<(), Fault> {
        self.traced.interrupt().map_err(trace)?;
        self.place = match self.wait(Some(self.deadline))? {
            Stop::Interrupt => Place::Stopped(0),
            Stop::Signal(signal) => Place::Stopped(signal),
            Stop::Group(signal) => {
                self.place = Place::Stopped(0);
                return Err(Fault::Halted(signal));
            }
            // Of a kind that was not asked for; there is nothing to deliver.
            Stop::Call => Place::Stopped(0),
            Stop::Gone => return Err(Fault::Gone),
        };
        Ok(())
    }

    /// The next stop. The thread keeps its place, but for its end.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<Stop, Fault> {
        match self.traced.wait(deadline) {
            Ok(Stop::Gone) => {
                self.place = Place::Released;
                Err(Fault::Gone)
            }
            Ok(stop) => Ok(stop),
            Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => Err(Fault::Blocked),
            Err(error) => Err(trace(error)),
        }
    }

    fn resume(&mut self, signal: i32) -> Result<(), Fault> {
        self.traced.resume(signal).map_err(trace)?;
        self.place = Place::Running;
        Ok(())
    }

    /// Gives the thread its own registers back.
    fn give_back(&mut self) -> Result<(), Fault> {
        if let Some(own) = &self.own {
            self.traced.set_registers(own).map_err(trace)?;
        }
        self.place = Place::Stopped(0);
        Ok(())
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
        self.traced.read_memory(area + 8, &mut section) && section != [0; 8]
    }
}

impl Drop for StoppedThread<'_> {
    fn drop(&mut self) {
        // Errors mean that the thread has ended.
        let _ = self.let_go();
    }
}

fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

fn trace(error: io::Error) -> Fault {
    Fault::Trace(number(&error))
}
