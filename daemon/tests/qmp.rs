//! The QMP client against a server of our own: greeting, answers, events, descriptors, and everything that goes wrong.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use daemon::qemu::settings::Settings;
use daemon::qmp::{Qmp, QmpError};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

/// A socket path of its own for each test.
fn path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("pagecopy-qmp-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// One client's connection, after the greeting and `qmp_capabilities`.
struct Served {
    reader: BufReader<UnixStream>,
}

impl Served {
    fn accept(listener: &UnixListener) -> Served {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{GREETING}").unwrap();
        let mut served = Served {
            reader: BufReader::new(stream),
        };
        let command = served.command();
        assert_eq!(command["execute"], "qmp_capabilities");
        served.answer(&command, json!({ "return": {} }));
        served
    }

    fn command(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn answer(&mut self, command: &Value, mut answer: Value) {
        answer["id"] = command["id"].clone();
        self.say(&answer);
    }

    fn say(&mut self, value: &Value) {
        writeln!(self.reader.get_mut(), "{value}").unwrap();
    }
}

fn serve(name: &str, script: impl FnOnce(Served) + Send + 'static) -> (PathBuf, JoinHandle<()>) {
    let path = path(name);
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || script(Served::accept(&listener)));
    (path, thread)
}

#[tokio::test]
async fn answers_find_their_questions_and_events_their_readers() {
    let (path, server) = serve("answers", |mut served| {
        let (first, second) = (served.command(), served.command());
        served.say(&json!({ "event": "MIGRATION", "data": { "status": "active" } }));
        // Answered in the other order, with what nobody asked for in between.
        served.answer(&second, json!({ "return": { "is": second["execute"] } }));
        served.say(&json!({ "return": {}, "id": 999 }));
        served.answer(&first, json!({ "return": { "is": first["execute"] } }));
        let refused = served.command();
        served.answer(
            &refused,
            json!({ "error": { "class": "CommandNotFound", "desc": "no such thing" } }),
        );
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    assert_eq!(qmp.version().to_string(), "10.0.2");
    assert_eq!(qmp.peer_pid(), i32::try_from(std::process::id()).ok());
    let mut events = qmp.subscribe();
    let (a, b) = tokio::join!(
        qmp.execute("query-a", json!({})),
        qmp.execute("query-b", json!({}))
    );
    assert_eq!(a.unwrap(), json!({ "is": "query-a" }));
    assert_eq!(b.unwrap(), json!({ "is": "query-b" }));
    assert_eq!(
        events.recv().await.unwrap().migration_status(),
        Some("active")
    );
    let refused = qmp.execute("nonsense", json!({})).await.unwrap_err();
    assert!(
        matches!(&refused, QmpError::Refused { class, description, .. }
        if class == "CommandNotFound" && description == "no such thing"),
        "{refused}"
    );
    server.join().unwrap();
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_call() {
    let (path, server) = serve("gone", |mut served| {
        served.command();
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    assert_eq!(
        qmp.execute("query-status", json!({})).await,
        Err(QmpError::Gone)
    );
    qmp.gone().await;
    assert_eq!(
        qmp.execute("query-status", json!({})).await,
        Err(QmpError::Gone)
    );
    server.join().unwrap();
}

#[tokio::test]
async fn an_answer_of_another_shape_is_told() {
    let (path, server) = serve("shape", |mut served| {
        let command = served.command();
        served.answer(&command, json!({ "return": "a string" }));
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    let error = qmp
        .query::<u64>("query-number", json!({}))
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::Unexpected { .. }), "{error}");
    server.join().unwrap();
}

#[tokio::test]
async fn a_descriptor_arrives_with_its_command() {
    let (path, server) = serve("fd", |mut served| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0_u8; 4096];
        let got = recvmsg(
            served.reader.get_ref(),
            &mut [IoSliceMut::new(&mut buffer)],
            &mut ancillary,
            RecvFlags::empty(),
        )
        .unwrap();
        let command: Value = serde_json::from_slice(&buffer[..got.bytes]).unwrap();
        assert_eq!(command["execute"], "getfd");
        let received: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(received.len(), 1);
        for fd in received {
            UnixStream::from(fd)
                .write_all(b"through the descriptor")
                .unwrap();
        }
        served.answer(&command, json!({ "return": {} }));
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qmp.execute_with_fd("getfd", json!({ "fdname": "x" }), theirs.as_fd())
        .await
        .unwrap();
    drop(theirs);
    let mut text = String::new();
    ours.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through the descriptor");
    server.join().unwrap();
}

/// As when its main loop stands in a page fault that this very daemon is to serve.
#[tokio::test]
async fn a_qemu_that_does_not_greet_yet_answers_later() {
    let path = path("unheard");
    let listener = UnixListener::bind(&path).unwrap();
    // Nobody has accepted.
    let qmp = Qmp::connect_unheard(&path).await.unwrap();
    let server = std::thread::spawn(move || {
        let mut served = Served::accept(&listener);
        let command = served.command();
        served.answer(&command, json!({ "return": { "is": command["execute"] } }));
    });
    let answer = qmp.execute("query-a", json!({})).await;
    assert_eq!(answer, Ok(json!({ "is": "query-a" })));
    qmp.gone().await;
    server.join().unwrap();
}

/// What a migration has changed in a QEMU: one capability, which is to be off again.
fn changed() -> Settings {
    serde_json::from_value(json!({ "capabilities": [["events", false]], "parameters": {} }))
        .unwrap()
}

#[tokio::test]
async fn settings_that_qemu_refuses_to_take_back_are_not_asked_for_again() {
    let (path, server) = serve("refuses", |mut served| {
        let command = served.command();
        assert_eq!(command["execute"], "migrate-set-capabilities");
        served.answer(
            &command,
            json!({ "error": { "class": "GenericError", "desc": "not now" } }),
        );
        let mut more = String::new();
        served.reader.read_line(&mut more).unwrap();
        assert_eq!(more, "", "asked again");
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    changed().restore(&qmp).await;
    drop(qmp);
    server.join().unwrap();
}

#[tokio::test]
async fn settings_are_put_back_over_another_connection_when_the_first_is_lost() {
    let path = path("lost");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut served = Served::accept(&listener);
        served.command();
        drop(served);
        let mut served = Served::accept(&listener);
        let command = served.command();
        served.answer(&command, json!({ "return": {} }));
        command
    });
    let qmp = Qmp::connect(&path).await.unwrap();
    changed().restore(&qmp).await;
    let command = server.join().unwrap();
    let capability = &command["arguments"]["capabilities"][0];
    assert_eq!(
        capability,
        &json!({ "capability": "events", "state": false })
    );
}

#[tokio::test]
async fn a_socket_that_another_client_holds_says_so() {
    let path = path("taken");
    // Listens and never greets: what QEMU does while another client is connected.
    let listener = UnixListener::bind(&path).unwrap();
    let begun = Instant::now();
    let failure = Qmp::connect(&path).await.unwrap_err();
    assert!(
        failure.what.contains("taken by another client"),
        "{failure:?}"
    );
    assert!(
        failure
            .remedy
            .contains("-qmp unix:/path,server=on,wait=off"),
        "{failure:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(4));
    drop(listener);
}

#[tokio::test]
async fn each_bad_socket_has_its_own_words() {
    let absent = Qmp::connect("/nonexistent/qmp.sock".as_ref())
        .await
        .unwrap_err();
    assert!(
        absent
            .what
            .contains("there is no QMP socket /nonexistent/qmp.sock"),
        "{absent:?}"
    );

    let file = path("file");
    std::fs::write(&file, "text").unwrap();
    let no_socket = Qmp::connect(&file).await.unwrap_err();
    assert!(no_socket.what.contains("is not a socket"), "{no_socket:?}");

    let dead = path("dead");
    drop(UnixListener::bind(&dead).unwrap());
    let refused = Qmp::connect(&dead).await.unwrap_err();
    assert!(refused.what.contains("nobody listens"), "{refused:?}");

    let other = path("other");
    let listener = UnixListener::bind(&other).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"hello\": \"world\"}\n").unwrap();
    });
    let no_qmp = Qmp::connect(&other).await.unwrap_err();
    assert!(no_qmp.what.contains("is not a QMP socket"), "{no_qmp:?}");
    server.join().unwrap();
}
