//! What no migration can be faster than: what the link carries, and what the memory does.

use std::hint::black_box;
use std::time::Instant;

use benches::hosts::Hosts;
use benches::record::Run;
use benches::ways::Way;

/// Moves `mib` MiB without a guest.
pub(crate) fn run(way: &Way, hosts: &mut Hosts, mib: u64) -> Result<Run, String> {
    let total_ms = match way.id() {
        "iperf3" => iperf3(hosts, mib)?,
        "sockets" => hosts.streams(mib, false)?,
        "ktls" => hosts.streams(mib, true)?,
        _ => memcpy(mib),
    };
    Ok(Run {
        figures: [("total_ms".to_owned(), total_ms)].into(),
        ..Run::default()
    })
}

/// How long `mib` MiB take at the rate that the link carries.
fn iperf3(hosts: &mut Hosts, mib: u64) -> Result<f64, String> {
    let rate = hosts.iperf3()?;
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let bits = (mib << 20) as f64 * 8.0;
    Ok(bits / rate * 1e3)
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
