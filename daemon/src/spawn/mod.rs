//! QEMUs that this host starts for guests that come (`migrate --spawn`): what is started, under which policy, by whom.
//!
//! [`plan`] makes of a source's command line what is started here; it is pure. The starter (`starter.rs`) is a process of its
//! own, with the privileges that it takes to start a program as another user, and keeps to the policy by itself: what the
//! daemon asks of it is only what a source has asked. The daemon's end of it is in `client.rs`.

mod client;
mod options;
mod pipe;
mod plan;
mod policy;
mod starter;
mod words;

pub use client::{Starter, run_if_called};
pub use pipe::Started;
pub use plan::{Ask, Plan, plan};
pub use policy::Policy;
pub use words::{Prop, Props};

/// The processes that were started for the migration `id` and run.
///
/// # Errors
/// `/proc` cannot be read.
pub(crate) fn processes(id: uuid::Uuid) -> std::io::Result<Vec<i32>> {
    starter::processes(id)
}
