//! Manual pages and completions are what they are made of, and their readers take them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Command as Definition;

/// What was written, in a folder that goes away.
struct Written(PathBuf);

impl Written {
    fn new(name: &str) -> Written {
        let folder =
            std::env::temp_dir().join(format!("pagecopy-packaging-{name}-{}", std::process::id()));
        let status = Command::new(env!("CARGO_BIN_EXE_packaging"))
            .arg(&folder)
            .status()
            .unwrap();
        assert!(status.success());
        Written(folder)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        // The system's folder for temporary files is emptied by others, too.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Every command, with its name and section as its page is called.
fn commands() -> Vec<(String, Definition)> {
    let mut all = Vec::new();
    for (mut program, section) in packaging::programs() {
        program.build();
        let name = program.get_name().to_owned();
        for below in program
            .get_subcommands()
            .filter(|below| below.get_name() != "help")
        {
            all.push((
                format!("{name}-{}.{section}", below.get_name()),
                below.clone(),
            ));
        }
        all.push((format!("{name}.{section}"), program));
    }
    all
}

/// The options that people see.
fn options(command: &Definition) -> Vec<String> {
    let shown = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set());
    shown
        .filter_map(|argument| argument.get_long())
        .map(|long| format!("--{long}"))
        .collect()
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr]
        .map(|said| String::from_utf8(said).unwrap())
        .concat();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// A page as `man` would show it. Whatever groff finds wrong with it fails.
fn shown(page: &Path) -> String {
    let output = Command::new("groff")
        .args(["-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=200n"])
        .arg(page)
        .output()
        .unwrap();
    let complaints = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && complaints.is_empty(),
        "{page:?}: {complaints}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn each_command_has_a_page_with_all_of_its_options() {
    let written = Written::new("pages");
    let commands = commands();
    let pages = fs::read_dir(written.0.join("man")).unwrap().count();
    assert_eq!(pages, commands.len());
    for (name, command) in commands {
        // Hyphens are shown as such, so that an option can be copied.
        let page = shown(&written.0.join("man").join(&name)).replace('\u{2010}', "-");
        for option in options(&command) {
            assert!(page.contains(&option), "{name} lacks {option}: {page}");
        }
        assert!(page.contains("SEE ALSO"), "{name}: {page}");
    }
}

#[test]
fn bash_completes_commands_options_and_values() {
    let written = Written::new("bash");
    let script = written.0.join("completions/pagecopy.bash");
    let complete = |words: &str| {
        let text = format!(
            "source {script:?}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _pagecopy pagecopy \
             \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; echo \"${{COMPREPLY[@]}}\""
        );
        said(Command::new("bash").args(["--noprofile", "--norc", "-c", &text]))
    };
    assert_eq!(complete("pagecopy mig").trim(), "migrate");
    assert_eq!(
        complete("pagecopy migrate --downt").trim(),
        "--downtime-limit"
    );
    assert!(complete("pagecopy migrate --mode ''").contains("hybrid"));
}

#[test]
fn other_shells_take_their_completions() {
    let written = Written::new("shells");
    let names = [
        "pagecopy.bash",
        "pagecopy.fish",
        "_pagecopy",
        "pagecopyd.bash",
        "pagecopyd.fish",
        "_pagecopyd",
    ];
    for name in names {
        let text = fs::read_to_string(written.0.join("completions").join(name)).unwrap();
        let word = if name.contains("pagecopyd") {
            "log-format"
        } else {
            "start-postcopy"
        };
        assert!(text.contains(word), "{name} lacks {word}");
    }
    for (shell, name) in [("zsh", "_pagecopy"), ("fish", "pagecopy.fish")] {
        match Command::new(shell)
            .arg("-n")
            .arg(written.0.join("completions").join(name))
            .output()
        {
            Ok(output) => assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(_) => println!("SKIPPED: there is no {shell} to read its completions"),
        }
    }
}
