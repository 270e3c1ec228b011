//! The rules of the code that no compiler checks, each with the file that breaks it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// All Rust files of the workspace's crates, as paths from its root, with their text.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for member in ["transport", "pagecopy", "daemon", "tests", "benches"] {
        collect(&root().join(member), &mut found);
    }
    assert!(found.len() > 20, "only {} files found", found.len());
    found
}

fn collect(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path
                .strip_prefix(root())
                .unwrap()
                .to_string_lossy()
                .into_owned();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

fn none(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

/// Lines of code: without comments, and without the text of strings on one line.
fn code(text: &str) -> impl Iterator<Item = (usize, String)> + '_ {
    text.lines().enumerate().map(|(number, line)| {
        let line = line.split("//").next().unwrap_or_default();
        (
            number + 1,
            line.split('"').step_by(2).collect::<Vec<_>>().join("\"\""),
        )
    })
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|found| found == word)
}

#[test]
fn every_file_says_what_it_is() {
    let broken: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! ") || text.lines().next().unwrap().len() < 20)
        .map(|(name, _)| format!("{name}: does not begin with a `//!` paragraph"))
        .collect();
    none(&broken);
}

#[test]
fn no_file_is_too_long() {
    let broken: Vec<String> = sources()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > 600)
        .map(|(name, lines)| format!("{name}: {lines} lines"))
        .collect();
    none(&broken);
}

#[test]
fn unsafe_lives_in_sys() {
    let mut broken = Vec::new();
    for (name, text) in sources() {
        if name.contains("/sys/") || name.ends_with("/sys.rs") || name == "transport/src/region.rs"
        {
            continue;
        }
        for (number, line) in code(&text) {
            if has_word(&line, "unsafe") {
                broken.push(format!("{name}:{number}: unsafe outside sys/"));
            }
        }
    }
    none(&broken);
}

#[test]
fn the_siblings_do_not_know_each_other() {
    for (sibling, other) in [("transport", "pagecopy"), ("pagecopy", "transport")] {
        let manifest = fs::read_to_string(root().join(sibling).join("Cargo.toml")).unwrap();
        let depends = manifest.lines().any(|line| {
            let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
            name == other
        });
        assert!(!depends, "{sibling} depends on {other}");
    }
}

/// The engine and the wire decide; they are told the time and own no threads. `clippy.toml` bans the calls, this the
/// names, so that not even a field can hold such a thing.
#[test]
fn the_pure_half_is_pure() {
    let banned = [
        "Instant",
        "SystemTime",
        "HashMap",
        "HashSet",
        "thread",
        "tokio",
        "rustix",
        "libc",
        "File",
        "Mutex",
    ];
    let mut broken = Vec::new();
    let mut seen = 0;
    for (name, text) in sources() {
        if !name.starts_with("pagecopy/src/") || name.starts_with("pagecopy/src/host/") {
            continue;
        }
        seen += 1;
        for (number, line) in code(&text) {
            for word in banned {
                if has_word(&line, word) {
                    broken.push(format!("{name}:{number}: {word} in the pure half"));
                }
            }
        }
    }
    assert!(seen > 5, "only {seen} files of the pure half found");
    none(&broken);
}

#[test]
fn nothing_is_left_unfinished() {
    // Spelt in pieces, so that this file does not hold them.
    let marks = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["XX", "X"],
        ["todo", "!("],
        ["unimplemented", "!("],
        ["dbg", "!("],
    ];
    let mut broken = Vec::new();
    for (name, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            if marks.iter().any(|mark| line.contains(&mark.concat())) {
                broken.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(&broken);
}

#[test]
fn no_test_sleeps_to_wait_for_an_event() {
    let broken: Vec<String> = sources()
        .into_iter()
        .filter(|(name, _)| {
            let excused = "tests/src/real/patience.rs";
            name.starts_with("tests/") && !name.starts_with(excused)
        })
        .flat_map(|(name, text)| {
            let lines: Vec<_> = code(&text)
                .filter(|(_, line)| line.contains("sleep("))
                .collect();
            lines
                .into_iter()
                .map(move |(number, _)| format!("{name}:{number}: a sleep"))
        })
        .collect();
    none(&broken);
}
