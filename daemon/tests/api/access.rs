//! Who may use the API on its socket: by user, by any of the caller's groups, at once after a reload; and the audit lines.
//! Over TLS: `tests/tests/access.rs`.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::harness::{Daemon, JSON, stderr};
use super::problems::assert_problem;

const ID: &str = "6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e";
/// Groups and a user that every Debian has, by these numbers.
const ACCESS: &str = "[access]\nread = ['group:adm']\noperate = ['group:users', 'user:games']\n";
const ADM: &str = "4";
const USERS: &str = "100";
const GAMES: &str = "5";
/// A user whom nobody has named.
const NOBODY: &str = "64119";

/// The command line as another user, in `groups` beside its own.
fn cli_as(daemon: &Daemon, user: &str, groups: &str, words: &[&str]) -> Output {
    // Where the tests are built, others may not read.
    let pagecopy: PathBuf = daemon.dir.join("pagecopy");
    if !pagecopy.exists() {
        std::fs::copy(env!("CARGO_BIN_EXE_pagecopy"), &pagecopy).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={NOBODY}")]);
    match groups {
        "" => command.arg("--clear-groups"),
        groups => command.arg(format!("--groups={groups}")),
    };
    command
        .arg(pagecopy)
        .arg("--api")
        .arg(daemon.dir.join("api.sock"));
    command.args(words).output().unwrap()
}

fn assert_refused(output: &Output, words: &[&str]) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for word in words {
        assert!(stderr(output).contains(word), "{word}: {}", stderr(output));
    }
}

#[test]
fn roles_come_by_user_and_by_any_group() {
    let daemon = Daemon::with("access", ACCESS);
    let mode = std::fs::metadata(daemon.dir.join("api.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o666);
    let cancel = ["cancel", ID];
    let nobody = cli_as(&daemon, NOBODY, "", &["list"]);
    assert_refused(
        &nobody,
        &["uid 64119", "has no role here", "group:NAME", "[access]"],
    );
    assert_refused(&cli_as(&daemon, NOBODY, "", &cancel), &["has no role here"]);
    for groups in [ADM, "9,4"] {
        let list = cli_as(&daemon, NOBODY, groups, &["list"]);
        assert!(list.status.success(), "{list:?}");
        let asked = cli_as(&daemon, NOBODY, groups, &cancel);
        assert_refused(&asked, &["has the role read, and this needs operate"]);
    }
    for (user, groups) in [(NOBODY, USERS), (GAMES, ""), (NOBODY, "4,100"), ("0", "")] {
        let list = cli_as(&daemon, user, groups, &["list"]);
        assert!(list.status.success(), "{list:?}");
        assert_refused(
            &cli_as(&daemon, user, groups, &cancel),
            &["there is no migration"],
        );
    }
    let caller = daemon.get("/v1/caller").json();
    assert_eq!(caller["role"], "operate");
    assert!(
        caller["who"].as_str().unwrap().starts_with("uid 0 "),
        "{caller}"
    );
}

/// What the daemon has logged, once it has ended.
fn log(daemon: &mut Daemon) -> String {
    daemon.signal(Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    let mut log = String::new();
    let stderr = daemon.child.stderr.as_mut().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    log
}

#[test]
fn who_asks_for_what_is_written_down() {
    let mut daemon = Daemon::with("audit", ACCESS);
    cli_as(&daemon, NOBODY, ADM, &["cancel", ID]);
    cli_as(&daemon, GAMES, "", &["cancel", ID]);
    cli_as(&daemon, NOBODY, ADM, &["list"]);
    cli_as(&daemon, NOBODY, "", &["list"]);
    let begun = daemon.begin_in_vain("web");
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(begun.header("location"), format!("/v1/migrations/{id}"));
    let log = log(&mut daemon);
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("pagecopyd::audit"))
        .collect();
    let [read, operate, nobody, begin] = lines.as_slice() else {
        panic!("looking is nothing to write down: {lines:?}");
    };
    for (line, words) in [
        (read, ["uid 64119", "role=read", "status=403"]),
        (operate, ["uid 5 ", "role=operate", "status=404"]),
        (
            nobody,
            ["uid 64119", "path=\"/v1/migrations\"", "status=403"],
        ),
        (begin, ["uid 0 ", "method=POST", "status=201"]),
    ] {
        assert!(
            words.iter().all(|word| line.contains(word)),
            "{words:?}: {line}"
        );
    }
    assert!(read.contains(&format!("id={ID}")), "{read}");
    assert!(begin.contains(&format!("id={id}")), "{begin}");
}

#[test]
fn a_reload_changes_who_may_and_not_whether_anybody_must() {
    let daemon = Daemon::with("access-reload", ACCESS);
    let file = daemon.dir.join("c.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let reload = |text: &str| {
        std::fs::write(&file, text).unwrap();
        daemon.signal(Signal::HUP);
    };
    let may_look = |user, groups| cli_as(&daemon, user, groups, &["list"]).status.success();
    let until = |what: &str, is: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is() {
            assert!(Instant::now() < deadline, "{what}");
        }
    };
    assert!(may_look(NOBODY, ADM) && !may_look("7", ""));
    // Without the table, and with one that names somebody who is not there: nothing is changed.
    reload(&text.replace(ACCESS, ""));
    reload(&text.replace("group:adm", "group:no-such-group"));
    reload(&text.replace("group:adm", "user:lp"));
    until("user lp may look", &|| may_look("7", ""));
    assert!(!may_look(NOBODY, ADM) && may_look(NOBODY, USERS));
    assert!(!may_look(NOBODY, ""), "the table is still there");
}

#[test]
fn somebody_who_does_not_exist_is_named_at_the_start() {
    let dir = std::env::temp_dir().join(format!("pagecopy-api-nobody-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("c.toml");
    let text = "name = 'a'\nlisten = '127.0.0.1:0'\napi = 'api.sock'\nstate-dir = 'state'\ninsecure-plaintext = true\n";
    std::fs::write(
        &file,
        format!("{text}[access]\nread = ['group:no-such-group']\n"),
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagecopyd"));
    let output = command.arg("--config").arg(&file).output().unwrap();
    assert_refused(
        &output,
        &["read names the group \"no-such-group\"", "what to do:"],
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn without_the_table_the_socket_is_its_owners() {
    let daemon = Daemon::start("access-none");
    let output = cli_as(&daemon, NOBODY, "", &["list"]);
    assert_refused(&output, &["cannot be reached", "Permission denied"]);
    assert_eq!(daemon.get("/v1/caller").json()["role"], "operate");
    let answer = daemon.ask("POST", "/v1/caller", &[JSON], "{}");
    assert_problem(&answer, 405, "wrong-method");
}
