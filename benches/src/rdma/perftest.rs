//! perftest's programs, run as they come but for their sizes: one queue pair, connections by rdma_cm.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How long a server may take to listen, and a client to be done beyond its time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Latencies that are measured.
const PAGES: u32 = 1000;

/// What of it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Program {
    WriteBandwidth,
    ReadBandwidth,
    ReadLatency,
}

impl Program {
    pub(super) fn name(self) -> &'static str {
        match self {
            Program::WriteBandwidth => "ib_write_bw",
            Program::ReadBandwidth => "ib_read_bw",
            Program::ReadLatency => "ib_read_lat",
        }
    }

    /// Where in the line of its figures the one is that is wanted: the average bandwidth in MiB/s, the median of the
    /// latency in microseconds.
    fn column(self) -> usize {
        match self {
            Program::WriteBandwidth | Program::ReadBandwidth => 3,
            Program::ReadLatency => 4,
        }
    }
}

/// A run of it, which both ends are told alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Test {
    pub(super) program: Program,
    /// Bytes of a message.
    pub(super) size: u64,
    pub(super) seconds: u64,
    pub(super) port: u16,
}

impl Test {
    fn command(&self) -> Command {
        let mut command = Command::new(self.program.name());
        command
            .args(["-R", "-F", "-s", &self.size.to_string()])
            .args(["-p", &self.port.to_string()]);
        match self.program {
            Program::ReadLatency => command.args(["-n", &PAGES.to_string()]),
            _ => command.args(["-D", &self.seconds.to_string()]),
        };
        command
    }

    /// Runs it against the server at `to`. Returns MiB/s or microseconds.
    pub(super) fn run(&self, to: IpAddr) -> Result<f64, String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let output = self.command().arg(to.to_string()).output();
            let output = output.map_err(|error| self.missing(&error))?;
            let text = String::from_utf8_lossy(&output.stdout);
            if let Some(figure) = figure(&text, self.size, self.program.column()) {
                return Ok(figure);
            }
            // Its server may not be listening yet, and says nothing when it does.
            if Instant::now() > end {
                let why = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{}: {}", self.program.name(), why.trim()));
            }
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }

    fn missing(&self, error: &std::io::Error) -> String {
        format!(
            "{}: {error} (Debian's package perftest has it, on both hosts)",
            self.program.name()
        )
    }
}

/// The line of figures begins with the size of a message.
fn figure(text: &str, size: u64, column: usize) -> Option<f64> {
    text.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        let figures = words.next()?.parse() == Ok(size);
        let wanted = words.nth(column - 1)?;
        figures.then(|| wanted.parse().ok())?
    })
}

/// A server of it, which ends with this.
pub(super) struct Server(Child);

impl Server {
    pub(super) fn start(test: &Test) -> Result<Server, String> {
        let mut command = test.command();
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        child.map(Server).map_err(|error| test.missing(&error))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended by itself, with its client, cannot be killed any more.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_is_found_in_what_the_program_prints() {
        let bandwidth = " local address: LID 0000\n\
            #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
            65536      4300             0.00               71.55  \t\t   0.001145\n---\n";
        assert_eq!(figure(bandwidth, 65536, 3), Some(71.55));
        assert_eq!(figure(bandwidth, 4096, 3), None);
        let latency = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]\n \
            4096    1000          90.44          900.07       95.17            96.00\n";
        assert_eq!(figure(latency, 4096, 4), Some(95.17));
        assert_eq!(figure("Couldn't connect to 192.0.2.1", 4096, 4), None);
    }
}
