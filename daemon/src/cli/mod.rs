//! The command line `pagecopy`: a client of the daemon's API.

mod arguments;
mod choose;
mod client;
mod evacuate;
mod migrate;
mod preflight;
mod progress;
mod retries;
mod set;
mod show;
mod tell;
mod watch;

use std::path::{Path, PathBuf};

use pagecopy::engine::event::State;
use serde_json::Value;

pub use arguments::{Arguments, Command, Decision, EvacuateArguments, How, MigrateArguments};

pub use set::{Changes, RateLimit};

use crate::api::types::{ReceiverRequest, RecoverRequest, ResolveRequest};
use client::{CliError, Client};

/// The API's socket, unless `--api` or `PAGECOPY_API` says otherwise.
pub const DEFAULT_API: &str = "/run/pagecopy/api.sock";

/// Does what the arguments say; returns the exit status.
pub async fn run(arguments: Arguments) -> u8 {
    let api = arguments
        .api
        .or_else(|| std::env::var_os("PAGECOPY_API").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from(DEFAULT_API));
    let client = Client::new(api);
    let done = match arguments.command {
        Command::Migrate(arguments) => return migrate::migrate(&client, arguments).await,
        Command::Evacuate(arguments) => return evacuate::evacuate(&client, arguments).await,
        Command::Preflight {
            vm,
            qmp,
            to,
            spawn,
            json,
        } => return preflight::preflight(&client, vm, qmp, to, spawn, json).await,
        Command::Receive { vm, qmp } => receive(&client, vm, qmp).await,
        Command::DirtyRate {
            vm,
            qmp,
            length,
            json,
        } => preflight::dirty_rate(&client, vm, qmp, length, json).await,
        Command::Status { id, json } => status(&client, id, json).await,
        Command::List { json } => list(&client, json).await,
        Command::Watch { json } => watch::watch(&client, json).await,
        Command::Set { id, change } => set::set(&client, &id, change).await,
        Command::Cancel { id } => {
            post(
                &client,
                &format!("/v1/migrations/{id}/cancel"),
                &Value::Null,
            )
            .await
        }
        Command::StartPostcopy { id } => decide(&client, &id, "start-postcopy", &Value::Null).await,
        Command::Recover { id, to } => {
            decide(&client, &id, "recover", &RecoverRequest { to }).await
        }
        Command::Resolve {
            id,
            decision,
            peer_fenced,
        } => resolve(&client, &id, decision, peer_fenced).await,
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("pagecopy: {error}");
            1
        }
    }
}

/// A path as the daemon takes it, whose working directory is another one.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The exit status of a migration that ended so.
pub fn exit_status(state: State) -> u8 {
    match state {
        State::Completed => 0,
        State::Cancelled => 3,
        State::InDoubt => 4,
        _ => 1,
    }
}

async fn receive(client: &Client, vm: String, qmp: PathBuf) -> Result<(), CliError> {
    let qmp = absolute(&qmp);
    client
        .post(
            "/v1/receivers",
            &ReceiverRequest {
                vm: vm.clone(),
                qmp,
            },
        )
        .await?;
    println!("{vm}: its QEMU waits here");
    Ok(())
}

async fn resolve(
    client: &Client,
    id: &str,
    decision: Decision,
    peer_fenced: bool,
) -> Result<(), CliError> {
    let request = ResolveRequest {
        resume_here: decision.resume_here,
        run_here: decision.run_here,
        abandon: decision.abandon,
        poison: decision.poison,
        peer_fenced,
    };
    decide(client, id, "resolve", &request).await
}

async fn decide(
    client: &Client,
    id: &str,
    what: &str,
    request: &impl serde::Serialize,
) -> Result<(), CliError> {
    let path = format!("/v1/migrations/{id}/{what}");
    let answer = client.post(&path, request).await?;
    println!("{}", answer["done"].as_str().unwrap_or("decided"));
    Ok(())
}

async fn post(client: &Client, path: &str, body: &impl serde::Serialize) -> Result<(), CliError> {
    client.post(path, body).await.map(drop)
}

async fn status(client: &Client, id: Option<String>, json: bool) -> Result<(), CliError> {
    let shown = match id {
        Some(id) => client.get(&format!("/v1/migrations/{id}")).await?,
        None => client.get("/v1/migrations").await?,
    };
    if json {
        println!("{shown}");
    } else if let Value::Array(all) = &shown {
        all.iter().for_each(|one| print!("{}", show::status(one)));
    } else {
        print!("{}", show::status(&shown));
    }
    Ok(())
}

async fn list(client: &Client, json: bool) -> Result<(), CliError> {
    let migrations = client.get("/v1/migrations").await?;
    let receivers = client.get("/v1/receivers").await?;
    if json {
        println!(
            "{}",
            serde_json::json!({ "migrations": migrations, "receivers": receivers })
        );
    } else {
        print!("{}", show::list(&migrations, &receivers));
    }
    Ok(())
}
