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
    if let Err(error) = log::wait_for_nobody() {
        eprintln!("pagecopyd: no thread: {error}");
        return ExitCode::FAILURE;
    }
    let ended = runtime.block_on(service::run(start));
    // What still runs may log; what it says is of no migration any more.
    drop(runtime);
    match ended {
        Ok(()) => {
            log::flush();
            ExitCode::SUCCESS
        }
        Err(failure) => failed(&failure),
    }
}

fn failed(failure: &Failure) -> ExitCode {
    if log::flush() {
        eprintln!("pagecopyd: {}", Shown(failure));
    }
    ExitCode::FAILURE
}
