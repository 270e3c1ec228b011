//! `bench agent`: what runs on each host. It is told what to do on its standard input, and says what came of it on its
//! standard output (see [`ask`](super::ask)).
//!
//! Two processes, so that nothing stays behind, whichever of them is killed. The worker does what is asked, and leads a
//! process group of all that it starts. The keeper hands on its input; when the worker ends, it ends that group and removes
//! the worker's folders. When the input ends, because ssh or whoever asks is gone, the worker does so itself.

use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use clap::Parser;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpgrp, getpid, kill_current_process_group,
    kill_process_group, waitid,
};
use serde::Serialize;
use tests::real::Scratch;

use super::ask::{Answer, Ask, Hello, PROTOCOL};
use super::side::Agent;

/// Does on this host what another `bench` asks for, on standard input and output.
#[derive(Debug, Parser)]
#[command(name = "bench agent")]
struct Options {
    /// That it is the process that does it.
    #[arg(long, hide = true)]
    worker: bool,
    /// What sshd says of the connection.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    ssh_connection: String,
}

/// Runs the agent with these arguments, the first of which is its name.
pub fn run(words: impl Iterator<Item = String>) -> ExitCode {
    let options = Options::parse_from(words);
    let ended = match options.worker {
        true => work(options.ssh_connection),
        false => keep(&options.ssh_connection),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the worker, and cleans up behind it.
fn keep(ssh_connection: &str) -> io::Result<()> {
    let mut worker = Command::new(std::env::current_exe()?)
        .args(["agent", "--worker", "--ssh-connection", ssh_connection])
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let asks = worker.stdin.take();
    let over = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&over);
    std::thread::spawn(move || {
        let mut asks = asks;
        let copied = asks.as_mut().map(|asks| io::copy(&mut io::stdin(), asks));
        // Known before the worker hears of it, and ends.
        ends.store(matches!(copied, Some(Ok(_))), Ordering::SeqCst);
    });
    let group = Pid::from_child(&worker);
    // Not reaped yet, so that no other process can have its number.
    waitid(
        WaitId::Pid(group),
        WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
    )?;
    let _ = kill_process_group(group, Signal::KILL);
    let status = worker.wait()?;
    Scratch::sweep();
    match over.load(Ordering::SeqCst) {
        true => Ok(()),
        false => Err(io::Error::other(format!("it was ended: {status}"))),
    }
}

/// Greets, and does what is asked for until the input ends.
fn work(ssh_connection: String) -> io::Result<()> {
    let lines = lines();
    say(&Hello {
        agent: PROTOCOL,
        pid: std::process::id(),
        ssh_connection,
    })?;
    let mut agent = Agent::new();
    for line in lines {
        let answer = match serde_json::from_str::<Ask>(&line) {
            Ok(ask) => agent.answer(ask),
            Err(error) => Err(format!("the agent does not understand: {error}")),
        };
        say(&answer.map_or_else(Answer::Failed, Answer::Done))?;
    }
    Ok(())
}

fn say(what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(what)?;
    line.push('\n');
    let mut output = io::stdout().lock();
    output.write_all(line.as_bytes())?;
    output.flush()
}

/// Lines of the input, which are read from a thread: whatever the worker does when the input ends, it is over then.
fn lines() -> Receiver<String> {
    let (heard, lines) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if heard.send(line).is_err() {
                break;
            }
        }
        Scratch::abandon();
        // The keeper made the group for this process.
        if getpgrp() == getpid() {
            let _ = kill_current_process_group(Signal::KILL);
        }
        std::process::exit(1);
    });
    lines
}
