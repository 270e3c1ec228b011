//! The daemon's end of the starter.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uuid::Uuid;

use super::pipe::{Answer, Done, Order, Started, What, receive, send};
use super::plan::Ask;
use super::starter;
use crate::failure::{Failure, Fault, host};
use crate::session::blocking;

/// The word by which the daemon calls itself as the starter. No option of `pagecopyd`: only it says this.
const WORD: &str = "--start-guests";
/// How long the starter may take; killing a QEMU of much memory takes longest.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Runs the starter if this process was called as one.
pub fn run_if_called() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != OsStr::new(WORD) {
        return None;
    }
    let policy = PathBuf::from(words.next()?);
    Some(starter::serve(&policy))
}

/// The process that starts QEMUs.
#[derive(Clone, Debug)]
pub struct Starter(Arc<Mutex<Pipe>>);

#[derive(Debug)]
struct Pipe {
    socket: OwnedFd,
    last: u64,
}

impl Starter {
    /// Checks the policy and starts the process, with the privileges of this one. To be called by the only thread, before
    /// they are given up.
    ///
    /// # Errors
    /// The policy is wrong, or there is no process.
    pub(crate) fn launch(policy: &Path) -> Result<Starter, Failure> {
        starter::read_policy(policy)?;
        let launch = || -> io::Result<OwnedFd> {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            rustix::net::sockopt::set_socket_timeout(
                &ours,
                rustix::net::sockopt::Timeout::Recv,
                Some(ANSWER_LIMIT),
            )?;
            // It ends by itself, when the other end of the socket is closed.
            Command::new("/proc/self/exe")
                .arg0("pagecopyd")
                .arg(WORD)
                .arg(policy)
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .process_group(0)
                .spawn()?;
            Ok(ours)
        };
        let socket = launch().map_err(|error| {
            host(
                format!("the starter of guests cannot be started: {error}"),
                "raise the limit of processes, and see that /proc is there",
            )
        })?;
        Ok(Starter(Arc::new(Mutex::new(Pipe { socket, last: 0 }))))
    }

    /// Starts a QEMU for what a source asks, with its monitor at the socket `monitor`, which is bound, and its output in `log`.
    /// Says what was started, with a descriptor of its process.
    ///
    /// # Errors
    /// The policy does not allow it, or it cannot be started.
    pub(crate) async fn start(
        &self,
        ask: Ask,
        monitor: OwnedFd,
        log: OwnedFd,
    ) -> Result<(Started, OwnedFd), Failure> {
        let this = self.clone();
        blocking(move || {
            let with = [monitor.as_fd(), log.as_fd()];
            match this.say(What::Start(ask), &with)? {
                (Done::Started(started), Some(process)) => Ok((started, process)),
                (answer, _) => Err(strange(&answer)),
            }
        })
        .await
    }

    /// Ends the QEMU that was started for `id`, if it runs, and removes its RAM files.
    ///
    /// # Errors
    /// It cannot be ended, or a file cannot be removed.
    pub(crate) async fn end(&self, id: Uuid) -> Result<bool, Failure> {
        self.be_rid(What::End(id)).await
    }

    /// Removes the RAM files of a QEMU that has ended. Says whether it runs after all.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub(crate) async fn tidy(&self, id: Uuid) -> Result<bool, Failure> {
        self.be_rid(What::Tidy(id)).await
    }

    async fn be_rid(&self, what: What) -> Result<bool, Failure> {
        let this = self.clone();
        blocking(move || match this.say(what, &[])? {
            (Done::Gone(found), _) => Ok(found),
            (answer, _) => Err(strange(&answer)),
        })
        .await
    }

    fn say(
        &self,
        order: What,
        with: &[BorrowedFd<'_>],
    ) -> Result<(Done, Option<OwnedFd>), Failure> {
        let mut pipe = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pipe.last += 1;
        let number = pipe.last;
        let gone = |error: io::Error| {
            host(
                format!("the starter of guests does not answer: {error}"),
                "start pagecopyd again; its log says why",
            )
        };
        send(&pipe.socket, &Order { number, order }, with).map_err(gone)?;
        loop {
            let answer = receive::<Answer>(&pipe.socket).map_err(gone)?;
            let (answer, with) = answer.ok_or_else(|| gone(io::ErrorKind::UnexpectedEof.into()))?;
            // One that came too late for who had asked is nobody's.
            if answer.number != number {
                continue;
            }
            return match answer.answer {
                Done::Refused {
                    fault,
                    what,
                    remedy,
                } => Err(Failure::new(fault, what, remedy)),
                done => Ok((done, with.into_iter().next())),
            };
        }
    }
}

fn strange(answer: &Done) -> Failure {
    Failure::new(
        Fault::ThisHost,
        format!("the starter of guests answers {answer:?}"),
        "report this",
    )
}
