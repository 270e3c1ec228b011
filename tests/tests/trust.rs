//! Peers that must not be trusted: each attempt fails on both sides with its own reason, and the guest runs on.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use tests::real::{Certs, Machine, Scratch, Side, Trust, Version, World, assert_stayed};

fn allow(name: &str) -> Vec<String> {
    vec![name.to_owned()]
}

/// Tries to move a guest from A to B. The source must say `source_words`; the log of B's daemon `destination_words`.
fn refused(
    scratch: Scratch,
    a: &Trust,
    b: &Trust,
    source_words: &[&str],
    destination_words: &[&str],
) {
    refused_after(0, scratch, a, b, source_words, destination_words);
}

/// The same, `ms` milliseconds after the daemons have started.
fn refused_after(
    ms: usize,
    scratch: Scratch,
    a: &Trust,
    b: &Trust,
    source_words: &[&str],
    destination_words: &[&str],
) {
    let world = World::with(scratch, a, b);
    let machine = Machine::new(Version::V10_0, 64, "rate=0");
    let mut source = world.guest("source", &machine);
    let mut destination = world.waiting("destination", &machine);
    // The guest beats once a millisecond, or a little slower when the machine is busy.
    source.serial.wait_beats(ms);
    let begun = Instant::now();
    world
        .migrate(Side::A, "vm", &source, &destination, &[])
        .failed_with(source_words);
    world.daemon(Side::B).assert_logs(destination_words);
    assert_stayed(&mut source, Some(&mut destination), begun);
}

#[test]
fn destination_not_on_the_allow_list() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let a = Trust::Tls(certs.identity("a"), allow("somebody-else"));
    let b = Trust::Tls(certs.identity("b"), allow("a"));
    refused(scratch, &a, &b, &["allow", "b"], &[]);
}

#[test]
fn source_not_on_the_allow_list() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let a = Trust::Tls(certs.identity("a"), allow("b"));
    let b = Trust::Tls(certs.identity("b"), allow("somebody-else"));
    refused(scratch, &a, &b, &["refused"], &["allow"]);
}

/// Long enough for a daemon to start with the certificate: it does not start with one that has expired.
const SOON: Duration = Duration::from_secs(3);
const AFTER_SOON_MS: usize = 4200;

#[test]
fn certificate_of_the_destination_expires() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let a = Trust::Tls(certs.identity("a"), allow("b"));
    let b = Trust::Tls(certs.expiring("b", SOON), allow("a"));
    refused_after(AFTER_SOON_MS, scratch, &a, &b, &["expired"], &["expired"]);
}

#[test]
fn certificate_of_the_source_expires() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let a = Trust::Tls(certs.expiring("a", SOON), allow("b"));
    let b = Trust::Tls(certs.identity("b"), allow("a"));
    refused_after(AFTER_SOON_MS, scratch, &a, &b, &["expired"], &["expired"]);
}

#[test]
fn certificates_of_different_authorities() {
    let scratch = Scratch::new();
    let ours = Certs::new(scratch.files(), "authority");
    let theirs = Certs::new(scratch.files(), "foreign");
    let a = Trust::Tls(ours.identity("a"), allow("b"));
    let b = Trust::Tls(theirs.identity("b"), allow("a"));
    refused(scratch, &a, &b, &["authority"], &["authority"]);
}

#[test]
fn plaintext_to_tls() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let b = Trust::Tls(certs.identity("b"), allow("a"));
    refused(
        scratch,
        &Trust::Plaintext,
        &b,
        &["TLS"],
        &["does not use TLS"],
    );
}

#[test]
fn tls_to_plaintext() {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let a = Trust::Tls(certs.identity("a"), allow("b"));
    refused(scratch, &a, &Trust::Plaintext, &["TLS"], &["TLS"]);
}
