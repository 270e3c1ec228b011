//! `pagecopy evacuate`: all guests of this host, or some, leave it.
//!
//! A client of the daemon like any other: it finds the guests, asks what each would take, hands all of them to the daemon's queue,
//! the shortest first, and follows them. The queue says how many leave at a time, and goes on without this program.

mod follow;
mod gone;
mod plan;
mod table;

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::Path;

use pagecopy::engine::event::State;
use serde_json::json;

use super::absolute;
use super::arguments::EvacuateArguments;
use super::choose;
use super::client::{CliError, Client};
use super::migrate::misunderstood;
use super::tell::Tell;
use crate::guests::{GuestFound, GuestSocket, GuestsRequest};
use plan::Leaving;

/// Guests that are asked about in one request, which is bounded.
const AT_ONCE: usize = 100;
/// Exit status where the arguments are wrong.
const WRONG: u8 = 2;

/// Moves the guests; returns the exit status.
pub(super) async fn evacuate(client: &Client, arguments: EvacuateArguments) -> u8 {
    let tell = Tell::new(arguments.json);
    let found = async {
        let to = choose::named(client, &arguments.to.all).await;
        let to = to.map_err(|error| (1, error))?;
        Ok((to, leaving(client, &arguments, tell).await?))
    };
    let (to, leaving) = match found.await {
        Ok(found) => found,
        Err((status, error)) => {
            let error: CliError = error;
            eprintln!("pagecopy: {error}");
            return status;
        }
    };
    let leaving = plan::in_order(client, &to, leaving).await;
    tell.event(
        &table::plan(&leaving),
        || json!({ "event": "planned", "to": to.join(","), "guests": leaving }),
    );
    if arguments.dry_run {
        return 0;
    }
    let begun = std::time::Instant::now();
    let gone = follow::run(client, &arguments, &to, leaving, tell).await;
    let took = begun.elapsed();
    tell.event(&table::end(&gone, &to, took), || {
        table::event(&gone, &to, took)
    });
    exit_status(&gone)
}

/// 0 when all have moved, 4 when one is in doubt, else 1.
fn exit_status(gone: &[gone::Gone]) -> u8 {
    let mut status = 0;
    for one in gone {
        status = match one.state {
            State::Completed => status,
            State::InDoubt => return 4,
            _ => 1,
        };
    }
    status
}

/// The guests that are to leave; or the exit status, and why nobody does.
async fn leaving(
    client: &Client,
    arguments: &EvacuateArguments,
    tell: Tell,
) -> Result<Vec<Leaving>, (u8, CliError)> {
    let found = found(client, arguments).await?;
    let wanted: BTreeSet<&str> = arguments.vms.iter().map(String::as_str).collect();
    let known: BTreeSet<&str> = found.iter().map(|one| one.vm.as_str()).collect();
    let unknown: Vec<&str> = wanted.difference(&known).copied().collect();
    if !unknown.is_empty() {
        let error = CliError::new(
            format!("no such guest here: {}", unknown.join(", ")),
            "see which sockets there are, and how they are called; nobody has been moved",
        );
        return Err((WRONG, error));
    }
    let mut leaving = Vec::new();
    for one in found {
        if !wanted.is_empty() && !wanted.contains(one.vm.as_str()) {
            continue;
        }
        match one.state.as_deref() {
            // Nobody's: the one before has left, the next has not come.
            Some(state @ ("inmigrate" | "postmigrate" | "ended")) => {
                let why = match state {
                    "inmigrate" => "its QEMU waits for a guest",
                    "postmigrate" => "it has moved away already",
                    _ => "its QEMU has ended",
                };
                tell.note(&format!("{} does not run here: {why}", one.vm));
            }
            _ => leaving.push(Leaving::of(one)),
        }
    }
    Ok(leaving)
}

/// Everything that there is.
async fn found(
    client: &Client,
    arguments: &EvacuateArguments,
) -> Result<Vec<GuestFound>, (u8, CliError)> {
    let requests = match &arguments.guests {
        None => vec![GuestsRequest {
            folder: arguments.qmp_dir.as_deref().map(absolute),
            guests: None,
        }],
        Some(file) => read(file)
            .map_err(|error| (WRONG, error))?
            .chunks(AT_ONCE)
            .map(|some| GuestsRequest {
                folder: None,
                guests: Some(some.to_vec()),
            })
            .collect(),
    };
    let mut found: Vec<GuestFound> = Vec::new();
    for request in requests {
        let answer = client
            .post("/v1/guests", &request)
            .await
            .map_err(|error| (1, error))?;
        let some: Vec<GuestFound> =
            serde_json::from_value(answer).map_err(|error| (1, misunderstood(&error)))?;
        found.extend(some);
    }
    Ok(found)
}

/// The guests in a file.
fn read(file: &Path) -> Result<Vec<GuestSocket>, CliError> {
    let mut text = String::new();
    let read = match file == Path::new("-") {
        true => io::stdin().read_to_string(&mut text).map(drop),
        false => std::fs::read_to_string(file).map(|read| text = read),
    };
    let shown = file.display();
    read.map_err(|error| CliError::new(format!("{shown} cannot be read: {error}"), ""))?;
    listed(&text).map_err(|what| {
        CliError::new(
            format!("{shown}: {what}"),
            "write a guest a line, NAME=SOCKET; # begins a comment",
        )
    })
}

fn listed(text: &str) -> Result<Vec<GuestSocket>, String> {
    let (mut guests, mut names) = (Vec::new(), BTreeSet::new());
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (vm, qmp) = line
            .split_once('=')
            .map(|(vm, qmp)| (vm.trim(), qmp.trim()))
            .filter(|(vm, qmp)| !vm.is_empty() && !qmp.is_empty())
            .ok_or_else(|| format!("line {number} is not NAME=SOCKET"))?;
        if !names.insert(vm) {
            return Err(format!("line {number} names {vm} again"));
        }
        guests.push(GuestSocket {
            vm: vm.to_owned(),
            qmp: absolute(Path::new(qmp)),
        });
    }
    Ok(guests)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_list_of_guests() {
        let text = "# of this host\nweb1=/run/web1.qmp\n\n db = /run/a=b.qmp \n";
        let found = listed(text).unwrap();
        let all: Vec<(&str, &str)> = found
            .iter()
            .map(|one| (one.vm.as_str(), one.qmp.to_str().unwrap()))
            .collect();
        assert_eq!(all, [("web1", "/run/web1.qmp"), ("db", "/run/a=b.qmp")]);
        for (wrong, why) in [
            ("web1 /run/web1.qmp", "line 1 is not"),
            ("a=/x\n=/y", "line 2 is not"),
            ("a=/x\nb=/y\na=/z", "line 3 names a again"),
        ] {
            let error = listed(wrong).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn one_in_doubt_says_more_than_one_that_failed() {
        let gone = |states: &[State]| {
            let all: Vec<gone::Gone> = states.iter().map(|s| gone::Gone::ended(*s)).collect();
            exit_status(&all)
        };
        assert_eq!(gone(&[]), 0);
        assert_eq!(gone(&[State::Completed, State::Completed]), 0);
        assert_eq!(gone(&[State::Failed, State::Completed]), 1);
        assert_eq!(
            gone(&[State::Cancelled, State::InDoubt, State::Completed]),
            4
        );
        assert_eq!(gone(&[State::Paused]), 1, "left alone");
    }
}
