//! A `pagecopyd` for a test, started from a configuration and ready when the call returns.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Identity, Net, PATIENCE, Place, Process, RunAs, Side, eventually, listens_at};

/// Port on which every test's daemons listen; the namespaces keep them apart.
pub(super) const PORT: u16 = 7700;

/// How a daemon trusts its peers.
#[derive(Clone, Debug)]
pub enum Trust {
    /// `insecure-plaintext = true`.
    Plaintext,
    /// `[tls]` with these files and this allow-list.
    Tls(Identity, Vec<String>),
}

/// What a daemon is like.
#[derive(Clone, Debug)]
pub struct Manner {
    /// What it calls itself.
    pub name: String,
    /// How it trusts its peers.
    pub trust: Trust,
    /// Where the harness listens that may hold its steps ([`Steps`](super::Steps)).
    pub steps: Option<PathBuf>,
    /// How it is started.
    pub run_as: RunAs,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    api: PathBuf,
    config: PathBuf,
    /// On a link; none when it runs on this process's own host.
    side: Option<Side>,
    manner: Manner,
}

impl Daemon {
    /// Starts the daemon of `side`, with its files in `folder`, and waits until it says that it is ready.
    pub fn start(net: &Net, side: Side, folder: &Path, manner: &Manner) -> Daemon {
        Self::start_with(net, side, folder, manner, |_| {})
    }

    /// The same, with what `adjust` adds to its command for this life.
    pub fn start_with(
        net: &Net,
        side: Side,
        folder: &Path,
        manner: &Manner,
        adjust: impl FnOnce(&mut Command),
    ) -> Daemon {
        Self::start_new(Place::On(net, side), folder, manner, adjust)
    }

    /// Starts a daemon on this process's own host, where it listens at `address`.
    pub fn start_here(address: SocketAddr, folder: &Path, manner: &Manner) -> Daemon {
        Self::start_new(Place::Here(address), folder, manner, |_| {})
    }

    fn start_new(
        place: Place<'_>,
        folder: &Path,
        manner: &Manner,
        adjust: impl FnOnce(&mut Command),
    ) -> Daemon {
        let api = folder.join("api.sock");
        let config = folder.join("pagecopyd.toml");
        let listen = match place {
            Place::On(_, side) => listens_at(side),
            Place::Here(address) => address.to_string(),
        };
        let text = configuration(&listen, folder, manner);
        fs::write(&config, manner.run_as.configuration() + &text).expect("a configuration file");
        Self::start_from(place, &config, &api, manner, adjust)
    }

    /// Starts the daemon again after its end, from the same files.
    pub fn restart(&mut self, net: &Net) {
        self.process.kill();
        let (config, api, manner) = (self.config.clone(), self.api.clone(), self.manner.clone());
        let side = self.side.expect("a daemon on a link");
        *self = Self::start_from(Place::On(net, side), &config, &api, &manner, |_| {});
    }

    fn start_from(
        place: Place<'_>,
        config: &Path,
        api: &Path,
        manner: &Manner,
        adjust: impl FnOnce(&mut Command),
    ) -> Daemon {
        let notify_path = config.with_extension("notify");
        let _ = fs::remove_file(&notify_path);
        let notify = UnixDatagram::bind(&notify_path).expect("a socket for sd_notify");
        // Anybody may tell systemd's.
        fs::set_permissions(&notify_path, Permissions::from_mode(0o777))
            .expect("a socket takes a mode");
        notify
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a socket takes a time-out");
        let folder = config.parent().expect("a file is in a folder");
        let mut command = manner
            .run_as
            .command_at(place, folder, &program("pagecopyd"));
        command
            .arg("--config")
            .arg(config)
            .env("NOTIFY_SOCKET", &notify_path)
            .envs(manner.steps.iter().map(|socket| ("PAGECOPY_STEPS", socket)));
        adjust(&mut command);
        let mut process = Process::spawn(
            &format!("daemon {}", manner.name),
            &mut command,
            &config.with_extension("log"),
        );
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = [0_u8; 1024];
        loop {
            let told = notify.recv(&mut bytes).unwrap_or(0);
            if String::from_utf8_lossy(&bytes[..told]).contains("READY=1") {
                break;
            }
            assert!(
                process.is_running(),
                "the daemon ended: {}",
                process.output()
            );
            assert!(
                Instant::now() < deadline,
                "the daemon is not ready: {}",
                process.output()
            );
        }
        Daemon {
            process,
            api: api.to_owned(),
            config: config.to_owned(),
            side: match place {
                Place::On(_, side) => Some(side),
                Place::Here(_) => None,
            },
            manner: manner.clone(),
        }
    }

    /// The API's socket.
    pub fn api(&self) -> &Path {
        &self.api
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until its log holds all of `words`, and panics if it never does.
    pub fn assert_logs(&self, words: &[&str]) {
        let logged = self.process.wait_output(words, Duration::from_secs(10));
        assert!(
            logged,
            "the daemon does not say {words:?}: {}",
            self.process.output()
        );
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Stops it by SIGSTOP, and waits until every thread of it stands: some may go on for a moment.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.pid());
        let stands = |stat: String| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" T"))
        };
        let all_stand = eventually(PATIENCE, || {
            let threads = fs::read_dir(&tasks).into_iter().flatten().flatten();
            let all = threads
                .filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok())
                .all(stands);
            if all {
                Ok(())
            } else {
                Err("a thread goes on".to_owned())
            }
        });
        assert_eq!(all_stand, Ok(()), "SIGSTOP stops the daemon");
    }

    /// Sends `signal` and does not wait.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end; whether it ended in order.
    pub fn wait_end(&mut self) -> bool {
        self.process
            .wait(PATIENCE)
            .is_some_and(|status| status.success())
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// All that it has logged, over all its lives.
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// The folder of its journals.
    pub fn state(&self) -> PathBuf {
        self.config.with_file_name("state")
    }

    /// Sends SIGTERM and waits; whether it ended in order.
    pub fn terminate(&mut self) -> bool {
        self.signal(Signal::TERM);
        self.wait_end()
    }
}

/// The text of a configuration file.
fn configuration(listen: &str, folder: &Path, manner: &Manner) -> String {
    let mut text = format!(
        "name = {:?}\nlisten = {:?}\napi = {:?}\nstate-dir = {:?}\nmemory-margin = \"64MiB\"\n",
        manner.name,
        listen,
        folder.join("api.sock"),
        folder.join("state"),
    );
    // A host that has a policy starts QEMUs.
    let policy = folder.join("spawn.toml");
    if policy.exists() {
        text.push_str(&format!("spawn-policy = {policy:?}\n"));
    }
    match &manner.trust {
        Trust::Plaintext => text.push_str("insecure-plaintext = true\n"),
        Trust::Tls(identity, allow) => {
            let Identity { ca, cert, key } = identity;
            text.push_str(&format!(
                "[tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\nallow = {allow:?}\n"
            ));
        }
    }
    text
}

/// The folder that cargo builds to.
pub(super) fn target_folder() -> PathBuf {
    // A test runs as target/PROFILE/deps/NAME, a benchmark's program as target/PROFILE/NAME.
    let exe = std::env::current_exe().expect("a test knows its own path");
    let folder = exe.parent().expect("a program is in a folder");
    let profile = if folder.ends_with("deps") {
        folder.parent().expect("deps is in a folder")
    } else {
        folder
    };
    profile.to_owned()
}

/// A program of the daemon's crate. `PAGECOPY_BIN_DIR` says where it is; otherwise it is built, once, like the tests.
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(built_folder).join(name)
}

fn built_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("PAGECOPY_BIN_DIR") {
        return folder.into();
    }
    let folder = target_folder();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "-p",
        "daemon",
        "-p",
        "packaging",
        "--bins",
    ]);
    // The fault matrix holds the daemons at their steps.
    cargo.args(["--features", "daemon/steps"]);
    cargo.arg("--target-dir").arg(
        folder
            .parent()
            .expect("a profile's folder is in the target folder"),
    );
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo can be called");
    assert!(status.success(), "the daemon does not build");
    folder
}
