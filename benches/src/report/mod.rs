//! One page for people: everything in one file, no script, nothing fetched from anywhere.
//!
//! It is readable on a phone and on a wide screen, in the light and in the dark. Each plot has a title and a text that says
//! all of its values, for those who do not see it; colour never says anything alone.

pub mod compare;
mod plot;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use self::compare::{COMPARED, Rate, ratio, reached, rivals, sealed, way};
use crate::record::{Cell, FIGURES, Figure, Machine, Record};
use crate::work::Work;

const STYLE: &str = include_str!("style.css");
/// Nothing may be loaded or run, whatever the record holds.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// The page.
pub fn page(record: &Record) -> String {
    let body = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { "pagecopy beside QEMU: " (record.began) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    (head(record))
                    (ratios(record))
                    (encryption(record))
                    (limit(record))
                    @for (number, cells) in groups(record).iter().enumerate() {
                        (group(record, number, cells))
                    }
                    (meanings())
                    (settings(record))
                }
            }
        }
    };
    body.into_string()
}

/// A number as a person reads it: three digits that say something, and thousands apart.
pub(crate) fn shown(value: f64) -> String {
    let digits = match value.abs() {
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut apart = String::new();
    for (at, digit) in whole.chars().enumerate() {
        let left = whole.len() - at;
        if at > 0 && left % 3 == 0 && digit.is_ascii_digit() {
            apart.push('\u{202f}'); // a narrow blank that does not break
        }
        apart.push(digit);
    }
    apart + rest
}

/// A value with its unit.
pub(crate) fn with_unit(value: f64, unit: &str) -> String {
    format!("{}\u{a0}{unit}", shown(value))
}

fn figure(name: &str) -> Option<&'static Figure> {
    FIGURES.iter().find(|figure| figure.name == name)
}

/// A way's title, as the record has it.
fn title<'a>(record: &'a Record, name: &'a str) -> &'a str {
    let mut ways = record.ways.iter();
    ways.find(|settings| settings.way == name)
        .map_or(name, |settings| &settings.title)
}

/// Cells of the same link and work, in order.
fn groups(record: &Record) -> Vec<Vec<&Cell>> {
    let mut groups: Vec<Vec<&Cell>> = Vec::new();
    for cell in record.cells.iter().filter(|cell| !cell.runs.is_empty()) {
        match groups.last_mut() {
            Some(group) if group[0].is_beside(cell) => group.push(cell),
            _ => groups.push(vec![cell]),
        }
    }
    groups
}

fn head(record: &Record) -> Markup {
    let machine = &record.machine;
    let plan = &record.plan;
    html! {
        header {
            h1 { "Live migration, pagecopy beside QEMU" }
            dl.facts {
                @match &record.hosts {
                    Some(joined) => {
                        dt { "Source" } dd { (joined.source.name) " (" (joined.source.address) "): " (hardware(&joined.source.machine)) }
                        dt { "Destination" }
                        dd { (joined.destination.name) " (" (joined.destination.address) "): " (hardware(&joined.destination.machine)) }
                        dt { "Link" } dd { (joined) }
                    }
                    None => { dt { "Machine" } dd { (hardware(machine)) } }
                }
                dt { "QEMU" } dd { (machine.qemu) }
                dt { "Commit" } dd { code { (record.commit) } }
                dt { "Began" } dd { time datetime=(record.began) { (record.began) } }
                dt { "Command" } dd { code { (record.command.join(" ")) } }
                dt { "Guest" }
                dd {
                    (plan.mib) " MiB of content, of which up to " (plan.set_mib) " MiB are written; downtime limit "
                    (plan.downtime_limit_ms) " ms; each way " (plan.pairs) "×, all ways in turn"
                }
                dt { "Memory there" } dd { (plan.memory()) }
            }
        }
    }
}

fn hardware(machine: &Machine) -> String {
    let Machine {
        cpu,
        cpus,
        memory_mib,
        kernel,
        ..
    } = machine;
    format!("{cpus} × {cpu}, {memory_mib} MiB, Linux {kernel}")
}

/// Ours by the best of QEMU's, for each link and work.
fn ratios(record: &Record) -> Markup {
    let rivals = rivals(record);
    if rivals.is_empty() {
        return html! {};
    }
    let rows = record.cells.iter().enumerate();
    let rows: Vec<(usize, &Cell)> = rows
        .filter(|(at, _)| rivals.iter().any(|rival| rival.cell == *at))
        .collect();
    html! {
        section aria-labelledby="ratios" {
            h2 #ratios { "pagecopy by the best of QEMU’s ways" }
            p {
                "Each figure is held against that of QEMU’s ways, of those that do the same, which is best in it. Below 1 "
                "is better. The median of the ratios of runs that followed each other, with the least and the greatest."
            }
            div.wide tabindex="0" role="region" aria-labelledby="ratios" {
                table {
                    thead { tr {
                        th scope="col" { "Link, work, way" }
                        @for name in COMPARED { th scope="col" { (figure(name).map_or(name, |figure| figure.title)) } }
                    } }
                    tbody {
                        @for (at, cell) in rows { tr {
                            th scope="row" { (cell.link) ", " (cell.work) br; (title(record, &cell.way)) }
                            @for name in COMPARED {
                                @match rivals.iter().find(|rival| rival.cell == at && rival.figure == name) {
                                    Some(rival) => td.better[rival.ratio.median <= 1.0] {
                                        strong { (ratio(rival.ratio.median)) }
                                        " (" (ratio(rival.ratio.least)) "–" (ratio(rival.ratio.most)) ")"
                                        br; small { "of " (title(record, &rival.theirs)) }
                                    }
                                    None => td { "–" }
                                }
                            }
                        } }
                    }
                }
            }
        }
    }
}

/// What TLS leaves of each way's rate.
fn encryption(record: &Record) -> Markup {
    let said = "The total time of the same way in the clear by that with TLS, in runs that followed each other: the median, with \
                the least and the greatest.";
    let id = "encryption";
    rates(
        record,
        &sealed(record),
        id,
        "What TLS leaves of the rate",
        said,
    )
}

/// How much of the link each way fills.
fn limit(record: &Record) -> Markup {
    let said = "What the guest has filled by the total time, from the command to the end, by the rate of iperf3, in runs that followed \
                each other: the median, with the least and the greatest. In the clear, of guests that write nothing. Memory at \
                the destination: ";
    let said = said.to_owned() + record.plan.memory() + ".";
    let title = "What each way reaches of the link’s rate";
    rates(record, &reached(record), "limit", title, &said)
}

/// Rates beside others, each on a line.
fn rates(record: &Record, all: &[Rate], id: &str, heading: &str, said: &str) -> Markup {
    html! {
        @if !all.is_empty() {
            section aria-labelledby=(id) {
                h2 id=(id) { (heading) }
                p { (said) }
                ul {
                    @for one in all {
                        li {
                            (one.way[0]) ", " (one.way[1]) ", " (title(record, &one.way[2])) ": "
                            strong { (ratio(one.rate.median)) }
                            " (" (ratio(one.rate.least)) "–" (ratio(one.rate.most)) ") of " (title(record, &one.of))
                        }
                    }
                }
            }
        }
    }
}

/// Everything of one link and work.
fn group(record: &Record, number: usize, cells: &[&Cell]) -> Markup {
    let first = cells[0];
    let work = first.work.parse().map(Work::described).unwrap_or_default();
    let id = format!("group-{number}");
    let names: Vec<&str> = cells.iter().map(|cell| title(record, &cell.way)).collect();
    html! {
        section aria-labelledby=(id) {
            h2 id=(id) { (first.link) ", " (first.work) }
            p { (work) "; " (first.machine_mib) " MiB of RAM." }
            (failures(record, cells))
            div.plots {
                @for name in COMPARED {
                    @if let Some(figure) = figure(name) { (plot::bars(&format!("{id}-{name}"), figure, cells, &names)) }
                }
            }
            h3 { "What the guest got done" }
            p {
                "Pages that it checked, a second, in the run whose total time is nearest to the median. The band is the "
                "time of the migration; before and behind it is a second of the guest’s usual work."
            }
            div.plots {
                @for (at, cell) in cells.iter().enumerate() {
                    (plot::work(&format!("{id}-work-{at}"), cell, names[at], plot::most_loops(cells)))
                }
            }
            details {
                summary { "All medians as a table" }
                div.wide tabindex="0" role="region" aria-label={ "Medians, " (first.link) ", " (first.work) } {
                    (medians(cells, &names))
                }
            }
        }
    }
}

fn failures(record: &Record, cells: &[&Cell]) -> Markup {
    let failed: Vec<(&str, &str)> = cells
        .iter()
        .flat_map(|cell| cell.runs.iter().map(move |run| (cell, run)))
        .filter_map(|(cell, run)| Some((title(record, &cell.way), run.failed.as_deref()?)))
        .collect();
    html! {
        @if !failed.is_empty() {
            p { "Runs that failed:" }
            ul { @for (name, reason) in failed { li { (name) ": " (reason) } } }
        }
    }
}

fn medians(cells: &[&Cell], names: &[&str]) -> Markup {
    html! {
        table {
            thead { tr {
                th scope="col" { "Way" }
                @for figure in FIGURES { th scope="col" { (figure.title) " (" (figure.unit) ")" } }
            } }
            tbody {
                @for (cell, name) in cells.iter().zip(names) { tr {
                    th scope="row" { (name) }
                    @for figure in FIGURES {
                        @match cell.spread(figure.name) {
                            Some(spread) => td {
                                (shown(spread.median)) br;
                                small { (shown(spread.least)) "–" (shown(spread.most)) }
                            }
                            None => td { "–" }
                        }
                    }
                } }
            }
        }
    }
}

fn meanings() -> Markup {
    html! {
        section aria-labelledby="meanings" {
            h2 #meanings { "What the figures are" }
            dl { @for figure in FIGURES { dt { (figure.title) } dd { (figure.meaning) } } }
        }
    }
}

fn settings(record: &Record) -> Markup {
    html! {
        section aria-labelledby="settings" {
            h2 #settings { "How each way was set" }
            dl {
                @for settings in &record.ways {
                    dt { (settings.title) " (" code { (settings.way) } ")" }
                    dd { code { (settings.settings) } }
                }
            }
            p { "Guests, in the order of the sections above:" }
            ul { @for cells in groups(record) { li { code { (cells[0].guest) } } } }
        }
    }
}

/// What a bar or a line of a way looks like.
fn class(cell: &Cell) -> &'static str {
    use crate::ways::Mover;
    match way(cell).map(|way| way.mover()) {
        Some(Mover::Ours) => "ours",
        Some(Mover::Qemu) => "qemu",
        _ => "limit",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let narrow = |text: &str| text.replace('_', "\u{202f}");
        for (value, text) in [
            (0.1234, "0.12"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1234.5, "1_234"),
            (1_234_567.0, "1_234_567"),
            (-1234.0, "-1_234"),
        ] {
            assert_eq!(shown(value), narrow(text));
        }
    }
}
