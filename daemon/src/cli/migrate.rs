//! `pagecopy migrate`: begin, follow, tell the end.

use pagecopy::engine::event::{Figures, State};
use pagecopy::preflight::Span;
use serde_json::{Value, json};

use super::arguments::MigrateArguments;
use super::choose::{Choice, Wanted, choose, named};
use super::client::{CliError, Client};
use super::exit_status;
use super::progress::Progress;
use super::retries::Retries;
use super::tell::Tell;
use crate::api::types::Begun;
use crate::migrations::Finished;
use crate::preflight::outcome::{Outcome, When};
use crate::units::{show_bytes, show_rate};

/// Runs a migration to its end, and those after it that are tried in its place; returns the exit status.
pub(super) async fn migrate(client: &Client, arguments: MigrateArguments) -> u8 {
    let json = arguments.json;
    let mut retries = Retries::new(arguments.to.retries);
    loop {
        let mut seen = Seen::default();
        let ended = follow(client, &arguments, &mut seen, &mut retries).await;
        if let Some(pause) = retries.next.take() {
            retries.note(json, pause);
            tokio::select! {
                () = tokio::time::sleep(pause) => continue,
                // It has failed, and stays so.
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        return end(ended, &seen, json);
    }
}

/// What has come of it; returns the exit status.
fn end(ended: Result<Finished, CliError>, seen: &Seen, json: bool) -> u8 {
    match ended {
        Ok(finished) => exit_status(finished.status),
        Err(error) => {
            // Cut off while the guest was being handed over, nobody here knows where it runs. One that waits is begun by the
            // daemon that is started anew.
            let status = if seen.completing || seen.pending {
                State::InDoubt
            } else if seen.interrupted {
                State::Cancelled
            } else {
                State::Failed
            };
            if json {
                println!("{}", cut_short(seen.id.as_deref(), status, &error));
            }
            eprintln!("pagecopy: {error}");
            exit_status(status)
        }
    }
}

/// What was learnt of a migration before the connection to the daemon broke.
#[derive(Debug, Default)]
struct Seen {
    id: Option<String>,
    completing: bool,
    /// It waits for its turn.
    pending: bool,
    /// Ctrl-C came before it had begun.
    interrupted: bool,
}

async fn follow(
    client: &Client,
    arguments: &MigrateArguments,
    seen: &mut Seen,
    retries: &mut Retries,
) -> Result<Finished, CliError> {
    let (as_json, vm) = (arguments.json, arguments.vm.clone());
    // Looking takes a second for each destination, and nothing has begun.
    let choice = tokio::select! {
        biased;
        _ = tokio::signal::ctrl_c() => {
            seen.interrupted = true;
            return Err(not_begun());
        }
        choice = destination(client, arguments) => choice?,
    };
    let to = match choice {
        Choice::To(to) => to,
        Choice::Nowhere { why, may_pass } => {
            if may_pass {
                retries.next = retries.after_nobody(&why.what);
            }
            return Err(why);
        }
    };
    let begun = client
        .post("/v1/migrations", &arguments.request(&to))
        .await?;
    let Begun { id } = serde_json::from_value(begun).map_err(|error| misunderstood(&error))?;
    let id = seen.id.insert(id.to_string()).clone();
    let mut events = client.events(&id).await?;
    if as_json {
        // The id at once, for tools that may want to cancel or ask.
        println!("{}", json!({ "event": "begun", "id": id, "vm": vm }));
    }
    let mut progress = Progress::new(as_json, &vm, &id);
    let mut interrupted = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event.map_err(|error| cut_off(&id, &error.what, seen.pending))?,
            _ = tokio::signal::ctrl_c() => {
                if interrupted {
                    return Err(left_alone(&id));
                }
                interrupted = true;
                progress.note("cancelling (once more to leave it to pagecopyd)");
                // When it has just ended, its end is the next event.
                let _ = client.post(&format!("/v1/migrations/{id}/cancel"), &Value::Null).await;
                continue;
            }
        };
        let Some(mut event) = event else {
            return Err(cut_off(&id, "it has ended", seen.pending));
        };
        let finished = finished(&event)?;
        if let Some(finished) = &finished {
            retries.after(finished, interrupted, &mut event);
        }
        progress.event(&event);
        if let Some(state) = event.get("state").and_then(Value::as_str) {
            seen.pending = state == State::Pending.word();
            seen.completing |= state == State::Completing.word();
        }
        if let Some(finished) = finished {
            progress.end();
            if !as_json {
                tell(&vm, &finished);
            }
            return Ok(finished);
        }
    }
}

async fn destination(client: &Client, arguments: &MigrateArguments) -> Result<Choice, CliError> {
    let wanted = Wanted {
        vm: &arguments.vm,
        qmp: &arguments.qmp,
        to: &named(client, &arguments.to.all).await?,
        how: &arguments.how,
    };
    choose(client, wanted, Tell::new(arguments.json)).await
}

/// The end, if that is what an event tells.
fn finished(event: &Value) -> Result<Option<Finished>, CliError> {
    if event.get("event").and_then(Value::as_str) != Some("finished") {
        return Ok(None);
    }
    let finished = serde_json::from_value(event.clone());
    finished.map(Some).map_err(|error| misunderstood(&error))
}

/// The closing summary.
fn tell(vm: &str, finished: &Finished) {
    if let Some(error) = &finished.error {
        eprintln!("pagecopy: migration {} of {vm} ended: {error}", finished.id);
        return;
    }
    let Figures {
        total_ms,
        downtime_ms,
        predicted_downtime_ms,
        verify_ms,
        throttle_percent,
        rounds,
        ..
    } = finished.figures;
    let ms = |value: Option<f64>| {
        value.map_or_else(|| "unknown".to_owned(), |value| format!("{value:.1} ms"))
    };
    println!("{vm} runs at the destination");
    println!(
        "  total            {:.2} s, {rounds} rounds",
        total_ms / 1e3
    );
    println!(
        "  downtime         {} (predicted {})",
        ms(downtime_ms),
        ms(predicted_downtime_ms)
    );
    if let Some(predicted) = &finished.predicted {
        println!("  predicted        {}", in_words(predicted));
    }
    if throttle_percent > 0 {
        println!("  slowed           for up to {throttle_percent} % of its time");
    }
    if verify_ms.is_some() {
        println!("  of it verifying  {}", ms(verify_ms));
    }
    println!(
        "  pages            {} sent, {} zero; {} on the wire over {}",
        finished.figures.pages_sent,
        finished.figures.pages_zero,
        show_bytes(finished.bytes_on_wire),
        over(finished),
    );
    let encoded = finished.figures.encoded;
    if encoded.bytes() > 0 {
        println!(
            "  encoded          {} compressed to {}, {} as deltas of {}; {} saved",
            show_bytes(encoded.zstd_bytes),
            show_bytes(encoded.zstd_sent),
            show_bytes(encoded.delta_bytes),
            show_bytes(encoded.delta_sent),
            show_bytes(encoded.saved()),
        );
    }
    if let Some(lacking) = finished.figures.lacking_bytes {
        println!(
            "  post-copy        {} in {} ({} without a connection)",
            show_bytes(lacking),
            ms(finished.figures.postcopy_ms),
            ms(finished.figures.paused_ms),
        );
    }
    if let Some(faults) = finished.figures.faults {
        let took = faults.fault_us;
        println!(
            "  page faults      {}; half took up to {} us, 99 % {} us, 99.9 % {} us, all {} us",
            faults.faults, took.p50, took.p99, took.p999, took.max
        );
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // For people.
    let goodput = show_rate((finished.figures.goodput_mbit_s * 1e6 / 8.0) as u64);
    println!("  goodput          {goodput}");
}

/// What had been predicted, and when.
fn in_words(predicted: &Outcome) -> String {
    let when = match predicted.when {
        When::Preflight => "before it began",
        When::FirstRound => "after the first round",
    };
    let Span { low, likely, high } = predicted.total_ms.span;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // For people.
    let bytes = show_bytes(predicted.bytes.span.likely as u64);
    format!(
        "{when}: {:.2} s ({:.2} to {:.2} s), downtime {:.1} ms, {bytes} of pages",
        likely / 1e3,
        low / 1e3,
        high / 1e3,
        predicted.downtime_ms.span.likely
    )
}

/// What the pages moved over, from the beginning to the end.
fn over(finished: &Finished) -> String {
    match (&finished.transport, &finished.transport_at_end) {
        (Some(began), Some(ended)) if began != ended => format!("{began}, in the end {ended}"),
        (Some(began), _) => began.clone(),
        (None, _) => "nothing".to_owned(),
    }
}

/// The last line of `--json` when there is none from the daemon.
fn cut_short(id: Option<&str>, status: State, error: &CliError) -> Value {
    let figures = serde_json::to_value(Figures::default()).unwrap_or(Value::Null);
    let mut event = json!({
        "event": "finished", "id": id, "status": status, "mode": "precopy", "transport": null,
        "transport_at_end": null, "bytes_on_wire": 0, "error": error.to_string(), "remedy": error.remedy,
    });
    if let (Value::Object(event), Value::Object(figures)) = (&mut event, figures) {
        event.extend(figures);
    }
    event
}

pub(super) fn misunderstood(error: &dyn std::fmt::Display) -> CliError {
    CliError::new(
        format!("pagecopyd's answer is not understood: {error}"),
        "use pagecopy and pagecopyd of the same version",
    )
}

fn cut_off(id: &str, why: &str, pending: bool) -> CliError {
    let what = format!("pagecopyd can no longer be asked about migration {id}: {why}");
    if pending {
        let remedy = format!(
            "it waits for its turn, and begins once pagecopyd runs again; `pagecopy status {id}` tells, `pagecopy cancel {id}` \
             prevents it"
        );
        return CliError::new(what, remedy);
    }
    CliError::new(
        what,
        "start pagecopyd again: it takes the guest back, or asks the destination what became of it; `pagecopy status` tells",
    )
}

fn not_begun() -> CliError {
    CliError::new(
        "cancelled before it had begun",
        "nothing: the guest runs on here",
    )
}

fn left_alone(id: &str) -> CliError {
    CliError::new(
        format!("no longer waiting for migration {id}"),
        format!("see `pagecopy status {id}`"),
    )
}
