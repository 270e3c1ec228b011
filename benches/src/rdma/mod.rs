//! `scripts/bench --transport rdma`: our channels over RDMA beside those over TCP and beside perftest's programs, in turn, on
//! the same device and at the same message size.
//!
//! Two processes, on two hosts (`--listen` on one, `--to` on the other) or on one (`--on`). Bulk is what `ib_write_bw` and
//! `ib_read_bw` measure: many messages of one size, as many under way as each side likes; ours go in operations of a MiB, no
//! two pieces of which are neighbours, and end with a message there and back. A latency is that of one page, from when it is
//! asked for until it lies in its place. CPU is that of each process; what the kernel does for a software device is not in
//! it. With `--guest`, on one host: what a page fault of a guest in post-copy takes, and whole migrations beside QEMU's own
//! over RDMA.
//!
//! What is printed are ratios: of runs that followed each other, and their medians.

mod end;
mod far;
mod guests;
mod perftest;
mod rounds;
mod talk;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Where the far end listens, unless another port is said.
const PORT: u16 = 18550;

/// Measures channels over RDMA beside those over TCP and perftest.
#[derive(Debug, Parser)]
#[command(name = "bench --transport rdma")]
pub(crate) struct Options {
    /// What is measured: `rdma` is all that there is.
    #[arg(long, value_parser = ["rdma"])]
    transport: String,
    /// Is the far end, at this address of an RDMA device, until it is ended. Whoever reaches it may use it: on a network that
    /// is trusted, and while it is measured.
    #[arg(long, value_name = "ADDRESS", group = "place")]
    listen: Option<IpAddr>,
    /// Measures against the far end at this address.
    #[arg(long, value_name = "ADDRESS", group = "place")]
    to: Option<IpAddr>,
    /// Both ends are on this host, at this address of an RDMA device of its.
    #[arg(long, value_name = "ADDRESS", group = "place")]
    on: Option<IpAddr>,
    /// The far end's port for TCP; perftest uses the next one.
    #[arg(long, default_value_t = PORT)]
    port: u16,
    /// Bytes of a message.
    #[arg(long, value_delimiter = ',', default_value = "4096,65536,1048576")]
    sizes: Vec<u64>,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// How often all is measured.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// With guests, too. Both daemons and QEMUs are on this host: for one whose RDMA devices are its own, as in scripts/vm.
    #[arg(long, requires = "on", conflicts_with_all = ["to", "listen"])]
    guest: bool,
    /// Where to write all figures.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the benchmark with these arguments, the program's name first.
pub fn run(words: impl Iterator<Item = String>) -> ExitCode {
    match dispatch(&Options::parse_from(words)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(options: &Options) -> Result<(), String> {
    if let Some(address) = options.listen {
        return far::serve(SocketAddr::new(address, options.port));
    }
    transport::rdma::available().map_err(|error| error.to_string())?;
    if let Some(size) = options.sizes.iter().find(|size| !end::is_size(**size)) {
        return Err(format!(
            "--sizes {size}: a message has 4096 bytes to a MiB, a power of two"
        ));
    }
    match (options.to, options.on) {
        (Some(to), _) => rounds::measure(options, SocketAddr::new(to, options.port)),
        (None, Some(on)) => {
            let far = far::Child::start(SocketAddr::new(on, options.port))?;
            rounds::measure(options, far.address())
        }
        (None, None) => Err("say --on, --to or --listen with an address of an RDMA device".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let parse = |words: &str| {
            let words = words.split(' ').map(str::to_owned);
            Options::try_parse_from(["bench".to_owned()].into_iter().chain(words))
        };
        let options = parse("--transport rdma --on 192.0.2.1 --sizes 4096,8192").expect("options");
        assert_eq!((options.sizes.len(), options.port), (2, PORT));
        for wrong in [
            "--transport tcp --on 192.0.2.1",
            "--transport rdma --on 192.0.2.1 --to 192.0.2.2",
            "--transport rdma --to host",
            "--transport rdma --to 192.0.2.1 --guest",
        ] {
            assert!(parse(wrong).is_err(), "{wrong} was taken");
        }
    }
}
