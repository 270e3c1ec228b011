//! Ours held against the best of QEMU's ways that do the same, figure by figure.
//!
//! The best is the one with the least median of that very figure: so ours may be held against three different ways in one
//! row, which is the hardest comparison. The ratio is the median of the ratios of runs that followed each other.

use std::fmt;

use crate::record::{Cell, Record};
use crate::stats::Spread;
use crate::ways::{Mover, Way};

/// The figures that are compared; less is better in all.
pub const COMPARED: [&str; 5] = [
    "total_ms",
    "downtime_ms",
    "cpu_s_per_gib",
    "wire_mb",
    "touch_p999_us",
];

/// One of ours against one of QEMU's, in one figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Rival {
    /// Our cell, as its place in the record.
    pub cell: usize,
    /// Link, work and our way.
    pub ours: [String; 3],
    /// QEMU's best way in this figure.
    pub theirs: String,
    /// The figure's name.
    pub figure: &'static str,
    /// Ours by theirs.
    pub ratio: Spread,
}

impl fmt::Display for Rival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [link, work, way] = &self.ours;
        let (figure, ratios) = (self.figure, ratios(self.ratio));
        write!(
            f,
            "{link} {work} {way}: {figure} {ratios} of {}",
            self.theirs
        )
    }
}

/// An encrypted way beside the same in the clear.
#[derive(Clone, Debug, PartialEq)]
pub struct Sealed {
    /// Link, work and the encrypted way.
    pub way: [String; 3],
    /// The one in the clear.
    pub clear: String,
    /// The rate of the former by that of the latter.
    pub rate: Spread,
}

impl fmt::Display for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [link, work, way] = &self.way;
        let ratios = ratios(self.rate);
        write!(
            f,
            "{link} {work} {way}: {ratios} of the rate of {}",
            self.clear
        )
    }
}

/// What encryption leaves of each way's rate, over the total time, where both were measured.
pub fn sealed(record: &Record) -> Vec<Sealed> {
    let of = |cell: &Cell| {
        let clear = way(cell)?.in_the_clear()?.to_string();
        let mut beside = record.cells.iter().filter(|other| other.is_beside(cell));
        let beside = beside.find(|other| other.way == clear)?;
        let (ours, theirs) = (cell.values("total_ms"), beside.values("total_ms"));
        Some(Sealed {
            way: [&cell.link, &cell.work, &cell.way].map(Clone::clone),
            clear,
            rate: Spread::of_ratios(&theirs, &ours)?,
        })
    };
    record.cells.iter().filter_map(of).collect()
}

/// Ratios with their spread, as a person reads them.
fn ratios(spread: Spread) -> String {
    let [median, least, most] = [spread.median, spread.least, spread.most].map(ratio);
    format!("{median} ({least} to {most})")
}

/// A ratio as a person reads it.
pub(super) fn ratio(value: f64) -> String {
    if value < 0.1 {
        format!("{value:.3}")
    } else {
        format!("{value:.2}")
    }
}

/// The way of a cell, if this program knows it.
pub fn way(cell: &Cell) -> Option<Way> {
    cell.way.parse().ok()
}

/// All comparisons that the record's figures allow.
pub fn rivals(record: &Record) -> Vec<Rival> {
    let ours = record.cells.iter().enumerate();
    let ours = ours.filter(|(_, cell)| way(cell).is_some_and(|way| way.mover() == Mover::Ours));
    ours.flat_map(|(at, cell)| {
        let of = move |figure| rival(record, at, cell, figure);
        COMPARED.into_iter().filter_map(of)
    })
    .collect()
}

fn rival(record: &Record, at: usize, ours: &Cell, figure: &'static str) -> Option<Rival> {
    let our_way = way(ours)?;
    let likes = record.cells.iter().filter(|cell| {
        let like = |way: Way| way.mover() == Mover::Qemu && way.is_like(&our_way);
        cell.is_beside(ours) && way(cell).is_some_and(like)
    });
    let medians = likes.filter_map(|cell| Some((cell, cell.spread(figure)?.median)));
    let (theirs, _) = medians.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Rival {
        cell: at,
        ours: [ours.link.clone(), ours.work.clone(), ours.way.clone()],
        theirs: theirs.way.clone(),
        figure,
        ratio: Spread::of_ratios(&ours.values(figure), &theirs.values(figure))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Plan, Run};

    fn cell(way: &str, totals: &[f64]) -> Cell {
        let run = |total: &f64| Run {
            figures: [("total_ms".to_owned(), *total)].into(),
            ..Run::default()
        };
        Cell {
            link: "veth".to_owned(),
            work: "idle".to_owned(),
            way: way.to_owned(),
            machine_mib: 64,
            guest: String::new(),
            runs: totals.iter().map(run).collect(),
        }
    }

    #[test]
    fn the_best_that_does_the_same_is_the_rival() {
        let plan = Plan {
            ways: vec![],
            work: vec![],
            links: vec![],
            mib: 64,
            set_mib: 32,
            pairs: 3,
            downtime_limit_ms: 300,
            patience_s: 60,
            hosts: None,
        };
        let record = Record {
            schema: String::new(),
            began: String::new(),
            commit: String::new(),
            command: vec![],
            machine: Default::default(),
            hosts: None,
            plan,
            ways: vec![],
            cells: vec![
                cell("tcp", &[10.0, 10.0, 10.0]),
                cell("qemu-tcp", &[50.0, 50.0, 50.0]),
                cell("qemu-multifd2", &[20.0, 10.0, 40.0]),
                // Faster, but with TLS, or no migration: nobody's rival here.
                cell("qemu-tls", &[1.0, 1.0, 1.0]),
                cell("iperf3", &[1.0, 1.0, 1.0]),
                cell("tls", &[20.0, 40.0, 20.0]),
            ],
        };
        let all = sealed(&record);
        assert_eq!(
            all.iter().map(Sealed::to_string).collect::<Vec<_>>(),
            [
                "veth idle qemu-tls: 50.00 (50.00 to 50.00) of the rate of qemu-tcp",
                "veth idle tls: 0.50 (0.25 to 0.50) of the rate of tcp",
            ]
        );
        let mut rivals = rivals(&record);
        rivals.retain(|rival| rival.ours[2] == "tcp");
        assert_eq!(
            rivals.iter().map(Rival::to_string).collect::<Vec<_>>(),
            ["veth idle tcp: total_ms 0.50 (0.25 to 1.00) of qemu-multifd2"]
        );
    }
}
