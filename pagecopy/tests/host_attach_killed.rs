//! Kills in the middle of an attach, by the hundred: the process that is attached to must never notice.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]
#![cfg(target_arch = "x86_64")]

mod host_support;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pagecopy::host::attach::attach;
use pagecopy::host::process;
use rustix::process::{Pid, PidfdFlags, Signal};

use host_support::sys::{self, Child};
use host_support::{Random, is_root};

const KILLS: usize = 400;

/// A process that runs `compute_and_answer`.
struct Checked {
    child: Child,
    control: UnixStream,
    _turn: MutexGuard<'static, ()>,
}

/// Computes on all registers and on the stack below the stack pointer, sleeps now and then, and ends when any of it goes
/// wrong. Meanwhile it answers what it is sent.
extern "C" fn compute_and_answer(control: RawFd) {
    const ROUNDS: u64 = 20_000;
    let mut control = sys::stream(control);
    control.set_nonblocking(true).unwrap();
    let expected = sys::churn_registers(ROUNDS);
    let mut byte = [0];
    loop {
        assert_eq!(sys::churn_registers(ROUNDS), expected);
        assert!(sys::vectors_and_red_zone_hold(ROUNDS));
        let answer = sys::raw_syscall(libc::SYS_poll, [0, 0, 1, 0, 0]);
        assert!([0, -i64::from(libc::EINTR)].contains(&answer), "{answer}");
        match control.read(&mut byte) {
            Ok(1) => control.write_all(&byte).unwrap(),
            Ok(_) => return,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

impl Checked {
    fn new() -> Checked {
        // A forked process inherits what other tests have open.
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (control, theirs) = UnixStream::pair().unwrap();
        control
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let mut stacks = process::maps(own).unwrap();
        stacks.retain(|mapping| mapping.name.as_os_str() == "[stack]");
        // As in QEMU, the thread is on the stack that the kernel made. A test's thread has another; that one is free in
        // the forked process.
        let top = stacks[0].addresses.start + (64 << 10);
        let child = sys::fork(|| sys::on_stack(top, compute_and_answer, theirs.into_raw_fd()));
        Checked {
            child,
            control,
            _turn: turn,
        }
    }

    /// Whether it has come through until now.
    fn is_well(&mut self) -> bool {
        self.control.write_all(&[5]).is_ok() && self.control.read_exact(&mut [0]).is_ok()
    }

    /// The process that traces it at this moment.
    fn tracer(&self) -> Option<Pid> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.pid)).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"))
            .unwrap();
        Pid::from_raw(line.trim().parse().unwrap())
    }
}

/// A process that attaches to another without end, and has done so at least once.
fn attacher(pid: i32) -> Child {
    let (mut ready, mut theirs) = UnixStream::pair().unwrap();
    let child = sys::fork(move || {
        // A failure is for the test to see: it kills what attaches.
        loop {
            let attached = attach(pid).is_ok();
            if attached && theirs.write_all(&[1]).is_err() {
                return;
            }
        }
    });
    ready.read_exact(&mut [0]).unwrap();
    // Its later notes are thrown away, so that it never waits for a reader.
    thread::spawn(move || {
        let mut notes = [0; 64];
        while matches!(ready.read(&mut notes), Ok(count) if count > 0) {}
    });
    child
}

/// The daemon dies at any moment: nothing of the attach is seen in the process shortly afterwards.
#[test]
fn a_process_outlives_the_one_that_attaches_to_it() {
    skip_unless!(is_root(), "needs root");
    let mut target = Checked::new();
    let pid = target.child.pid;
    let mut random = Random(0x5EED_0001);
    let mut slowest = Duration::ZERO;
    for kill in 0..KILLS {
        let daemon = attacher(pid);
        thread::sleep(Duration::from_micros(random.below(4_000)));
        drop(daemon);
        let started = Instant::now();
        while target.tracer().is_some() {
            assert!(started.elapsed() < Duration::from_secs(10), "still traced");
            thread::yield_now();
        }
        slowest = slowest.max(started.elapsed());
        assert!(target.is_well(), "lost by kill {kill}");
        assert_eq!(process::userfaultfds(pid).unwrap(), 0, "kill {kill}");
    }
    println!("{KILLS} kills; it was let go of {slowest:?} after its tracer's parent at most");
    attach(pid).unwrap();
    assert!(target.is_well());
}

/// The process that does the work for the daemon is itself killed, while it traces.
#[test]
fn a_process_outlives_its_tracer() {
    skip_unless!(is_root(), "needs root");
    let mut target = Checked::new();
    let pid = target.child.pid;
    let daemon = attacher(pid);
    let mut random = Random(0x5EED_0002);
    let mut kills = 0;
    let started = Instant::now();
    while kills < KILLS {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "{kills} kills"
        );
        let Some(tracer) = target.tracer() else {
            continue;
        };
        let Ok(handle) = rustix::process::pidfd_open(tracer, PidfdFlags::empty()) else {
            continue;
        };
        let spin = Instant::now();
        let moment = Duration::from_micros(random.below(60));
        while spin.elapsed() < moment {
            std::hint::spin_loop();
        }
        // Its id means the tracer as long as it traces.
        if target.tracer() == Some(tracer)
            && rustix::process::pidfd_send_signal(&handle, Signal::KILL).is_ok()
        {
            kills += 1;
            assert!(target.is_well(), "lost by kill {kills}");
        }
    }
    drop(daemon);
    let left = process::userfaultfds(pid).unwrap();
    println!("{kills} kills; {left} unused descriptors stayed");
    assert_eq!(process::userfaultfds_in_use(pid).unwrap(), 0);
    attach(pid).unwrap();
    assert!(target.is_well());
}
