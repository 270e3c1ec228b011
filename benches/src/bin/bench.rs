//! `scripts/bench`: our migration beside QEMU's own, in turn, on the same guest and the same link.
//!
//! The link is a veth pair between two network namespaces. The guest fills its memory with random words and dirties a
//! working set at a set rate. Each migration has a new pair of QEMUs. Measured from outside, the same way for all:
//!
//! - total: from the command until the side that sends says that it is done;
//! - downtime: from the guest's last beat at the source to its first at the destination;
//! - CPU: user and system time of both QEMUs and, for ours, both daemons, over the total (so the guest's own work is in
//!   it, for all alike);
//! - bytes: what both ends of the link have sent, headers included.
//!
//! QEMU is set as well as we know how: `max-bandwidth` out of the way, one stream or `multifd` with two channels (ours
//! has two as well), the same downtime limit, and a destination without `-S` that resumes by itself.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use benches::{Sample, median, medians, to_json};
use serde_json::{Value, json};
use tests::real::{
    Certs, Machine, Qemu, Role, Side, Version, World, assert_moved, cpu_seconds, outside_downtime,
};

const CHANNELS: &str = "2";
const PORT: u16 = 4444;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    OursPlain,
    QemuPlain,
    QemuPlainMultifd,
    OursTls,
    QemuTls,
    QemuTlsMultifd,
}

impl Contender {
    const ALL: [Contender; 6] = [
        Contender::OursPlain,
        Contender::QemuPlain,
        Contender::QemuPlainMultifd,
        Contender::OursTls,
        Contender::QemuTls,
        Contender::QemuTlsMultifd,
    ];

    fn is_ours(self) -> bool {
        matches!(self, Contender::OursPlain | Contender::OursTls)
    }

    fn name(self) -> &'static str {
        match self {
            Contender::OursPlain => "pagecopy, tcp x2",
            Contender::QemuPlain => "QEMU, tcp",
            Contender::QemuPlainMultifd => "QEMU, multifd x2",
            Contender::OursTls => "pagecopy, tls x2",
            Contender::QemuTls => "QEMU, tls",
            Contender::QemuTlsMultifd => "QEMU, multifd x2 + tls",
        }
    }
}

struct Options {
    pairs: usize,
    mib: u64,
    rate: u32,
    set: u32,
    limit_ms: u32,
    json: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        pairs: 5,
        mib: 1024,
        rate: 50,
        set: 256,
        limit_ms: 300,
        json: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(format!("{word} wants a value"))?;
        let bad = |_| format!("{word} {value}: not a number");
        match word.as_str() {
            "--pairs" => options.pairs = value.parse().map_err(bad)?,
            "--mib" => options.mib = value.parse().map_err(bad)?,
            "--rate" => options.rate = value.parse().map_err(bad)?,
            "--set" => options.set = value.parse().map_err(bad)?,
            "--downtime-limit" => {
                options.limit_ms = value.trim_end_matches("ms").parse().map_err(bad)?
            }
            "--json" => options.json = Some(value),
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!(
                "error: {error}\nusage: bench [--pairs N] [--mib N] [--rate MB/s] [--set MiB] [--downtime-limit MS] [--json FILE]"
            );
            return ExitCode::FAILURE;
        }
    };
    println!(
        "{} MiB of random words, {} MB/s dirtied over {} MiB, downtime limit {} ms, {} migrations each",
        options.mib, options.rate, options.set, options.limit_ms, options.pairs
    );
    let guest = format!("rate={} set={}", options.rate, options.set);
    let machine = Machine::new(Version::V10_0, options.mib, &guest);
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); Contender::ALL.len()];
    for pair in 0..options.pairs {
        for (contender, samples) in Contender::ALL.into_iter().zip(&mut samples) {
            let sample = run(contender, &machine, options.limit_ms);
            println!("{pair:>3} {:<24} {}", contender.name(), to_json(&sample));
            samples.push(sample);
        }
    }
    print_table(&samples);
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", report(&options, &samples));
        if let Err(error) = std::fs::write(path, text) {
            eprintln!("error: {path}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn run(contender: Contender, machine: &Machine, limit_ms: u32) -> Sample {
    let world = match contender {
        Contender::OursTls => World::tls(),
        _ => World::plain(),
    };
    let qemu = |name: &str, side: Side, role: Role, extra: &[String]| {
        let mut machine = machine.clone();
        machine.extra.extend_from_slice(extra);
        Qemu::start_with(
            &world.scratch,
            name,
            &machine,
            role,
            world.net.command(side, machine.version.binary()),
        )
    };
    let tls = matches!(contender, Contender::QemuTls | Contender::QemuTlsMultifd);
    let multifd = matches!(
        contender,
        Contender::QemuPlainMultifd | Contender::QemuTlsMultifd
    );
    let (theirs, ours) = if tls {
        qemu_credentials(world.scratch.files())
    } else {
        Default::default()
    };
    let role = if contender.is_ours() {
        Role::Destination
    } else {
        Role::EagerDestination
    };
    let mut source = qemu("source", Side::A, Role::Source, &ours);
    let mut destination = qemu("destination", Side::B, role, &theirs);
    source.serial.wait_filled();
    source.serial.wait_beats(1000);

    let pids = [
        source.pid(),
        destination.pid(),
        world.daemon(Side::A).pid(),
        world.daemon(Side::B).pid(),
    ];
    let cpu = || pids.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
    let bytes = || world.net.bytes_sent(Side::A) + world.net.bytes_sent(Side::B);
    if contender.is_ours() {
        world
            .cli(Side::B)
            .receive("vm", destination.socket())
            .expect("the destination takes the guest");
    } else {
        prepare_qemu(&mut source, &mut destination, multifd, tls, limit_ms);
    }
    let (cpu_before, bytes_before, begun) = (cpu(), bytes(), Instant::now());
    if contender.is_ours() {
        let limit = format!("{limit_ms}ms");
        let options = ["--channels", CHANNELS, "--downtime-limit", &limit];
        world
            .cli(Side::A)
            .migrate("vm", &source, Side::B, &options)
            .finish()
            .completed();
    } else {
        let uri = format!("tcp:{}:{PORT}", Side::B.address());
        source
            .qmp
            .execute("migrate", json!({"uri": uri}))
            .expect("QEMU begins");
        source
            .qmp
            .wait_event("MIGRATION", Duration::from_secs(120), |data| {
                assert_ne!(data["status"], "failed", "QEMU's own migration failed");
                data["status"] == "completed"
            });
    }
    let total = begun.elapsed();
    let (cpu_used, bytes_sent) = (cpu() - cpu_before, bytes() - bytes_before);
    destination.serial.wait_beats(1);
    let downtime = outside_downtime(&source.serial, &destination.serial);
    assert_moved(&mut source, &mut destination);
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let megabytes = bytes_sent as f64 / 1e6;
    vec![
        ("total_ms", total.as_secs_f64() * 1e3),
        ("outside_downtime_ms", downtime.as_secs_f64() * 1e3),
        ("cpu_s", cpu_used),
        ("megabytes", megabytes),
    ]
}

/// QEMU's own migration, as fast as its settings allow.
fn prepare_qemu(
    source: &mut Qemu,
    destination: &mut Qemu,
    multifd: bool,
    tls: bool,
    limit_ms: u32,
) {
    let mut parameters = json!({
        "multifd-channels": 2,
        "max-bandwidth": 1_u64 << 40,
        "downtime-limit": limit_ms,
    });
    if tls {
        parameters["tls-creds"] = json!("tls0");
        parameters["tls-hostname"] = json!("b");
    }
    for qemu in [&mut *source, &mut *destination] {
        qemu.qmp.capabilities(if multifd {
            &["multifd", "events"]
        } else {
            &["events"]
        });
        qemu.qmp
            .execute("migrate-set-parameters", parameters.clone())
            .expect("QEMU takes these parameters");
    }
    let uri = format!("tcp:{}:{PORT}", Side::B.address());
    destination
        .qmp
        .execute("migrate-incoming", json!({"uri": uri}))
        .expect("QEMU listens");
}

/// QEMU's arguments for mutual TLS: those of the destination (a server), and those of the source (a client).
fn qemu_credentials(folder: &Path) -> (Vec<String>, Vec<String>) {
    let certs = Certs::new(folder, "qemu-authority");
    let end = |host: &str, role: &str| {
        let identity = certs.identity(host);
        let files = folder.join(format!("qemu-tls-{role}"));
        let copy = |from: &Path, to: &str| {
            std::fs::copy(from, files.join(to)).expect("a certificate can be copied")
        };
        std::fs::create_dir_all(&files).expect("a folder for certificates");
        copy(&identity.ca, "ca-cert.pem");
        copy(&identity.cert, &format!("{role}-cert.pem"));
        copy(&identity.key, &format!("{role}-key.pem"));
        let object = format!(
            "tls-creds-x509,id=tls0,dir={},endpoint={role},verify-peer=on",
            files.display()
        );
        vec!["-object".to_owned(), object]
    };
    (end("b", "server"), end("a", "client"))
}

fn print_table(samples: &[Vec<Sample>]) {
    println!(
        "\n{:<24} {:>10} {:>12} {:>8} {:>10}",
        "medians", "total ms", "downtime ms", "CPU s", "MB"
    );
    for (contender, samples) in Contender::ALL.iter().zip(samples) {
        print!("{:<24}", contender.name());
        for ((_, value), width) in medians(samples).iter().zip([10, 12, 8, 10]) {
            print!(" {value:>width$.1}");
        }
        println!();
    }
    let pairs = [
        ("ours / QEMU, tcp", 0, 1),
        ("ours / multifd", 0, 2),
        ("ours / QEMU, tls", 3, 4),
        ("ours / multifd + tls", 3, 5),
    ];
    for (name, ours, theirs) in pairs {
        print!("{name:<24}");
        for (at, width) in [10, 12, 8, 10].into_iter().enumerate() {
            print!(" {:>width$.2}", ratio(&samples[ours], &samples[theirs], at));
        }
        println!();
    }
}

/// Median of the ratios of migrations that ran one after the other.
fn ratio(ours: &[Sample], theirs: &[Sample], figure: usize) -> f64 {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| ours[figure].1 / theirs[figure].1.max(f64::MIN_POSITIVE))
        .collect();
    median(&ratios)
}

fn report(options: &Options, samples: &[Vec<Sample>]) -> Value {
    let contenders: Vec<Value> = Contender::ALL
        .iter()
        .zip(samples)
        .map(|(contender, samples)| {
            json!({
                "name": contender.name(),
                "median": to_json(&medians(samples)),
                "samples": samples.iter().map(to_json).collect::<Vec<_>>(),
            })
        })
        .collect();
    let kernel = Command::new("uname")
        .arg("-r")
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    json!({
        "kernel": String::from_utf8_lossy(&kernel).trim(),
        "mib": options.mib,
        "rate_mb_s": options.rate,
        "set_mib": options.set,
        "downtime_limit_ms": options.limit_ms,
        "contenders": contenders,
    })
}
