//! Every error is a problem of RFC 9457, whoever makes it.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use super::harness::{Answer, Daemon, JSON};

const ID: &str = "6f7ab5a5-4b92-4d6d-93a9-8c2ed2cf1a3e";

/// Panics unless `answer` is the problem `kind`, with all that it must have.
pub(crate) fn assert_problem(answer: &Answer, status: u16, kind: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(
        answer.header("content-type"),
        "application/problem+json",
        "{answer:?}"
    );
    let problem = answer.json();
    assert_eq!(
        problem["type"],
        format!("urn:problem-type:pagecopy:{kind}"),
        "{problem}"
    );
    assert_eq!(problem["status"], status, "{problem}");
    for member in ["title", "detail", "remedy", "fault"] {
        let text = problem[member].as_str().unwrap_or_default();
        assert!(text.len() > 3, "{member} of {problem}");
    }
    assert_eq!(problem.as_object().unwrap().len(), 6, "{problem}");
}

fn assert_detail(answer: &Answer, part: &str) {
    let problem = answer.json();
    assert!(
        problem["detail"].as_str().unwrap().contains(part),
        "{problem}"
    );
}

#[test]
fn what_is_not_there_and_what_is_not_taken() {
    let daemon = Daemon::start("routes");
    for path in [
        "/v2/migrations",
        "/v1/migration",
        "/v1/receivers/a/b",
        "/v1/migrations/",
    ] {
        let answer = daemon.ask("GET", path, &[], "");
        assert_problem(&answer, 404, "no-such-route");
        assert_detail(&answer, path);
    }
    let answer = daemon.ask("DELETE", "/v1/migrations", &[], "");
    assert_problem(&answer, 405, "wrong-method");
    assert!(answer.header("allow").contains("post"), "{answer:?}");
    assert!(
        answer.json()["remedy"].as_str().unwrap().contains("POST"),
        "{answer:?}"
    );

    assert_problem(
        &daemon.ask("GET", "/v1/migrations/x", &[], ""),
        400,
        "refused",
    );
    let unknown = format!("/v1/migrations/{ID}");
    assert_problem(&daemon.ask("GET", &unknown, &[], ""), 404, "not-found");
    assert_problem(
        &daemon.ask("GET", &format!("{unknown}/events"), &[], ""),
        404,
        "not-found",
    );
    assert_problem(
        &daemon.post(&format!("{unknown}/cancel"), ""),
        404,
        "not-found",
    );
    assert_problem(
        &daemon.ask("DELETE", "/v1/receivers/web", &[], ""),
        404,
        "not-found",
    );
    // A name that is no text.
    assert_problem(
        &daemon.ask("DELETE", "/v1/receivers/%ff", &[], ""),
        400,
        "bad-request",
    );
}

#[test]
fn bodies_that_are_wrong() {
    let daemon = Daemon::start("bodies");
    let begin = |body: &str| daemon.post("/v1/migrations", body);
    assert_problem(&begin("{"), 400, "bad-request");
    let unknown = begin(r#"{"vm":"web","qmp":"/q","to":"b:1","mod":"auto"}"#);
    assert_problem(&unknown, 422, "invalid");
    assert_detail(&unknown, "unknown field `mod`");
    let missing = begin(r#"{"vm":"web","qmp":"/q"}"#);
    assert_problem(&missing, 422, "invalid");
    assert_detail(&missing, "missing field `to`");
    for wrong in [
        r#""channels":"two""#,
        r#""channels":-1"#,
        r#""mode":"warp""#,
        r#""verify":1"#,
    ] {
        let body = format!(r#"{{"vm":"web","qmp":"/q","to":"b:1",{wrong}}}"#);
        assert_problem(&begin(&body), 422, "invalid");
    }
    let untyped = daemon.ask("POST", "/v1/migrations", &[], "{}");
    assert_problem(&untyped, 415, "media-type");
    let large = format!(r#"{{"vm":"{}"}}"#, "x".repeat(1 << 20));
    assert_problem(&begin(&large), 413, "too-large");
    // Understood, and it cannot be.
    assert_problem(
        &begin(r#"{"vm":"web","qmp":"/q","to":"b"}"#),
        400,
        "refused",
    );
    let no_socket = daemon.post("/v1/receivers", r#"{"vm":"web","qmp":"/nonexistent"}"#);
    assert_problem(&no_socket, no_socket.status, "refused");
    let decided = daemon.post(&format!("/v1/migrations/{ID}/resolve"), "{}");
    assert_problem(&decided, 400, "refused");
    let extra = daemon.ask(
        "POST",
        &format!("/v1/migrations/{ID}/recover"),
        &[JSON],
        r#"{"t":1}"#,
    );
    assert_problem(&extra, 422, "invalid");
}

/// The schema that a part of the description refers to.
fn referred<'a>(description: &'a Value, part: &Value) -> &'a Value {
    let text = part.to_string();
    let name = text.split("#/components/schemas/").nth(1);
    let name = name.and_then(|rest| rest.split('"').next());
    let name = name.unwrap_or_else(|| panic!("no schema: {part}"));
    &description["components"]["schemas"][name]
}

/// Whatever takes a body says which member is unknown, and that one is of another type; nothing of it is done.
#[test]
fn every_member_of_every_body_is_looked_at() {
    let daemon = Daemon::start("members");
    let description = daemon.get("/v1/openapi.json").json();
    let mut seen = 0;
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let Some(body) = operation.get("requestBody") else {
                continue;
            };
            let path = path.replace("{id}", ID).replace("{vm}", "web");
            let ask = |body: &Value| {
                let method = method.to_uppercase();
                daemon.ask(&method, &path, &[JSON], &body.to_string())
            };
            let unknown = ask(&json!({ "no_such_member": 1 }));
            assert_problem(&unknown, 422, "invalid");
            assert_detail(&unknown, "no_such_member");
            assert_problem(&ask(&json!("text")), 422, "invalid");
            let members = referred(&description, body)["properties"].as_object();
            for member in members.unwrap().keys() {
                // No member of any takes an object.
                let answer = ask(&json!({ member.as_str(): { "of": ["another type"] } }));
                assert_problem(&answer, 422, "invalid");
                let detail = answer.json()["detail"].as_str().unwrap().to_owned();
                assert!(!detail.contains("missing"), "{method} {path}: {detail}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 30, "only {seen} members found");
    assert_eq!(daemon.get("/v1/migrations").json(), json!([]));
    let query = format!("/v1/migrations/{ID}/journal?sid=source");
    assert_problem(&daemon.ask("GET", &query, &[], ""), 400, "bad-request");
}

/// A QEMU that is not there, has ended, says nothing at all, or greets and says nothing more.
#[test]
fn a_qemu_that_is_absent_or_silent_is_said_so() {
    let daemon = Daemon::start("sockets");
    let path = |name: &str| daemon.dir.join(name);
    drop(UnixListener::bind(path("dead")).unwrap());
    let _silent = UnixListener::bind(path("silent")).unwrap();
    std::fs::write(path("file"), "").unwrap();
    for (socket, part) in [
        ("absent", "there is no QMP socket"),
        ("dead", "its QEMU has ended"),
        ("file", "is not a socket"),
        ("silent", "is taken by another client"),
    ] {
        let sample = json!({ "vm": "web", "qmp": path(socket), "for_ms": 100 });
        let wait = json!({ "vm": "web", "qmp": path(socket) });
        for (route, body) in [("/v1/dirty-rate", sample), ("/v1/receivers", wait)] {
            let answer = daemon.post(route, &body.to_string());
            assert_problem(&answer, 400, "refused");
            assert_detail(&answer, part);
        }
        // A migration and an evacuation are told at their end.
        let begun = json!({ "vm": socket, "qmp": path(socket), "to": "127.0.0.1:1" });
        let begun = daemon.post("/v1/migrations", &begun.to_string());
        assert_eq!(begun.status, 201, "{begun:?}");
        let id = begun.json()["id"].as_str().unwrap().to_owned();
        daemon.get(&format!("/v1/migrations/{id}/events"));
        let end = daemon.shown(&id)["finished"].clone();
        assert_eq!([&end["status"], &end["fault"]], ["failed", "operator"]);
        assert!(end["error"].as_str().unwrap().contains(part), "{end}");
        assert!(end["remedy"].as_str().unwrap().len() > 3, "{end}");
    }
}

/// A destination that takes the connection and never says a word, and one that is late by more than it may.
#[test]
fn a_destination_that_never_answers_is_said_so() {
    let daemon = Daemon::start("late");
    let never = TcpListener::bind("127.0.0.1:0").unwrap();
    let garbled = TcpListener::bind("127.0.0.1:0").unwrap();
    let to_garbled = garbled.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in garbled.incoming().map_while(Result::ok) {
            // Whether it is read is the other side's matter.
            let _ = (&stream).write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    for to in [never.local_addr().unwrap().to_string(), to_garbled] {
        let body = json!({ "vm": "web", "qmp": daemon.dir.join("absent"), "to": to });
        let answer = daemon.post("/v1/preflight", &body.to_string());
        assert_eq!(answer.status, 200, "{answer:?}");
        let found = answer.json();
        assert_eq!(found["verdict"], "fail");
        let lines = found["lines"].as_array().unwrap();
        let line = lines.iter().find(|line| line["check"] == "network");
        let line = line.unwrap_or_else(|| panic!("no line about it: {found}"));
        assert_eq!(line["verdict"], "fail", "{line}");
        assert!(line["remedy"].as_str().unwrap().len() > 3, "{line}");
        println!("{line}");
    }
}
