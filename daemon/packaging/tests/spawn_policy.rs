//! The shipped policy says everything that can be said, and its defaults are the daemon's.

#![allow(clippy::unwrap_used)]

use daemon::spawn::Policy;
use toml::Table;

const SHIPPED: &str = include_str!("../spawn.toml");

/// The file with every value that is commented out put into force. A comment is a `#` and one blank; a value has none behind
/// the `#`, or four where it goes on.
fn all_in_force() -> String {
    let line = |line: &str| match line.strip_prefix('#') {
        Some(value) if !value.starts_with(' ') || value.starts_with("    ") => value.to_owned(),
        _ => line.to_owned(),
    };
    SHIPPED.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_is_commented_out_is_the_default() {
    let shipped = Policy::parse(SHIPPED).unwrap();
    assert_eq!(shipped, Policy::parse(&all_in_force()).unwrap());
    assert!(shipped.sandbox && !shipped.devices.is_empty());
}

#[test]
fn every_key_is_in_it() {
    let mut table: Table = toml::from_str(&all_in_force()).unwrap();
    table.insert("no-such-key".to_owned(), true.into());
    let error = Policy::parse(&toml::to_string(&table).unwrap()).unwrap_err();
    let (_, known) = error.split_once("`no-such-key`").unwrap();
    let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
    assert!(known.len() > 10, "{error}");
    let missing: Vec<&&str> = known
        .iter()
        .filter(|key| !table.contains_key(**key))
        .collect();
    assert!(missing.is_empty(), "packaging/spawn.toml lacks {missing:?}");
}
