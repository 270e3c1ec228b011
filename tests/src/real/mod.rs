//! Real guests, moved between real daemons: what the tests and the benchmark stand on.
//!
//! A [`World`] is two hosts on one machine: two network namespaces joined by a veth pair, a daemon in each. A [`Qemu`]
//! runs the test guest, whose serial port ([`Serial`]) tells when it beats and whether its memory is whole. Everything
//! is torn down on drop, by pid and by name; what a killed test left behind is swept by the next one.

mod booted;
mod browser;
mod certs;
mod cli;
mod daemon;
mod guest;
mod hostile;
mod hugepages;
mod kernel;
mod leftovers;
mod levels;
mod linux;
mod net;
mod overlay;
mod patience;
mod process;
mod qemu;
mod qmp;
mod scratch;
mod serial;
mod small_fs;
mod spawned;
mod steps;
mod sys;
mod used;
mod user;
mod world;

pub use booted::Booted;
pub use browser::{Browser, tunnel};
pub use certs::{Certs, Identity};
pub use cli::{Cli, Migration, Outcome, listens_at};
pub use daemon::{Daemon, Manner, Trust, program};
pub use guest::{guest_elf, outside_downtime};
pub use hostile::{Conduct, Ended, HostileDestination, HostileSource, Mallory, hello, stranger};
pub use hugepages::Hugepages;
pub use kernel::{Sealing, hardware_kvm, kernel_tls, seal_by_kernel};
pub use leftovers::{Footprint, assert_nothing_left_in, nothing_left_in};
pub use levels::Levels;
pub use linux::{Download, LinuxGuest, LinuxState, Ping, Pinged, Switch};
pub use net::{Net, Place, Side};
pub use overlay::{has_overlay, overlay_script};
pub use patience::{eventually, let_it_last};
pub use process::{Process, cpu_seconds, waited_for_processor};
pub use qemu::{Accel, Backing, Machine, Qemu, Ram, Role, Version};
pub use qmp::Qmp;
pub use scratch::Scratch;
pub use serial::{Serial, State, Touches};
pub use small_fs::SmallFs;
pub use spawned::{SpawnAs, SpawnHost, Spawned};
pub use steps::{Held, Steps};
pub use used::{Watch, wait_level};
pub use user::{DAEMON_ID, DAEMON_USER, MONITOR_GROUP, QEMU_ID, RunAs};
pub use world::{
    Moved, World, assert_arrived, assert_follows, assert_left, assert_moved, assert_stayed,
    certified,
};

use std::time::Duration;

/// How long a test waits for something that should happen at once, on a machine that may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Ends a test early, passing, because the machine lacks what it needs. `scripts/test` lists these lines.
pub fn skipped(reason: &str) {
    println!("SKIPPED: {reason}");
}
