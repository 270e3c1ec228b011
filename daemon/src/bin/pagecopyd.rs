//! `pagecopyd`: the migration service of a host.

use std::process::ExitCode;

use clap::Parser;
use daemon::arguments::Arguments;
use daemon::failure::{Failure, Shown};
use daemon::start::Start;
use daemon::{log, service, spawn};

fn main() -> ExitCode {
    if let Some(ended) = spawn::run_if_called() {
        return ended;
    }
    let arguments = Arguments::parse();
    log::init(arguments.log_format);
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
