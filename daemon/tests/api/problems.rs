//! Every error is a problem of RFC 9457, whoever makes it.

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
