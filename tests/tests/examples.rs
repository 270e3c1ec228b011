//! The examples for orchestrators (`scripts/examples`): each moves a real guest, is told why one cannot be moved, and goes on when
//! the daemon is away for a moment.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tests::real::{Machine, Side, Version, World, assert_moved, skipped};

fn example(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("scripts/examples").join(name)
}

/// The command of an example, which talks to a host's daemon.
fn command(world: &World, program: &Path, words: [&str; 3]) -> Command {
    let mut command = Command::new(program);
    command.args(words);
    command.env("PAGECOPY_API", world.daemon(Side::A).api());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn texts(output: &Output) -> [String; 2] {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned())
}

/// Moves a guest by `program`, and tries what cannot be.
fn try_out(program: &Path) {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 64, "rate=10 set=16");
    let (mut source, mut destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let qmp = source.socket().to_str().unwrap().to_owned();
    let to = format!("{}:7700", Side::B.address());

    let refused = command(&world, program, ["web \"1\"", &qmp, "nowhere"])
        .output()
        .unwrap();
    let [_, errors] = texts(&refused);
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("has no port") && errors.contains("what to do: "),
        "{errors}"
    );
    // The destination does not expect it yet.
    let failed = command(&world, program, ["web \"1\"", &qmp, &to])
        .output()
        .unwrap();
    let [said, errors] = texts(&failed);
    assert_eq!(failed.status.code(), Some(1), "{said}{errors}");
    assert!(
        said.contains("preparing") && said.contains("failed: "),
        "{said}{errors}"
    );

    world
        .cli(Side::B)
        .receive("web \"1\"", destination.socket())
        .unwrap();
    let moved = command(&world, program, ["web \"1\"", &qmp, &to])
        .output()
        .unwrap();
    let [said, errors] = texts(&moved);
    assert_eq!(moved.status.code(), Some(0), "{said}{errors}");
    for word in ["migration ", "migrating", "round", "completed"] {
        assert!(said.contains(word), "{said}{errors}");
    }
    assert_moved(&mut source, &mut destination);
    let usage = Command::new(program).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
}

#[test]
fn in_shell() {
    try_out(&example("migrate.sh"));
}

#[test]
fn in_python() {
    try_out(&example("migrate.py"));
}

#[test]
fn in_go() {
    let scratch = tests::real::Scratch::new();
    let program = scratch.files().join("migrate");
    let mut build = Command::new("go");
    build
        .args(["build", "-o"])
        .arg(&program)
        .arg(example("migrate.go"));
    build
        .env("GOCACHE", scratch.folder("cache"))
        .env("GOFLAGS", "-mod=mod");
    let built = match build.output() {
        Ok(built) => built,
        Err(error) => {
            return skipped(&format!(
                "go cannot be called: {error}: scripts/install brings it"
            ));
        }
    };
    assert!(built.status.success(), "{:?}", texts(&built));
    try_out(&program);
    let mut format = Command::new("gofmt");
    let format = format
        .arg("-l")
        .arg(example("migrate.go"))
        .output()
        .unwrap();
    assert_eq!(
        texts(&format),
        [String::new(), String::new()],
        "gofmt would write it in another way"
    );
}
