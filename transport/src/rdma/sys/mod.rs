//! Verbs and rdma_cm behind safe types: all the `unsafe` code of this transport.
//!
//! Every type here owns what it made and gives it back when it is dropped. Addresses and keys may be anything: the device
//! checks them against what is registered, and a wrong one ends the queue pair, not the process.

mod bindings;
mod cm;
mod verbs;

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::bindings::Functions;
pub(super) use self::bindings::Wc;
pub(super) use self::cm::{CmEvent, EventKind, Id};
pub(super) use self::verbs::{Device, Kind, Pd, QueuePair, Registration, Work, status_text};
use crate::error::Error;

/// Devices that have been seen. Each stays open from then on, whatever connections come and go.
static KEPT: Mutex<BTreeSet<Device>> = Mutex::new(BTreeSet::new());

/// The libraries and at least one device, or why there is none.
fn library() -> Result<&'static Functions, Error> {
    let functions = bindings::functions()
        .map_err(|error| no_device(&format!("install libibverbs1 and librdmacm1: {error}")))?;
    let none = kept().is_empty();
    if none && devices().is_empty() {
        return Err(no_device("`rdma link` lists none"));
    }
    Ok(functions)
}

fn kept() -> MutexGuard<'static, BTreeSet<Device>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices that this host has now.
pub(super) fn devices() -> Vec<Device> {
    let Ok(functions) = bindings::functions() else {
        return Vec::new();
    };
    let mut count = 0;
    // SAFETY: the count is written during the call only.
    let list = unsafe { (functions.rdma_get_devices)(&raw mut count) };
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: it is a list of so many, which is ours until it is given back.
    let contexts = unsafe { std::slice::from_raw_parts(list, usize::try_from(count).unwrap_or(0)) };
    let devices: Vec<Device> = contexts
        .iter()
        .filter_map(|it| Device::listed(*it))
        .collect();
    let mut kept = kept();
    if devices.iter().all(|device| kept.contains(device)) {
        // SAFETY: it is given back once. Another one, which is not, keeps each of its devices open.
        unsafe { (functions.rdma_free_devices)(list) };
    } else {
        // Never given back: it keeps them open.
        kept.extend(&devices);
    }
    devices
}

/// Whether a device that somebody has open now stays so. One that has just been removed does not.
fn keep(device: Device) -> bool {
    let known = kept().contains(&device);
    known || devices().contains(&device)
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
