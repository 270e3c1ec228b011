//! Attaching to live processes: what they were doing goes on as if nothing had happened.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]
#![cfg(target_arch = "x86_64")]

mod host_support;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::host::attach::{AttachOptions, attach, attach_with};
use pagecopy::host::track::{TrackedBlock, UffdTracker};
use pagecopy::host::{TrackError, Tracker, process};
use pagecopy::memory::BlockId;

use host_support::sys::{self, Child};
use host_support::{RamFile, is_registered, is_root};

/// Waits for this test's turn: a forked process inherits what other tests have open.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forks a process that runs `work` with one end of a socket.
fn forked(work: impl FnOnce(UnixStream)) -> (Child, UnixStream, MutexGuard<'static, ()>) {
    let turn = turn();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = sys::fork(|| work(theirs));
    ours.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    (child, ours, turn)
}

/// Attaches `count` times, checks that nothing stays behind, and tells how long the stops took.
fn attach_often(pid: i32, count: usize, what: &str) {
    let mut stops: Vec<Duration> = (0..count)
        .map(|_| {
            let (uffd, figures) = attach(pid).unwrap();
            drop(uffd);
            figures.stopped
        })
        .collect();
    assert_eq!(process::userfaultfds(pid).unwrap(), 0);
    stops.sort_unstable();
    let (median, longest) = (stops[count / 2], stops[count - 1]);
    println!("{what}: stopped {median:?} (median of {count}), {longest:?} at most");
    assert!(median < Duration::from_millis(50));
}

/// System calls that the kernel restarts in different ways (again as it was, with the time that is left, by handler) must
/// end as they would have, with their own answers.
#[test]
fn interrupted_system_calls_restart() {
    skip_unless!(is_root(), "needs root");
    static SHORT: libc::timespec = libc::timespec {
        tv_sec: 0,
        tv_nsec: 400_000_000,
    };
    let (child, mut control, _turn) = forked(|mut control| {
        let (quiet, _other_end) = UnixStream::pair().unwrap();
        let mut poll = libc::pollfd {
            fd: quiet.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let poll = (&raw mut poll) as usize;
        let time = (&raw const SHORT) as usize;
        let word = 0_u32;
        let futex = (&raw const word) as usize;
        let wait = libc::FUTEX_WAIT as usize;
        let epoll = sys::raw_syscall(libc::SYS_epoll_create1, [0; 5]) as usize;
        let mut event = [0_u64; 2];
        let event = event.as_mut_ptr() as usize;
        let timed_out = -i64::from(libc::ETIMEDOUT);
        let calls = [
            (libc::SYS_poll, [poll, 1, 400, 0, 0], 0),
            (libc::SYS_nanosleep, [time, 0, 0, 0, 0], 0),
            (libc::SYS_futex, [futex, wait, 0, time, 0], timed_out),
            (
                libc::SYS_clock_nanosleep,
                [libc::CLOCK_MONOTONIC as usize, 0, time, 0, 0],
                0,
            ),
        ];
        for (number, arguments, expected) in calls {
            control.write_all(&[1]).unwrap();
            let started = Instant::now();
            let answer = sys::raw_syscall(number, arguments);
            let took = started.elapsed();
            assert_eq!(answer, expected, "system call {number}");
            assert!(
                (380..5_000).contains(&took.as_millis()),
                "system call {number} took {took:?}"
            );
        }
        // `epoll_wait` restarts never: its wait ends early with EINTR, as after SIGSTOP and SIGCONT (man 7 signal).
        control.write_all(&[2]).unwrap();
        let answer = sys::raw_syscall(libc::SYS_epoll_wait, [epoll, event, 1, 400, 0]);
        assert!(
            answer == 0 || answer == -i64::from(libc::EINTR),
            "epoll_wait: {answer}"
        );
        // Blocked in `read` until the test has attached often.
        control.write_all(&[3]).unwrap();
        let mut byte = [0];
        assert_eq!(control.read(&mut byte).unwrap(), 1);
        control.write_all(&byte).unwrap();
    });
    for phase in [1, 1, 1, 1, 2] {
        let mut byte = [0];
        control.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [phase]);
        for _ in 0..5 {
            attach(child.pid).unwrap();
        }
    }
    control.read_exact(&mut [0]).unwrap();
    attach_often(child.pid, 200, "blocked in read");
    control.write_all(&[9]).unwrap();
    let mut byte = [0];
    control.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [9]);
    assert!(
        libc::WIFEXITED(child.wait(0)),
        "the process ended by itself"
    );
}

#[test]
fn registers_of_a_computing_thread_stay_intact() {
    skip_unless!(is_root(), "needs root");
    const ROUNDS: u64 = 3_000_000;
    let expected = sys::churn_registers(ROUNDS);
    let (child, mut control, _turn) = forked(|mut control| {
        control.set_nonblocking(true).unwrap();
        while control.read(&mut [0]).is_err() {
            assert_eq!(sys::churn_registers(ROUNDS), expected);
        }
        control.write_all(&[7]).unwrap();
    });
    attach_often(child.pid, 200, "computing");
    control.write_all(&[1]).unwrap();
    let mut byte = [0];
    control.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [7]);
}

#[test]
fn signals_that_come_in_between_are_delivered() {
    skip_unless!(is_root(), "needs root");
    let (child, mut control, _turn) = forked(|mut control| {
        sys::interval_timer(50);
        let mut byte = [0];
        while control.read(&mut byte).unwrap() == 1 && byte != [9] {
            control.write_all(&byte).unwrap();
        }
        control
            .write_all(&sys::signals_handled().to_le_bytes())
            .unwrap();
    });
    attach_often(child.pid, 200, "under a signal every 50 us");
    control.write_all(&[3]).unwrap();
    control.read_exact(&mut [0]).unwrap();
    control.write_all(&[9]).unwrap();
    let mut handled = [0; 8];
    control.read_exact(&mut handled).unwrap();
    assert!(u64::from_le_bytes(handled) > 0);
}

#[test]
fn a_stopped_a_traced_and_an_ended_process_are_refused_with_the_reason() {
    skip_unless!(is_root(), "needs root");
    let (child, mut control, _turn) = forked(|mut control| {
        let mut byte = [0];
        while control.read(&mut byte).unwrap() == 1 {
            control.write_all(&byte).unwrap();
        }
    });
    let mut alive = || {
        control.write_all(&[5]).unwrap();
        control.read_exact(&mut [0]).unwrap();
    };
    alive();
    child.signal(libc::SIGSTOP);
    assert!(libc::WIFSTOPPED(child.wait(libc::WUNTRACED)));
    let error = attach(child.pid).unwrap_err();
    assert!(
        matches!(&error, TrackError::Busy(text) if text.contains("SIGCONT")),
        "{error}"
    );
    child.signal(libc::SIGCONT);
    alive();
    attach(child.pid).unwrap();

    let pid = child.pid;
    let tracer = sys::fork(move || {
        sys::trace(pid);
        sys::stop_oneself();
    });
    assert!(libc::WIFSTOPPED(tracer.wait(libc::WUNTRACED)));
    let error = attach(child.pid).unwrap_err();
    let names_it = |text: &str| text.contains(&format!("process {}", tracer.pid));
    assert!(
        matches!(&error, TrackError::Busy(text) if names_it(text)),
        "{error}"
    );
    drop(tracer);
    alive();

    child.signal(libc::SIGKILL);
    child.wait(libc::__WALL);
    assert!(matches!(attach(child.pid), Err(TrackError::Gone(pid)) if pid == child.pid));
    assert!(matches!(attach(-1), Err(TrackError::Gone(_))));
}

#[test]
fn an_unprivileged_tracer_is_told_what_it_lacks() {
    skip_unless!(is_root(), "needs root");
    let (child, mut control, _turn) = forked(|mut control| {
        let _ = control.read(&mut [0]);
    });
    let pid = child.pid;
    let unprivileged = sys::fork(move || {
        sys::become_nobody();
        let error = attach(pid).unwrap_err();
        assert!(
            matches!(&error, TrackError::Permission(text) if text.contains("CAP_SYS_PTRACE")),
            "{error}"
        );
    });
    let status = unprivileged.wait(0);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
    control.write_all(&[1]).unwrap();
}

#[test]
fn the_descriptor_can_be_left_open_in_the_process() {
    skip_unless!(is_root(), "needs root");
    let (child, _control, _turn) = forked(|mut control| {
        let _ = control.read(&mut [0]);
    });
    let options = AttachOptions {
        kernel_faults: true,
        leave_open: true,
        device: None,
    };
    let uffd = attach_with(child.pid, options).unwrap().uffd;
    drop(uffd);
    assert_eq!(process::userfaultfds(child.pid).unwrap(), 1);
}

/// A real, unmodified QEMU under its seccomp sandbox.
#[test]
fn a_sandboxed_qemu_is_attached_to_and_tracked() {
    skip_unless!(is_root(), "needs root");
    const QEMU: &str = "/usr/bin/qemu-system-x86_64";
    skip_unless!(
        std::path::Path::new(QEMU).exists(),
        "{QEMU} is not installed"
    );
    let _turn = turn();
    let ram = RamFile::tmpfs(64 << 20);
    let path = ram.path.display();
    let mut qemu = std::process::Command::new(QEMU)
        .args([
            "-machine",
            "q35,memory-backend=ram",
            "-accel",
            "tcg",
            "-m",
            "64M",
            "-nodefaults",
        ])
        .args([
            "-object",
            &format!("memory-backend-file,id=ram,mem-path={path},size=64M,share=on"),
        ])
        .args([
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ])
        .args(["-display", "none", "-qmp", "stdio"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = qemu.id() as i32;
    let mut answers = std::io::BufReader::new(qemu.stdout.take().unwrap());
    let mut commands = qemu.stdin.take().unwrap();
    let mut ask = |command: &str| {
        use std::io::BufRead;
        // In one write: QEMU obeys at the closing brace, and one that quits would not take a newline after it.
        if let Err(error) = commands.write_all(format!("{command}\n").as_bytes()) {
            panic!(
                "QEMU has ended before {command}: {error}; {:?}",
                qemu.wait()
            );
        }
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            assert!(answers.read_line(&mut line).unwrap() > 0, "QEMU has ended");
        }
    };
    ask(r#"{"execute":"qmp_capabilities"}"#);

    let mapping = process::find_mapping(pid, &ram.path, 64 << 20).unwrap();
    assert_eq!((mapping.page_size, &mapping.path), (4096, &ram.path));
    assert!(process::assigned_devices(pid).unwrap().is_empty());
    attach_often(pid, 100, "QEMU with its guest running");
    let block = TrackedBlock {
        block: BlockId(0),
        address: mapping.address,
        len: mapping.len,
        page_size: mapping.page_size,
    };
    let mut tracker = UffdTracker::new(pid, vec![block]).unwrap();
    tracker.arm().unwrap();
    assert!(tracker.attach_figures().is_some());
    // The firmware runs from this memory when the machine is reset.
    ask(r#"{"execute":"system_reset"}"#);
    let mut dirty = Vec::new();
    let started = Instant::now();
    while dirty.is_empty() && started.elapsed() < Duration::from_secs(20) {
        tracker.scan(&mut dirty).unwrap();
    }
    assert!(!dirty.is_empty(), "the guest wrote");
    let started = Instant::now();
    tracker.scan(&mut dirty).unwrap();
    println!("QEMU's 64 MiB scanned in {:?}", started.elapsed());
    tracker.disarm();
    assert!(!is_registered(pid));
    assert_eq!(process::userfaultfds(pid).unwrap(), 0);
    ask(r#"{"execute":"query-status"}"#);
    ask(r#"{"execute":"quit"}"#);
    assert!(qemu.wait().unwrap().success());
}
