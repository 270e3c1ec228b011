//! What was measured, for people and for programs.

use std::process::Command;

use benches::{Sample, median, medians, to_json};
use serde_json::{Value, json};

use super::Options;
use super::contender::Contender;

/// Names of figures, as [`Sample`] has them, beside how the table heads their columns.
const COLUMNS: [(&str, &str, usize); 6] = [
    ("total_ms", "total ms", 10),
    ("outside_downtime_ms", "downtime ms", 12),
    ("cpu_s", "CPU s", 8),
    ("megabytes", "MB", 10),
    ("touch_p99_us", "touch p99 us", 14),
    ("touch_p999_us", "p99.9 us", 12),
];

/// Prints medians, and ratios of ours to QEMU's.
pub(crate) fn print(contenders: &[Contender], samples: &[Vec<Sample>]) {
    let measured = samples.first().map(|samples| medians(samples).len());
    let columns = &COLUMNS[..measured.unwrap_or(0).min(COLUMNS.len())];
    print!("\n{:<24}", "medians");
    for (_, head, width) in columns {
        print!(" {head:>width$}");
    }
    println!();
    for (contender, samples) in contenders.iter().zip(samples) {
        print!("{:<24}", contender.name());
        for ((_, value), (_, _, width)) in medians(samples).iter().zip(columns) {
            print!(" {value:>width$.1}");
        }
        println!();
    }
    for (ours, theirs) in pairs(contenders) {
        let of = |contender| {
            let at = contenders.iter().position(|one| *one == contender);
            at.and_then(|at| samples.get(at))
                .map_or(&[][..], Vec::as_slice)
        };
        print!("{:<24}", format!("ours / {}", theirs.name()));
        for (at, (_, _, width)) in columns.iter().enumerate() {
            print!(" {:>width$.2}", ratio(of(ours), of(theirs), at));
        }
        println!("   ({})", ours.name());
    }
}

/// Ours beside each of QEMU's that does the same.
fn pairs(contenders: &[Contender]) -> Vec<(Contender, Contender)> {
    let (ours, theirs): (Vec<Contender>, Vec<Contender>) =
        contenders.iter().partition(|contender| contender.is_ours());
    let each = |ours: Contender| {
        let alike = move |theirs: &&Contender| theirs.has_tls() == ours.has_tls();
        theirs
            .iter()
            .filter(alike)
            .map(move |theirs| (ours, *theirs))
            .collect::<Vec<_>>()
    };
    ours.into_iter().flat_map(each).collect()
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

/// Everything, with what it was measured on.
pub(crate) fn report(
    options: &Options,
    contenders: &[Contender],
    samples: &[Vec<Sample>],
) -> Value {
    let of_each: Vec<Value> = contenders
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
        "link_mbit_s": options.link_mbit,
        "contenders": of_each,
    })
}
