//! The file that a benchmark writes: JSON, one object, of the schema below.
//!
//! `schema` comes first and names this version; a program that does not know it must not read on. A figure that was not
//! measured is absent, never zero. Files are read back to render a report again, or to repeat the run (`--replay`).

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::series::Series;
use crate::stats::Spread;

/// The version of the schema. It changes when a reader of this one would be wrong about a file.
pub const SCHEMA: &str = "pagecopy-bench/1";

/// Everything about one call of `bench`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: String,
    /// When it began, in UTC, as in `2026-01-31T12:00:00Z`.
    pub began: String,
    /// The commit that was measured; `-dirty` at its end when files differed from it.
    pub commit: String,
    /// The command, word for word.
    pub command: Vec<String>,
    /// What it ran on; of two hosts, the source.
    pub machine: Machine,
    /// Both hosts, and what joins them, when they are two machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Joined>,
    /// What was asked for; enough to do the same again.
    pub plan: Plan,
    /// Each way that was measured, and all that was set for it.
    pub ways: Vec<WaySettings>,
    /// What came out, for each link, work and way.
    pub cells: Vec<Cell>,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Processors that this program may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// QEMU's version, as it says itself.
    pub qemu: String,
}

/// Two hosts and the link between them, before anything is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Joined {
    /// Where guests are.
    pub source: HostFacts,
    /// Where they go.
    pub destination: HostFacts,
    /// The link's round trip, in microseconds: the median of some over TCP.
    pub rtt_us: f64,
    /// How well the distance of their clocks is known, in milliseconds.
    pub clock_error_ms: f64,
    /// What two streams of iperf3's bring, in Mbit/s; none when there is no iperf3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iperf3_mbit_s: Option<f64>,
}

impl fmt::Display for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round trip {:.0} µs", self.rtt_us)?;
        if let Some(rate) = self.iperf3_mbit_s {
            write!(f, ", {rate:.0} Mbit/s by iperf3 with 2 streams")?;
        }
        write!(f, ", clocks known to {:.3} ms", self.clock_error_ms)
    }
}

/// One of two hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// As it was named.
    pub name: String,
    /// Its address on the link.
    pub address: IpAddr,
    /// The network device that it sends by, all of whose bytes are counted.
    pub device: String,
    /// What it is.
    pub machine: Machine,
}

/// Which two hosts are asked for, and how they are reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TwoHosts {
    /// Where guests are: a name for `ssh`, or `local`.
    pub source: String,
    /// Where they go.
    pub destination: String,
    /// The destination's address on the link; none when ssh's is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_address: Option<IpAddr>,
    /// The first of four ports of the destination's.
    pub port: u16,
    /// The command that leads to a host, its words apart.
    pub ssh: Vec<String>,
    /// A folder there with the programs; none when they are copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub programs: Option<PathBuf>,
    /// QEMU there; none for that of the `PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
}

/// What a benchmark does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Ways, as in `--ways`.
    pub ways: Vec<String>,
    /// Loads, as in `--work`.
    pub work: Vec<String>,
    /// Links, as in `--links`.
    pub links: Vec<String>,
    /// How much content the guest has, in MiB.
    pub mib: u64,
    /// How much of it is written, in MiB.
    pub set_mib: u64,
    /// How often each way is measured; all ways in turn each time.
    pub pairs: usize,
    /// The downtime that both are asked for, in milliseconds.
    pub downtime_limit_ms: u32,
    /// When a migration that has not ended counts as failed, in seconds.
    pub patience_s: u64,
    /// Whether the destination's QEMU allocates all RAM before, for every way: `prealloc=on`. Otherwise nobody has touched it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub allocated: bool,
    /// The two hosts, when they are not namespaces of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<TwoHosts>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks so
fn is_false(value: &bool) -> bool {
    !*value
}

impl Plan {
    /// What the destination's memory is like before, as a person would say it.
    pub fn memory(&self) -> &'static str {
        match self.allocated {
            true => "allocated before (prealloc=on)",
            false => "not allocated before",
        }
    }
}

/// How a way was set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaySettings {
    /// The way, as in [`Plan::ways`].
    pub way: String,
    /// As a person would say it.
    pub title: String,
    /// `options` of `pagecopy migrate`, or QEMU's `capabilities` and `parameters`.
    pub settings: Value,
}

/// One way, for one work on one link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The link, as in [`Plan::links`].
    pub link: String,
    /// The work, as in [`Plan::work`].
    pub work: String,
    /// The way, as in [`Plan::ways`].
    pub way: String,
    /// The guest's RAM in MiB.
    pub machine_mib: u64,
    /// The guest's command line.
    pub guest: String,
    /// Its runs, in the order of time: run N of all ways of a link and work are a pair.
    pub runs: Vec<Run>,
}

/// One migration, or one measurement of a limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Figures by the names of [`FIGURES`].
    #[serde(default)]
    pub figures: BTreeMap<String, f64>,
    /// What the guest got done meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Series>,
}

/// What a figure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figure {
    /// Its name in [`Run::figures`].
    pub name: &'static str,
    /// As a person would say it.
    pub title: &'static str,
    /// Its unit, as it is written behind a number.
    pub unit: &'static str,
    /// How it was measured.
    pub meaning: &'static str,
}

const fn figure(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    meaning: &'static str,
) -> Figure {
    Figure {
        name,
        title,
        unit,
        meaning,
    }
}

/// All figures. Less is better, but for loops.
#[rustfmt::skip] // a table
pub const FIGURES: &[Figure] = &[
    figure("total_ms", "Total time", "ms",
        "from the command until the side that sends says that it is done"),
    figure("downtime_ms", "Downtime", "ms",
        "from the guest's last beat at the source to its first at the destination; it beats each millisecond"),
    figure("downtime_error_ms", "Downtime, known to", "ms",
        "how far the downtime may be off: each host has its own clock, and the distance of both is read over the link before and after each run"),
    figure("cpu_s_per_gib", "CPU seconds per GiB", "s",
        "of both QEMUs and both daemons over the total time, the guest's own work in it, by GiB of content"),
    figure("wire_mb", "Bytes on the wire", "MB",
        "sent by the network devices of both ends of the link, headers included, and whatever else uses them meanwhile"),
    figure("allocated_mb", "Memory there before", "MB",
        "of the guest's RAM at the destination, allocated when the migration begins"),
    figure("daemon_mb", "Memory of a daemon", "MB",
        "of its own (RssAnon), the greater of both daemons, at most, looked at each 10 ms over the total time"),
    figure("touch_p99_us", "Page touch, 99th percentile", "µs",
        "the guest's own measure of how long a page takes that it reads again after a while: over the whole migration, or with post-copy from its first beat at the destination"),
    figure("touch_p999_us", "Page touch, 99.9th percentile", "µs", "the same"),
    figure("loops_before", "Loops before", "/s", "pages that the guest checked, in the second before"),
    figure("loops_during", "Loops during", "/s", "the same over the total time"),
    figure("loops_after", "Loops after", "/s", "the same in the second after"),
];

impl Cell {
    /// A figure of each run; none where it failed.
    pub fn values(&self, figure: &str) -> Vec<Option<f64>> {
        let runs = self.runs.iter();
        runs.map(|run| run.figures.get(figure).copied()).collect()
    }

    /// The median of a figure over the runs that did not fail, and its spread.
    pub fn spread(&self, figure: &str) -> Option<Spread> {
        let values: Vec<f64> = self.values(figure).into_iter().flatten().collect();
        Spread::of(&values)
    }

    /// Whether another cell is of the same link and work.
    pub fn is_beside(&self, other: &Cell) -> bool {
        self.link == other.link && self.work == other.work
    }
}

impl Record {
    /// Reads a file.
    ///
    /// # Errors
    /// Why it cannot be read, or that it is of another schema.
    pub fn read(path: &Path) -> Result<Record, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Reads what [`to_text`](Self::to_text) wrote.
    ///
    /// # Errors
    /// That it is no JSON, or of another schema.
    pub fn parse(text: &str) -> Result<Record, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        match value["schema"].as_str() {
            Some(SCHEMA) => serde_json::from_value(value).map_err(|error| error.to_string()),
            other => Err(format!(
                "its schema is {}, and this program reads {SCHEMA:?}",
                other.map_or("not named".to_owned(), |name| format!("{name:?}"))
            )),
        }
    }

    /// The file's text.
    pub fn to_text(&self) -> String {
        // A list of numbers on one line each would make most of the file.
        let text = serde_json::to_string(self).unwrap_or_default();
        text + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_schema_is_refused() {
        let refused = |text| Record::parse(text).expect_err("refused");
        assert!(refused("{}").contains("not named"));
        assert!(refused(r#"{"schema": "pagecopy-bench/2"}"#).contains("pagecopy-bench/2"));
        assert!(refused(r#"{"schema": "pagecopy-bench/1"}"#).contains("began"));
        assert!(refused("[").contains("EOF"));
    }

    #[test]
    fn a_run_that_failed_has_no_figures() {
        let run = |failed: Option<&str>, ms: f64| Run {
            failed: failed.map(str::to_owned),
            figures: failed
                .map_or_else(|| [("total_ms".to_owned(), ms)].into(), |_| BTreeMap::new()),
            guest: None,
        };
        let cell = Cell {
            link: "veth".to_owned(),
            work: "idle".to_owned(),
            way: "tcp".to_owned(),
            machine_mib: 64,
            guest: String::new(),
            runs: vec![run(None, 3.0), run(Some("gave up"), 0.0), run(None, 1.0)],
        };
        assert_eq!(cell.values("total_ms"), [Some(3.0), None, Some(1.0)]);
        let spread = cell.spread("total_ms").expect("two runs");
        assert!((spread.median - 2.0).abs() < f64::EPSILON);
        assert_eq!(cell.spread("wire_mb"), None);
    }
}
