//! What no migration can be faster than: what the link carries, and what the memory does.

use std::hint::black_box;
use std::process::{Child, Stdio};
use std::time::Instant;

use benches::link::Link;
use benches::record::Run;
use benches::ways::Way;
use serde_json::Value;
use tests::real::{Net, PATIENCE, Side, eventually};

use super::migration::net;

/// Moves `mib` MiB without a guest.
pub(crate) fn run(way: &Way, link: Link, mib: u64) -> Result<Run, String> {
    let total_ms = match way.id() {
        "iperf3" => iperf3(&net(link), mib)?,
        _ => memcpy(mib),
    };
    Ok(Run {
        figures: [("total_ms".to_owned(), total_ms)].into(),
        ..Run::default()
    })
}

/// Ends a server that had no client.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Seconds of full speed that the rate is taken from.
const SECONDS: &str = "2";

/// How long `mib` MiB take at the rate of two streams, as many as the ways have that are measured beside it.
fn iperf3(net: &Net, mib: u64) -> Result<f64, String> {
    let missing = |error| format!("iperf3 does not start: {error}");
    let mut server = net.command(Side::B, "iperf3");
    server
        .args(["--server", "--one-off"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _server = Server(server.spawn().map_err(missing)?);
    eventually(PATIENCE, || {
        let mut client = net.command(Side::A, "iperf3");
        client.args(["--client", Side::B.address(), "--parallel", "2", "--json"]);
        let output = client.args(["--time", SECONDS]).output().map_err(missing)?;
        let told: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        if let Some(error) = told["error"].as_str() {
            return Err(error.to_owned()); // the server may not listen yet
        }
        let rate = told["end"]["sum_received"]["bits_per_second"].as_f64();
        let rate = rate
            .filter(|rate| *rate > 0.0)
            .ok_or("iperf3 does not say its rate")?;
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let bits = (mib << 20) as f64 * 8.0;
        Ok(bits / rate * 1e3)
    })
}

/// Milliseconds to copy resident memory, by one thread.
fn memcpy(mib: u64) -> f64 {
    let size = usize::try_from(mib << 20).unwrap_or(usize::MAX);
    let from = vec![1_u8; size];
    let mut to = vec![2_u8; size];
    let begun = Instant::now();
    to.copy_from_slice(&from);
    let taken = begun.elapsed();
    black_box(&to);
    taken.as_secs_f64() * 1e3
}
