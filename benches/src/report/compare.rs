//! Ours held against the best of QEMU's ways that do the same, figure by figure.
//!
//! The best is the one with the least median of that very figure: so ours may be held against three different ways in one
//! row, which is the hardest comparison. The ratio is the median of the ratios of runs that followed each other.

use std::fmt;

use crate::record::{Cell, Record};
use crate::stats::Spread;
use crate::ways::{Mover, Way};
use crate::work::Work;

/// The way that says what the link carries.
const LINK: &str = "iperf3";

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

/// The rate of a way, over the total time, beside that of another: of the same in the clear, or of a limit.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// Link, work and way.
    pub way: [String; 3],
    /// The other way.
    pub of: String,
    /// The rate of the former by that of the latter.
    pub rate: Spread,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [link, work, way] = &self.way;
        let ratios = ratios(self.rate);
        write!(
            f,
            "{link} {work} {way}: {ratios} of the rate of {}",
            self.of
        )
    }
}

/// What encryption leaves of each way's rate, where both were measured.
pub fn sealed(record: &Record) -> Vec<Rate> {
    rates(record, |cell| Some(way(cell)?.in_the_clear()?.to_string()))
}

/// How much each way in the clear reaches of what two streams of iperf3 do, where both were measured: what the guest has filled by
/// the total time, from the command to the end. Of guests that write nothing, since what is sent again is no content.
pub fn reached(record: &Record) -> Vec<Rate> {
    let filled = Work::filled_share(record.plan.mib);
    let mut all = rates(record, |cell| {
        let way = way(cell)?;
        let work: Work = cell.work.parse().ok()?;
        let counts = way.mover() != Mover::Limit && !way.has_tls() && work.is_idle();
        counts.then(|| LINK.to_owned())
    });
    for one in &mut all {
        one.rate = one.rate.times(filled);
    }
    all
}

/// Each cell's rate by that of the way beside it that `of` names.
fn rates(record: &Record, of: impl Fn(&Cell) -> Option<String>) -> Vec<Rate> {
    let rate = |cell: &Cell| {
        let of = of(cell)?;
        let mut beside = record.cells.iter().filter(|other| other.is_beside(cell));
        let beside = beside.find(|other| other.way == of)?;
        let (ours, theirs) = (cell.values("total_ms"), beside.values("total_ms"));
        Some(Rate {
            way: [&cell.link, &cell.work, &cell.way].map(Clone::clone),
            of,
            rate: Spread::of_ratios(&theirs, &ours)?,
        })
    };
    record.cells.iter().filter_map(rate).collect()
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
            allocated: false,
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
            all.iter().map(Rate::to_string).collect::<Vec<_>>(),
            [
                "veth idle qemu-tls: 50.00 (50.00 to 50.00) of the rate of qemu-tcp",
                "veth idle tls: 0.50 (0.25 to 0.50) of the rate of tcp",
            ]
        );
        let mut writing = record.clone();
        // Half of the 64 MiB is filled.
        assert_eq!(
            reached(&record)
                .iter()
                .map(Rate::to_string)
                .collect::<Vec<_>>(),
            [
                "veth idle tcp: 0.050 (0.050 to 0.050) of the rate of iperf3",
                "veth idle qemu-tcp: 0.010 (0.010 to 0.010) of the rate of iperf3",
                "veth idle qemu-multifd2: 0.025 (0.013 to 0.050) of the rate of iperf3",
            ]
        );
        for cell in &mut writing.cells {
            cell.work = "50".to_owned();
        }
        assert_eq!(reached(&writing), [], "what is sent again is no content");
        let mut rivals = rivals(&record);
        rivals.retain(|rival| rival.ours[2] == "tcp");
        assert_eq!(
            rivals.iter().map(Rival::to_string).collect::<Vec<_>>(),
            ["veth idle tcp: total_ms 0.50 (0.25 to 1.00) of qemu-multifd2"]
        );
    }
}
