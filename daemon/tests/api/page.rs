//! The status page as it is sent, and who may have it and the rest of the API. What it looks like: `tests/tests/page.rs`.

use super::harness::{Daemon, JSON, in_vain};
use super::problems::assert_problem;

#[test]
fn it_is_one_document_that_runs_nothing_but_its_own_script() {
    let daemon = Daemon::start("page");
    let page = daemon.get("/");
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    assert_eq!(page.header("cache-control"), "no-store");
    let policy = page.header("content-security-policy");
    for part in [
        "default-src 'none'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    let (_, nonce) = policy.split_once("script-src 'nonce-").unwrap();
    let (nonce, _) = nonce.split_once('\'').unwrap();
    assert_eq!(nonce.len(), 32, "{policy}");
    let marked = format!("nonce=\"{nonce}\"");
    assert_eq!(
        page.body.matches(&marked).count(),
        2,
        "a script and a style"
    );
    assert!(!page.body.contains("{nonce}"));
    for outside in [
        "src=",
        "@import",
        "url(",
        "innerHTML",
        "style=\"",
        "onclick",
    ] {
        assert!(!page.body.contains(outside), "the page has {outside}");
    }
    let again = daemon.get("/");
    assert!(
        !again.body.contains(&marked),
        "the word is another each time"
    );
}

#[test]
fn what_other_sites_ask_for_is_refused() {
    let daemon = Daemon::start("foreign");
    let begin = in_vain("web");
    for wrong in [
        "Host: evil.example",
        "Origin: http://evil.example",
        "Sec-Fetch-Site: cross-site",
    ] {
        for (method, path) in [("GET", "/"), ("GET", "/v1/events"), ("GET", "/nothing")] {
            assert_problem(
                &daemon.asked_by(wrong, method, path, &[], ""),
                403,
                "foreign",
            );
        }
        let asked = daemon.asked_by(wrong, "POST", "/v1/migrations", &[JSON], &begin);
        assert_problem(&asked, 403, "foreign");
    }
    assert_eq!(daemon.get("/v1/migrations").body, "[]");
    let own = [
        "Origin: http://localhost",
        "Sec-Fetch-Site: same-origin",
        JSON,
    ];
    let asked = daemon.ask("POST", "/v1/migrations", &own, &begin);
    assert_eq!(asked.status, 201, "{asked:?}");
}

#[test]
fn the_journal_has_events_and_records() {
    let daemon = Daemon::start("journal");
    let id = daemon.fail("web");
    let path = format!("/v1/migrations/{id}/journal");
    let journal = daemon.get(&path).json();
    let events = journal["events"].as_array().unwrap();
    assert_eq!(events.last().unwrap()["event"], "finished", "{journal}");
    // QEMU was not there, so nothing was begun.
    assert_eq!(journal["records"], serde_json::json!([]));
    assert_eq!(daemon.get(&format!("{path}?side=source")).json(), journal);
    let other = daemon.ask("GET", &format!("{path}?side=destination"), &[], "");
    assert_problem(&other, 404, "not-found");
    for wrong in ["side=left", "sid=source", "side=source&side=source"] {
        let answer = daemon.ask("GET", &format!("{path}?{wrong}"), &[], "");
        assert_problem(&answer, 400, "bad-request");
    }
}
