//! The plots, as inline SVG whose colours and fonts come from the page's style sheet.
//!
//! A plot is 360 units wide, about what a phone shows, so that its letters keep their size; a wide screen has several in
//! a row.

use std::fmt::Write;

use maud::{Markup, html};

use super::{class, shown, with_unit};
use crate::record::{Cell, Figure, Run};
use crate::series::{MARGIN_MS, Series};
use crate::stats::Spread;

const WIDTH: f64 = 360.0;
const ROW: f64 = 36.0;
const PLOT: f64 = 96.0;
/// From the top of a plot of the guest's work to its frame, and what is below it.
const HEAD: f64 = 34.0;
const FOOT: f64 = 18.0;

/// A figure of all ways: a bar as long as the median, a line from the least to the greatest, and a dot for each run.
pub(super) fn bars(id: &str, figure: &Figure, cells: &[&Cell], names: &[&str]) -> Markup {
    let rows: Vec<(&Cell, &str, Option<Spread>)> = cells
        .iter()
        .zip(names)
        .map(|(cell, name)| (*cell, *name, cell.spread(figure.name)))
        // A limit has few figures, and lacks the others for good.
        .filter(|(cell, _, spread)| spread.is_some() || class(cell) != "limit")
        .collect();
    let spreads = rows.iter().filter_map(|(_, _, spread)| *spread);
    let most = spreads.map(|spread| spread.most).fold(0.0, f64::max);
    if most <= 0.0 {
        return html! {};
    }
    let logarithmic = figure.name.starts_with("touch");
    let x = |value: f64| at(share(value, most, logarithmic) * (WIDTH - 4.0));
    let scale = if logarithmic { " (log scale)" } else { "" };
    let mut said = format!(
        "Medians, with the least and the greatest, in {}.",
        figure.unit
    );
    for (_, name, spread) in &rows {
        let _ = match spread {
            Some(Spread {
                least,
                median,
                most,
            }) => write!(
                said,
                " {name}: {} ({} to {}).",
                shown(*median),
                shown(*least),
                shown(*most)
            ),
            None => write!(said, " {name}: failed."),
        };
    }
    let height = ROW * rows.iter().fold(0.0, |sum, _| sum + 1.0);
    html! {
        figure {
            figcaption { (figure.title) (scale) }
            svg viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-labelledby={ (id) "-t " (id) "-d" } {
                title id={ (id) "-t" } { (figure.title) " of each way" }
                desc id={ (id) "-d" } { (said) }
                @for (row, (cell, name, spread)) in rows.iter().enumerate() {
                    g transform={ "translate(0 " (at(top(row))) ")" } class=(class(cell)) {
                        text x="0" y="13" { (name) }
                        @match spread {
                            Some(spread) => {
                                text.value x=(WIDTH) y="13" text-anchor="end" { (with_unit(spread.median, figure.unit)) }
                                rect.track x="0" y="19" width=(WIDTH) height="10" {}
                                rect.bar x="0" y="19" width=(x(spread.median)) height="10" {}
                                line.spread x1=(x(spread.least)) x2=(x(spread.most)) y1="24" y2="24" {}
                                @for value in cell.values(figure.name).into_iter().flatten() {
                                    circle.run cx=(x(value)) cy="24" r="2.5" {}
                                }
                            }
                            None => text.value x=(WIDTH) y="13" text-anchor="end" { "failed" }
                        }
                    }
                }
            }
        }
    }
}

/// How far along a bar a value is. Times of page touches span decades, so theirs are logarithms, from a tenth of a
/// microsecond on.
fn share(value: f64, most: f64, logarithmic: bool) -> f64 {
    const FIRST: f64 = 0.1;
    if !logarithmic {
        return value / most;
    }
    if value <= FIRST || most <= FIRST {
        return 0.0;
    }
    (value / FIRST).ln() / (most / FIRST).ln()
}

fn top(row: usize) -> f64 {
    f64::from(u32::try_from(row).unwrap_or(u32::MAX)) * ROW
}

/// A coordinate: a tenth of a unit is enough.
fn at(value: f64) -> String {
    format!("{value:.1}")
}

/// The run to show: the one whose total time is nearest to the median.
fn typical(cell: &Cell) -> Option<(&Run, &Series)> {
    let median = cell.spread("total_ms")?.median;
    let far = |run: &Run| (run.figures.get("total_ms").copied().unwrap_or(f64::MAX) - median).abs();
    let runs = cell
        .runs
        .iter()
        .filter_map(|run| Some((run, run.guest.as_ref()?)));
    runs.min_by(|a, b| far(a.0).total_cmp(&far(b.0)))
}

/// The top of all plots of one link and work.
pub(super) fn most_loops(cells: &[&Cell]) -> u64 {
    let typical = cells.iter().filter_map(|cell| typical(cell));
    let steps = typical.flat_map(|(_, series)| series.loops_s.iter().copied());
    steps.max().unwrap_or(0)
}

/// What the guest got done over time.
pub(super) fn work(id: &str, cell: &Cell, name: &str, most: u64) -> Markup {
    let Some((run, series)) = typical(cell).filter(|_| most > 0) else {
        return html! {};
    };
    let span = series.done_ms + 2.0 * MARGIN_MS;
    let x = |ms: f64| (ms + MARGIN_MS) / span * WIDTH;
    let loops = |name: &str| run.figures.get(name).copied().unwrap_or(0.0);
    let lowest = series.loops_s.iter().min().copied().unwrap_or(0);
    let said = format!(
        "{} a second before, {} during, {} after; at the lowest {}, over {:.0} ms",
        shown(loops("loops_before")),
        shown(loops("loops_during")),
        shown(loops("loops_after")),
        lowest,
        series.step_ms,
    );
    let bottom = HEAD + PLOT;
    html! {
        figure.work {
            svg viewBox={ "0 0 " (WIDTH) " " (bottom + FOOT) } role="img" aria-labelledby={ (id) "-t " (id) "-d" }
                class=(class(cell)) {
                title id={ (id) "-t" } { "What the guest got done with " (name) }
                desc id={ (id) "-d" } { "Loops of the guest: " (said) "." }
                text x="0" y="13" { (name) }
                text.value x=(WIDTH) y="13" text-anchor="end" { (with_unit(series.done_ms, "ms")) }
                text.small x="0" y="28" {
                    (shown(loops("loops_before"))) " → " (shown(loops("loops_during"))) " → "
                    (shown(loops("loops_after"))) " loops/s"
                }
                rect.track x="0" y=(HEAD) width=(WIDTH) height=(PLOT) {}
                rect.band x=(at(x(0.0))) y=(HEAD) width=(at(x(series.done_ms) - x(0.0))) height=(PLOT) {}
                path.line d=(line(series, most, x, bottom)) {}
                text.small x="0" y=(bottom + 13.0) { "−1 s" }
                text.small x=(at(x(0.0))) y=(bottom + 13.0) text-anchor="middle" { "begins" }
                text.small x=(WIDTH) y=(bottom + 13.0) text-anchor="end" { "1 s behind its end" }
            }
        }
    }
}

/// The path of a series: a level for each step.
fn line(series: &Series, most: u64, x: impl Fn(f64) -> f64, bottom: f64) -> String {
    let mut path = String::new();
    let mut from = series.from_ms;
    for loops in &series.loops_s {
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let y = bottom - 2.0 - *loops as f64 / most as f64 * (PLOT - 6.0);
        let command = if path.is_empty() { 'M' } else { 'L' };
        let to = from + series.step_ms;
        // Writing to a text does not fail.
        let _ = write!(path, "{command}{:.1} {y:.1}H{:.1}", x(from), x(to));
        from = to;
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_are_equally_far_apart() {
        for (value, place) in [(0.01, 0.0), (0.1, 0.0), (10.0, 0.5), (1000.0, 1.0)] {
            assert!((share(value, 1000.0, true) - place).abs() < 1e-9, "{value}");
        }
        assert!((share(250.0, 1000.0, false) - 0.25).abs() < 1e-9);
    }
}
