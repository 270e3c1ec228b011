//! The start, while there is one thread and perhaps root's privileges: what only root can do is done, and then given up.
//!
//! systemd's socket is taken. As root: limits are raised, the TLS key is read, TCP is listened on (a port below 1024 may be wanted), `/dev/userfaultfd`
//! is opened, and folders that are missing are made and given to the user. Everything later is done as that user.

use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use transport::{Listener, Security};

use crate::config::Config;
use crate::dial;
use crate::failure::{Failure, host, operator};
use crate::privilege::{self, User};
use crate::qemu::faults::Device;
use crate::reload::{self, InForce};
use crate::session::link_failure;
use crate::spawn::Starter;
use crate::systemd;

/// Open files that the daemon asks for: channels, RAM files, QMP and API connections.
const OPEN_FILES: u64 = 65_536;
/// The priority that an attach runs at, the lowest real-time one.
const ATTACH_PRIORITY: u64 = 1;

/// A daemon that has its configuration, its certificates and its socket, and no privilege that it does not need.
#[derive(Debug)]
pub struct Start {
    pub(crate) in_force: InForce,
    pub(crate) security: Security,
    pub(crate) api: Option<UnixListener>,
    pub(crate) api_remote: Option<TcpListener>,
    pub(crate) listener: Listener,
    pub(crate) userfaultfd: Device,
    pub(crate) starter: Option<Starter>,
}

impl Start {
    /// Reads the configuration and does everything that may need privileges. To be called by the only thread.
    ///
    /// # Errors
    /// What is wrong with the configuration, the files that it names, or the privileges.
    pub fn from_file(config_file: &Path) -> Result<Start, Failure> {
        let in_force = InForce::load(config_file)?;
        let config = in_force.now();
        let api = systemd::passed_socket(&config.api)?;
        let user = config.user.as_deref().map(User::look_up).transpose()?;
        raise_limits();
        let policy = config.spawn_policy.as_deref();
        let starter = policy.map(Starter::launch).transpose()?;
        let security = security(&config)?;
        if let Some(user) = user.as_ref().filter(|_| privilege::is_root()) {
            give_folder(&config.state_dir, 0o700, user)?;
            if let Some(folder) = config.api.parent() {
                give_folder(folder, 0o755, user)?;
            }
        }
        // A socket file is to be the user's own.
        let is_file = config.listen.starts_with("unix:");
        let early = (!is_file).then(|| bind(&config.listen)).transpose()?;
        let api_remote = config.access.as_ref();
        let api_remote = api_remote.and_then(|access| access.listen.as_deref());
        let api_remote = api_remote.map(bind_api).transpose()?;
        let userfaultfd = Device::open();
        privilege::give_up(user.as_ref())?;
        // Sockets, too, are made with the permissions that they shall have.
        rustix::process::umask(Mode::RWXG | Mode::RWXO);
        let listener = match early {
            Some(listener) => listener,
            None => bind(&config.listen)?,
        };
        Ok(Start {
            in_force,
            security,
            api,
            api_remote,
            listener,
            userfaultfd,
            starter,
        })
    }
}

fn security(config: &Config) -> Result<Security, Failure> {
    let Some(tls) = &config.tls else {
        tracing::warn!(
            "INSECURE: insecure-plaintext = true. Guest memory crosses the network unencrypted, and every host that \
             reaches {} may send guests here or take them. Use [tls] on any network that is not yours alone.",
            config.listen
        );
        return Ok(Security::Plaintext);
    };
    let security = reload::tls(tls)?;
    // The first random bytes of a process are made of the CPU's jitter, which takes seconds where a CPU is emulated or busy:
    // not in a peer's handshake, which has no more than that.
    aws_lc_rs::rand::fill(&mut [0])
        .map_err(|_| host("the system has no random bytes", "see the kernel's log"))?;
    Ok(security)
}

/// Makes a folder for `user` if it is not there. One that is there stays as it is: whether it will do is found out as that
/// user.
fn give_folder(path: &Path, mode: u32, user: &User) -> Result<(), Failure> {
    let make = || {
        if std::fs::symlink_metadata(path).is_ok() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o755).create(parent)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(path)?;
        // What was made just now, and no link that took its place.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty())?;
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        rustix::fs::fchown(&folder, Some(uid), Some(gid))?;
        let folder = std::fs::File::from(folder);
        folder.set_permissions(std::fs::Permissions::from_mode(mode))
    };
    make().map_err(|error: io::Error| {
        host(
            format!("the folder {} cannot be made: {error}", path.display()),
            format!("make it, and give it to user {}", user.name),
        )
    })
}

fn bind(listen: &str) -> Result<Listener, Failure> {
    let mut last = None;
    for address in dial::resolve_to_listen(listen)? {
        match Listener::bind(&address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    let failure = last.map_or_else(
        || host("there is no address", ""),
        |error| link_failure(&error),
    );
    Err(operator(
        format!(
            "listen = {listen:?} cannot be listened on: {}",
            failure.what
        ),
        "choose an address of this host and a port that is free",
    ))
}

fn bind_api(listen: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(listen).map_err(|error| {
        operator(
            format!("access.listen = {listen:?} cannot be listened on: {error}"),
            "choose an address of this host and a port that is free",
        )
    })
}

/// Raises what the daemon may raise by itself: locked memory for io_uring's buffers, open files, and the priority of an
/// attach, which root could take without.
fn raise_limits() {
    let raise = |resource, wanted: Option<u64>| {
        let Rlimit { current, maximum } = getrlimit(resource);
        let enough = |limit: Option<u64>| match (limit, wanted) {
            (None, _) => true,
            (Some(limit), Some(wanted)) => limit >= wanted,
            (Some(_), None) => false,
        };
        if enough(current) {
            return;
        }
        let all = Rlimit {
            current: wanted,
            maximum: if enough(maximum) { maximum } else { wanted },
        };
        let own = Rlimit {
            current: maximum,
            maximum,
        };
        if setrlimit(resource, all)
            .or_else(|_| setrlimit(resource, own))
            .is_err()
        {
            tracing::debug!(?resource, ?current, "this limit could not be raised");
        }
    };
    raise(Resource::Memlock, None);
    raise(Resource::Nofile, Some(OPEN_FILES));
    raise(Resource::Rtprio, Some(ATTACH_PRIORITY));
}
