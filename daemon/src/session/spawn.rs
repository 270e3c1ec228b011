//! A QEMU started for the guest: the source asks before its `Hello`, on the same connection, and the destination answers when one waits.

use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::journal::Side;
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId};
use pagecopy::limits;
use pagecopy::wire::{AbortCode, Blame, Message, Part};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep, timeout};
use transport::Channel;
use uuid::Uuid;

use super::arrive::{NOT_BEGUN, Visit};
use super::link_failure;
use super::spawned::{self, Place, Spawning, starter};
use crate::api::types::MigrationRequest;
use crate::failure::{Shown, host, operator, qemu};
use crate::lane::control::Control;
use crate::lane::{Lane, LaneEvent, Told};
use crate::limits::{BEGIN_LIMIT, MAX_SPAWNING, SPAWN_LIMIT};
use crate::qemu::maps::command_line;
use crate::qemu::{Guest, parts};
use crate::qmp::Qmp;
use crate::service::Service;
use crate::spawn::{Ask, Started};
use crate::store::{Receiver, SpawnedQemu};

/// How long the source waits for the answer: what the destination may take, and a margin.
const ANSWER_LIMIT: Duration = Duration::from_secs(SPAWN_LIMIT.as_secs() + 30);
/// Pause between two looks at whether a QEMU that was started answers.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Bytes of what QEMU printed that are told.
const TOLD: u64 = 700;

/// At the source: has the destination start a QEMU like the guest's, and returns the channels, on which the guest may come.
///
/// # Errors
/// It did not, and why.
pub(super) async fn ask(
    service: &Service,
    id: MigrationId,
    request: &MigrationRequest,
    qmp: &Qmp,
    guest: &Guest,
    channels: Vec<Box<dyn Channel>>,
) -> Result<Vec<Box<dyn Channel>>, Failure> {
    let parts = parts::parts(qmp).await?;
    let arguments = arguments(guest.pid)?;
    check(&arguments, &parts)?;
    let mut channels = channels.into_iter();
    let control = channels
        .next()
        .ok_or_else(|| host("a connection without a channel", "report this"))?;
    let (sender, mut events) = unbounded_channel();
    let to_us = move |told: Told| {
        // Nobody waits for an answer any more.
        let _ = sender.send(told);
    };
    let lane = Lane::start(
        "control",
        ChannelId(0),
        control,
        Control::default(),
        (),
        to_us,
    )?;
    lane.give(Message::Spawn {
        id,
        vm: request.vm.clone(),
        host: service.config.name.clone(),
        arguments,
        parts,
    });
    let answered = timeout(ANSWER_LIMIT, answer(id, &mut events)).await;
    let told = answered.map_err(|_| {
        Failure::new(
            Fault::PeerHost,
            "the destination does not say whether it has started a QEMU",
            "see the other host's log",
        )
    })??;
    tracing::info!(id = %Uuid::from_bytes(id.0), told, "a QEMU waits at the destination");
    let mut control = tokio::task::block_in_place(|| lane.park()).ok_or_else(|| {
        host(
            "the control channel was lost by its own thread",
            "report this",
        )
    })?;
    control.pause(false);
    Ok(std::iter::once(control).chain(channels).collect())
}

/// The command line of the source's QEMU, by the program that it really is.
fn arguments(pid: i32) -> Result<Vec<String>, Failure> {
    let cannot = |error: std::io::Error| {
        host(
            format!("the command line of QEMU (process {pid}) cannot be read: {error}"),
            "run pagecopyd in QEMU's user namespace or outside of it",
        )
    };
    let mut words = command_line(pid).map_err(cannot)?;
    // Each word ends with a byte of its own, so one that is empty follows the last.
    words.pop();
    Ok(words)
}

fn check(arguments: &[String], parts: &[Part]) -> Result<(), Failure> {
    let text = |text: &str| !text.chars().any(char::is_control);
    let bytes: usize = arguments.iter().map(String::len).sum();
    let good = (1..=limits::MAX_ARGUMENTS).contains(&arguments.len())
        && bytes <= limits::MAX_ARGUMENT_BYTES
        && arguments.iter().all(|word| text(word));
    let all: usize = parts
        .iter()
        .map(|part| part.name.len() + part.what.len())
        .sum();
    let told = parts.len() <= limits::MAX_PARTS
        && all <= limits::MAX_PARTS_BYTES
        && parts.iter().all(|part| {
            (1..=limits::MAX_NAME).contains(&part.name.len())
                && part.what.len() <= limits::MAX_PART
                && text(&part.name)
                && text(&part.what)
        });
    if good && told {
        return Ok(());
    }
    Err(operator(
        "QEMU's command line, or what it is made of, is too long or has control characters in it",
        "start the destination's QEMU by hand, and use `pagecopy receive`",
    ))
}

async fn answer(id: MigrationId, events: &mut UnboundedReceiver<Told>) -> Result<String, Failure> {
    let strange = |what: &str| {
        Failure::new(
            Fault::PeerHost,
            format!("the destination was asked to start a QEMU, and {what}"),
            "use the same version of pagecopyd on both hosts",
        )
    };
    match events.recv().await.map(Told::take) {
        Some(LaneEvent::Message(Message::Spawned {
            id: of,
            blame,
            text,
            remedy,
        })) if of == id => match blame {
            Blame::Nobody => Ok(text),
            Blame::Request => Err(operator(text, remedy)),
            Blame::Destination => Err(Failure::new(Fault::PeerHost, text, remedy)),
            Blame::Qemu => Err(qemu(text, remedy)),
        },
        Some(LaneEvent::Message(Message::Abort { reason, .. })) => {
            Err(strange(&format!("says: {reason}")))
        }
        Some(LaneEvent::Message(other)) => Err(strange(&format!("says {}", other.name()))),
        Some(LaneEvent::Misbehaved(what)) => Err(strange(&format!("breaks the protocol: {what}"))),
        Some(LaneEvent::Lost(_, error)) => Err(link_failure(&error)),
        Some(_) | None => Err(strange("left")),
    }
}

impl Visit {
    /// At the destination: starts a QEMU, answers, and receives the guest. What was started is ended unless the guest has come.
    #[tracing::instrument(name = "migration", level = "error", skip_all, fields(id = comes(&ask)))]
    pub(super) async fn spawn(mut self, ask: Message) {
        let Message::Spawn {
            id,
            vm,
            host: from,
            arguments,
            parts,
        } = ask
        else {
            return;
        };
        let service = Arc::clone(&self.service);
        let uuid = Uuid::from_bytes(id.0);
        tracing::info!(id = %uuid, vm, from, peer = self.peer.address, "a QEMU is asked for");
        let place = match may_start(&service, id, &vm) {
            Ok(place) => place,
            Err(failure) => return self.answer_spawn(id, Err(&failure)),
        };
        // The places of others that have ended.
        spawned::recover(&service);
        let started = tokio::select! {
            started = start(&service, id, &vm, arguments, &parts) => started,
            () = left(&mut self.events) => Err(operator("the source has left", "")),
            () = service.spawning.ending() => Err(host("pagecopyd is ending", "try again")),
        };
        match started {
            Ok(waits) => {
                let told = format!(
                    "its monitor is {}, its log {}",
                    waits.qmp.display(),
                    waits.log.display()
                );
                self.answer_spawn_ready(id, told);
                let first = tokio::select! {
                    first = self.word(BEGIN_LIMIT) => first,
                    () = service.spawning.ending() => Ok(None),
                };
                match first {
                    Err(_) => self.refuse(AbortCode::TimedOut, NOT_BEGUN.to_owned()),
                    Ok(Some(LaneEvent::Message(hello @ Message::Hello { .. })))
                        if is_of(&hello, id, &vm) =>
                    {
                        let receiver = Receiver { vm, qmp: waits.qmp };
                        self.receive(hello, Some(receiver)).await;
                    }
                    Ok(Some(LaneEvent::Message(other))) => self.refuse(
                        AbortCode::Protocol,
                        format!("{} came where Hello of the same guest should", other.name()),
                    ),
                    Ok(_) => tracing::info!(id = %uuid, "the guest does not come"),
                }
                spawned::settle(&service, id).await;
            }
            Err(failure) => {
                // Before the answer, so that the next attempt finds nothing of this one.
                spawned::settle(&service, id).await;
                self.answer_spawn(id, Err(&failure));
            }
        }
        drop(place);
    }

    fn answer_spawn_ready(&self, id: MigrationId, text: String) {
        self.control.give(Message::Spawned {
            id,
            blame: Blame::Nobody,
            text,
            remedy: String::new(),
        });
    }

    /// Says why there is none, and closes.
    fn answer_spawn(self, id: MigrationId, answer: Result<(), &Failure>) {
        if let Err(failure) = answer {
            tracing::warn!(id = %Uuid::from_bytes(id.0), failure = %Shown(failure), "no QEMU is started");
            let blame = match failure.fault {
                Fault::Operator => Blame::Request,
                Fault::Qemu => Blame::Qemu,
                _ => Blame::Destination,
            };
            self.control.give(Message::Spawned {
                id,
                blame,
                text: format!("{}: {}", self.service.config.name, failure.what),
                remedy: failure.remedy.clone(),
            });
        }
        self.control.close();
    }
}

fn comes(ask: &Message) -> Option<String> {
    match ask {
        Message::Spawn { id, .. } => Some(Uuid::from_bytes(id.0).to_string()),
        _ => None,
    }
}

fn is_of(hello: &Message, wanted: MigrationId, name: &str) -> bool {
    matches!(hello, Message::Hello { id, vm, .. } if *id == wanted && vm == name)
}

/// Comes when the peer is gone, or says what it should not say now.
async fn left(events: &mut UnboundedReceiver<Told>) {
    while let Some(told) = events.recv().await {
        if !matches!(told.take(), LaneEvent::Message(Message::Ping { .. })) {
            return;
        }
    }
}

/// Refuses what would be refused later, and what there is no place for.
fn may_start(service: &Arc<Service>, id: MigrationId, vm: &str) -> Result<Place, Failure> {
    starter(service)?;
    let uuid = Uuid::from_bytes(id.0);
    let known = service.store.journals.read(id, Side::Destination);
    let spawned = service.store.spawned.get(id);
    if !matches!((known, spawned), (Ok(None), Ok(None))) {
        return Err(operator(
            format!("migration {uuid} is known here already: it cannot begin once more"),
            "begin another",
        ));
    }
    service.refuse_if_receiving(vm)?;
    service.refuse_in_doubt(vm, Path::new(""))?;
    if service.store.receivers.get(vm).is_some() {
        return Err(operator(
            format!("a QEMU waits here for {vm:?} already"),
            "leave --spawn out, or have it forgotten: DELETE /v1/receivers/NAME of the API there",
        ));
    }
    Spawning::place(service, id).ok_or_else(|| {
        host(
            format!("{MAX_SPAWNING} QEMUs are being started or wait for their guests here, or pagecopyd is ending"),
            "try again when one of those migrations has ended",
        )
    })
}

/// Starts a QEMU and waits until it waits for the guest, made of the same parts as the source's.
async fn start(
    service: &Arc<Service>,
    id: MigrationId,
    vm: &str,
    arguments: Vec<String>,
    theirs: &[Part],
) -> Result<SpawnedQemu, Failure> {
    let ask = Ask {
        id: Uuid::from_bytes(id.0),
        arguments,
        machine: parts::machine(theirs).map(str::to_owned),
    };
    let (spawned, log) = service.store.spawned.begin(id, vm).map_err(|error| {
        host(
            format!("that a QEMU is to be started could not be written down: {error}"),
            "see to the disk under state-dir",
        )
    })?;
    let monitor = monitor(&spawned.qmp)?;
    let (started, process) = starter(service)?.start(ask, monitor, log.into()).await?;
    let Started {
        pid,
        mapped,
        notices,
    } = started;
    tracing::info!(id = %spawned.id, vm, pid, log = %spawned.log.display(), ?notices, "a QEMU was started");
    let qmp = wait_until_it_answers(&spawned, &process).await?;
    parts::same(theirs, &parts::parts(&qmp).await?, &mapped)?;
    Ok(spawned)
}

/// A socket that is bound and on which QEMU will listen: so it is QEMU that is known as the one at its other end.
fn monitor(path: &Path) -> Result<OwnedFd, Failure> {
    let bind = || {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    bind().map_err(|error: rustix::io::Errno| {
        host(
            format!("QEMU's monitor cannot be at {}: {error}", path.display()),
            "give a state-dir with a short path, on a disk that is not full",
        )
    })
}

async fn wait_until_it_answers(spawned: &SpawnedQemu, process: &OwnedFd) -> Result<Qmp, Failure> {
    let until = Instant::now() + SPAWN_LIMIT;
    loop {
        let failure = match Qmp::connect(&spawned.qmp).await {
            Ok(qmp) => return Ok(qmp),
            Err(failure) => failure,
        };
        if has_ended(process) {
            return Err(qemu(
                format!(
                    "the QEMU that was started has ended: {}",
                    last_words(&spawned.log)
                ),
                "see that what it names is there at the destination; its version may lack something that the source's has",
            ));
        }
        if Instant::now() >= until {
            return Err(qemu(
                format!(
                    "the QEMU that was started does not answer: {}; it says: {}",
                    failure.what,
                    last_words(&spawned.log)
                ),
                "see the destination's memory and storage, and try again",
            ));
        }
        sleep(LOOK_EVERY).await;
    }
}

fn has_ended(process: &OwnedFd) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// The end of what QEMU has printed, on one line.
fn last_words(log: &Path) -> String {
    let read = || {
        let mut file = std::fs::File::open(log)?;
        let from = file.metadata()?.len().saturating_sub(TOLD);
        file.seek(SeekFrom::Start(from))?;
        let mut end = Vec::new();
        file.take(TOLD).read_to_end(&mut end)?;
        Ok::<_, std::io::Error>(end)
    };
    let text: String = String::from_utf8_lossy(&read().unwrap_or_default())
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match text.trim() {
        "" => "(it printed nothing)".to_owned(),
        words => words.to_owned(),
    }
}
