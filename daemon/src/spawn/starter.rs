//! The process that starts QEMUs: a child of the daemon from its first moment, with one thread, and with what it takes to start a
//! program as another user and nothing else.
//!
//! The daemon has no such privilege, and talks to peers. So this process trusts it with nothing: whatever a source asked for is
//! looked at here, under the policy, which only root can write; it starts no program that the policy does not name, ends no
//! process that it did not start, and removes no file whose name it did not make.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::unistd::{Gid, Uid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::{CapabilitySet, CapabilitySets};
use uuid::Uuid;

use super::pipe::{Answer, Done, Order, Started, What, receive, send};
use super::plan::{Ask, OUR_ID, Plan, plan, ram_prefix};
use super::policy::Policy;
use crate::failure::{Failure, host, operator, qemu};
use crate::privilege::{User, is_root};
use crate::qemu::maps::{command_line, processes_with};
use crate::sys::Child;

/// What root's starter keeps: to become a user, to end that user's processes, and to remove that user's files.
const KEPT: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH);
/// How long a process that was killed may take to be gone: the kernel frees its memory.
const GONE_LIMIT: Duration = Duration::from_secs(20);
/// Write permission for anybody but the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Serves the daemon at the other end of standard input, until that has ended.
pub(super) fn serve(policy: &Path) -> ExitCode {
    let socket = io::stdin();
    if let Err(error) = give_up_the_rest() {
        eprintln!("pagecopyd: the starter of guests cannot drop its privileges: {error}");
        return ExitCode::FAILURE;
    }
    let mut children: Vec<OwnedFd> = Vec::new();
    let mut known = Known {
        policy: policy.to_owned(),
        folders: BTreeSet::new(),
    };
    // One that is wrong by now is told to whoever asks.
    let _ = known.read();
    loop {
        if let Err(error) = wait(socket.as_fd(), &mut children) {
            eprintln!("pagecopyd: the starter of guests ends: {error}");
            return ExitCode::FAILURE;
        }
        let (order, with) = match receive::<Order>(socket.as_fd()) {
            Ok(Some(order)) => order,
            // The daemon has ended. What it has started goes on: the next one decides.
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("pagecopyd: the starter of guests does not understand: {error}");
                return ExitCode::FAILURE;
            }
        };
        let mut process = None;
        let answer = match order.order {
            What::Start(ask) => {
                start(&mut known, &ask, with, socket.as_fd()).map(|(started, child)| {
                    process = child.try_clone().ok();
                    children.push(child);
                    Done::Started(started)
                })
            }
            What::End(id) => end(&mut known, id).map(Done::Gone),
            What::Tidy(id) => tidy(&mut known, id).map(Done::Gone),
        };
        let answer = Answer {
            number: order.number,
            answer: answer.unwrap_or_else(Done::from),
        };
        let with: Vec<_> = process.iter().map(AsFd::as_fd).collect();
        if send(socket.as_fd(), &answer, &with).is_err() {
            return ExitCode::FAILURE;
        }
    }
}

fn give_up_the_rest() -> rustix::io::Result<()> {
    let kept = if is_root() {
        KEPT
    } else {
        CapabilitySet::empty()
    };
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(None, sets)
}

/// Waits for an order, and takes leave of QEMUs that end meanwhile.
fn wait(socket: BorrowedFd<'_>, children: &mut Vec<OwnedFd>) -> io::Result<()> {
    loop {
        let mut polled: Vec<PollFd<'_>> =
            std::iter::once(PollFd::from_borrowed_fd(socket, PollFlags::IN))
                .chain(
                    children
                        .iter()
                        .map(|child| PollFd::new(child, PollFlags::IN)),
                )
                .collect();
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let asked = polled.first().is_some_and(|it| !it.revents().is_empty());
        children.retain(|child| {
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            matches!(
                rustix::process::waitid(WaitId::PidFd(child.as_fd()), ended),
                Ok(None)
            )
        });
        if asked {
            return Ok(());
        }
    }
}

/// Reads the policy. For root it decides what runs as whom, so nobody else may write it.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn read_policy(path: &Path) -> Result<Policy, Failure> {
    let wrong = |what: String| {
        operator(
            format!("spawn-policy {}: {what}", path.display()),
            "correct the file; /usr/share/doc/pagecopy/spawn.toml has every key",
        )
    };
    let unreadable = |error: io::Error| wrong(format!("it cannot be read: {error}"));
    let file = File::open(path).map_err(unreadable)?;
    let data = file.metadata().map_err(unreadable)?;
    let trusted = data.uid() == 0 || data.uid() == Uid::effective().as_raw();
    if !trusted || data.mode() & OTHERS_WRITE != 0 {
        return Err(wrong(
            "it must belong to root and be writable by nobody else, for it says what runs here"
                .to_owned(),
        ));
    }
    let text = io::read_to_string(file).map_err(unreadable)?;
    Policy::parse(&text).map_err(wrong)
}

/// The policy, and the folders where it has had RAM files made: they are emptied whatever it says by now.
struct Known {
    policy: PathBuf,
    folders: BTreeSet<PathBuf>,
}

impl Known {
    fn read(&mut self) -> Result<Policy, Failure> {
        let policy = read_policy(&self.policy)?;
        self.folders
            .extend(policy.memory_directories.values().cloned());
        Ok(policy)
    }
}

fn start(
    known: &mut Known,
    ask: &Ask,
    with: Vec<OwnedFd>,
    daemon: BorrowedFd<'_>,
) -> Result<(Started, OwnedFd), Failure> {
    let policy = known.read()?;
    let mut with = with.into_iter();
    let (Some(monitor), Some(log)) = (with.next(), with.next()) else {
        return Err(host("no socket and no log came", "report this"));
    };
    let plan = plan(&policy, ask, monitor.as_raw_fd())?;
    let user = user(&policy)?;
    check_opened(&plan)?;
    check_ram(&plan)?;
    let error_log = log
        .try_clone()
        .map_err(|error| host(error.to_string(), "report this"))?;
    let mut command = Command::new(&plan.binary);
    command
        .args(&plan.arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(error_log);
    let child = Child {
        user,
        gains_nothing: !plan.bridged,
        keeps: monitor,
    };
    child.prepare(&mut command);
    // The next daemon may have looked already for what this one has left.
    if has_ended(daemon) {
        return Err(host("pagecopyd has ended", ""));
    }
    let child = command.spawn().map_err(|error| {
        operator(
            format!(
                "{} cannot be started as user {}: {error}",
                plan.binary.display(),
                policy.user
            ),
            "see to [binaries] and user of the policy (spawn-policy) at the destination",
        )
    })?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let process = Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
        .map_err(|error| {
            host(
                format!("QEMU's process cannot be looked at: {error}"),
                "report this",
            )
        })?;
    let started = Started {
        pid,
        mapped: plan.mapped,
        notices: plan.notices,
    };
    Ok((started, process))
}

fn has_ended(daemon: BorrowedFd<'_>) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut polled = [PollFd::from_borrowed_fd(daemon, PollFlags::RDHUP)];
    let ended = PollFlags::RDHUP | PollFlags::HUP;
    poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().intersects(ended)
}

/// Whom QEMU runs as; `None` where that is who this process is.
fn user(policy: &Policy) -> Result<Option<(Uid, Gid, Vec<Gid>)>, Failure> {
    let user = User::look_up(&policy.user)?;
    if is_root() {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        return Ok(Some((uid, gid, user.groups().to_vec())));
    }
    if Uid::effective().as_raw() == user.uid {
        return Ok(None);
    }
    Err(operator(
        format!(
            "the policy has QEMU run as user {}, and pagecopyd was not started by root",
            user.name
        ),
        format!(
            "start pagecopyd as root with user in its configuration, or name its own user ({}) in the policy",
            Uid::effective()
        ),
    ))
}

/// No symbolic link leads out of a folder that the policy names. What does not exist is looked at by the folder that it is in.
fn check_opened(plan: &Plan) -> Result<(), Failure> {
    for (path, folder) in &plan.opened {
        let refuse = |what: String| {
            Err(operator(
                what,
                "see to [paths] of the policy (spawn-policy) at the destination, and to what is there",
            ))
        };
        let Ok(folder) = folder.canonicalize() else {
            return refuse(format!("the folder {} is not there", folder.display()));
        };
        let real = path
            .canonicalize()
            .or_else(|error| match fs::symlink_metadata(path) {
                Ok(_) => Err(error),
                Err(_) => path.parent().unwrap_or(Path::new("/")).canonicalize(),
            });
        match real {
            Ok(real) if real.starts_with(&folder) => {}
            Ok(_) => {
                return refuse(format!(
                    "{} leads out of {}",
                    path.display(),
                    folder.display()
                ));
            }
            Err(error) => return refuse(format!("{}: {error}", path.display())),
        }
    }
    Ok(())
}

fn check_ram(plan: &Plan) -> Result<(), Failure> {
    for file in &plan.ram {
        let folder = file.parent().unwrap_or(Path::new("/"));
        if !folder.is_dir() {
            return Err(operator(
                format!("the folder for RAM files {} is not there", folder.display()),
                "make it on tmpfs or hugetlbfs, for the user of the policy, or correct [memory-directories]",
            ));
        }
        if fs::symlink_metadata(file).is_ok() {
            return Err(host(
                format!("the RAM file {} is there already", file.display()),
                "begin the migration once more; this one's id was used before",
            ));
        }
    }
    Ok(())
}

/// The QEMUs that were started for `id`: by what follows `-chardev`, which no source can write.
pub(super) fn processes(id: Uuid) -> io::Result<Vec<i32>> {
    processes_with(|words| is_for(id, words))
}

fn is_for(id: Uuid, words: &[String]) -> bool {
    let beginning = format!("socket,id={OUR_ID}{id},fd=");
    let mut pairs = words.windows(2);
    pairs.any(|pair| matches!(pair, [a, b] if a == "-chardev" && b.starts_with(&beginning)))
}

fn end(known: &mut Known, id: Uuid) -> Result<bool, Failure> {
    let failed = |error: io::Error| {
        qemu(
            format!("the QEMU that was started for migration {id} cannot be ended: {error}"),
            "end it by hand; its command line has the migration's id",
        )
    };
    let found = processes(id).map_err(failed)?;
    for pid in &found {
        kill(*pid, id).map_err(failed)?;
    }
    remove_ram(known, id)?;
    Ok(!found.is_empty())
}

/// Kills a process that is still the one that was looked at, and waits until it is gone.
fn kill(pid: i32, id: Uuid) -> io::Result<()> {
    let pid_of = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    let Ok(process) = rustix::process::pidfd_open(pid_of, PidfdFlags::empty()) else {
        return Ok(());
    };
    // Another may have come by the same number since; while the descriptor is held, none can.
    if !command_line(pid).is_ok_and(|words| is_for(id, &words)) {
        return Ok(());
    }
    match rustix::process::pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    let limit = Timespec::try_from(GONE_LIMIT).map_err(io::Error::other)?;
    let mut gone = [PollFd::new(&process, PollFlags::IN)];
    match rustix::io::retry_on_intr(|| poll(&mut gone, Some(&limit)))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

fn tidy(known: &mut Known, id: Uuid) -> Result<bool, Failure> {
    let runs =
        processes(id).map_err(|error| host(error.to_string(), "see that /proc can be read"))?;
    if !runs.is_empty() {
        return Ok(true);
    }
    remove_ram(known, id)?;
    Ok(false)
}

/// Removes the RAM files of `id` in the folders of the policy, by the names that they were given here.
fn remove_ram(known: &mut Known, id: Uuid) -> Result<(), Failure> {
    let prefix = ram_prefix(id);
    // What is wrong with the policy is told to whoever wants to start something.
    let _ = known.read();
    for folder in &known.folders {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let ours = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix));
            if !ours {
                continue;
            }
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(host(
                        format!(
                            "the RAM file {} cannot be removed: {error}",
                            entry.path().display()
                        ),
                        "remove it by hand: it holds memory",
                    ));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
