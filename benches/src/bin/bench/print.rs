//! What the terminal shows meanwhile, and at the end.

use benches::record::{Cell, FIGURES, Machine, Record, Run};
use benches::report::compare::{reached, rivals, sealed};
use benches::ways::Way;

/// Columns of the table at the end: the figure, its head and its digits behind the point.
const COLUMNS: [(&str, &str, usize); 8] = [
    ("total_ms", "total ms", 0),
    ("downtime_ms", "downtime ms", 1),
    ("cpu_s_per_gib", "CPU s/GiB", 2),
    ("wire_mb", "MB", 0),
    ("daemon_mb", "daemon MB", 1),
    ("touch_p999_us", "touch p99.9 us", 0),
    ("loops_before", "loops/s before", 0),
    ("loops_during", "during", 0),
];

/// All ways, and how each is set.
pub(crate) fn ways() {
    for way in Way::all() {
        let name = way.to_string();
        println!("{name:<20} {}", way.title());
        println!("{:<20}   {}", "", way.settings(300, false));
    }
}

/// What will be measured, and on what.
pub(crate) fn head(record: &Record) {
    match &record.hosts {
        None => println!("{}; commit {}", described(&record.machine), record.commit),
        Some(joined) => {
            for host in [&joined.source, &joined.destination] {
                let (name, address) = (&host.name, host.address);
                println!("{name} ({address}): {}", described(&host.machine));
            }
            println!("{joined}; commit {}", record.commit);
        }
    }
    println!("the destination's memory: {}", record.plan.memory());
    for way in &record.ways {
        println!("{:<20} {}", way.way, way.settings);
    }
}

fn described(machine: &Machine) -> String {
    format!(
        "{} × {}, {} MiB, Linux {}, {}",
        machine.cpus, machine.cpu, machine.memory_mib, machine.kernel, machine.qemu
    )
}

/// A run that has ended.
pub(crate) fn run(cell: &Cell, pair: usize, run: &Run) {
    let place = format!("{} {} {pair:>2} {:<20}", cell.link, cell.work, cell.way);
    if let Some(reason) = &run.failed {
        println!("{place} failed: {reason}");
        return;
    }
    let figures = FIGURES.iter().filter_map(|figure| {
        let value = run.figures.get(figure.name)?;
        Some(format!("{}={value:.1}", figure.name))
    });
    println!("{place} {}", figures.collect::<Vec<_>>().join(" "));
}

/// Medians of each cell, and ours by the best of QEMU's.
pub(crate) fn medians(record: &Record) {
    for (at, cell) in record.cells.iter().enumerate() {
        if at == 0 || !cell.is_beside(&record.cells[at - 1]) {
            print!("\n{:<28}", format!("{}, {}", cell.link, cell.work));
            for (_, head, _) in COLUMNS {
                print!(" {head:>14}");
            }
            println!();
        }
        print!("{:<28}", cell.way);
        for (figure, _, digits) in COLUMNS {
            match cell.spread(figure) {
                Some(spread) => print!(" {:>14.digits$}", spread.median),
                None => print!(" {:>14}", "-"),
            }
        }
        println!();
    }
    println!();
    for rival in rivals(record) {
        println!("{rival}");
    }
    for rate in sealed(record).iter().chain(&reached(record)) {
        println!("{rate}");
    }
}
