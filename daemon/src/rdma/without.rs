//! A build without RDMA: says what it lacks.

use transport::{Channel, Regions};

use super::{Plan, Rdma};

const LACKS: &str = "this pagecopyd was built without RDMA (cargo feature `rdma`)";

/// What came of asking.
#[expect(dead_code)]
pub(crate) enum Asked {
    /// The data channels go over RDMA now.
    Over(Vec<Box<dyn Channel>>, String),
    /// They stay as they are, and why.
    Declined(Vec<Box<dyn Channel>>, String),
    /// The connection is of no use any more, and why.
    Spoiled(String),
}

pub(super) fn available() -> Result<(), String> {
    Err(LACKS.to_owned())
}

pub(super) fn pages_on_demand() -> bool {
    false
}

/// The channels stay as they are.
pub(crate) fn ask(channels: Vec<Box<dyn Channel>>, _: &Regions, _: &Plan) -> Asked {
    Asked::Declined(channels, LACKS.to_owned())
}

/// Nobody ever waits for calls.
pub(crate) enum Waiting {}

impl Waiting {
    /// # Errors
    /// Always: what this build lacks.
    pub(crate) fn listen(_: &Rdma, _: u64, _: u16) -> Result<Waiting, String> {
        Err(LACKS.to_owned())
    }

    pub(crate) fn address(&self) -> String {
        match *self {}
    }

    pub(crate) fn secret(&self) -> [u8; 32] {
        match *self {}
    }

    pub(crate) fn gather(
        self,
        _: &Regions,
        _: Vec<Box<dyn Channel>>,
    ) -> Result<Vec<Box<dyn Channel>>, String> {
        match self {}
    }
}
