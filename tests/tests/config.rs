//! Configurations that `pagecopyd` does not start with, each with its own clear error.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use tests::real::{Certs, Identity, Scratch, program};

/// Starts the daemon with this configuration; it must end by itself, and its words must hold all of `words`.
fn refused(text: &str, words: &[&str]) {
    let scratch = Scratch::new();
    let config = scratch.files().join("pagecopyd.toml");
    std::fs::write(
        &config,
        text.replace("DIR", scratch.files().to_str().unwrap()),
    )
    .unwrap();
    let output = Command::new("timeout")
        .args(["--signal=KILL", "20"])
        .arg(program("pagecopyd"))
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.status.success(), "{said}");
    assert!(
        output.status.code().is_some_and(|code| code < 128),
        "it did not end by itself: {said}"
    );
    for word in words {
        assert!(said.contains(word), "does not say {word:?}: {said}");
    }
}

const BASE: &str =
    "name = \"a\"\nlisten = \"127.0.0.1:0\"\napi = \"DIR/api.sock\"\nstate-dir = \"DIR/state\"\n";

#[test]
fn neither_tls_nor_insecure_plaintext() {
    refused(BASE, &["insecure-plaintext", "[tls]"]);
}

#[test]
fn unknown_key() {
    refused(
        &format!("{BASE}insecure-plaintext = true\nlissten = \"x\"\n"),
        &["lissten"],
    );
}

#[test]
fn unknown_key_in_tls() {
    let tls = "[tls]\nca = \"c\"\ncert = \"c\"\nkey = \"k\"\nallow = [\"b\"]\nverify = false\n";
    refused(&format!("{BASE}{tls}"), &["verify"]);
}

#[test]
fn missing_key() {
    refused("name = \"a\"\ninsecure-plaintext = true\n", &["listen"]);
}

#[test]
fn certificate_file_absent() {
    let tls =
        "[tls]\nca = \"DIR/nothing.pem\"\ncert = \"DIR/c\"\nkey = \"DIR/k\"\nallow = [\"b\"]\n";
    refused(&format!("{BASE}{tls}"), &["nothing.pem"]);
}

#[test]
fn address_that_is_none() {
    let text = BASE.replace("127.0.0.1:0", "here");
    refused(
        &format!("{text}insecure-plaintext = true\n"),
        &["listen", "here"],
    );
}

#[test]
fn configuration_file_absent() {
    let output = Command::new(program("pagecopyd"))
        .args(["--config", "/nonexistent/pagecopyd.toml"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/pagecopyd.toml"));
}

#[test]
fn own_certificate_has_expired() {
    let files = Scratch::new();
    let identity = Certs::new(files.files(), "authority").expiring("a", Duration::ZERO);
    let Identity { ca, cert, key } = &identity;
    let tls = format!("[tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\nallow = [\"b\"]\n");
    refused(
        &format!("{BASE}{tls}"),
        &["expired", cert.to_str().unwrap()],
    );
}
