//! Idempotency keys: whoever asks again is answered again, and nothing begins twice.

use super::harness::{Answer, Daemon, JSON, in_vain, start};
use super::problems::assert_problem;

fn begin(daemon: &Daemon, key: &str, body: &str) -> Answer {
    let key = format!("Idempotency-Key: {key}");
    daemon.ask("POST", "/v1/migrations", &[JSON, &key], body)
}

fn begun(answer: &Answer) -> String {
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_request_that_comes_again_begins_nothing() {
    let mut daemon = Daemon::start("keys");
    let first = begin(&daemon, "\"one\"", &in_vain("web"));
    let id = begun(&first);
    assert_eq!(first.header("idempotent-replayed"), "");
    // The same, though it is written in another way.
    let same = in_vain("web")
        .replace(',', ", ")
        .replace('}', r#", "mode": "auto"}"#);
    for body in [in_vain("web"), same] {
        let again = begin(&daemon, "\"one\"", &body);
        assert_eq!(begun(&again), id);
        assert_eq!(again.header("idempotent-replayed"), "true");
        assert_eq!(again.header("location"), format!("/v1/migrations/{id}"));
    }
    assert_ne!(begun(&begin(&daemon, "two", &in_vain("db"))), id);
    assert_eq!(
        daemon
            .get("/v1/migrations")
            .json()
            .as_array()
            .unwrap()
            .len(),
        2
    );
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    daemon.child = start(&daemon.dir);
    assert_eq!(begun(&begin(&daemon, "\"one\"", &in_vain("web"))), id);
    assert_eq!(daemon.get("/v1/migrations").body, "[]");
}

#[test]
fn keys_that_cannot_be() {
    let daemon = Daemon::start("keys-wrong");
    let id = begun(&begin(&daemon, "one", &in_vain("web")));
    let other = begin(&daemon, "one", &in_vain("db"));
    assert_problem(&other, 422, "key-reused");
    assert!(
        other.json()["detail"].as_str().unwrap().contains(&id),
        "{other:?}"
    );
    for wrong in ["", "a b", "\u{e4}", &"x".repeat(256)] {
        assert_problem(&begin(&daemon, wrong, &in_vain("db")), 400, "bad-request");
    }
    let two = ["Idempotency-Key: a", "Idempotency-Key: b", JSON];
    let twice = daemon.ask("POST", "/v1/migrations", &two, &in_vain("db"));
    assert_problem(&twice, 400, "bad-request");
    // What was refused has used up no key.
    assert_problem(&begin(&daemon, "three", &in_vain("")), 400, "refused");
    begun(&begin(&daemon, "three", &in_vain("db")));
}
