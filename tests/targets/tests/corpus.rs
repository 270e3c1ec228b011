//! Every file of the fuzzers' corpus once more, as an ordinary test: a regression shows without the fuzzer.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use targets::{TARGETS, Target};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

/// Runs every file of a target's folder. The name of the one that fails is printed before its panic.
fn replay(name: &str) {
    let (_, target): (_, Target) = *TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let mut files = 0;
    for entry in fs::read_dir(corpus().join(name)).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        target(&fs::read(&path).unwrap());
        files += 1;
    }
    assert!(files > 0, "the corpus of {name} is empty");
}

#[test]
fn destination() {
    replay("destination");
}

#[test]
fn encoded() {
    replay("encoded");
}

#[test]
fn facts() {
    replay("facts");
}

#[test]
fn greeting() {
    replay("greeting");
}

#[test]
fn journal() {
    replay("journal");
}

#[test]
fn message() {
    replay("message");
}

#[test]
fn records() {
    replay("records");
}

#[test]
fn source() {
    replay("source");
}

#[test]
fn spawn() {
    replay("spawn");
}

#[test]
fn stream() {
    replay("stream");
}

/// No folder is left over from a target that is gone, each target has a test above, and the whole stays small.
#[test]
fn the_corpus_is_that_of_the_targets() {
    let mut folders: Vec<String> = fs::read_dir(corpus())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(folders, names);
    let this = include_str!("corpus.rs");
    let (mut files, mut bytes) = (0, 0);
    for name in names {
        assert!(this.contains(&format!("fn {name}()")), "no test of {name}");
        for entry in fs::read_dir(corpus().join(name)).unwrap() {
            files += 1;
            bytes += entry.unwrap().metadata().unwrap().len();
        }
    }
    assert!(
        files <= 240 && bytes <= 1 << 20,
        "{files} files, {bytes} bytes"
    );
}
