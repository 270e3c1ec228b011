//! What the daemon may do once it has started: exactly what it needs, in every thread, however it was started; and that this is
//! enough for QEMUs of other users. And that no name that a peer or a client gives becomes a path.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use tests::real::{
    DAEMON_ID, DAEMON_USER, MONITOR_GROUP, Machine, Net, Qemu, Role, RunAs, Scratch, Side, Version,
    World, assert_moved, assert_stayed, program, skipped,
};

/// CAP_SYS_PTRACE.
const IN_EFFECT: &str = "0000000000080000";
/// The same and CAP_DAC_READ_SEARCH.
const HELD: &str = "0000000000080004";
const NONE: &str = "0000000000000000";

/// Panics unless every thread of the process has these ids and exactly the capabilities that are needed.
fn assert_confined(pid: u32, id: u32, groups: Option<&str>) {
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        // A thread may end meanwhile.
        let Ok(status) = fs::read_to_string(task.path().join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        let ids = format!("{id} {id} {id} {id}");
        let mut expected = vec![
            ("Uid:", ids.as_str()),
            ("Gid:", ids.as_str()),
            ("CapInh:", NONE),
            ("CapPrm:", HELD),
            ("CapEff:", IN_EFFECT),
            ("CapAmb:", NONE),
            ("NoNewPrivs:", "1"),
        ];
        expected.extend(groups.map(|groups| ("Groups:", groups)));
        for (name, value) in expected {
            assert_eq!(
                field(name),
                value,
                "{name} of {}: {status}",
                task.path().display()
            );
        }
        threads += 1;
    }
    assert!(threads > 2, "only {threads} threads were looked at");
    // Whom this file belongs to says whether others of the same user may trace the process or read its memory.
    let owner = fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid();
    assert_eq!(owner, 0, "the daemon is dumpable");
}

fn bounding_set(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    line.unwrap().trim().to_owned()
}

fn groups() -> String {
    format!("{DAEMON_ID} {MONITOR_GROUP}")
}

/// Moves a guest between QEMUs that `start` starts, there and back, and looks at the daemons in between.
fn there_and_back(world: &World, start: impl Fn(&str, Role) -> Qemu, confined: impl Fn(&World)) {
    confined(world);
    let mut here = start("source", Role::Source);
    here.serial.wait_filled();
    for (from, name) in [(Side::A, "there"), (Side::B, "back")] {
        let mut next = start(name, Role::Destination);
        let migration = world.begin(from, "vm", &here, &next, &["--bandwidth-limit", "100MB/s"]);
        migration.wait_mid_round();
        confined(world);
        migration.finish().completed();
        assert_moved(&mut here, &mut next);
        here = next;
    }
    confined(world);
}

/// The daemons run as their user, QEMU as another one: RAM and its folder are QEMU's alone, and the monitor is open to a
/// group. With QEMU's sandbox.
fn moved_between_users(version: Version) {
    let world = World::tls();
    let mut machine = Machine::new(version, 96, "rate=20 set=16");
    machine.sandbox = true;
    let start = |name: &str, role| {
        let qemu = Qemu::start_unprivileged(&world.scratch, name, &machine, role);
        let ram = fs::metadata(qemu.ram()).unwrap();
        assert_eq!(ram.mode() & 0o777, 0o600, "guest RAM is its owner's");
        assert_ne!(ram.uid(), DAEMON_ID);
        let qemu_status = fs::read_to_string(format!("/proc/{}/status", qemu.pid())).unwrap();
        assert!(
            qemu_status.contains(&format!("CapPrm:\t{NONE}")),
            "{qemu_status}"
        );
        qemu
    };
    there_and_back(&world, start, |world| {
        for side in [Side::A, Side::B] {
            let pid = world.daemon(side).pid();
            assert_confined(pid, DAEMON_ID, Some(&groups()));
            assert_eq!(bounding_set(pid), NONE);
        }
    });
    assert_private(&world.folder(Side::A));
    assert_private(&world.folder(Side::B));
}

/// Panics unless the state and the API's socket are for the daemon's user only.
fn assert_private(folder: &Path) {
    let mut seen = BTreeSet::new();
    let mut look = |path: &Path, mode: u32| {
        let data = fs::symlink_metadata(path).unwrap();
        assert_eq!(data.mode() & 0o7777, mode, "{}", path.display());
        assert_eq!(
            (data.uid(), data.gid()),
            (DAEMON_ID, DAEMON_ID),
            "{}",
            path.display()
        );
        seen.insert(path.extension().unwrap_or_default().to_owned());
    };
    look(&folder.join("api.sock"), 0o600);
    for folder in [folder.join("state"), folder.join("state/journal")] {
        look(&folder, 0o700);
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if !entry.path().is_dir() {
                look(&entry.path(), 0o600);
            }
        }
    }
    for kind in ["source", "destination", "json"] {
        assert!(
            seen.contains(std::ffi::OsStr::new(kind)),
            "no .{kind} among {seen:?}"
        );
    }
}

#[test]
fn user_of_its_own_and_qemu_7_2_of_another() {
    moved_between_users(Version::V7_2);
}

#[test]
fn user_of_its_own_and_qemu_10_0_of_another() {
    moved_between_users(Version::V10_0);
}

/// A QEMU that may not make a userfaultfd that sees faults in the kernel: it is lent `/dev/userfaultfd`, which the daemon
/// opened while it was root.
fn goes_first_without_privileges(version: Version) {
    let world = World::tls();
    let mut machine = Machine::new(version, 64, "rate=20 set=16");
    machine.sandbox = true;
    let start = |name: &str, role| Qemu::start_unprivileged(&world.scratch, name, &machine, role);
    let mut source = start("source", Role::Source);
    source.serial.wait_filled();
    let mut destination = start("destination", Role::Destination);
    let options = ["--mode", "postcopy"];
    let outcome = world.migrate(Side::A, "vm", &source, &destination, &options);
    outcome.completed();
    assert_moved(&mut source, &mut destination);
    let open = fs::read_dir(format!("/proc/{}/fd", destination.pid())).unwrap();
    let targets = open
        .flatten()
        .map(|fd| fs::read_link(fd.path()).unwrap_or_default());
    let left = targets.filter(|target| target.ends_with("userfaultfd"));
    assert_eq!(left.count(), 0, "the device stays open inside QEMU");
    assert_confined(world.daemon(Side::B).pid(), DAEMON_ID, Some(&groups()));
}

#[test]
fn qemu_10_0_without_privileges_goes_first_by_the_device() {
    goes_first_without_privileges(Version::V10_0);
}

#[test]
fn qemu_7_2_without_privileges_goes_first_by_the_device() {
    goes_first_without_privileges(Version::V7_2);
}

/// Found before the guest is stopped, and said at the source: a daemon that was never root cannot lend the device.
#[test]
fn faults_that_cannot_be_served_are_found_before_the_guest_stops() {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if sysctl.is_ok_and(|all| all.trim() == "1") {
        return skipped("every process may serve page faults in the kernel here");
    }
    let world = World::tls_as(RunAs::Ambient);
    let machine = Machine::new(Version::V10_0, 64, "rate=20 set=16");
    let start = |name: &str, role| Qemu::start_unprivileged(&world.scratch, name, &machine, role);
    let mut source = start("source", Role::Source);
    source.serial.wait_filled();
    let mut destination = start("destination", Role::Destination);
    for mode in ["hybrid", "postcopy"] {
        let begun = Instant::now();
        let outcome = world.migrate(Side::A, "vm", &source, &destination, &["--mode", mode]);
        outcome.failed_with(&[
            "the destination cannot do post-copy",
            "/dev/userfaultfd",
            "vm.unprivileged_userfaultfd=1",
            "--mode precopy",
        ]);
        let stopped = |event: &serde_json::Value| event["state"] == "completing";
        assert!(!outcome.events.iter().any(stopped), "{:?}", outcome.events);
        assert_stayed(&mut source, Some(&mut destination), begun);
    }
    // It may do without, and says that it will.
    let options = ["--mode", "auto", "--allow-postcopy"];
    let outcome = world.migrate(Side::A, "vm", &source, &destination, &options);
    assert_eq!(outcome.completed()["mode"], "precopy");
    let warned = |event: &serde_json::Value| {
        let text = event["text"].as_str().unwrap_or_default();
        event["event"] == "notice" && text.contains("/dev/userfaultfd")
    };
    assert!(outcome.events.iter().any(warned), "{:?}", outcome.events);
    world
        .daemon(Side::B)
        .assert_logs(&["post-copy is not possible here"]);
    assert_moved(&mut source, &mut destination);
}

#[test]
fn root_without_a_user_keeps_no_more() {
    let world = World::tls_as(RunAs::Root);
    let machine = Machine::new(Version::V10_0, 96, "rate=20 set=16");
    there_and_back(
        &world,
        |name, role| Qemu::start_unprivileged(&world.scratch, name, &machine, role),
        |world| {
            for side in [Side::A, Side::B] {
                let pid = world.daemon(side).pid();
                assert_confined(pid, 0, None);
                assert_eq!(bounding_set(pid), NONE);
            }
        },
    );
}

#[test]
fn plain_user_with_ambient_capabilities() {
    let world = World::tls_as(RunAs::Ambient);
    let machine = Machine::new(Version::V7_2, 96, "rate=20 set=16");
    there_and_back(
        &world,
        |name, role| Qemu::start_unprivileged(&world.scratch, name, &machine, role),
        |world| {
            for side in [Side::A, Side::B] {
                assert_confined(world.daemon(side).pid(), DAEMON_ID, Some(&groups()));
            }
        },
    );
}

#[test]
fn qemu_in_a_user_namespace() {
    let allowed = Command::new("unshare")
        .args(["--user", "--map-root-user", "true"])
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        return skipped("user namespaces cannot be made here");
    }
    let world = World::tls();
    let machine = Machine::new(Version::V7_2, 96, "rate=20 set=16");
    let start = |name: &str, role| {
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user"])
            .arg(machine.version.binary());
        Qemu::start_with(&world.scratch, name, &machine, role, command)
    };
    there_and_back(&world, start, |_| {});
}

/// Other processes of the daemon's user cannot get at what it may do.
#[test]
fn daemon_cannot_be_traced_by_its_own_user() {
    let world = World::tls();
    let pid = world.daemon(Side::A).pid();
    for file in ["maps", "mem", "environ", "fd/0"] {
        let output = as_daemon_user()
            .args(["cat", &format!("/proc/{pid}/{file}")])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Permission denied"), "{file}: {said}");
    }
}

fn as_daemon_user() -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        format!("--reuid={DAEMON_ID}"),
        format!("--regid={DAEMON_ID}"),
        "--clear-groups".to_owned(),
    ]);
    command
}

/// A configuration in `folder` with `more` lines of its own.
fn configuration(folder: &Path, more: &str) -> String {
    let text = format!(
        "{more}name = \"a\"\nlisten = \"127.0.0.1:0\"\napi = {:?}\nstate-dir = {:?}\ninsecure-plaintext = true\n",
        folder.join("api.sock"),
        folder.join("state"),
    );
    let path = folder.join("pagecopyd.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs a daemon that must not start, in the way given and in `folder`; its words must hold all of `words`.
fn refused(net: &Net, run_as: RunAs, folder: &Path, more: &str, words: &[&str]) {
    let config = configuration(folder, more);
    let command = run_as.command(net, Side::A, folder, &program("pagecopyd"));
    let mut limited = Command::new("timeout");
    limited
        .args(["--signal=KILL", "20"])
        .arg(command.get_program());
    limited.args(command.get_args()).args(["--config", &config]);
    let output = limited.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "does not say {word:?}: {said}");
    }
}

#[test]
fn no_start_without_the_capabilities() {
    let (net, scratch) = (Net::new(), Scratch::new());
    let words = [
        "without CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        "setcap cap_sys_ptrace,cap_dac_read_search",
        "AmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH",
    ];
    refused(&net, RunAs::Bare, &scratch.folder("bare"), "", &words);
    // root in a container, for example.
    let folder = scratch.folder("container");
    let config = configuration(&folder, "");
    let output = Command::new("setpriv")
        .args(["--bounding-set=-sys_ptrace"])
        .arg(program("pagecopyd"))
        .args(["--config", &config])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("as user 0 without CAP_SYS_PTRACE,"), "{said}");
}

#[test]
fn users_that_cannot_be_become() {
    let (net, scratch) = (Net::new(), Scratch::new());
    let unknown = "user = \"pagecopy-nobody\"\n";
    let words = ["\"pagecopy-nobody\"", "no such user", "useradd --system"];
    refused(
        &net,
        RunAs::User,
        &scratch.folder("unknown"),
        unknown,
        &words,
    );
    let words = [
        "user = \"root\" cannot be become",
        &format!("started as user {DAEMON_ID}"),
    ];
    refused(
        &net,
        RunAs::Ambient,
        &scratch.folder("other"),
        "user = \"root\"\n",
        &words,
    );
}

#[test]
fn state_of_others_is_not_used() {
    let (net, scratch) = (Net::new(), Scratch::new());
    let as_user = format!("user = {DAEMON_USER:?}\n");
    // Left by a daemon that ran as root: `RunAs::command` gives the folder itself away, and `journal` stays root's.
    let folder = scratch.folder("foreign");
    fs::create_dir_all(folder.join("state/journal")).unwrap();
    let words = ["belongs to user 0", &format!("chown -R {DAEMON_ID}")];
    refused(&net, RunAs::User, &folder, &as_user, &words);
    let folder = scratch.folder("writable");
    fs::create_dir(folder.join("state")).unwrap();
    fs::set_permissions(folder.join("state"), fs::Permissions::from_mode(0o777)).unwrap();
    refused(
        &net,
        RunAs::User,
        &folder,
        &as_user,
        &["others may write", "chmod 700"],
    );
    for (name, leads_to) in [
        ("lock", "victim"),
        ("journal", "."),
        ("receivers.json", "victim"),
    ] {
        let folder = scratch.folder(&format!("link-{name}"));
        fs::create_dir(folder.join("state")).unwrap();
        fs::write(folder.join("victim"), "[]").unwrap();
        chown(folder.join("victim"), Some(DAEMON_ID), Some(DAEMON_ID)).unwrap();
        symlink(folder.join(leads_to), folder.join("state").join(name)).unwrap();
        refused(
            &net,
            RunAs::User,
            &folder,
            &as_user,
            &[name, "symbolic link"],
        );
        assert_eq!(fs::read(folder.join("victim")).unwrap(), b"[]");
    }
}

/// A link in the place of a journal decides nothing, and is not followed.
#[test]
fn planted_journal_is_not_followed() {
    let mut world = World::plain();
    let journal = world.folder(Side::B).join("state/journal");
    let victim = world.scratch.files().join("victim");
    fs::write(&victim, "not a journal").unwrap();
    let name = "01010101-0101-0101-0101-010101010101.destination";
    symlink(&victim, journal.join(name)).unwrap();
    world.restart(Side::B);
    world
        .daemon(Side::B)
        .assert_logs(&["symbolic link", "a person has to look"]);
    assert_eq!(fs::read(&victim).unwrap(), b"not a journal");
}

/// Names that would be paths, or would write into a log or a terminal, given by a client here and by a peer there: where they are
/// accepted they are a name and nothing else, and a guest moves under them.
#[test]
fn hostile_names_are_only_names() {
    let world = World::tls();
    let machine = Machine::new(Version::V10_0, 64, "rate=0");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let before = files_below(world.scratch.files());
    let longest = "../".repeat(85);
    assert_eq!(longest.len(), 255);
    let hostile = [
        "../../x",
        "/etc/passwd",
        "..",
        "$(reboot)",
        "%s%n",
        "journal/lock",
        &longest,
    ];
    let begun = Instant::now();
    for name in hostile {
        // A peer that names a guest that nobody waits for.
        let outcome = world
            .cli(Side::A)
            .migrate(name, &source, Side::B, &[])
            .finish();
        outcome.failed_with(&["no QEMU waits here"]);
        // A client that takes and forgets it.
        world
            .cli(Side::B)
            .receive(name, destination.socket())
            .unwrap();
        let listed = world.cli(Side::B).run(&["list"]);
        assert!(String::from_utf8_lossy(&listed.stdout).contains(name));
    }
    for name in [
        "two\nlines",
        "\u{1b}[2Jcleared",
        "\u{9b}2J",
        "",
        &"x".repeat(256),
    ] {
        let error = world
            .cli(Side::B)
            .receive(name, destination.socket())
            .unwrap_err();
        assert!(error.contains("name of the guest"), "{error}");
        let outcome = world
            .cli(Side::A)
            .migrate(name, &source, Side::B, &[])
            .finish();
        assert!(
            outcome.errors.contains("name of the guest"),
            "{}",
            outcome.errors
        );
    }
    assert_stayed(&mut source, Some(&mut destination), begun);
    // The journals and the settings of these attempts are named by ids; nothing else has appeared anywhere.
    let outcome = world.migrate(Side::A, "../../x", &source, &destination, &[]);
    outcome.completed();
    assert_moved(&mut source, &mut destination);
    for path in files_below(world.scratch.files()).difference(&before) {
        let name = path.rsplit('/').next().unwrap();
        let stem = name.split('.').next().unwrap();
        let id = stem.len() == 36
            && stem
                .bytes()
                .all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
        let own = ["receivers.json", "fixed-downtime.json"].contains(&name);
        assert!(id || own, "a file has appeared: {path}");
    }
}

/// Every path below `folder`.
fn files_below(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        found.insert(path.to_str().unwrap().to_owned());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_below(&path));
        }
    }
    found
}

/// Sockets are made before root's privileges go: a port below 1024 and a key that only root may read will do.
#[test]
fn what_only_root_may_open_is_opened_first() {
    let (net, scratch) = (Net::new(), Scratch::new());
    let folder = scratch.folder("port");
    fs::remove_dir_all(&folder).unwrap();
    let home = scratch.folder("home");
    let config = home.join("pagecopyd.toml");
    let text = format!(
        "user = {DAEMON_USER:?}\nname = \"a\"\nlisten = \"10.77.0.1:700\"\napi = {:?}\nstate-dir = {:?}\ninsecure-plaintext = true\n",
        folder.join("run/api.sock"),
        folder.join("lib/state"),
    );
    fs::write(&config, text).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = RunAs::Root.command(&net, Side::A, &home, &program("pagecopyd"));
    command.arg("--config").arg(&config);
    let mut daemon = tests::real::Process::spawn("daemon", &mut command, &home.join("log"));
    assert!(
        daemon.wait_output(&["10.77.0.1:700", "ready"], tests::real::PATIENCE),
        "{}",
        daemon.output()
    );
    assert_confined(daemon.pid(), DAEMON_ID, Some(&groups()));
    // Folders that were missing are the user's now; what leads there is not.
    for (path, owner, mode) in [
        ("run", DAEMON_ID, 0o755),
        ("lib", 0, 0o755),
        ("lib/state", DAEMON_ID, 0o700),
    ] {
        let data = fs::metadata(folder.join(path)).unwrap();
        assert_eq!((data.uid(), data.mode() & 0o7777), (owner, mode), "{path}");
    }
    daemon.signal(rustix::process::Signal::TERM);
    assert!(
        daemon
            .wait(tests::real::PATIENCE)
            .is_some_and(|status| status.success())
    );
    assert!(
        !folder.join("run/api.sock").exists(),
        "the socket is removed by the user"
    );
}
