//! What a host is asked for, and what it says: JSON, a line each.
//!
//! The agent greets first. Times are its own, in milliseconds since it was started; see [`clock`](super::clock) for how
//! those of two hosts are brought together.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tests::real::Role;

/// The version of what is said here. Both sides must be of the same.
pub const PROTOCOL: u64 = 2;

/// The agent's first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub agent: u64,
    /// The process that does the work, and leads the group of all that it starts.
    pub pid: u32,
    /// `SSH_CONNECTION`, as sshd sets it: the caller's address and port, and this host's.
    pub ssh_connection: String,
}

/// What a host is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Digests of its programs, by their names.
    Programs,
    /// What kind of machine it is, and the version of this QEMU. Answered by a [`Machine`](crate::record::Machine).
    Describe(PathBuf),
    /// By which device, and from which address, it sends to this one. Answered by a [`Route`].
    Route(IpAddr),
    /// Answers one caller's pings at this address.
    Listen(SocketAddr),
    /// Pings whoever answers there so many times. Answered by a [`Reading`](super::clock::Reading).
    Ping(SocketAddr, usize),
    /// Serves one client of iperf3's at this address.
    Iperf3Server(SocketAddr),
    /// Sends to that server. Answered by bits per second.
    Iperf3(SocketAddr),
    /// Reads all that one caller's streams bring to this address; whether the kernel opens it.
    Drain(SocketAddr, bool),
    /// Sends so many MiB there; whether the kernel seals them. Answered by milliseconds.
    Fill(SocketAddr, u64, bool),
    /// Starts one side of a migration. Answered by the ids of its processes.
    Start(Box<Start>),
    /// Waits until the guest has filled its memory and has beaten for a while.
    Settle,
    /// Has so many MiB of memory that were just in use.
    Warm(u64),
    /// Runs a command of QEMU's monitor. Answered by what that returns.
    Qmp(String, Value),
    /// The daemon takes the guest.
    Receive,
    /// How many bytes of the guest's RAM are allocated.
    Allocated,
    /// Begins to count. Answered by [`Counters`], as is the next.
    Arm,
    /// Ends it.
    Disarm,
    /// Begins to move the guest, and does not wait.
    Begin(Order),
    /// Waits until it is moved, by the side that sends. Answered by [`Ended`].
    Finish,
    /// Waits for so many more beats.
    Beats(usize),
    /// How long pages took to touch since this was asked before. Answered by [`Touched`].
    Touches,
    /// All that the guest has said. Answered by [`Heard`].
    Hear,
    /// The guest is whole.
    Verify,
    /// The guest is whole, runs here, and nothing is left in QEMU.
    Arrived,
    /// The guest has left after so many beats, and nothing is left in QEMU.
    Left(usize),
    /// Ends all that was started.
    Stop,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// What was asked for.
    Done(Value),
    /// Why not.
    Failed(String),
}

/// Where a host's packets go out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The network device.
    pub device: String,
    /// The host's own address.
    pub address: IpAddr,
}

/// One side of a migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// What its daemon calls itself: `a` or `b`.
    pub name: String,
    /// What QEMU is started for.
    pub role: Role,
    /// QEMU.
    pub qemu: PathBuf,
    /// The guest's RAM in MiB.
    pub machine_mib: u64,
    /// Whether QEMU allocates all of it as it starts.
    pub allocated: bool,
    /// The guest's command line.
    pub guest: String,
    /// Where its daemon listens; none when QEMU moves the guest.
    pub daemon: Option<SocketAddr>,
    /// Certificates, when the link is encrypted.
    pub identity: Option<Pem>,
    /// The device whose bytes are counted.
    pub device: String,
}

/// What a host shows of itself, as the text of PEM files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pem {
    /// The authority that it trusts.
    pub ca: String,
    /// Its certificate.
    pub cert: String,
    /// Its private key.
    pub key: String,
}

/// What has been used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Seconds of CPU, of QEMU and the daemon.
    pub cpu_s: f64,
    /// Bytes that the network device has sent.
    pub bytes: u64,
    /// The daemon's own memory at most since counting began, in KiB.
    pub daemon_kib: Option<u64>,
}

/// How a guest is moved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Where to.
    pub to: SocketAddr,
    /// By whom.
    pub by: By,
    /// When it counts as failed, in seconds.
    pub patience_s: u64,
}

/// Who moves it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// The daemon, with these options of `pagecopy migrate`.
    Daemon(Vec<String>),
    /// QEMU, which has been set; whether it is told to switch over as soon as it lets itself be told.
    Qemu(bool),
}

/// A migration that is over, at the side that sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// When it was told to.
    pub begun_ms: f64,
    /// When that side said that it was done.
    pub ended_ms: f64,
    /// What had been used before.
    pub before: Counters,
    /// And after.
    pub after: Counters,
}

/// How long pages took to touch, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Touched {
    /// All but one of a hundred took no longer.
    pub p99_us: f64,
    /// All but one of a thousand.
    pub p999_us: f64,
}

/// What a guest has said at a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Heard {
    /// How often it has beaten.
    pub beats: usize,
    /// When it first did so, and which beat it was.
    pub first: Option<(f64, u8)>,
    /// The same of the last one.
    pub last: Option<(f64, u8)>,
    /// When it said how many pages it had checked by then.
    pub states: Vec<(f64, u64)>,
}

/// Digests by the names of programs.
pub type Digests = BTreeMap<String, String>;
