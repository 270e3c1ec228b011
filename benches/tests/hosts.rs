//! Runs between two hosts: two namespaces that a stand-in for ssh leads to, or a real sshd; and what is said when they do not
//! come about.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use benches::hosts::Host;
use benches::hosts::ask::{Ask, Start};
use benches::record::Record;
use benches::report::page;
use rustix::process::{Pid, Signal, kill_process};
use tests::real::{Net, Process, Role, Scratch, Side, Version, eventually, program, skipped};

const BENCH: &str = env!("CARGO_BIN_EXE_bench");
const SMALL: [&str; 6] = ["--mib", "64", "--pairs", "1", "--work", "20"];

/// Two hosts, and what leads to them.
struct Two {
    net: Net,
    scratch: Scratch,
    ssh: PathBuf,
}

impl Two {
    fn new() -> Two {
        let (net, scratch) = (Net::new(), Scratch::new());
        let ssh = scratch.files().join("ssh");
        let copies = scratch.folder("copies");
        let script = format!(
            "#!/bin/sh\nhost=$1; shift\nTMPDIR={} exec ip netns exec \"$host\" sh -c \"$*\"\n",
            copies.display()
        );
        fs::write(&ssh, script).expect("a script");
        fs::set_permissions(&ssh, Permissions::from_mode(0o755)).expect("a script takes a mode");
        Two { net, scratch, ssh }
    }

    fn out(&self) -> PathBuf {
        self.scratch.files().join("out")
    }

    /// Where programs are copied to.
    fn copies(&self) -> PathBuf {
        self.scratch.folder("copies")
    }

    /// Calls `bench` for both hosts, with these words, and others where they say nothing.
    fn bench(&self, words: &[&str]) -> Output {
        let (a, b) = (self.net.namespace(Side::A), self.net.namespace(Side::B));
        let ssh = self.ssh.to_str().expect("a path");
        let usual = [
            ("--ssh", ssh),
            ("--source-host", &a),
            ("--destination-host", &b),
            ("--destination-address", Side::B.address()),
        ];
        let mut command = Command::new(BENCH);
        let missing = usual.iter().filter(|(option, _)| !words.contains(option));
        command.args(missing.flat_map(|(option, value)| [*option, *value]));
        called(&mut command, &self.out(), words)
    }

    /// The one line that it says when it does not come to a run.
    fn refused(&self, words: &[&str]) -> String {
        refusal(&self.bench(words))
    }
}

/// Calls `bench` for a small guest, with this QEMU if no other is named.
fn called(command: &mut Command, out: &Path, words: &[&str]) -> Output {
    if !words.contains(&"--qemu") {
        command.arg("--qemu").arg(Version::V10_0.binary());
    }
    command.arg("--out").arg(out).args(SMALL).args(words);
    built(command).output().expect("bench can be called")
}

/// With the programs that were built for tests.
fn built(command: &mut Command) -> &mut Command {
    let daemon = program("pagecopyd");
    command.env("PAGECOPY_BIN_DIR", daemon.parent().expect("a folder"));
    command.env("PAGECOPY_QEMU_10_0", Version::V10_0.binary())
}

fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it was not refused: {said}");
    let errors: Vec<&str> = said
        .lines()
        .filter(|it| it.starts_with("error: "))
        .collect();
    let [error] = errors.as_slice() else {
        panic!("not one line: {said}");
    };
    (*error).to_owned()
}

fn record(output: &Output, out: &Path) -> Record {
    let said = String::from_utf8_lossy(&output.stderr);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}{said}");
    Record::read(&out.with_extension("json")).expect("it has written a record")
}

/// A run of each way, as it looks on two hosts.
fn assert_measured(record: &Record) {
    let joined = record.hosts.as_ref().expect("what both hosts are");
    for host in [&joined.source, &joined.destination] {
        assert!(
            host.machine.qemu.contains("10.0") && host.machine.cpus > 0,
            "{host:?}"
        );
    }
    assert_eq!(joined.destination.address.to_string(), Side::B.address());
    assert!(
        joined.rtt_us > 1.0 && joined.clock_error_ms < 50.0,
        "{joined:?}"
    );
    for cell in &record.cells {
        let [run] = cell.runs.as_slice() else {
            panic!("{} has not run once", cell.way);
        };
        let value = |name: &str| run.figures.get(name).copied().unwrap_or(f64::NAN);
        // Their clocks began with their agents, far more than that apart.
        let (down, off) = (value("downtime_ms"), value("downtime_error_ms"));
        assert!(down < value("total_ms") + 50.0 && off < 50.0, "{cell:?}");
        // 32 MiB are the guest's, and nobody compresses them here.
        assert!((30.0..120.0).contains(&value("wire_mb")), "{cell:?}");
        assert!(value("cpu_s_per_gib") > 0.0, "{cell:?}");
        assert!(
            value("loops_before") > 100.0 && value("loops_after") > 100.0,
            "{cell:?}"
        );
    }
}

#[test]
fn a_guest_moves_between_two_hosts_and_again() {
    let two = Two::new();
    let output = two.bench(&["--ways", "tcp,qemu-multifd2"]);
    let first = record(&output, &two.out());
    assert_eq!(first.cells.len(), 2);
    assert_measured(&first);
    let text = fs::read_to_string(two.out().with_extension("html")).expect("a page");
    assert_eq!(text, page(&first));
    for side in [Side::A, Side::B] {
        assert!(
            text.contains(&two.net.namespace(side)),
            "the page names both hosts"
        );
    }
    let joined = first.hosts.as_ref().expect("two hosts");
    assert!(
        joined.iperf3_mbit_s.is_some_and(|rate| rate > 100.0),
        "{joined:?}"
    );

    // All that is needed is in the file.
    let again = two.scratch.files().join("again");
    let mut command = Command::new(BENCH);
    command
        .arg("--replay")
        .arg(two.out().with_extension("json"));
    let output = built(command.arg("--out").arg(&again)).output();
    let second = record(&output.expect("bench can be called"), &again);
    assert_eq!(second.plan, first.plan);
    assert_measured(&second);
    let left = fs::read_dir(two.copies()).expect("a folder").count();
    assert_eq!(left, 0, "programs stay where they were copied to");
}

#[test]
fn what_is_not_for_two_hosts_is_refused() {
    let two = Two::new();
    let refused = |words: &[&str]| two.refused(words);
    let memcpy = refused(&["--ways", "tcp,memcpy"]);
    assert!(
        memcpy.contains("memcpy is not for two hosts: it copies memory"),
        "{memcpy}"
    );
    let faults = refused(&["--faults"]);
    assert!(faults.contains("of one machine"), "{faults}");
    let rdma = refused(&["--transport", "rdma"]);
    assert!(rdma.contains("--listen ADDRESS"), "{rdma}");
    let veth = refused(&["--links", "veth"]);
    assert!(veth.contains("cannot be used with"), "{veth}");
    let out = two.out();
    let only = refusal(&called(
        &mut Command::new(BENCH),
        &out,
        &["--source-host", "local"],
    ));
    assert!(only.contains("both hosts are local"), "{only}");
    let links = refusal(&called(
        &mut Command::new(BENCH),
        &out,
        &["--links", "hosts"],
    ));
    assert!(links.contains("--destination-host"), "{links}");
    assert!(!out.with_extension("json").exists(), "nothing was measured");
}

#[test]
fn a_host_that_is_not_reached_is_named() {
    let two = Two::new();
    let (a, b) = (two.net.namespace(Side::A), two.net.namespace(Side::B));
    let closed = "ssh -F none -o BatchMode=yes -o ConnectTimeout=5 -p 9";
    let words = [
        "--source-host",
        "127.0.0.1",
        "--destination-host",
        &b,
        "--ssh",
        closed,
    ];
    let refused = refusal(&called(&mut Command::new(BENCH), &two.out(), &words));
    assert!(
        refused.contains("127.0.0.1: ssh does not get there") && refused.contains("refused"),
        "{refused}"
    );
    let missing = two.refused(&["--ssh", "/no/such/ssh"]);
    assert!(
        missing.contains(&a) && missing.contains("does not start"),
        "{missing}"
    );
    let silent = two.refused(&["--ssh", "false"]);
    assert!(silent.contains("exit status 1"), "{silent}");
}

#[test]
fn a_host_that_lacks_something_is_named() {
    let two = Two::new();
    let (a, b) = (two.net.namespace(Side::A), two.net.namespace(Side::B));
    let qemu = two.refused(&["--qemu", "/no/such/qemu"]);
    assert!(
        qemu.contains(&a) && qemu.contains("/no/such/qemu") && qemu.contains("--qemu"),
        "{qemu}"
    );
    // It is no ssh that says where it leads.
    let output = {
        let mut command = Command::new(BENCH);
        command.arg("--ssh").arg(&two.ssh);
        command.args(["--source-host", &a, "--destination-host", &b]);
        called(&mut command, &two.out(), &[])
    };
    let address = refusal(&output);
    assert!(address.contains("--destination-address"), "{address}");
    two.net.drop_arriving(Side::B);
    let port = two.refused(&[]);
    assert!(
        port.contains("does not reach 10.77.0.2:7700") && port.contains("ports 7700 to 7703"),
        "{port}"
    );
}

#[test]
fn another_build_is_refused() {
    let two = Two::new();
    let folder = two.scratch.folder("programs");
    let daemon = program("pagecopyd");
    let from = daemon.parent().expect("a folder");
    for name in ["pagecopy", "pagecopyd", "test-guest.elf"] {
        fs::copy(from.join(name), folder.join(name)).expect("a copy");
    }
    fs::copy(BENCH, folder.join("bench")).expect("a copy");
    let words = ["--programs", folder.to_str().expect("a path")];
    // The same build is taken from there; the next thing that is looked at is QEMU.
    let same = two.refused(&[&words[..], &["--qemu", "/no/such/qemu"]].concat());
    assert!(same.contains("/no/such/qemu"), "{same}");
    let mut text = fs::read(folder.join("pagecopyd")).expect("a program");
    text.push(0);
    fs::write(folder.join("pagecopyd"), text).expect("a program");
    let other = two.refused(&words);
    assert!(
        other.contains("pagecopyd there is of another build"),
        "{other}"
    );
    fs::remove_file(folder.join("bench")).expect("a program");
    let none = two.refused(&words);
    assert!(none.contains("does not start there"), "{none}");
}

/// An agent on a host, which has started a guest and its daemon; the processes.
fn started(net: &Net) -> (Host, Vec<u32>) {
    let mut command = net.command(Side::A, BENCH);
    command.arg("agent");
    built(&mut command);
    let mut host = Host::start("a", command, b"").expect("it greets");
    let start = Start {
        allocated: false,
        name: "a".to_owned(),
        role: Role::Source,
        qemu: Version::V10_0.binary(),
        machine_mib: 64,
        guest: "mem=16..48 rate=0".to_owned(),
        daemon: Some(([10, 77, 0, 1], 7700).into()),
        identity: None,
        device: "veth0".to_owned(),
    };
    let pids: Vec<u32> = host.ask(&Ask::Start(Box::new(start))).expect("it starts");
    assert_eq!(pids.len(), 2, "QEMU and the daemon");
    assert_eq!(folders(host.hello.pid).len(), 2, "files and RAM");
    (host, pids)
}

/// What a process has in folders of its own.
fn folders(pid: u32) -> Vec<PathBuf> {
    let mine = format!("pagecopy-{pid}-");
    let all = ["/tmp", "/dev/shm"]
        .into_iter()
        .flat_map(fs::read_dir)
        .flatten()
        .flatten();
    let all = all.filter(|entry| entry.file_name().to_string_lossy().starts_with(&mine));
    all.map(|entry| entry.path()).collect()
}

/// Whether a process runs: one that nobody has reaped yet does not.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// Panics unless all of them end, and nothing stays that the worker had made.
fn assert_gone(worker: u32, pids: &[u32]) {
    eventually(Duration::from_secs(10), || {
        let left: Vec<u32> = pids.iter().copied().filter(|pid| runs(*pid)).collect();
        let folders = folders(worker);
        match left.is_empty() && folders.is_empty() {
            true => Ok(()),
            false => Err(format!("{left:?} run, {folders:?} are there")),
        }
    })
    .unwrap_or_else(|left| panic!("left behind: {left}"));
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process");
    kill_process(pid, Signal::KILL).expect("it runs");
}

#[test]
fn an_agent_leaves_nothing_behind_whoever_is_killed() {
    let net = Net::new();
    for victim in ["worker", "keeper", "nobody"] {
        let (host, mut pids) = started(&net);
        let (worker, keeper) = (host.hello.pid, host.pid());
        pids.extend([worker, keeper]);
        match victim {
            "worker" => kill(worker),
            "keeper" => kill(keeper),
            // Whoever asked is gone: so is the other end of the agent's input.
            _ => drop(host),
        }
        assert_gone(worker, &pids);
    }
}

/// A server on host B, which only this test's key opens.
struct Sshd {
    _process: Process,
    client: String,
}

impl Sshd {
    /// Started with a list of users and a /run of its own: nothing is changed on this machine.
    fn start(two: &Two, program: &str) -> Sshd {
        let folder = two.scratch.folder("sshd");
        let at = |name: &str| folder.join(name).display().to_string();
        for key in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)]);
            assert!(keygen.status().expect("ssh-keygen can be called").success());
        }
        let users = fs::read_to_string("/etc/passwd").expect("a list of users");
        let user = "sshd:x:64115:64115::/run/sshd:/usr/sbin/nologin";
        fs::write(at("passwd"), format!("{}\n{user}\n", users.trim_end())).expect("a file");
        let config = format!(
            "Port 2222\nListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PermitRootLogin prohibit-password\n",
            Side::B.address(),
            at("host"),
            at("user.pub"),
        );
        fs::write(at("config"), config).expect("a file");
        let script = "mount --bind \"$1\" /etc/passwd && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && shift && exec \"$@\"";
        let mut command = two.net.command(Side::B, "sh");
        command.args([
            "-c",
            script,
            "sh",
            &at("passwd"),
            program,
            "-D",
            "-e",
            "-f",
            &at("config"),
        ]);
        let log = folder.join("log");
        let process = Process::spawn("sshd", &mut command, &log);
        let listens = process.wait_output(&["Server listening"], Duration::from_secs(10));
        assert!(listens, "sshd does not start: {}", process.output());
        let key = fs::read_to_string(at("host.pub")).expect("a key");
        let known = format!("[{}]:2222 {key}", Side::B.address());
        fs::write(at("known"), known).expect("a file");
        let client = format!(
            "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=yes -o UserKnownHostsFile={} -i {} -p 2222",
            at("known"),
            at("user"),
        );
        Sshd {
            _process: process,
            client,
        }
    }
}

/// Where a program is.
fn found(name: &str) -> Option<String> {
    let output = Command::new("sh")
        .args(["-c", &format!("command -v {name}")])
        .output()
        .ok()?;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!path.is_empty()).then_some(path)
}

#[test]
fn a_guest_moves_over_real_ssh_and_tls() {
    let Some(program) = found("sshd") else {
        return skipped("no sshd: scripts/install fetches it on Debian");
    };
    let two = Two::new();
    let sshd = Sshd::start(&two, &program);
    let there = format!("root@{}", Side::B.address());
    // From a host that is itself one end; sshd knows the address of the other.
    let mut command = two.net.command(Side::A, BENCH);
    command.args(["--destination-host", &there, "--ssh", &sshd.client]);
    let output = called(&mut command, &two.out(), &["--ways", "tls,qemu-tls"]);
    let record = record(&output, &two.out());
    assert_eq!(record.cells.len(), 2);
    assert_measured(&record);
    let stranger = sshd.client.replace("/sshd/user", "/sshd/host");
    let mut command = two.net.command(Side::A, BENCH);
    command.args(["--destination-host", &there, "--ssh", &stranger]);
    let refused = refusal(&called(&mut command, &two.out(), &[]));
    assert!(refused.contains("Permission denied"), "{refused}");
}

#[test]
fn a_host_that_is_lost_ends_the_run() {
    let two = Two::new();
    let mut command = Command::new(BENCH);
    command.arg("--ssh").arg(&two.ssh);
    command.args(["--source-host", &two.net.namespace(Side::A)]);
    command.args(["--destination-host", &two.net.namespace(Side::B)]);
    command.args([
        "--destination-address",
        Side::B.address(),
        "--ways",
        "tcp",
        "--pairs",
        "99",
    ]);
    command.arg("--qemu").arg(Version::V10_0.binary());
    command
        .arg("--out")
        .arg(two.out())
        .args(["--mib", "64", "--work", "20"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let running = built(&mut command).spawn().expect("bench can be called");
    let (worker, pids) = eventually(Duration::from_secs(30), || daemon_of(&two))
        .unwrap_or_else(|why| panic!("no run: {why}"));
    kill(worker);
    let output = running.wait_with_output().expect("it ends");
    let refused = refusal(&output);
    let there = two.net.namespace(Side::B);
    assert!(
        refused.contains("nothing more is measured") && refused.contains(&there),
        "{refused}"
    );
    assert_gone(worker, &pids);
}

/// The daemon of host B, once it runs, and whose child it is.
fn daemon_of(two: &Two) -> Result<(u32, Vec<u32>), String> {
    let mut ip = Command::new("ip");
    let output = ip
        .args(["netns", "pids", &two.net.namespace(Side::B)])
        .output();
    let output = output.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let pids: Vec<u32> = text
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect();
    let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let daemon = pids
        .iter()
        .copied()
        .find(|pid| name(*pid).trim() == "pagecopyd");
    let stat = daemon.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
    let parent = stat.and_then(|stat| stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok());
    parent
        .map(|parent| (parent, pids))
        .ok_or_else(|| format!("no daemon among {text}"))
}
