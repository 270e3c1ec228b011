//! The Debian package: what is in it, that it comes and goes cleanly, and that a daemon as its units start it moves guests.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tests::real::{
    Booted, Certs, Cli, MONITOR_GROUP, Machine, PATIENCE, Qemu, Role, Scratch, Version, eventually,
    has_overlay, overlay_script, program, skipped,
};

/// Builds the package from the programs of this build, once. None where there is no cargo-deb.
fn package() -> Option<PathBuf> {
    static BUILT: OnceLock<Option<(Scratch, PathBuf)>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let is_there = Command::new("cargo").args(["deb", "--version"]).output();
        if !is_there.is_ok_and(|output| output.status.success()) {
            return None;
        }
        let scratch = Scratch::new();
        let out = scratch.folder("package");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let output = Command::new(root.join("scripts/package"))
            .arg("--programs")
            .arg(program("pagecopyd").parent().unwrap())
            .arg("--out")
            .arg(&out)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut made = fs::read_dir(out)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let package = made.next().expect("a package");
        assert_eq!(made.next(), None);
        Some((scratch, package))
    });
    if built.is_none() {
        skipped("there is no cargo-deb here");
    }
    built.as_ref().map(|(_, package)| package.clone())
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr]
        .map(|said| String::from_utf8(said).unwrap())
        .concat();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

#[test]
fn the_package_has_what_a_host_needs() {
    let Some(package) = package() else { return };
    let contents = said(Command::new("dpkg-deb").arg("--contents").arg(&package));
    for (mode, path) in [
        ("-rwxr-xr-x 0/0", "./usr/sbin/pagecopyd"),
        ("-rwxr-xr-x 0/0", "./usr/bin/pagecopy"),
        (
            "-rw-r--r-- 0/0",
            "./usr/lib/systemd/system/pagecopyd.service",
        ),
        (
            "-rw-r--r-- 0/0",
            "./usr/lib/systemd/system/pagecopyd.socket",
        ),
        ("-rw-r--r-- 0/0", "./usr/lib/sysusers.d/pagecopy.conf"),
        ("-rw-r--r-- 0/0", "./usr/lib/udev/rules.d/70-pagecopy.rules"),
        ("-rw-r--r-- 0/0", "./etc/pagecopy/pagecopy.toml"),
        ("-rw-r--r-- 0/0", "./etc/default/pagecopyd"),
        ("-rw-r--r-- 0/0", "./usr/share/man/man1/pagecopy.1.gz"),
        (
            "-rw-r--r-- 0/0",
            "./usr/share/man/man1/pagecopy-migrate.1.gz",
        ),
        ("-rw-r--r-- 0/0", "./usr/share/man/man8/pagecopyd.8.gz"),
        (
            "-rw-r--r-- 0/0",
            "./usr/share/bash-completion/completions/pagecopy",
        ),
        (
            "-rw-r--r-- 0/0",
            "./usr/share/zsh/vendor-completions/_pagecopy",
        ),
        (
            "-rw-r--r-- 0/0",
            "./usr/share/fish/vendor_completions.d/pagecopy.fish",
        ),
        ("-rw-r--r-- 0/0", "./usr/share/doc/pagecopy/copyright"),
    ] {
        let line = contents
            .lines()
            .find(|line| line.ends_with(&format!(" {path}")));
        assert!(
            line.is_some_and(|line| line.starts_with(mode)),
            "{path}: {line:?} in {contents}"
        );
    }
    let fields = said(Command::new("dpkg-deb").arg("--field").arg(&package));
    for field in [
        "Package: pagecopy",
        "Architecture: amd64",
        "libc6 (>=",
        "systemd-standalone-sysusers",
    ] {
        assert!(fields.contains(field), "{field} is not in {fields}");
    }
}

/// Installs, looks, and purges, in an overlay over this machine's files.
const COME_AND_GO: &str = r#"
mkdir -p tmp/package
cp "$2" tmp/package/it.deb
cat >tmp/package/look <<'LOOK'
set -e
dpkg --install /tmp/package/it.deb
dpkg --verify pagecopy
getent passwd pagecopy
pagecopyd --version
pagecopy --version
[ ! -e /usr/bin/man ] || man --where pagecopy pagecopy-start-postcopy pagecopyd
echo '# of the operator' >>/etc/pagecopy/pagecopy.toml
dpkg --force-confold --install /tmp/package/it.deb
tail -n 1 /etc/pagecopy/pagecopy.toml
mkdir -p /var/lib/pagecopy
touch /var/lib/pagecopy/journal
dpkg --remove pagecopy
ls /var/lib/pagecopy /etc/pagecopy
dpkg --purge pagecopy
find / -xdev -name '*pagecopy*' -path '/[euv]*' ! -path '/usr/src/*' | sed 's/^/left: /'
LOOK
exec chroot . /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive sh /tmp/package/look
"#;

#[test]
fn it_comes_and_goes_cleanly() {
    let Some(package) = package() else { return };
    if !has_overlay() {
        return skipped("there is no overlay in this kernel to install the package in");
    }
    let scratch = Scratch::new();
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &overlay_script(COME_AND_GO),
        "sh",
    ]);
    let said = said(command.arg(scratch.folder("root")).arg(package));
    for line in [
        "pagecopyd 0.",
        "# of the operator",
        "journal",
        "pagecopy, live migration",
    ] {
        assert!(said.contains(line), "{line} is not in {said}");
    }
    let left: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("left: "))
        .collect();
    assert!(left.is_empty(), "{left:?} in {said}");
}

/// The files of a host that is its own peer, below `/etc`.
fn files(scratch: &Scratch) -> Vec<(&'static str, String)> {
    let identity = Certs::new(scratch.files(), "authority").identity("here");
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let shipped = include_str!("../../daemon/packaging/pagecopy.toml");
    let config = shipped
        .replace("host-b.example.org", "here")
        .replace("0.0.0.0", "127.0.0.1");
    // What a whole system starts first has no place here; the log goes where the test sees it.
    let alone = "[Unit]\nDefaultDependencies=no\n";
    let log = scratch.files().join("pagecopyd.log");
    let service = format!(
        "{alone}[Service]\nStandardError=append:{}\nSupplementaryGroups=monitor\n",
        log.display()
    );
    vec![
        ("pagecopy/pagecopy.toml", config),
        ("pagecopy/ca.pem", read(&identity.ca)),
        ("pagecopy/host.pem", read(&identity.cert)),
        ("pagecopy/host.key", read(&identity.key)),
        ("systemd/system/pagecopyd.service.d/test.conf", service),
        (
            "systemd/system/pagecopyd.socket.d/test.conf",
            alone.to_owned(),
        ),
    ]
}

/// A QEMU in the machine.
fn qemu(booted: &Booted, scratch: &Scratch, name: &str, role: Role) -> Qemu {
    let machine = Machine::new(Version::V10_0, 64, "rate=5 set=8");
    let command = booted.command(machine.version.binary());
    let qemu = Qemu::start_with(scratch, name, &machine, role, command);
    if role == Role::Source {
        qemu.serial.wait_filled();
    }
    qemu
}

#[test]
fn a_daemon_as_hardened_as_its_unit_moves_guests_and_is_started_again_in_a_post_copy() {
    let Some(package) = package() else { return };
    let scratch = Scratch::new();
    let booted = match Booted::boot(&scratch, &package, &files(&scratch)) {
        Ok(booted) => booted,
        Err(reason) => return skipped(&reason),
    };
    let number = MONITOR_GROUP.to_string();
    said(
        booted
            .command("groupadd")
            .args(["--gid", &number, "monitor"]),
    );
    booted.order(&["mask", "--runtime", "network-online.target"]);
    booted.order(&["start", "pagecopyd.service"]);
    let log = || fs::read_to_string(scratch.files().join("pagecopyd.log")).unwrap_or_default();
    assert_eq!(
        booted.property("pagecopyd.service", "ActiveState"),
        "active",
        "{}",
        log()
    );
    assert_eq!(booted.property("pagecopyd.socket", "SubState"), "running");
    let pid = booted.property("pagecopyd.service", "MainPID");
    let status = said(booted.command("cat").arg(format!("/proc/{pid}/status")));
    for line in [
        "CapEff:\t0000000000080000",
        "CapPrm:\t0000000000080004",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }

    let first = qemu(&booted, &scratch, "first", Role::Source);
    let second = qemu(&booted, &scratch, "second", Role::Destination);
    let cli = Cli::at(&booted.path("/run/pagecopy/api.sock"));
    cli.receive("vm", second.socket())
        .unwrap_or_else(|refused| panic!("{refused}: {}", log()));
    let here = "127.0.0.1:7070";
    cli.migrate_socket("vm", first.socket(), here, &["--verify"])
        .finish()
        .completed();
    second.serial.wait_beats(100);
    drop(first);

    booted.order(&["reload", "pagecopyd.service"]);
    let reloaded = eventually(PATIENCE, || match log().contains("reloaded") {
        true => Ok(()),
        false => Err(log()),
    });
    assert_eq!(reloaded, Ok(()));

    // Both sides of a post-copy are in the daemon that is started again; it goes on from their journals.
    let third = qemu(&booted, &scratch, "third", Role::Destination);
    cli.receive("vm", third.socket()).unwrap();
    let slowly = [
        "--mode",
        "postcopy",
        "--channels",
        "2",
        "--postcopy-bandwidth-limit",
        "4MB/s",
    ];
    let migration = cli.migrate_socket("vm", second.socket(), here, &slowly);
    third.serial.wait_beats(10);
    let id = cli.id_of("vm");
    booted.order(&["restart", "pagecopyd.service"]);
    assert_ne!(booted.property("pagecopyd.service", "MainPID"), pid);
    drop(migration);
    let ended = eventually(Duration::from_secs(90), || {
        let shown = cli.find(&id).unwrap_or_default();
        match shown["state"] == "completed" {
            true => Ok(()),
            false => Err(shown.to_string()),
        }
    });
    assert_eq!(ended, Ok(()), "{}", log());
    third.serial.verify();

    booted.order(&["stop", "pagecopyd.service"]);
    assert_eq!(
        booted.property("pagecopyd.service", "Result"),
        "success",
        "{}",
        log()
    );
    assert_eq!(booted.property("pagecopyd.socket", "SubState"), "listening");
    let complaints = booted.console();
    assert!(!complaints.contains("Failed to"), "{complaints}");
}
