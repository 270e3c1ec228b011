//! Guests, moved on this host over its RDMA device: what a page fault takes in post-copy, and how long whole migrations
//! take, ours and QEMU's own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use ::tests::real::{
    Machine, Net, PATIENCE, Qemu, Role, Scratch, Side, Trust, Version, World, assert_moved,
};
use serde_json::{Value, json};

use crate::stats::Spread;

/// RAM of a guest, in MiB.
const MIB: u64 = 96;
/// Nearly nothing is fetched but what the guest waits for: what a fault takes alone.
const ALONE: &str = "1KB/s";
/// How long a guest waits for its pages.
const FAULTS: f64 = 5.0;
/// What a fault may take, in terms of `ib_read_lat`, beside what it takes on this host.
const PROMISE: f64 = 2.0;
const PORT: u16 = 4444;
/// The stages of a fault, as the daemon names them.
const STAGES: [&str; 4] = ["read_us", "queue_us", "wire_us", "place_us"];

/// Medians of the page faults of one post-copy, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Faults {
    count: f64,
    all: f64,
    /// Of that, in turn: until the kernel's report was read, the page was asked for, its bytes were here, and it was mapped.
    stages: [f64; 4],
}

impl Faults {
    /// Until its bytes were here, from when they were asked for.
    fn wire(&self) -> f64 {
        self.stages[2]
    }
}

/// What was measured.
pub(super) struct Guests {
    rdma: Vec<Faults>,
    tcp: Vec<Faults>,
    /// Seconds for a whole migration by each of [`WAYS`].
    moves: [Vec<Option<f64>>; 4],
}

const WAYS: [&str; 4] = [
    "ours over RDMA",
    "ours over TCP",
    "QEMU's rdma:",
    "QEMU's tcp:",
];

/// Measures `pairs` times over the device at `address`.
pub(super) fn measure(address: IpAddr, pairs: usize) -> Result<Guests, String> {
    let network = match address {
        IpAddr::V4(_) => format!("{address}/32"),
        IpAddr::V6(_) => format!("{address}/128"),
    };
    let mut guests = Guests {
        rdma: Vec::new(),
        tcp: Vec::new(),
        moves: Default::default(),
    };
    for pair in 0..pairs {
        guests.rdma.push(faults(&network, "rdma")?);
        guests.tcp.push(faults(&network, "tcp")?);
        let took = [
            ours(&network, "rdma"),
            ours(&network, "tcp"),
            qemus(&format!("rdma:{address}:{PORT}")),
            qemus(&format!("tcp:{address}:{PORT}")),
        ];
        for (way, took) in took.into_iter().enumerate() {
            let took = took.inspect_err(|error| eprintln!("{}: {error}", WAYS[way]));
            guests.moves[way].push(took.ok());
        }
        eprintln!("{} of {pairs} with guests", pair + 1);
    }
    Ok(guests)
}

/// Two daemons, of which both allow RDMA.
fn world(network: &str) -> World {
    let trust = [Trust::Plaintext, Trust::Plaintext];
    let mut world = World::on(Net::here(), Scratch::new(), &trust);
    world.allow_rdma(&[Side::A, Side::B], &[network]);
    world
}

/// A post-copy of which next to nothing comes that nobody waits for.
fn faults(network: &str, transport: &str) -> Result<Faults, String> {
    let world = world(network);
    let machine = Machine::new(Version::V10_0, MIB, "rate=2 set=32");
    let source = world.guest("source", &machine);
    let destination = world.waiting("destination", &machine);
    let words = [
        "--mode",
        "postcopy",
        "--transport",
        transport,
        "--postcopy-bandwidth-limit",
        ALONE,
    ];
    let migration = world.begin(Side::A, "vm", &source, &destination, &words);
    destination.serial.wait_beats(1);
    let event = migration.wait_event("faults", PATIENCE * 4, |event| {
        let at = event["postcopy_ms"].as_f64().unwrap_or(0.0);
        event["event"] == "postcopy" && at >= FAULTS * 1e3
    });
    let id = world.cli(Side::B).id_of("vm");
    let shown = world.cli(Side::B).status(&id);
    let figure = |value: &Value| {
        let why = || format!("a post-copy over {transport} without figures: {shown}");
        value.as_f64().ok_or_else(why)
    };
    let mut stages = [0.0; 4];
    for (took, stage) in stages.iter_mut().zip(STAGES) {
        *took = figure(&shown["faults"][stage]["p50"])?;
    }
    Ok(Faults {
        count: figure(&event["faults"])?,
        all: figure(&event["fault_us"]["p50"])?,
        stages,
    })
}

/// Seconds for a migration of ours.
fn ours(network: &str, transport: &str) -> Result<f64, String> {
    let world = world(network);
    let machine = Machine::new(Version::V10_0, MIB, "rate=0");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    let words = ["--transport", transport, "--downtime-limit", "1s"];
    let begun = Instant::now();
    let outcome = world.migrate(Side::A, "vm", &source, &destination, &words);
    let took = begun.elapsed();
    let end = outcome.completed();
    if end["transport_at_end"] != transport {
        return Err(format!("it went over {}", end["transport_at_end"]));
    }
    assert_moved(&mut source, &mut destination);
    Ok(took.as_secs_f64())
}

/// Seconds for one of QEMU's, with its limit of 128 MiB/s lifted.
fn qemus(uri: &str) -> Result<f64, String> {
    let scratch = Scratch::new();
    let machine = Machine::new(Version::V10_0, MIB, "rate=0");
    let start = |name, role| Qemu::start(&scratch, name, &machine, role);
    let mut source = start("source", Role::Source);
    source.serial.wait_filled();
    let mut destination = start("destination", Role::EagerDestination);
    for qemu in [&mut source, &mut destination] {
        let on = json!({"capabilities": [{"capability": "events", "state": true}]});
        qemu.qmp.execute("migrate-set-capabilities", on)?;
        let limits = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 1000});
        qemu.qmp.execute("migrate-set-parameters", limits)?;
    }
    let uri = json!({ "uri": uri });
    destination.qmp.execute("migrate-incoming", uri.clone())?;
    let begun = Instant::now();
    source.qmp.execute("migrate", uri)?;
    let ended = |data: &Value| data["status"] == "completed" || data["status"] == "failed";
    let end = source.qmp.event_within("MIGRATION", 4 * PATIENCE, ended);
    let took = begun.elapsed();
    match end {
        Some(data) if data["status"] == "completed" => {}
        Some(_) => {
            let told = source.qmp.execute("query-migrate", json!({}))?;
            return Err(format!("QEMU's migration failed: {}", told["error-desc"]));
        }
        None => return Err(format!("not done within {:?}", 4 * PATIENCE)),
    }
    destination.serial.wait_beats(1);
    destination.serial.verify();
    Ok(took.as_secs_f64())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.collect();
    Spread::of(&values).map_or(f64::NAN, |spread| spread.median)
}

impl Guests {
    /// Says what came out, held against the median of `ib_read_lat` in microseconds.
    pub(super) fn say(&self, read_latency: Option<f64>) {
        let [rdma, tcp] = [&self.rdma, &self.tcp].map(|all| {
            let of = |pick: fn(&Faults) -> f64| median(all.iter().map(pick));
            (of(|it| it.all), of(|it| it.all - it.wire()))
        });
        println!(
            "a page fault over RDMA: {:.2} times one over TCP",
            rdma.0 / tcp.0
        );
        if let Some(latency) = read_latency {
            let (all, local) = rdma;
            let times = all / (PROMISE * latency + local);
            let verdict = if times <= 1.0 { "kept" } else { "missed" };
            println!(
                "a page fault over RDMA: {times:.2} times what is promised ({PROMISE} times ib_read_lat and what it takes \
                 on this host), {verdict}; of it on the way {:.2} times ib_read_lat",
                (all - local) / latency
            );
        }
        for (way, took) in self.moves.iter().enumerate().skip(1) {
            let ratios = Spread::of_ratios(&self.moves[0], took);
            let ratios = ratios.map_or("not measured".to_owned(), |it| format!("{:.2}", it.median));
            println!(
                "a whole migration, {}: {ratios} times the time of {}",
                WAYS[0], WAYS[way]
            );
        }
    }

    pub(super) fn value(&self) -> Value {
        let faults = |all: &[Faults]| -> Vec<Value> {
            let one = |it: &Faults| {
                let stages: BTreeMap<_, _> = STAGES.iter().zip(it.stages).collect();
                json!({"count": it.count, "p50_us": it.all, "stages_p50": stages})
            };
            all.iter().map(one).collect()
        };
        let moves: Vec<Value> = WAYS
            .iter()
            .zip(&self.moves)
            .map(|(way, took)| json!({"way": way, "seconds": took}))
            .collect();
        json!({"faults_rdma": faults(&self.rdma), "faults_tcp": faults(&self.tcp), "moves": moves})
    }
}
