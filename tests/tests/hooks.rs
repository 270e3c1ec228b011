//! Web hooks over TLS, with a real guest that is on its way. What is told and how: `daemon/tests/api/hooks.rs`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use tests::real::{Certs, Identity, Machine, Side, Version, World, assert_stayed};

/// A receiver over TLS: prints each event with what it is about.
const RECEIVER: &str = r#"
import http.server, ssl, sys
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        print(body.decode(), flush=True)
        self.send_response(204)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer((sys.argv[1], 8443), Receiver)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"#;

struct Receiver {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Receiver {
    fn start(command: &mut Command) -> Receiver {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 can be called");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        Receiver { child, lines }
    }

    fn wait(&mut self, event: &str) -> Value {
        for line in self.lines.by_ref() {
            let told: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if told["event"] == event {
                return told;
            }
        }
        panic!("{event} was never told");
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_guest_on_its_way_is_told_of_over_tls() {
    let mut world = World::plain();
    let certs = Certs::new(world.scratch.files(), "ops");
    let Identity { ca, cert, key } = certs.identity("localhost");
    let mut python = world.net.command(Side::A, "/usr/bin/python3");
    let mut receiver = Receiver::start(
        python
            .args(["-c", RECEIVER, "127.0.0.1"])
            .arg(cert)
            .arg(key),
    );
    let daemon = world.daemon_mut(Side::A);
    let mut text = fs::read_to_string(daemon.config()).unwrap();
    text += &format!(
        "[[hooks]]\nurl = 'https://localhost:8443/'\nca = {ca:?}\nevents = ['state', 'finished']\n"
    );
    fs::write(daemon.config(), text).unwrap();
    daemon.signal(Signal::TERM);
    assert!(daemon.wait_end());
    world.restart(Side::A);
    let machine = Machine::new(Version::V10_0, 192, "rate=200 set=96");
    let (mut source, mut destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let from = std::time::Instant::now();
    let options = [
        "--bandwidth-limit",
        "60MB/s",
        "--downtime-limit",
        "5ms",
        "--max-rounds",
        "1000",
    ];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    assert_eq!(receiver.wait("state")["state"], "preparing");
    let told = receiver.wait("state");
    assert_eq!(told["state"], "migrating", "{told}");
    assert_eq!(
        (&told["vm"], &told["side"], &told["host"]),
        (&"vm".into(), &"source".into(), &"a".into())
    );
    let id = told["id"].as_str().unwrap();
    assert!(world.cli(Side::A).run(&["cancel", id]).status.success());
    migration.finish().not_completed("cancelled");
    assert_eq!(receiver.wait("finished")["status"], "cancelled");
    assert_stayed(&mut source, Some(&mut destination), from);
}
