//! `pagecopy`: the command line of the migration service.

use std::process::ExitCode;

use clap::Parser;
use daemon::cli::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => ExitCode::from(runtime.block_on(run(arguments))),
        Err(error) => {
            eprintln!("pagecopy: cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
