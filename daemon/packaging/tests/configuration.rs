//! The default configuration says everything that can be said, and its defaults are the daemon's.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use daemon::config::Config;
use toml::{Table, Value};

const SHIPPED: &str = include_str!("../pagecopy.toml");
/// Before a key with its default, …
const DEFAULT: &str = "#";
/// … and before an example.
const EXAMPLE: &str = "#e.g. ";

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(Path::new("/etc/pagecopy/pagecopy.toml"), text).map_err(|error| error.to_string())
}

/// The key that a line would set without its `mark`, and the line so.
fn unmarked<'a>(line: &'a str, mark: &str) -> Option<(&'a str, &'a str)> {
    let line = line.strip_prefix(mark)?;
    let (key, _) = line.split_once(" = ")?;
    let is_key = key.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    is_key.then_some((key, line))
}

/// The file with each line that `changes` says something about as it says.
fn with(changes: impl Fn(usize, &str) -> Option<String>) -> String {
    let lines = SHIPPED.lines().enumerate();
    let changed =
        lines.map(|(number, line)| changes(number, line).unwrap_or_else(|| line.to_owned()));
    changed.collect::<Vec<_>>().join("\n")
}

/// Each marked line of the file: its key, and the file with that line set alone.
fn set_alone(mark: &str) -> Vec<(String, String)> {
    let lines = SHIPPED.lines().enumerate();
    let marked = lines.filter_map(|(at, line)| Some((at, unmarked(line, mark)?)));
    let set = |(at, (key, set)): (usize, (&str, &str))| {
        let text = with(|number, _| (number == at).then(|| set.to_owned()));
        (key.to_owned(), text)
    };
    marked.map(set).collect()
}

#[test]
fn the_shipped_file_is_a_configuration() {
    let config = parse(SHIPPED).unwrap();
    assert_eq!(config.user.as_deref(), Some("pagecopy"));
    assert_eq!(config.tls.unwrap().key, Path::new("/etc/pagecopy/host.key"));
}

#[test]
fn what_is_commented_out_is_the_default() {
    let shipped = parse(SHIPPED).unwrap();
    let defaults = set_alone(DEFAULT);
    assert!(defaults.len() > 3, "{defaults:?}");
    for (key, text) in defaults {
        assert_eq!(parse(&text).as_ref(), Ok(&shipped), "{key}");
    }
    for (key, text) in set_alone(EXAMPLE) {
        assert_ne!(parse(&text).unwrap(), shipped, "{key}");
    }
}

/// All keys of a table, as the error about one that is unknown lists them.
fn known_keys(whole: &Table, path: &[String]) -> Vec<String> {
    let mut wrong = whole.clone();
    let mut table = &mut wrong;
    for name in path {
        table = table[name].as_table_mut().unwrap();
    }
    table.insert("no-such-key".to_owned(), Value::Boolean(true));
    let error = parse(&toml::to_string(&wrong).unwrap()).unwrap_err();
    let (_, known) = error
        .split_once("unknown key `no-such-key`")
        .unwrap_or_else(|| panic!("of {path:?}: {error}"));
    known
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_key_is_in_it() {
    let all = with(|_, line| {
        let set = unmarked(line, EXAMPLE).or_else(|| unmarked(line, DEFAULT));
        set.map(|(_, line)| line.to_owned())
    });
    let all: Table = toml::from_str(&all).unwrap();
    let mut paths = vec![Vec::new()];
    while let Some(path) = paths.pop() {
        let table = path
            .iter()
            .fold(&all, |table, name: &String| table[name].as_table().unwrap());
        let missing: Vec<String> = known_keys(&all, &path)
            .into_iter()
            .filter(|key| !table.contains_key(key))
            .collect();
        assert!(
            missing.is_empty(),
            "packaging/pagecopy.toml lacks {missing:?} of table {path:?}"
        );
        let below = table.iter().filter(|(_, value)| value.is_table());
        paths.extend(below.map(|(name, _)| [path.clone(), vec![name.clone()]].concat()));
    }
}
