//! Verbs and rdma_cm behind safe types: all the `unsafe` code of this transport.
//!
//! Every type here owns what it made and gives it back when it is dropped. Addresses and keys may be anything: the device
//! checks them against what is registered, and a wrong one ends the queue pair, not the process.

mod bindings;
mod cm;
mod verbs;

use std::sync::OnceLock;

use self::bindings::Functions;
pub(super) use self::bindings::Wc;
pub(super) use self::cm::{CmEvent, EventKind, Id};
pub(super) use self::verbs::{Device, Kind, Pd, QueuePair, Registration, Work, status_text};
use crate::error::Error;

/// The libraries and at least one device, or why there is none.
fn library() -> Result<&'static Functions, Error> {
    static DEVICES: OnceLock<bool> = OnceLock::new();
    let functions = bindings::functions()
        .map_err(|error| no_device(&format!("install libibverbs1 and librdmacm1: {error}")))?;
    // The list is never given back: it keeps each device open, whatever connections come and go.
    // SAFETY: the count may be null, says rdma_get_devices(3).
    let found = *DEVICES
        .get_or_init(|| !unsafe { (functions.rdma_get_devices)(std::ptr::null_mut()) }.is_null());
    if found {
        Ok(functions)
    } else {
        Err(no_device(
            "`rdma link` lists none when the first one was looked for",
        ))
    }
}

/// Whether this host has an RDMA device.
pub(super) fn available() -> Result<(), Error> {
    library().map(|_| ())
}

fn no_device(why: &str) -> Error {
    Error::Io {
        what: "looking for an RDMA device",
        kind: std::io::ErrorKind::NotFound,
        message: format!("no RDMA device ({why})"),
    }
}

/// The error of a call that has just failed.
fn last_error(what: &'static str) -> Error {
    Error::io(what, &std::io::Error::last_os_error())
}

/// The result of a call of librdmacm's, which sets `errno`.
fn checked(what: &'static str, result: i32) -> Result<(), Error> {
    if result == 0 {
        Ok(())
    } else {
        Err(last_error(what))
    }
}
