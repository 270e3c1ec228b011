//! Between fork and exec: a child becomes whom it shall run as, and gives up everything else.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::unistd::{Gid, Uid};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What a child becomes before it executes its program.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its user, group and other groups; `None` leaves them as they are.
    pub(crate) user: Option<(Uid, Gid, Vec<Gid>)>,
    /// Whether what it executes may gain nothing by that, such as a setuid program.
    pub(crate) gains_nothing: bool,
    /// The descriptor that it keeps, by the same number.
    pub(crate) keeps: OwnedFd,
}

impl Child {
    /// Has `command` become this between fork and exec. The descriptor is open for as long as the command lives.
    pub(crate) fn prepare(self, command: &mut Command) {
        // SAFETY: the closure makes system calls only, on values made before the fork: no lock is taken and nothing is
        // allocated, so it does not matter what other threads of the parent held.
        unsafe {
            command.pre_exec(move || self.become_it());
        }
    }

    fn become_it(&self) -> io::Result<()> {
        // A session of its own: no terminal's or group's signal reaches it.
        rustix::process::setsid()?;
        rustix::process::umask(Mode::RWXG | Mode::RWXO);
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        // A guest's memory in a core dump is nobody's business.
        rustix::process::setrlimit(Resource::Core, none)?;
        rustix::process::setrlimit(Resource::Rtprio, none)?;
        // The daemon is ended last when memory is short; a guest takes its turn. Where that is refused, it does not.
        let _ = rustix::fs::open(
            c"/proc/self/oom_score_adj",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|file| rustix::io::write(&file, b"0"));
        if let Some((uid, gid, groups)) = &self.user {
            nix::unistd::setgroups(groups)?;
            nix::unistd::setresgid(*gid, *gid, *gid)?;
            nix::unistd::setresuid(*uid, *uid, *uid)?;
        }
        rustix::thread::clear_ambient_capability_set()?;
        let sets = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets)?;
        if self.gains_nothing {
            rustix::thread::set_no_new_privs(true)?;
        }
        rustix::io::fcntl_setfd(&self.keeps, rustix::io::FdFlags::empty())?;
        Ok(())
    }
}
