//! The conformance suite: one body over every back end, and what is particular to sockets and certificates.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub
)]

mod body;
mod certificates;
mod harness;
mod hostile;
#[cfg(feature = "rdma")]
mod rdma;

use harness::{Mem, Sockets};

#[test]
fn tcp() {
    body::all(&Sockets::tcp());
}

#[test]
fn unix() {
    body::all(&Sockets::unix());
}

#[test]
fn tcp_between_files() {
    body::all(&Sockets::tcp().of_files());
}

#[test]
fn unix_between_files() {
    body::all(&Sockets::unix().of_files());
}

#[test]
fn mem() {
    body::all(&Mem::new());
}

#[test]
fn tls() {
    body::all(&certificates::sockets());
}

#[test]
fn tls_between_files() {
    body::all(&certificates::sockets().of_files());
}
