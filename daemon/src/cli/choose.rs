//! Which of several destinations a guest goes to: the one that preflight ranks best.
//!
//! Each is looked at in turn, since the guest's writes are sampled each time: about a second for each. One where something fails
//! is out; one of which nothing is warned comes before one of which something is; among equals the guest goes where it will
//! likely be soonest, and then to the one that was named first.

use pagecopy::preflight::{Line, Verdict};
use serde_json::{Value, json};

use super::absolute;
use super::arguments::MigrateArguments;
use super::client::{CliError, Client};
use super::preflight;
use super::tell::Tell;
use crate::preflight::{Preflight, PreflightRequest};

/// A destination, and what was found on the way to it.
#[derive(Debug)]
struct Candidate {
    to: String,
    verdict: Verdict,
    /// How long the migration will likely take, in milliseconds; none where nothing was predicted.
    predicted_ms: Option<f64>,
    /// What is worst about it, and what to do; none where everything passes.
    why: Option<(String, String)>,
}

/// The destination that the guest goes to. Where one alone is named nothing is asked.
///
/// # Errors
/// Nobody can take the guest, and why not.
pub(super) async fn choose(
    client: &Client,
    arguments: &MigrateArguments,
) -> Result<String, CliError> {
    if let [only] = arguments.to.as_slice() {
        return Ok(only.clone());
    }
    let mut candidates = Vec::new();
    for to in &arguments.to {
        candidates.push(look(client, arguments, to).await);
    }
    rank(&mut candidates);
    tell(&candidates, arguments);
    match candidates.first() {
        Some(best) if best.verdict != Verdict::Fail => Ok(best.to.clone()),
        _ => Err(CliError::new(
            format!(
                "none of the {} destinations can take the guest, which runs on here",
                candidates.len()
            ),
            "see what fails at each, above; `pagecopy preflight --to HOST:PORT` says all of it",
        )),
    }
}

async fn look(client: &Client, arguments: &MigrateArguments, to: &str) -> Candidate {
    let request = PreflightRequest {
        vm: arguments.vm.clone(),
        qmp: absolute(&arguments.qmp),
        to: to.to_owned(),
        spawn: arguments.how.spawn,
    };
    match preflight::ask(client, &request).await {
        Ok(found) => Candidate::of(to, found),
        Err(error) => Candidate {
            to: to.to_owned(),
            verdict: Verdict::Fail,
            predicted_ms: None,
            why: Some((error.what, error.remedy)),
        },
    }
}

impl Candidate {
    fn of(to: &str, found: Preflight) -> Candidate {
        let worst = found
            .lines
            .into_iter()
            .find(|line| line.verdict == found.verdict && line.verdict != Verdict::Pass);
        let why = |line: Line| (format!("{}: {}", line.check, line.found), line.remedy);
        Candidate {
            to: to.to_owned(),
            verdict: found.verdict,
            predicted_ms: found.predicted.map(|predicted| predicted.total_ms.likely),
            why: worst.map(why),
        }
    }

    fn as_line(&self) -> String {
        let predicted = self.predicted_ms.map_or_else(
            || "no prediction".to_owned(),
            |ms| format!("likely {:.1} s", ms / 1e3),
        );
        let mut line = format!("  {}  {}  {predicted}", self.verdict.word(), self.to);
        if let Some((what, remedy)) = &self.why {
            line.push_str(&format!("; {what}; what to do: {remedy}"));
        }
        line
    }

    fn as_json(&self) -> Value {
        json!({
            "to": self.to, "verdict": self.verdict, "predicted_ms": self.predicted_ms,
            "why": self.why.as_ref().map(|(what, _)| what),
            "remedy": self.why.as_ref().map(|(_, remedy)| remedy),
        })
    }
}

/// The best first. Those of one rank stay as they were named.
fn rank(candidates: &mut [Candidate]) {
    candidates.sort_by(|one, other| {
        let soon = |one: &Candidate| one.predicted_ms.unwrap_or(f64::INFINITY);
        let by_verdict = one.verdict.cmp(&other.verdict);
        by_verdict.then_with(|| soon(one).total_cmp(&soon(other)))
    });
}

/// Says which it is, and why.
fn tell(candidates: &[Candidate], arguments: &MigrateArguments) {
    let chosen = candidates
        .first()
        .filter(|best| best.verdict != Verdict::Fail);
    let head = match chosen {
        Some(best) => format!("{} goes to {}:", arguments.vm, best.to),
        None => format!("{} stays:", arguments.vm),
    };
    let lines = candidates.iter().map(Candidate::as_line);
    let text: Vec<String> = [head].into_iter().chain(lines).collect();
    Tell::new(arguments.json).event(&text.join("\n"), || {
        let to = chosen.map(|best| &best.to);
        let ranked: Vec<Value> = candidates.iter().map(Candidate::as_json).collect();
        json!({ "event": "chosen", "vm": arguments.vm, "to": to, "ranked": ranked })
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(to: &str, verdict: Verdict, predicted_ms: Option<f64>) -> Candidate {
        Candidate {
            to: to.to_owned(),
            verdict,
            predicted_ms,
            why: None,
        }
    }

    #[test]
    fn what_passes_comes_first_and_then_what_is_sooner() {
        let mut all = [
            candidate("fails", Verdict::Fail, Some(1.0)),
            candidate("quick, with a warning", Verdict::Warn, Some(10.0)),
            candidate("slow", Verdict::Pass, Some(900.0)),
            candidate("unknown", Verdict::Pass, None),
            candidate("as quick, named later", Verdict::Pass, Some(100.0)),
            candidate("quick", Verdict::Pass, Some(20.0)),
            candidate("away", Verdict::Fail, None),
        ];
        rank(&mut all);
        let order: Vec<&str> = all.iter().map(|one| one.to.as_str()).collect();
        assert_eq!(
            order,
            [
                "quick",
                "as quick, named later",
                "slow",
                "unknown",
                "quick, with a warning",
                "fails",
                "away"
            ]
        );
    }

    #[test]
    fn the_worst_of_what_was_found_is_the_reason() {
        let found = Preflight {
            vm: "a".into(),
            to: "b:1".into(),
            verdict: Verdict::Fail,
            lines: vec![
                Line::warn("cpu", pagecopy::preflight::Whose::Both, "more", "name it"),
                Line::fail(
                    "memory",
                    pagecopy::preflight::Whose::Destination,
                    "none",
                    "add some",
                ),
            ],
            predicted: None,
            round_trip_us: None,
            goodput_bytes_per_s: None,
            dirty_rate: None,
        };
        let line = Candidate::of("b:1", found).as_line();
        assert_eq!(
            line,
            "  FAIL  b:1  no prediction; memory: none; what to do: add some"
        );
    }
}
