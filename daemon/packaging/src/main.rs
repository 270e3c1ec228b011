//! `packaging FOLDER` writes manual pages and completions into FOLDER. `scripts/package` calls it.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [folder] = &*arguments else {
        eprintln!("usage: packaging FOLDER");
        return ExitCode::from(2);
    };
    match packaging::write(folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("packaging: {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}
