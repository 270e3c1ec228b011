//! Which of several destinations a guest goes to: the one that preflight ranks best.
//!
//! Each is looked at in turn, since the guest's writes are sampled each time: about a second for each. One where something fails
//! is out; one of which nothing is warned comes before one of which something is; among equals the guest goes where it will
//! likely be soonest, and then to the one that was named first.

use std::path::Path;

use pagecopy::preflight::{Line, Verdict};
use serde_json::{Value, json};

use super::absolute;
use super::arguments::How;
use super::client::{CliError, Client};
use super::migrate::misunderstood;
use super::preflight;
use super::tell::Tell;
use crate::preflight::memory::CHECK as MEMORY;
use crate::preflight::{Preflight, PreflightRequest};

/// What the line about a destination that cannot be reached is called.
const NETWORK: &str = "network";
/// For those that the configuration of this host names.
const AUTO: &str = "auto";

/// A guest that is to go to one of these.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) vm: &'a str,
    pub(super) qmp: &'a Path,
    pub(super) to: &'a [String],
    pub(super) how: &'a How,
}

/// Where a guest goes.
#[derive(Debug)]
pub(super) enum Choice {
    To(String),
    /// Nobody can take it, and why not.
    Nowhere {
        why: CliError,
        /// One could not be reached, which may pass.
        may_pass: bool,
    },
}

/// A destination, and what was found on the way to it.
#[derive(Debug)]
struct Candidate {
    to: String,
    verdict: Verdict,
    /// How long the migration will likely take, in milliseconds; none where nothing was predicted.
    predicted_ms: Option<f64>,
    /// What is worst about it, and what to do; none where everything passes.
    why: Option<(String, String)>,
    /// Nothing fails but that it could not be reached.
    is_away: bool,
}

/// The destinations that were named, by themselves or in the configuration of this host.
///
/// # Errors
/// The daemon does not answer, or its configuration names none.
pub(super) async fn named(client: &Client, to: &[String]) -> Result<Vec<String>, CliError> {
    match to {
        [only] if only == AUTO => {}
        all if all.iter().any(|one| one == AUTO) => {
            return Err(CliError::new(
                "--to auto is given beside other destinations",
                "give auto alone, or a list without it",
            ));
        }
        all => return Ok(all.to_vec()),
    }
    let answer = client.get("/v1/destinations").await?;
    let known: Vec<String> =
        serde_json::from_value(answer).map_err(|error| misunderstood(&error))?;
    if known.is_empty() {
        return Err(CliError::new(
            "--to auto: the configuration of this host names no destinations",
            "set destinations in it and reload it, or name them with --to HOST:PORT,...",
        ));
    }
    Ok(known)
}

/// The destination that the guest goes to. Where one alone is named nothing is asked.
///
/// # Errors
/// The daemon of this host does not answer: nothing is known.
pub(super) async fn choose(
    client: &Client,
    wanted: Wanted<'_>,
    told: Tell,
) -> Result<Choice, CliError> {
    if let [only] = wanted.to {
        return Ok(Choice::To(only.clone()));
    }
    let mut candidates = Vec::new();
    for to in wanted.to {
        candidates.push(look(client, wanted, to).await?);
    }
    rank(&mut candidates);
    tell(&candidates, wanted.vm, told);
    match candidates.first() {
        Some(best) if best.verdict != Verdict::Fail => Ok(Choice::To(best.to.clone())),
        _ => Ok(Choice::Nowhere {
            why: CliError::new(
                format!(
                    "none of the {} destinations can take the guest, which runs on here",
                    candidates.len()
                ),
                "see what fails at each, above; `pagecopy preflight --to HOST:PORT` says all of it",
            ),
            may_pass: candidates.iter().any(|one| one.is_away),
        }),
    }
}

async fn look(client: &Client, wanted: Wanted<'_>, to: &str) -> Result<Candidate, CliError> {
    let request = PreflightRequest {
        vm: wanted.vm.to_owned(),
        qmp: absolute(wanted.qmp),
        to: to.to_owned(),
        spawn: wanted.how.spawn,
    };
    match preflight::ask(client, &request).await {
        Ok(found) => Ok(Candidate::of(to, found, wanted.how.force)),
        Err(error) if error.status.is_none() => Err(error),
        Err(error) => Ok(Candidate {
            to: to.to_owned(),
            verdict: Verdict::Fail,
            predicted_ms: None,
            why: Some((error.what, error.remedy)),
            is_away: false,
        }),
    }
}

/// What becomes of a migration by this line. The destination refuses one for which there is no room with the margin beside it, unless
/// that is forced.
fn verdict(line: &Line, force: bool) -> Verdict {
    match line.verdict {
        Verdict::Warn if line.check == MEMORY && !force => Verdict::Fail,
        verdict => verdict,
    }
}

impl Candidate {
    fn of(to: &str, found: Preflight, force: bool) -> Candidate {
        let verdicts = found.lines.iter().map(|line| verdict(line, force));
        let worst = verdicts.max().unwrap_or(found.verdict);
        let why = found
            .lines
            .iter()
            .find(|line| worst != Verdict::Pass && verdict(line, force) == worst);
        let fails = |line: &&Line| verdict(line, force) == Verdict::Fail;
        let mut failing = found.lines.iter().filter(fails);
        Candidate {
            to: to.to_owned(),
            verdict: worst,
            predicted_ms: found.predicted.map(|predicted| predicted.total_ms.likely),
            why: why.map(|line| (line.what(), line.remedy.clone())),
            is_away: worst == Verdict::Fail && failing.all(|line| line.check == NETWORK),
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
fn tell(candidates: &[Candidate], vm: &str, told: Tell) {
    let chosen = candidates
        .first()
        .filter(|best| best.verdict != Verdict::Fail);
    let head = match chosen {
        Some(best) => format!("{vm} goes to {}:", best.to),
        None => format!("{vm} stays:"),
    };
    let lines = candidates.iter().map(Candidate::as_line);
    let text: Vec<String> = [head].into_iter().chain(lines).collect();
    told.event(&text.join("\n"), || {
        let to = chosen.map(|best| &best.to);
        let ranked: Vec<Value> = candidates.iter().map(Candidate::as_json).collect();
        json!({ "event": "chosen", "vm": vm, "to": to, "ranked": ranked })
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
            is_away: false,
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
        let line = Candidate::of("b:1", found, false).as_line();
        assert_eq!(
            line,
            "  FAIL  b:1  no prediction; memory: none; what to do: add some"
        );
    }

    #[test]
    fn who_would_be_refused_for_the_margin_alone_is_no_candidate_unless_that_is_forced() {
        use pagecopy::preflight::Whose;
        let found = || Preflight {
            vm: "a".into(),
            to: "b:1".into(),
            verdict: Verdict::Warn,
            lines: vec![
                Line::warn("cpu", Whose::Both, "more", "name it"),
                Line::warn(MEMORY, Whose::Destination, "no margin", "free some"),
            ],
            predicted: None,
            round_trip_us: None,
            goodput_bytes_per_s: None,
            dirty_rate: None,
        };
        let refused = Candidate::of("b:1", found(), false);
        assert_eq!(refused.verdict, Verdict::Fail);
        assert!(refused.as_line().contains("memory: no margin"));
        let forced = Candidate::of("b:1", found(), true);
        assert_eq!(forced.verdict, Verdict::Warn);
        assert!(forced.as_line().contains("cpu: more"));
    }
}
