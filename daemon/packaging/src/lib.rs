//! Manual pages and completions, made of the command lines' own definitions.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// What a manual page says at its end.
const SEE_ALSO: &str =
    "pagecopy(1), pagecopyd(8), /etc/pagecopy/pagecopy.toml, /usr/share/doc/pagecopy/README.md";

/// The two programs, with the section of the manual that each is in.
pub fn programs() -> [(Command, &'static str); 2] {
    [
        (daemon::cli::Arguments::command(), "1"),
        (daemon::arguments::Arguments::command(), "8"),
    ]
}

/// Writes all pages into `folder`/man, one for each command, and all completions into `folder`/completions.
///
/// # Errors
/// The folder cannot be written.
pub fn write(folder: &Path) -> io::Result<()> {
    let (pages, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&pages, &completions] {
        fs::create_dir_all(folder)?;
    }
    for (program, section) in programs() {
        let mut program = program.disable_help_subcommand(true);
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            let name = program.get_name().to_owned();
            generate_to(shell, &mut program, name, &completions)?;
        }
        // Names of subcommands and arguments that all of them take are filled in.
        program.build();
        write_pages(&program, section, &pages)?;
    }
    Ok(())
}

/// The page of a command, and those of the commands below it.
fn write_pages(command: &Command, section: &str, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let man = Man::new(command.clone())
        .section(section)
        .manual("pagecopy")
        .title(name.to_uppercase());
    let mut page = Vec::new();
    man.render(&mut page)?;
    page.extend_from_slice(format!(".SH \"SEE ALSO\"\n{SEE_ALSO}\n").as_bytes());
    fs::write(folder.join(format!("{name}.{section}")), page)?;
    let below = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    for command in below {
        write_pages(command, section, folder)?;
    }
    Ok(())
}
