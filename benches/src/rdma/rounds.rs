//! What is measured in which order, and how it is said.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use super::Options;
use super::end::{Bulk, Far, Near, memory};
use super::guests;
use super::perftest::{Program, Test};
use super::talk::{Answer, Ask};
use crate::stats::Spread;

/// What ours is to reach of what perftest does.
const GOODPUT: f64 = 0.8;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// Much of it, in one direction and size: by each way, once for each round.
struct BulkFigures {
    write: bool,
    size: u64,
    rdma: Vec<Bulk>,
    tcp: Vec<Bulk>,
    perftest: Vec<Option<f64>>,
}

/// One page: microseconds.
#[derive(Default)]
struct PageFigures {
    rdma: Vec<Option<f64>>,
    tcp: Vec<Option<f64>>,
    perftest: Vec<Option<f64>>,
}

struct Bench<'a> {
    options: &'a Options,
    to: SocketAddr,
    far: Far,
    rdma: Near,
    tcp: Near,
}

/// Measures against the far end at `to`, and says what came out.
pub(super) fn measure(options: &Options, to: SocketAddr) -> Result<(), String> {
    let (mut far, regions) = (Far::dial(to)?, memory());
    let rdma = Near::open(&mut far, &regions, true)?;
    let tcp = Near::open(&mut far, &regions, false)?;
    let mut bench = Bench {
        options,
        to,
        far,
        rdma,
        tcp,
    };
    let kinds = [true, false].into_iter();
    let kinds = kinds.flat_map(|write| options.sizes.iter().map(move |size| (write, *size)));
    let mut bulks: Vec<BulkFigures> = kinds
        .map(|(write, size)| BulkFigures {
            write,
            size,
            rdma: Vec::new(),
            tcp: Vec::new(),
            perftest: Vec::new(),
        })
        .collect();
    let mut pages = PageFigures::default();
    for pair in 0..options.pairs {
        for bulk in &mut bulks {
            bench.bulk(bulk)?;
        }
        bench.pages(&mut pages)?;
        eprintln!("{} of {}", pair + 1, options.pairs);
    }
    // What its memory takes is not the guests' business.
    drop(bench);
    bulks.iter().for_each(say_bulk);
    say_pages(&pages);
    let guests = match options.guest {
        true => Some(guests::measure(to.ip(), options.pairs)?),
        false => None,
    };
    if let Some(guests) = &guests {
        guests.say(median(&pages.perftest));
    }
    let Some(path) = &options.json else {
        return Ok(());
    };
    let report = json!({
        "bulk": bulks.iter().map(BulkFigures::value).collect::<Vec<_>>(),
        "page_us": {"rdma": pages.rdma, "tcp": pages.tcp, "ib_read_lat": pages.perftest},
        "guests": guests.map(|guests| guests.value()),
    });
    std::fs::write(path, format!("{report:#}\n"))
        .map_err(|error| format!("{}: {error}", path.display()))
}

impl Bench<'_> {
    fn bulk(&mut self, figures: &mut BulkFigures) -> Result<(), String> {
        let (write, size) = (figures.write, figures.size);
        let time = Duration::from_secs_f64(self.options.seconds);
        let what = if write { "writes" } else { "reads" };
        let named =
            |way: &'static str| move |error| format!("{what} of {size} bytes over {way}: {error}");
        let tcp = self.tcp.bulk(&mut self.far, write, size, time);
        let tcp = tcp.map_err(named("TCP"))?;
        let rdma = self.rdma.bulk(&mut self.far, write, size, time);
        let rdma = rdma.map_err(named("RDMA"))?;
        let program = match write {
            true => Program::WriteBandwidth,
            false => Program::ReadBandwidth,
        };
        figures.tcp.push(tcp);
        figures.rdma.push(rdma);
        figures.perftest.push(self.perftest(program, size));
        Ok(())
    }

    fn pages(&mut self, figures: &mut PageFigures) -> Result<(), String> {
        let time = Duration::from_secs_f64(self.options.seconds);
        let of = |pages: Vec<f64>| Spread::of(&pages).map(|spread| spread.median);
        figures.tcp.push(of(self.tcp.pages(time)?));
        figures.rdma.push(of(self.rdma.pages(time)?));
        figures
            .perftest
            .push(self.perftest(Program::ReadLatency, PAGE));
        Ok(())
    }

    /// What perftest says; nothing, and why on the terminal, where it does not run.
    fn perftest(&mut self, program: Program, size: u64) -> Option<f64> {
        // It warms up for a part of its time.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // seconds
        let seconds = (self.options.seconds.ceil() as u64).max(2);
        let test = Test {
            program,
            size,
            seconds,
            port: self.options.port + 1,
        };
        let started = self.far.ask(&Ask::Perftest(test));
        let figure = match started {
            Ok(Answer::Started) => test.run(self.to.ip()),
            Ok(other) => Err(format!("the far end answers {other:?}")),
            Err(error) => Err(error),
        };
        figure
            .inspect_err(|error| eprintln!("no comparison: {error}"))
            .ok()
    }
}

impl BulkFigures {
    fn value(&self) -> Value {
        let speeds = |bulks: &[Bulk]| bulks.iter().map(|bulk| bulk.mib_s).collect::<Vec<_>>();
        let cpu = |bulks: &[Bulk]| bulks.iter().map(|bulk| bulk.cpu).collect::<Vec<_>>();
        json!({
            "write": self.write,
            "size": self.size,
            "mib_s": {"rdma": speeds(&self.rdma), "tcp": speeds(&self.tcp), "perftest": self.perftest},
            "cpu_s_per_gib": {"rdma": cpu(&self.rdma), "tcp": cpu(&self.tcp)},
        })
    }
}

fn median(values: &[Option<f64>]) -> Option<f64> {
    let known: Vec<f64> = values.iter().copied().flatten().collect();
    Spread::of(&known).map(|spread| spread.median)
}

/// Ratios in words: the median, and from where to where they go.
fn in_words(ratios: Option<Spread>) -> String {
    ratios.map_or("not measured".to_owned(), |it| {
        format!("{:.2} ({:.2} to {:.2})", it.median, it.least, it.most)
    })
}

fn say_bulk(figures: &BulkFigures) {
    let speeds = |bulks: &[Bulk]| -> Vec<Option<f64>> {
        bulks.iter().map(|bulk| Some(bulk.mib_s)).collect()
    };
    let (rdma, tcp) = (speeds(&figures.rdma), speeds(&figures.tcp));
    let (what, program) = match figures.write {
        true => ("writes", Program::WriteBandwidth),
        false => ("reads", Program::ReadBandwidth),
    };
    let of_perftest = Spread::of_ratios(&rdma, &figures.perftest);
    let verdict = match of_perftest {
        Some(it) if figures.write && it.median < GOODPUT => ", missed",
        Some(_) if figures.write => ", kept",
        _ => "",
    };
    println!(
        "{what} of {} bytes: {} times {}{verdict}; {} times TCP",
        figures.size,
        in_words(of_perftest),
        program.name(),
        in_words(Spread::of_ratios(&rdma, &tcp)),
    );
    for (end, name) in ["near", "far"].into_iter().enumerate() {
        let cpu = |bulks: &[Bulk]| {
            let all: Vec<f64> = bulks.iter().map(|bulk| bulk.cpu[end]).collect();
            Spread::of(&all).map_or(f64::NAN, |spread| spread.median)
        };
        let (rdma, tcp) = (cpu(&figures.rdma), cpu(&figures.tcp));
        println!(
            "  CPU of the {name} end for as much: {:.3} of TCP's",
            rdma / tcp
        );
    }
}

fn say_pages(figures: &PageFigures) {
    println!(
        "a page of {PAGE} bytes, read: {} times {}; {} times TCP",
        in_words(Spread::of_ratios(&figures.rdma, &figures.perftest)),
        Program::ReadLatency.name(),
        in_words(Spread::of_ratios(&figures.rdma, &figures.tcp)),
    );
}
