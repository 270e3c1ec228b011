//! `scripts/bench`: ways to move a guest beside each other, in turn, on the same guest and the same link.
//!
//! Each migration has a new pair of QEMUs and, for ours, of daemons. Everything is measured from outside, the same way for
//! all: see [`benches::record::FIGURES`]. All destinations have the same memory, a file on tmpfs that nobody has touched (or,
//! with `--allocated`, that QEMU has allocated), and the kernel has memory for it that was just in use.
//! QEMU is set as well as we know how: its limit of 128 MiB/s lifted, the same downtime limit, and a destination without
//! `-S` that resumes by itself.
//!
//! The two hosts are namespaces on this machine, or two machines (`--source-host`, `--destination-host`): see
//! [`benches::hosts`].
//!
//! What comes out is one JSON file and one page for people, both written again after each run. With `--faults`, see
//! [`benches::faults`]; with `--predictions`, [`benches::predictions`]; with `--transport rdma`, [`benches::rdma`].

mod args;
mod limits;
mod migration;
mod origin;
mod print;
mod qemu;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use benches::hosts::{self, Hosts};
use benches::link::Link;
use benches::record::{Cell, Joined, Plan, Record, Run, SCHEMA, WaySettings};
use benches::report;
use benches::ways::{Mover, Way, read_list};
use benches::work::Work;
use clap::Parser;
use tests::real::Version;

use self::args::Args;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("agent") {
        return hosts::agent::run(std::env::args().skip(1));
    }
    let wants = |mode: &str| {
        std::env::args().any(|word| word == mode || word.starts_with(&format!("{mode}=")))
    };
    let modes = ["--faults", "--predictions", "--transport"];
    if let Some(mode) = modes.into_iter().find(|mode| wants(mode)) {
        if wants("--source-host") || wants("--destination-host") {
            eprintln!("error: {}", only_here(mode));
            return ExitCode::FAILURE;
        }
        return match mode {
            "--faults" => benches::faults::run(std::env::args()),
            "--predictions" => benches::predictions::run(std::env::args()),
            _ => benches::rdma::run(std::env::args()),
        };
    }
    let args = Args::parse();
    match dispatch(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("{failed} runs failed; the files say why");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why a mode is not for two hosts that are named.
fn only_here(mode: &str) -> String {
    match mode {
        "--transport" => "--transport rdma reaches another host by itself: --listen ADDRESS there, --to ADDRESS here",
        _ => {
            "--faults and --predictions look into both daemons and are for the two namespaces of one machine: leave out \
             --source-host and --destination-host"
        }
    }
    .to_owned()
}

/// Does what was asked for; how many runs failed.
fn dispatch(args: &Args) -> Result<usize, String> {
    if args.list {
        print::ways();
        return Ok(0);
    }
    if let Some(path) = &args.report {
        let page = path.with_extension("html");
        write(&page, &report::page(&Record::read(path)?))?;
        println!("{}", page.display());
        return Ok(0);
    }
    let plan = match &args.replay {
        Some(path) => args.again(Record::read(path)?.plan),
        None => args.plan(),
    };
    let matrix = Matrix::read(&plan)?;
    let (json, html) = args.outputs();
    let mut two = plan.hosts.as_ref().map(Hosts::reach).transpose()?;
    let joined = two.as_mut().map(Hosts::facts).transpose()?;
    let mut record = matrix.begin(plan, joined)?;
    print::head(&record);
    matrix.run(&mut record, two.as_mut(), |record| {
        write(&json, &record.to_text())?;
        write(&html, &report::page(record))
    })?;
    print::medians(&record);
    println!("\n{}\n{}", json.display(), html.display());
    let runs = record.cells.iter().flat_map(|cell| &cell.runs);
    Ok(runs.filter(|run| run.failed.is_some()).count())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    let say = |error: std::io::Error| format!("{}: {error}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(say)?;
    }
    std::fs::write(path, text).map_err(say)
}

/// A plan whose words were understood.
struct Matrix {
    ways: Vec<Way>,
    work: Vec<Work>,
    links: Vec<Link>,
}

impl Matrix {
    fn read(plan: &Plan) -> Result<Matrix, String> {
        let mut matrix = Matrix {
            ways: read_list(&plan.ways)?,
            work: plan
                .work
                .iter()
                .map(|word| word.parse())
                .collect::<Result<_, _>>()?,
            links: plan
                .links
                .iter()
                .map(|word| word.parse())
                .collect::<Result<_, _>>()?,
        };
        if plan.mib < 64 {
            return Err("--mib: a guest needs 64 MiB".to_owned());
        }
        let between = matrix.links.contains(&Link::Hosts);
        if between != plan.hosts.is_some() || (between && matrix.links.len() > 1) {
            return Err("--links hosts: what joins two hosts is measured with --source-host and --destination-host, alone".to_owned());
        }
        if between {
            matrix.leave_out(&plan.ways)?;
        }
        Ok(matrix)
    }

    /// Without those ways that are for one host; whoever has named one is told so.
    fn leave_out(&mut self, named: &[String]) -> Result<(), String> {
        for way in &self.ways {
            match way.only_here() {
                Some(reason) if named.contains(&way.to_string()) => {
                    return Err(format!("--ways {way} is not for two hosts: {reason}"));
                }
                Some(reason) => eprintln!("{way} is left out: {reason}"),
                None => {}
            }
        }
        self.ways.retain(|way| way.only_here().is_none());
        Ok(())
    }

    /// A record without runs.
    fn begin(&self, plan: Plan, joined: Option<Joined>) -> Result<Record, String> {
        let settings = |way: &Way| WaySettings {
            way: way.to_string(),
            title: way.title(),
            settings: way.settings(plan.downtime_limit_ms, plan.allocated),
        };
        let mut cells = Vec::new();
        for link in &self.links {
            for work in &self.work {
                cells.extend(self.ways.iter().map(|way| Cell {
                    link: link.to_string(),
                    work: work.to_string(),
                    way: way.to_string(),
                    machine_mib: work.machine_mib(plan.mib),
                    guest: work.guest(plan.mib, plan.set_mib),
                    runs: Vec::new(),
                }));
            }
        }
        let machine = match &joined {
            Some(joined) => joined.source.machine.clone(),
            None => hosts::describe(&Version::V10_0.binary())?,
        };
        Ok(Record {
            schema: SCHEMA.to_owned(),
            began: origin::now(),
            commit: origin::commit(),
            command: std::env::args().collect(),
            machine,
            hosts: joined,
            ways: self.ways.iter().map(settings).collect(),
            cells,
            plan,
        })
    }

    /// Runs everything: for each link and work, all ways in turn, as often as there are pairs. `keep` has the record after
    /// each run. A host that is lost ends it.
    fn run(
        &self,
        record: &mut Record,
        mut two: Option<&mut Hosts>,
        keep: impl Fn(&Record) -> Result<(), String>,
    ) -> Result<(), String> {
        let pairs = record.plan.pairs;
        let cells = self
            .links
            .iter()
            .flat_map(|link| self.work.iter().map(move |work| (*link, *work)));
        for (group, (link, work)) in cells.enumerate() {
            for pair in 0..pairs {
                for (at, way) in self.ways.iter().enumerate() {
                    let cell = group * self.ways.len() + at;
                    let run = match &mut two {
                        Some(hosts) => measure(way, work, &record.plan, hosts),
                        None => measure_here(way, link, work, &record.plan),
                    };
                    print::run(&record.cells[cell], pair, &run);
                    record.cells[cell].runs.push(run);
                    keep(record)?;
                    if let Some(lost) = two.as_ref().and_then(|hosts| hosts.lost()) {
                        return Err(format!("nothing more is measured: {lost}"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// One run between two namespaces of this machine, made for it.
fn measure_here(way: &Way, link: Link, work: Work, plan: &Plan) -> Run {
    let hosts = catch_unwind(|| Hosts::here(link)).unwrap_or_else(|panic| {
        let words = hosts::words_of(panic.as_ref());
        Err(words)
    });
    match hosts {
        Ok(mut hosts) => measure(way, work, plan, &mut hosts),
        Err(reason) => failed(reason),
    }
}

/// One run. What goes wrong is written down and does not end the others.
fn measure(way: &Way, work: Work, plan: &Plan, hosts: &mut Hosts) -> Run {
    let measured = catch_unwind(AssertUnwindSafe(|| match way.mover() {
        Mover::Limit => limits::run(way, hosts, plan.mib),
        _ => migration::run(way, work, plan, hosts),
    }));
    hosts.stop();
    match measured {
        Ok(Ok(run)) => run,
        Ok(Err(reason)) => failed(reason),
        // The harness says what it misses by a panic, whose text has gone to the terminal.
        Err(panic) => failed(hosts::words_of(panic.as_ref())),
    }
}

fn failed(reason: String) -> Run {
    Run {
        failed: Some(reason),
        ..Run::default()
    }
}
