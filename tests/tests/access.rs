//! The API over TCP: who comes in by which certificate, and what for. On the socket: `daemon/tests/api/access.rs`.

#![allow(clippy::unwrap_used)]

use std::fs;

use serde_json::Value;
use tests::real::{Certs, Identity, Net, PATIENCE, Process, RunAs, Scratch, Side, program};

const PORT: u16 = 7071;
/// What the API's host is called in its certificate.
const NAME: &str = "host-a.test";

/// A daemon whose API is on the network.
struct Served {
    net: Net,
    scratch: Scratch,
    daemon: Process,
    certs: Certs,
}

impl Served {
    fn start() -> Served {
        let (scratch, net) = (Scratch::new(), Net::new());
        let folder = scratch.folder("a");
        let certs = Certs::new(scratch.files(), "authority");
        let Identity { ca, cert, key } = certs.identity(NAME);
        let config = folder.join("pagecopyd.toml");
        let text = format!(
            "name = 'a'\nlisten = '127.0.0.1:7070'\napi = {:?}\nstate-dir = {:?}\n\
             [tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\nallow = ['host-b.test']\n\
             [access]\nread = ['cert:watcher.test']\noperate = ['cert:Boss.test']\nlisten = '127.0.0.1:{PORT}'\n",
            folder.join("api.sock"),
            folder.join("state")
        );
        fs::write(&config, text).unwrap();
        let mut command = RunAs::Root.command(&net, Side::A, &folder, &program("pagecopyd"));
        command.arg("--config").arg(&config);
        let daemon = Process::spawn("daemon", &mut command, &folder.join("log"));
        assert!(
            daemon.wait_output(&["ready"], PATIENCE),
            "{}",
            daemon.output()
        );
        Served {
            net,
            scratch,
            daemon,
            certs,
        }
    }

    /// Asks with a certificate, or without: the status and what is answered; none where nobody was let in.
    fn ask(
        &self,
        who: Option<&Identity>,
        method: &str,
        path: &str,
        more: &[&str],
    ) -> Option<(u16, Value)> {
        let mut command = self.net.command(Side::A, "curl");
        command.args([
            "--silent",
            "--show-error",
            "--max-time",
            "20",
            "--request",
            method,
        ]);
        command.args([
            "--write-out",
            "\n%{http_code}",
            "--header",
            "Content-Type: application/json",
        ]);
        command
            .arg("--cacert")
            .arg(self.scratch.files().join("authority.pem"));
        command
            .arg("--resolve")
            .arg(format!("{NAME}:{PORT}:127.0.0.1"));
        if let Some(Identity { cert, key, .. }) = who {
            command.arg("--cert").arg(cert).arg("--key").arg(key);
        }
        let output = command
            .args(more)
            .arg(format!("https://{NAME}:{PORT}{path}"))
            .output();
        let output = output.expect("curl can be called: scripts/install brings it");
        if !output.status.success() {
            println!("{}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        let body = serde_json::from_str(body).unwrap_or(Value::Null);
        Some((status.parse().unwrap(), body))
    }
}

fn assert_problem(answer: Option<(u16, Value)>, status: u16, kind: &str, detail: &str) {
    let (got, problem) = answer.expect("an answer");
    assert_eq!(got, status, "{problem}");
    assert_eq!(
        problem["type"],
        format!("urn:problem-type:pagecopy:{kind}"),
        "{problem}"
    );
    assert!(
        problem["detail"].as_str().unwrap().contains(detail),
        "{problem}"
    );
    assert!(problem["remedy"].as_str().unwrap().len() > 3, "{problem}");
}

#[test]
fn certificates_have_roles() {
    let served = Served::start();
    let [boss, watcher, other] =
        ["boss.test", "watcher.test", "host-b.test"].map(|name| served.certs.identity(name));
    let cancel = "/v1/migrations/6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e/cancel";
    for (who, role) in [(&boss, "operate"), (&watcher, "read")] {
        let (status, caller) = served.ask(Some(who), "GET", "/v1/caller", &[]).unwrap();
        assert_eq!((status, &caller["role"]), (200, &role.into()), "{caller}");
        assert!(
            caller["who"]
                .as_str()
                .unwrap()
                .contains(".test, from 127.0.0.1:"),
            "{caller}"
        );
    }
    assert_problem(
        served.ask(Some(&boss), "POST", cancel, &[]),
        404,
        "not-found",
        "no migration",
    );
    let refused = served.ask(Some(&watcher), "POST", cancel, &[]);
    assert_problem(
        refused,
        403,
        "forbidden",
        "has the role read, and this needs operate",
    );
    // A peer may send guests here, and not order anything.
    let refused = served.ask(Some(&other), "GET", "/v1/migrations", &[]);
    assert_problem(refused, 403, "forbidden", "host-b.test, from 127.0.0.1:");
    // A browser shows a certificate for other sites' pages, too.
    let foreign = ["--header", "Origin: https://evil.example"];
    assert_problem(
        served.ask(Some(&boss), "POST", cancel, &foreign),
        403,
        "foreign",
        "another site",
    );
    let log = served.daemon.output();
    assert!(
        log.contains("pagecopyd::audit") && log.contains("who=boss.test, from"),
        "{log}"
    );
}

#[test]
fn nobody_comes_in_without_a_certificate_of_the_authority() {
    let served = Served::start();
    assert_eq!(served.ask(None, "GET", "/healthz", &[]), None);
    let folder = served.scratch.folder("strange");
    let strange = Certs::new(&folder, "stranger").identity("boss.test");
    assert_eq!(served.ask(Some(&strange), "GET", "/healthz", &[]), None);
    let mut command = served.net.command(Side::A, "curl");
    let plain = command.args([
        "--silent",
        "--max-time",
        "20",
        &format!("http://127.0.0.1:{PORT}/healthz"),
    ]);
    assert!(!plain.output().unwrap().status.success(), "in the clear");
    let log = served.daemon.output();
    assert!(log.matches("was not let in").count() >= 3, "{log}");
    let boss = served.certs.identity("boss.test");
    assert_eq!(
        served.ask(Some(&boss), "GET", "/healthz", &[]).unwrap().0,
        200
    );
}

/// Whoever connects and says nothing keeps nobody else waiting.
#[test]
fn who_says_nothing_keeps_nobody_waiting() {
    let served = Served::start();
    let script = format!(
        "for n in $(seq 20); do exec {{fd}}<>/dev/tcp/127.0.0.1/{PORT}; done; echo silent; read"
    );
    let mut silent = served.net.command(Side::A, "bash");
    silent
        .args(["-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    let mut silent = silent.spawn().unwrap();
    let mut said = [0; 7];
    std::io::Read::read_exact(silent.stdout.as_mut().unwrap(), &mut said).unwrap();
    let boss = served.certs.identity("boss.test");
    assert_eq!(
        served.ask(Some(&boss), "GET", "/healthz", &[]).unwrap().0,
        200
    );
    silent.kill().unwrap();
    silent.wait().unwrap();
}
