//! What an evacuation is going to do, and what came of it: a table for people, an event for programs.

use std::time::Duration;

use pagecopy::engine::event::State;
use serde_json::{Value, json};

use super::gone::Gone;
use super::plan::Leaving;
use crate::units::{millis, show_bytes};

/// Who leaves, in their order.
pub(super) fn plan(leaving: &[Leaving]) -> String {
    if leaving.is_empty() {
        return "no guest runs here".to_owned();
    }
    let rows = leaving.iter().map(|one| {
        [
            one.vm.clone(),
            bytes(one.ram_bytes),
            seconds(one.predicted_ms),
        ]
    });
    table(["guest", "memory", "predicted"], rows)
}

/// What came of each, and of all; where each has gone, if there were several destinations.
pub(super) fn end(gone: &[Gone], to: &[String], took: Duration) -> String {
    let rows = gone.iter().map(|one| {
        let chosen = one.to.as_ref().filter(|_| to.len() > 1);
        let result = one.state.word();
        [
            one.vm.clone(),
            chosen.map_or_else(|| result.to_owned(), |to| format!("{result}, {to}")),
            seconds(one.predicted_ms),
            seconds(one.total_ms),
            one.downtime_ms
                .map_or_else(nothing, |ms| format!("{ms:.0} ms")),
            bytes(one.bytes_on_wire),
            one.error.clone().unwrap_or_default(),
        ]
    });
    let heads = [
        "guest",
        "result",
        "predicted",
        "took",
        "downtime",
        "sent",
        "",
    ];
    let table = table(heads, rows);
    let moved = gone.iter().filter(|one| one.state == State::Completed);
    let (moved, all, took) = (moved.count(), gone.len(), took.as_secs_f64());
    let to = to.join(", ");
    format!("\n{table}\n{moved} of {all} guests have moved to {to} in {took:.1} s")
}

/// The last event.
pub(super) fn event(gone: &[Gone], to: &[String], took: Duration) -> Value {
    let count = |state: State| gone.iter().filter(|one| one.state == state).count();
    let (moved, in_doubt) = (count(State::Completed), count(State::InDoubt));
    json!({
        "event": "evacuated", "to": to.join(","), "total_ms": millis(took), "moved": moved, "in_doubt": in_doubt,
        "failed": gone.len() - moved - in_doubt, "guests": gone,
    })
}

fn nothing() -> String {
    "-".to_owned()
}

fn bytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(nothing, show_bytes)
}

fn seconds(ms: Option<f64>) -> String {
    ms.map_or_else(nothing, |ms| format!("{:.1} s", ms / 1e3))
}

/// Columns as wide as what is in them; the last as it comes.
fn table<const N: usize>(heads: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut all = vec![heads.map(str::to_owned)];
    all.extend(rows);
    let width = |column: usize| {
        let widths = all.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_came_of_each() {
        let mut moved = Gone::ended(State::Completed);
        (moved.predicted_ms, moved.total_ms, moved.downtime_ms) =
            (Some(1800.0), Some(2000.0), Some(40.4));
        moved.bytes_on_wire = Some(3 << 20);
        let mut stayed = Gone::ended(State::Failed);
        "db".clone_into(&mut stayed.vm);
        stayed.error = Some("no QEMU waits".to_owned());
        let gone = [moved, stayed];
        let took = Duration::from_millis(2500);
        let expected = "
guest  result     predicted  took   downtime  sent
web1   completed  1.8 s      2.0 s  40 ms     3.0 MiB
db     failed     -          -      -         -        no QEMU waits
1 of 2 guests have moved to b:7070 in 2.5 s";
        let to = ["b:7070".to_owned()];
        assert_eq!(end(&gone, &to, took), expected);
        let event = event(&gone, &to, took);
        assert_eq!(
            [&event["moved"], &event["failed"], &event["in_doubt"]],
            [1, 1, 0].map(|n| json!(n)).each_ref()
        );
        assert_eq!(event["guests"][1]["status"], "failed");
        assert_eq!(event["to"], "b:7070");
        assert_eq!(plan(&[]), "no guest runs here");

        let [mut moved, stayed] = gone;
        moved.to = Some("c:7070".to_owned());
        let several = ["b:7070", "c:7070"].map(str::to_owned);
        let table = end(&[moved, stayed], &several, took);
        assert!(
            table.contains("\nweb1   completed, c:7070  1.8 s"),
            "{table}"
        );
        assert!(table.contains("\ndb     failed             -"), "{table}");
        assert!(table.ends_with("to b:7070, c:7070 in 2.5 s"), "{table}");
    }
}
