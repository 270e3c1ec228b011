//! What `pagecopyd` takes. What `pagecopy` takes is in `cli`.

use std::path::PathBuf;

use clap::Parser;

use crate::log::Format;

/// The migration service of a host: sends running QEMU guests to other hosts and receives them.
///
/// Started as root it gives up, before it serves anybody, all privileges but CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (the
/// second one put into effect only to open QEMU's files under /proc), and becomes the user that the configuration names.
/// Any other user must give it these two.
///
/// RUST_LOG sets what is logged to standard error ("info" by default).
#[derive(Debug, Parser)]
#[command(name = "pagecopyd", version)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE.toml")]
    pub config: PathBuf,
    /// How the log is written
    #[arg(long, value_enum, default_value_t)]
    pub log_format: Format,
}
