//! What the agent has started on its host: one side of a migration.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use tests::real::{
    Cli, Daemon, Identity, Machine, Manner, PATIENCE, Qemu, Role, RunAs, Scratch, Trust, Version,
    Watch, assert_arrived, assert_left, cpu_seconds, eventually,
};

use super::ask::{Ask, By, Counters, Ended, Heard, Order, Pem, Start, Touched};
use super::clock::{self, Clock};
use super::{facts, stream, words_of};

/// What the guest is called.
const VM: &str = "vm";
/// The guest beats each millisecond; so many are waited for before it is moved.
const SETTLED_BEATS: usize = 1250;
/// Mebibytes that go beside the guest's content: page tables, sockets, QEMU's own.
const BESIDE_MIB: u64 = 256;
/// Bytes that a file's blocks are counted in.
const STAT_BLOCK: u64 = 512;
/// Seconds of full speed that a link's rate is taken from.
const IPERF3_SECONDS: &str = "2";

/// Does what is asked for.
#[derive(Debug)]
pub(super) struct Agent {
    clock: Clock,
    side: Option<Side>,
    server: Option<Server>,
}

impl Agent {
    pub(super) fn new() -> Agent {
        Agent {
            clock: Clock::from(Instant::now()),
            side: None,
            server: None,
        }
    }

    /// The answer, or why there is none. The harness says what it misses by a panic.
    pub(super) fn answer(&mut self, ask: Ask) -> Result<Value, String> {
        catch_unwind(AssertUnwindSafe(|| self.carry_out(ask)))
            .unwrap_or_else(|panic| Err(words_of(panic.as_ref())))
    }

    fn carry_out(&mut self, ask: Ask) -> Result<Value, String> {
        match ask {
            Ask::Programs => told(facts::digests()?),
            Ask::Describe(qemu) => told(facts::describe(&qemu)?),
            Ask::Route(to) => told(facts::route(to)?),
            Ask::Listen(at) => told(clock::listen(at, self.clock)?),
            Ask::Ping(to, count) => told(clock::ping(to, count, self.clock)?),
            Ask::Iperf3Server(at) => {
                self.server = None;
                self.server = Some(Server::start(at)?);
                told(())
            }
            Ask::Iperf3(to) => told(iperf3(to)?),
            Ask::Drain(at, sealed) => told(stream::drain(at, sealed)?),
            Ask::Fill(to, mib, sealed) => told(stream::fill(to, mib, sealed)?),
            Ask::Warm(mib) => {
                warm(mib);
                told(())
            }
            Ask::Stop => {
                self.side = None;
                self.server = None;
                told(())
            }
            Ask::Start(start) => {
                self.side = None;
                let side = Side::start(&start, self.clock);
                let pids = side.pids.clone();
                self.side = Some(side);
                told(pids)
            }
            asked => self
                .side
                .as_mut()
                .ok_or("nothing is started")?
                .carry_out(asked),
        }
    }
}

fn told(what: impl Serialize) -> Result<Value, String> {
    serde_json::to_value(what).map_err(|error| error.to_string())
}

/// Where QEMU is.
#[derive(Debug)]
enum Held {
    Here(Box<Qemu>),
    /// With the thread that moves the guest, and gives it back with what came of that.
    Moving(JoinHandle<(Box<Qemu>, Result<Ended, String>)>),
    /// A panic took it along.
    Lost,
}

/// One side of a migration. What is dropped first stands first.
#[derive(Debug)]
struct Side {
    watch: Option<Watch>,
    daemon: Option<Daemon>,
    qemu: Held,
    pids: Vec<u32>,
    device: String,
    clock: Clock,
    _scratch: Scratch,
}

impl Side {
    fn start(start: &Start, clock: Clock) -> Side {
        let scratch = Scratch::new();
        let pem = start.identity.as_ref();
        let daemon = start.daemon.map(|listen| {
            let trust = pem.map_or(Trust::Plaintext, |pem| trust(pem, &start.name, &scratch));
            let manner = Manner {
                name: start.name.clone(),
                trust,
                steps: None,
                run_as: RunAs::User,
            };
            Daemon::start_here(listen, &scratch.folder(&start.name), &manner)
        });
        let mut machine = Machine::new(Version::V10_0, start.machine_mib, "");
        machine.guest.clone_from(&start.guest);
        machine.prealloc = start.allocated;
        if let (Some(pem), None) = (pem, start.daemon) {
            machine.extra = credentials(pem, start.role, &scratch.folder("qemu-tls"));
        }
        let command = Command::new(&start.qemu);
        let qemu = Qemu::start_with(&scratch, "guest", &machine, start.role, command);
        let daemon_pid = daemon.iter().map(Daemon::pid);
        Side {
            watch: None,
            pids: [qemu.pid()].into_iter().chain(daemon_pid).collect(),
            daemon,
            qemu: Held::Here(Box::new(qemu)),
            device: start.device.clone(),
            clock,
            _scratch: scratch,
        }
    }

    fn qemu(&mut self) -> Result<&mut Qemu, String> {
        match &mut self.qemu {
            Held::Here(qemu) => Ok(qemu),
            Held::Moving(_) => Err("the guest is being moved".to_owned()),
            Held::Lost => Err("QEMU is gone".to_owned()),
        }
    }

    fn carry_out(&mut self, ask: Ask) -> Result<Value, String> {
        match ask {
            Ask::Qmp(command, arguments) => return self.qemu()?.qmp.execute(&command, arguments),
            Ask::Receive => {
                let daemon = self.daemon.as_ref().map(Cli::of).ok_or("no daemon")?;
                daemon.receive(VM, self.qemu()?.socket())?;
            }
            Ask::Settle => {
                let serial = &self.qemu()?.serial;
                serial.wait_filled();
                serial.wait_beats(SETTLED_BEATS);
            }
            Ask::Allocated => {
                let ram = fs::metadata(self.qemu()?.ram()).map_err(|error| error.to_string())?;
                return told(ram.blocks() * STAT_BLOCK);
            }
            Ask::Arm => {
                self.watch = self.daemon.as_ref().map(|daemon| Watch::over(daemon.pid()));
                return told(count(&self.pids, &self.device, None));
            }
            Ask::Disarm => {
                let counted = count(&self.pids, &self.device, None);
                let daemon_kib = self.watch.take().map(|watch| watch.most().memory_kib);
                return told(Counters {
                    daemon_kib,
                    ..counted
                });
            }
            Ask::Begin(order) => self.begin(order)?,
            Ask::Finish => return told(self.finish()?),
            Ask::Beats(count) => {
                self.qemu()?.serial.wait_beats(count);
            }
            Ask::Touches => {
                let touches = self.qemu()?.serial.touches();
                return told(Touched {
                    p99_us: touches.quantile_us(0.99),
                    p999_us: touches.quantile_us(0.999),
                });
            }
            Ask::Hear => {
                let clock = self.clock;
                return told(heard(self.qemu()?, clock));
            }
            Ask::Verify => self.qemu()?.serial.verify(),
            Ask::Arrived => assert_arrived(self.qemu()?),
            Ask::Left(beats) => assert_left(self.qemu()?, beats),
            other => return Err(format!("{other:?} is nothing that a side does")),
        }
        told(())
    }

    /// Moves the guest from a thread: whoever asks may look at the other side meanwhile, and the end is not missed.
    fn begin(&mut self, order: Order) -> Result<(), String> {
        self.qemu()?;
        let Held::Here(mut qemu) = std::mem::replace(&mut self.qemu, Held::Lost) else {
            return Err("QEMU is gone".to_owned());
        };
        let (pids, device, clock) = (self.pids.clone(), self.device.clone(), self.clock);
        let daemon = self.daemon.as_ref().map(|it| (it.pid(), Cli::of(it)));
        self.qemu = Held::Moving(std::thread::spawn(move || {
            qemu.serial.touches(); // counted from here on
            let watch = daemon.as_ref().map(|(pid, _)| Watch::over(*pid));
            let before = count(&pids, &device, None);
            let begun_ms = clock.now();
            let cli = daemon.map(|(_, cli)| cli);
            let outcome = carry_out(&order, cli.as_ref(), &mut qemu);
            let ended_ms = clock.now();
            let mut after = count(&pids, &device, None);
            after.daemon_kib = watch.map(|watch| watch.most().memory_kib);
            let ended = Ended {
                begun_ms,
                ended_ms,
                before,
                after,
            };
            (qemu, outcome.map(|()| ended))
        }));
        Ok(())
    }

    fn finish(&mut self) -> Result<Ended, String> {
        match std::mem::replace(&mut self.qemu, Held::Lost) {
            Held::Moving(thread) => {
                let (qemu, outcome) = thread.join().map_err(|panic| words_of(panic.as_ref()))?;
                self.qemu = Held::Here(qemu);
                outcome
            }
            other => {
                self.qemu = other;
                Err("nothing is being moved".to_owned())
            }
        }
    }
}

/// Has the guest moved, and waits until this side says that it is done.
fn carry_out(order: &Order, cli: Option<&Cli>, qemu: &mut Qemu) -> Result<(), String> {
    let options = match &order.by {
        By::Daemon(options) => options,
        By::Qemu(postcopy) => return by_qemu(order, *postcopy, qemu),
    };
    let cli = cli.ok_or("no daemon")?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let to = order.to.to_string();
    let outcome = cli
        .migrate_socket(VM, qemu.socket(), &to, &options)
        .finish();
    let last = outcome.events.last();
    if outcome.status.success() && last.is_some_and(|event| event["status"] == "completed") {
        return Ok(());
    }
    let error = last.and_then(|event| event["error"].as_str());
    Err(error.unwrap_or(outcome.errors.trim()).to_owned())
}

/// QEMU's own migration; with post-copy, switched over as soon as QEMU lets itself be told.
fn by_qemu(order: &Order, postcopy: bool, qemu: &mut Qemu) -> Result<(), String> {
    let qmp = &mut qemu.qmp;
    qmp.execute("migrate", json!({"uri": format!("tcp:{}", order.to)}))?;
    if postcopy {
        qmp.event_within("MIGRATION", PATIENCE, |data| data["status"] == "active")
            .ok_or("QEMU does not begin")?;
        qmp.execute("migrate-start-postcopy", json!({}))?;
    }
    let patience = Duration::from_secs(order.patience_s);
    let end = qmp.event_within("MIGRATION", patience, |data| {
        data["status"] == "completed" || data["status"] == "failed"
    });
    match end {
        Some(data) if data["status"] == "completed" => Ok(()),
        Some(_) => {
            let told = qmp.execute("query-migrate", json!({}))?;
            let reason = told["error-desc"].as_str().unwrap_or("without a reason");
            Err(format!("QEMU's migration failed: {reason}"))
        }
        None => Err(format!("not done within {patience:?}")),
    }
}

fn count(pids: &[u32], device: &str, daemon_kib: Option<u64>) -> Counters {
    Counters {
        cpu_s: pids.iter().map(|pid| cpu_seconds(*pid)).sum(),
        bytes: facts::bytes_sent(device),
        daemon_kib,
    }
}

fn heard(qemu: &Qemu, clock: Clock) -> Heard {
    let serial = &qemu.serial;
    let states = serial.states().into_iter();
    let beat = |(at, number)| (clock.at(at), number);
    Heard {
        beats: serial.beats(),
        first: serial.first_beat().map(beat),
        last: serial.last_beat().map(beat),
        states: states.map(|it| (clock.at(it.at), it.checked)).collect(),
    }
}

/// Memory that is free and has just been used: what every kind of migration allocates at the destination.
///
/// In a virtual machine, free pages may have been given back to the host. The next use of such a page costs several times
/// as much as the page itself, and which run meets how many of them is chance. What is dropped here is what the kernel
/// hands out next.
fn warm(mib: u64) {
    let bytes = usize::try_from((mib + BESIDE_MIB) << 20).unwrap_or(0);
    drop(std::hint::black_box(vec![1_u8; bytes]));
}

/// Writes PEM files to `folder` under these names.
fn write(pem: &Pem, folder: &Path, names: [&str; 3]) -> Identity {
    let [ca, cert, key] = names.map(|name| folder.join(name));
    for (path, text) in [(&ca, &pem.ca), (&cert, &pem.cert), (&key, &pem.key)] {
        fs::write(path, text).expect("a file of a certificate");
    }
    fs::set_permissions(&key, Permissions::from_mode(0o600)).expect("a key file takes a mode");
    Identity { ca, cert, key }
}

/// How a daemon trusts its peer.
fn trust(pem: &Pem, name: &str, scratch: &Scratch) -> Trust {
    let identity = write(
        pem,
        &scratch.folder("tls"),
        ["ca.pem", "cert.pem", "key.pem"],
    );
    let peer = if name == "a" { "b" } else { "a" };
    Trust::Tls(identity, vec![peer.to_owned()])
}

/// QEMU's arguments for mutual TLS.
fn credentials(pem: &Pem, role: Role, folder: &Path) -> Vec<String> {
    let end = match role {
        Role::Source => "client",
        _ => "server",
    };
    let (cert, key) = (format!("{end}-cert.pem"), format!("{end}-key.pem"));
    write(pem, folder, ["ca-cert.pem", &cert, &key]);
    let object = format!(
        "tls-creds-x509,id=tls0,dir={},endpoint={end},verify-peer=on",
        folder.display()
    );
    vec!["-object".to_owned(), object]
}

/// A server of iperf3's. Ended on drop: it may have had no client.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(at: SocketAddr) -> Result<Server, String> {
        let (ip, port) = (at.ip().to_string(), at.port().to_string());
        let mut command = Command::new("iperf3");
        command.args(["--server", "--one-off", "--bind", &ip, "--port", &port]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.stdin(Stdio::null());
        command.spawn().map(Server).map_err(missing)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn missing(error: std::io::Error) -> String {
    format!("iperf3 does not start: {error}; install iperf3 there")
}

/// Bits per second that two streams, as many as the ways have that are measured beside it, bring to the server.
fn iperf3(to: SocketAddr) -> Result<f64, String> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    eventually(PATIENCE, || {
        let mut client = Command::new("iperf3");
        client.args([
            "--client",
            &ip,
            "--port",
            &port,
            "--parallel",
            "2",
            "--json",
        ]);
        client.stdin(Stdio::null());
        let output = client.args(["--time", IPERF3_SECONDS]).output();
        let output = output.map_err(missing)?;
        let told: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        if let Some(error) = told["error"].as_str() {
            return Err(error.to_owned()); // the server may not listen yet
        }
        let rate = told["end"]["sum_received"]["bits_per_second"].as_f64();
        rate.filter(|rate| *rate > 0.0)
            .ok_or_else(|| "iperf3 does not say its rate".to_owned())
    })
}
