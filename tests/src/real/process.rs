//! A child process that is killed, by pid, when its owner goes away, and whose output is shown when a test fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A running child.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output appended to the file `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Process {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log file");
        let err = out.try_clone().expect("a second handle of the log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error} ({command:?})"));
        Process {
            child,
            name: name.to_owned(),
            log: log.to_owned(),
        }
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends SIGKILL, if it still runs, and reaps it.
    pub fn kill(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.rustix_pid(), signal).expect("the child can be signalled");
    }

    /// Waits for its end; none after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        let pidfd = pidfd_open(self.rustix_pid(), PidfdFlags::empty()).ok()?;
        let timeout = Timespec::try_from(timeout).ok()?;
        let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).ok()?;
        if ready == 0 {
            None
        } else {
            self.child.wait().ok()
        }
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed all of `words`; false after `timeout`.
    pub fn wait_output(&self, words: &[&str], timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let changes = inotify::init(CreateFlags::CLOEXEC).expect("inotify");
        inotify::add_watch(&changes, &self.log, WatchFlags::MODIFY)
            .expect("the log can be watched");
        let mut bytes = [0_u8; 4096];
        loop {
            let output = self.output();
            if words.iter().all(|word| output.contains(word)) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("a time-out of seconds");
            if poll(&mut [PollFd::new(&changes, PollFlags::IN)], Some(&left)).unwrap_or(0) == 0 {
                return false;
            }
            // What changed does not matter; the log is read as a whole.
            let _ = rustix::io::read(&changes, &mut bytes);
        }
    }

    fn rustix_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = match self.child.try_wait() {
            Ok(Some(status)) => format!("{status}"),
            Ok(None) => "it ran on".to_owned(),
            Err(error) => error.to_string(),
        };
        self.kill();
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            let tail = &lines[lines.len().saturating_sub(60)..];
            let (name, tail) = (&self.name, tail.join("\n"));
            eprintln!("--- {name} ({ended}) printed last:\n{tail}\n---");
        }
    }
}

/// User and system time of a process so far, in seconds; zero when it is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The command's name, in brackets, may hold blanks; utime and stime are the 12th and 13th field after it.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields
        .iter()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    #[allow(clippy::cast_precision_loss)] // 100 on Linux
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    ticks / per_second
}

/// How long the threads of a process have waited for a processor so far, those that live; zero when it is gone.
pub fn waited_for_processor(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let nanos = tasks.into_iter().flatten().flatten().filter_map(|task| {
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}
