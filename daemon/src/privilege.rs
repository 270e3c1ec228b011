//! What the daemon may do, and giving up everything else before it does anything.
//!
//! Two capabilities are needed for as long as the daemon runs, both over QEMU's process only (measured with QEMU 7.2 and 10.0 of
//! another user, of root, in a sandbox and in a user namespace):
//!
//! - `CAP_SYS_PTRACE`, in effect: attaching, taking QEMU's descriptors (`pidfd_getfd`: the userfaultfd, and the RAM file,
//!   which is therefore never opened by its path), `/proc/PID/{maps,fdinfo}`, and userfaultfds of our own.
//! - `CAP_DAC_READ_SEARCH`, permitted: `/proc/PID/{pagemap,mem,fd}` are their owner's by file permissions, which
//!   `CAP_SYS_PTRACE` does not change. It is put into effect for the moment in which these are opened, and in that thread
//!   (`pagecopy::host::process`); for every other path the daemon is its user and nothing more.
//!
//! Everything else that root can is used once, at the start ([`Start`](crate::start::Start)), and then dropped from every
//! set. All of it happens while there is one thread: capabilities belong to threads, and new ones inherit.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User as Entry};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::failure::{Failure, host, operator};

/// In effect for as long as the daemon runs.
const IN_EFFECT: CapabilitySet = CapabilitySet::SYS_PTRACE;
/// Held for as long as the daemon runs.
const HELD: CapabilitySet = CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH);
/// What the capabilities are called, to people, systemd and setcap.
const NAMES: [(CapabilitySet, &str); 2] = [
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
    (CapabilitySet::DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"),
];

/// The user that the daemon runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its id.
    pub uid: u32,
    /// The id of its own group.
    pub gid: u32,
    /// All groups that it is in.
    groups: Vec<Gid>,
}

impl User {
    /// Looks a user up where the system keeps them.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn look_up(name: &str) -> Result<User, Failure> {
        let failed = |why: &str| {
            operator(
                format!("user = {name:?}: {why}"),
                format!("make it (useradd --system {name}), or name another in the configuration"),
            )
        };
        let entry = Entry::from_name(name)
            .map_err(|error| failed(&format!("it cannot be looked up: {error}")))?
            .ok_or_else(|| failed("there is no such user"))?;
        let called = CString::new(name).map_err(|_| failed("that is no name"))?;
        let groups = nix::unistd::getgrouplist(&called, entry.gid)
            .map_err(|error| failed(&format!("its groups cannot be looked up: {error}")))?;
        Ok(User {
            name: name.to_owned(),
            uid: entry.uid.as_raw(),
            gid: entry.gid.as_raw(),
            groups,
        })
    }
}

impl User {
    /// All groups that it is in.
    pub(crate) fn groups(&self) -> &[Gid] {
        &self.groups
    }
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    Uid::effective().is_root()
}

/// Becomes `user`, if one is given, and gives up all that is not needed any more. To be called by the only thread.
///
/// # Errors
/// What was not started with the capabilities that it needs, and how to give them; or what cannot become `user`.
pub fn give_up(user: Option<&User>) -> Result<(), Failure> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        let what = format!("there are {threads} threads before the privileges were dropped");
        return Err(host(what, "report this"));
    }
    check_held()?;
    let failed = |what: &'static str| {
        move |error: Errno| {
            host(
                format!("the privileges could not be dropped: {what}: {error}"),
                "start pagecopyd as root, or as the user that it shall run as",
            )
        }
    };
    clear_bounding_set().map_err(failed("the bounding set"))?;
    if let Some(user) = user {
        switch_to(user)?;
    }
    let sets = CapabilitySets {
        effective: IN_EFFECT,
        permitted: HELD,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed("capabilities"))?;
    rustix::thread::clear_ambient_capability_set().map_err(failed("the ambient set"))?;
    rustix::thread::set_keep_capabilities(false).map_err(failed("keeping capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    // Other processes of this user must not get hold of what this one may do, and its core dump would hold keys.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("dumpable"))
}

/// A daemon that could not attach to any QEMU says so when it starts, and not in the middle of a migration.
fn check_held() -> Result<(), Failure> {
    let permitted = rustix::thread::capabilities(None)
        .map_or(CapabilitySet::empty(), |capabilities| {
            capabilities.permitted
        });
    let missing: Vec<&str> = NAMES
        .iter()
        .filter(|(capability, _)| !permitted.contains(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let all = NAMES.map(|(_, name)| name).join(" ");
    Err(operator(
        format!(
            "pagecopyd was started as user {} without {}, which it needs to attach to QEMU",
            Uid::effective(),
            missing.join(" and ")
        ),
        format!(
            "start it as root with user = \"pagecopy\" in the configuration; or with AmbientCapabilities={all} in its \
             systemd unit; or once: setcap cap_sys_ptrace,cap_dac_read_search=p on the program (in a container, both must \
             be allowed from outside, such as by --cap-add)"
        ),
    ))
}

/// What this process executes gains nothing by it. A process that is not root has no say in this, and no_new_privs has the
/// same effect.
fn clear_bounding_set() -> rustix::io::Result<()> {
    let may = rustix::thread::capabilities(None)?.effective;
    if !may.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows none beyond.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes on the ids of `user`; the permitted capabilities stay.
fn switch_to(user: &User) -> Result<(), Failure> {
    if !is_root() {
        let own = Uid::current();
        if own.as_raw() == user.uid {
            return Ok(());
        }
        return Err(operator(
            format!(
                "user = {:?} cannot be become: pagecopyd was started as user {own}",
                user.name
            ),
            "start it as root or as that user, or remove user from the configuration",
        ));
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        host(
            format!("user {:?} cannot be become: {what}: {error}", user.name),
            "start pagecopyd as root with CAP_SETUID and CAP_SETGID, or as that user",
        )
    };
    rustix::thread::set_keep_capabilities(true)
        .map_err(|error| failed("keeping capabilities", &error))?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    nix::unistd::setgroups(&user.groups).map_err(|error| failed("its groups", &error))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(|error| failed("its group", &error))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(|error| failed("its id", &error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn users_are_looked_up_and_an_unknown_one_is_named() {
        let root = User::look_up("root").unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert!(root.groups.contains(&Gid::from_raw(0)));
        for name in ["no-such-user", "", "a\0b"] {
            let error = User::look_up(name).unwrap_err();
            assert!(error.what.contains(&format!("{name:?}")), "{error:?}");
            assert!(error.remedy.contains("useradd"), "{error:?}");
        }
    }
}
