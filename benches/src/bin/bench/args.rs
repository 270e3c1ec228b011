//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use benches::hosts;
use benches::record::{Plan, TwoHosts};
use clap::Parser;

/// Measures ways to move a guest beside each other, in turn, and writes one JSON file and one page about it.
#[derive(Debug, Parser)]
#[command(name = "bench")]
pub(crate) struct Args {
    /// Ways, or groups of them (default, all, ours, qemu, limits, postcopies). Settings may be added, as in
    /// `tcp+channels=4` or `qemu-multifd2+multifd-channels=8`; --list shows all ways and how each is set.
    #[arg(long, value_delimiter = ',', default_value = "default")]
    pub ways: Vec<String>,
    /// Loads: idle, empty, text (compressible), or MB/s dirtied, as in 200, hot800 (90 % of it in a tenth), text50.
    #[arg(long, value_delimiter = ',', default_value = "50")]
    pub work: Vec<String>,
    /// Links: loopback, veth, or a limited veth, as in 1gbit or 250mbit.
    #[arg(long, value_delimiter = ',', default_value = "veth")]
    pub links: Vec<String>,
    /// Where guests are: a host as `ssh` knows it, or `local`. It and the other host are namespaces of this machine when
    /// neither is said. Both need root (or sudo that asks for no password), the same QEMU, and iproute2.
    #[arg(long, value_name = "HOST", conflicts_with = "links")]
    pub source_host: Option<String>,
    /// Where guests go: the same.
    #[arg(long, value_name = "HOST", conflicts_with = "links")]
    pub destination_host: Option<String>,
    /// The destination's address on the link that is measured; that by which ssh reaches it, when absent.
    #[arg(long, value_name = "ADDRESS")]
    pub destination_address: Option<IpAddr>,
    /// The first of four ports at which the destination listens, from that address.
    #[arg(long, default_value_t = hosts::PORT)]
    pub port: u16,
    /// What leads to a host, words apart by blanks: it is called with the host's name and a line for its shell, as
    /// `ssh` is. For jump hosts, `kubectl exec` and the like; a script of one's own will do.
    #[arg(long, value_name = "COMMAND", default_value = hosts::SSH)]
    pub ssh: String,
    /// A folder on the other hosts that has bench, pagecopy, pagecopyd and test-guest.elf of this very build. They are
    /// copied there and removed again when absent.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Option<PathBuf>,
    /// QEMU on both hosts; qemu-system-x86_64 of the PATH when absent.
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<PathBuf>,
    /// Content of the guest's memory, in MiB. With `empty` the guest has eight times as much RAM.
    #[arg(long, default_value_t = 1024)]
    pub mib: u64,
    /// How much of it is written, in MiB.
    #[arg(long, default_value_t = 512)]
    pub set: u64,
    /// How often each way is measured.
    #[arg(long, default_value_t = 5)]
    pub pairs: usize,
    /// The downtime that both are asked for, in milliseconds.
    #[arg(long, default_value_t = 300)]
    pub downtime_limit: u32,
    /// A migration that has not ended after so many seconds has failed.
    #[arg(long, default_value_t = 60)]
    pub patience: u64,
    /// The destination's QEMU allocates all of the guest's RAM as it starts (`prealloc=on`), for every way; nobody has touched it
    /// when absent.
    #[arg(long)]
    pub allocated: bool,
    /// Where to write, without the endings .json and .html; bench/latest below the folder that cargo builds to, when absent.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Does again what FILE.json is a record of; only --out is heeded besides, and between two hosts what says which.
    #[arg(long, value_name = "FILE.json")]
    pub replay: Option<PathBuf>,
    /// Measures nothing: makes FILE.html of FILE.json.
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// Lists all ways and how each is set.
    #[arg(long)]
    pub list: bool,
}

impl Args {
    /// What is to be measured.
    pub(crate) fn plan(&self) -> Plan {
        Plan {
            ways: self.ways.clone(),
            work: self.work.clone(),
            links: match self.hosts() {
                Some(_) => vec!["hosts".to_owned()],
                None => self.links.clone(),
            },
            mib: self.mib,
            set_mib: self.set,
            pairs: self.pairs,
            downtime_limit_ms: self.downtime_limit,
            patience_s: self.patience,
            allocated: self.allocated,
            hosts: self.hosts(),
        }
    }

    /// The two hosts, if any is named.
    fn hosts(&self) -> Option<TwoHosts> {
        if self.source_host.is_none() && self.destination_host.is_none() {
            return None;
        }
        let name = |host: &Option<String>| host.clone().unwrap_or(hosts::LOCAL.to_owned());
        Some(TwoHosts {
            source: name(&self.source_host),
            destination: name(&self.destination_host),
            destination_address: self.destination_address,
            port: self.port,
            ssh: hosts::words(&self.ssh),
            programs: self.programs.clone(),
            qemu: self.qemu.clone(),
        })
    }

    /// What was measured before: between the same hosts, or those that are named now.
    pub(crate) fn again(&self, before: Plan) -> Plan {
        match self.hosts() {
            None => before,
            Some(hosts) => Plan {
                links: vec!["hosts".to_owned()],
                hosts: Some(hosts),
                ..before
            },
        }
    }

    /// The JSON file and the page.
    pub(crate) fn outputs(&self) -> (PathBuf, PathBuf) {
        let usual = || {
            let built = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
            PathBuf::from(built).join("bench/latest")
        };
        let out = self.out.clone().unwrap_or_else(usual);
        let ending = |ending: &str| {
            let mut path = out.clone().into_os_string();
            path.push(ending);
            PathBuf::from(path)
        };
        (ending(".json"), ending(".html"))
    }
}
