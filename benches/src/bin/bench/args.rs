//! The command line.

use std::path::PathBuf;

use benches::record::Plan;
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
    /// Where to write, without the endings .json and .html; bench/latest below the folder that cargo builds to, when absent.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Does again what FILE.json is a record of; only --out is heeded besides.
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
            links: self.links.clone(),
            mib: self.mib,
            set_mib: self.set,
            pairs: self.pairs,
            downtime_limit_ms: self.downtime_limit,
            patience_s: self.patience,
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
