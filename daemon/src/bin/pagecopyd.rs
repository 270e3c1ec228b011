//! `pagecopyd`: the migration service of a host.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use daemon::failure::{Failure, Shown};
use daemon::service;
use daemon::start::Start;
use tracing_subscriber::EnvFilter;

/// The migration service of a host: sends running QEMU guests to other hosts and receives them.
///
/// Started as root it gives up, before it serves anybody, all privileges but CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (the
/// second one put into effect only to open QEMU's files under /proc), and becomes the user that the configuration names.
/// Any other user must give it these two.
///
/// RUST_LOG sets what is logged to standard error ("info" by default).
#[derive(Debug, Parser)]
#[command(name = "pagecopyd", version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // Before there is any other thread: capabilities belong to threads.
    let start = match Start::from_file(&arguments.config) {
        Ok(start) => start,
        Err(failure) => return failed(&failure),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pagecopyd: no threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(service::run(start)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failed(&failure),
    }
}

fn failed(failure: &Failure) -> ExitCode {
    eprintln!("pagecopyd: {}", Shown(failure));
    ExitCode::FAILURE
}
