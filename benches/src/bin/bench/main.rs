//! `scripts/bench`: ways to move a guest beside each other, in turn, on the same guest and the same link.
//!
//! Each migration has a new pair of QEMUs and, for ours, of daemons. Everything is measured from outside, the same way for
//! all: see [`benches::record::FIGURES`]. Both destinations have the same memory, a file on tmpfs that nobody has touched,
//! and the kernel has memory for it that was just in use.
//! QEMU is set as well as we know how: its limit of 128 MiB/s lifted, the same downtime limit, and a destination without
//! `-S` that resumes by itself.
//!
//! What comes out is one JSON file and one page for people, both written again after each run. With `--faults`, see
//! [`benches::faults`]; with `--predictions`, [`benches::predictions`]; with `--transport rdma`, [`benches::rdma`].

mod args;
mod limits;
mod machine;
mod migration;
mod print;
mod qemu;
mod warm;

use std::path::Path;
use std::process::ExitCode;

use benches::link::Link;
use benches::record::{Cell, Plan, Record, Run, SCHEMA, WaySettings};
use benches::report;
use benches::ways::{Mover, Way, read_list};
use benches::work::Work;
use clap::Parser;

use self::args::Args;

fn main() -> ExitCode {
    let wants = |mode: &str| std::env::args().any(|word| word == mode);
    if wants("--faults") {
        return benches::faults::run(std::env::args());
    }
    if wants("--predictions") {
        return benches::predictions::run(std::env::args());
    }
    if std::env::args().any(|word| word == "--transport" || word.starts_with("--transport=")) {
        return benches::rdma::run(std::env::args());
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
        Some(path) => Record::read(path)?.plan,
        None => args.plan(),
    };
    let matrix = Matrix::read(&plan)?;
    let (json, html) = args.outputs();
    let mut record = matrix.begin(plan);
    print::head(&record);
    matrix.run(&mut record, |record| {
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
        let matrix = Matrix {
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
        Ok(matrix)
    }

    /// A record without runs.
    fn begin(&self, plan: Plan) -> Record {
        let settings = |way: &Way| WaySettings {
            way: way.to_string(),
            title: way.title(),
            settings: way.settings(plan.downtime_limit_ms),
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
        Record {
            schema: SCHEMA.to_owned(),
            began: machine::now(),
            commit: machine::commit(),
            command: std::env::args().collect(),
            machine: machine::describe(),
            ways: self.ways.iter().map(settings).collect(),
            cells,
            plan,
        }
    }

    /// Runs everything: for each link and work, all ways in turn, as often as there are pairs. `keep` has the record after
    /// each run.
    fn run(
        &self,
        record: &mut Record,
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
                    let run = measure(way, link, work, &record.plan);
                    print::run(&record.cells[cell], pair, &run);
                    record.cells[cell].runs.push(run);
                    keep(record)?;
                }
            }
        }
        Ok(())
    }
}

/// One run. What goes wrong is written down and does not end the others.
fn measure(way: &Way, link: Link, work: Work, plan: &Plan) -> Run {
    let measured = std::panic::catch_unwind(|| match way.mover() {
        Mover::Limit => limits::run(way, link, plan.mib),
        _ => migration::run(way, link, work, plan),
    });
    let failed = match measured {
        Ok(Ok(run)) => return run,
        Ok(Err(reason)) => reason,
        // The harness says what it misses by a panic, whose text has gone to the terminal.
        Err(panic) => panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("a panic without words")
            .to_owned(),
    };
    Run {
        failed: Some(failed),
        ..Run::default()
    }
}
