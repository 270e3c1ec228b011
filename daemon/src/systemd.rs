//! What systemd gives a service and is told by it: a socket that it made, readiness, reloads, and that the daemon is alive.
//! Without systemd none of it is there, and nothing is missing.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use sd_notify::NotifyState;

use crate::failure::{Failure, host, operator};
use crate::sys;

/// The API's socket, if systemd has made it (a socket unit). To be called by the only thread.
///
/// # Errors
/// More was passed than one socket, or it is not the one that the configuration names.
pub(crate) fn passed_socket(api: &Path) -> Result<Option<UnixListener>, Failure> {
    let wrong = |what: String| {
        operator(
            format!("systemd passed {what}"),
            format!(
                "let the socket unit have one ListenStream, and api in the configuration name it: {}",
                api.display()
            ),
        )
    };
    let passed = sys::passed_descriptors()
        .map_err(|error| wrong(format!("what cannot be used: {error}")))?;
    let mut passed = passed.into_iter();
    let Some(descriptor) = passed.next() else {
        return Ok(None);
    };
    if passed.next().is_some() {
        return Err(wrong("more than one socket".to_owned()));
    }
    let listener = UnixListener::from(descriptor);
    let address = listener
        .local_addr()
        .map_err(|error| wrong(format!("no unix socket: {error}")))?;
    if address.as_pathname() != Some(api) {
        return Err(wrong(format!("another socket than the API's: {address:?}")));
    }
    listener
        .set_nonblocking(true)
        .map_err(|error| host(error.to_string(), "report this"))?;
    Ok(Some(listener))
}

/// Tells systemd, if it started the daemon and wants to know.
pub(crate) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// A reload begins; [`NotifyState::Ready`] ends it.
pub(crate) fn tell_reloading() {
    let mut states = vec![NotifyState::Reloading];
    states.extend(NotifyState::monotonic_usec_now());
    tell(&states);
}

/// Tells systemd that the daemon is alive, for as long as it is: tasks get their turn, and `is_alive` is true. Returns when it
/// is not, or when systemd does not want to know.
pub(crate) async fn keep_watchdog(is_alive: impl Fn() -> bool) {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| *limit > Duration::ZERO) else {
        return;
    };
    let mut turns = tokio::time::interval(limit / 2);
    loop {
        turns.tick().await;
        if !is_alive() {
            tracing::error!("no peer is accepted any more: systemd will start pagecopyd again");
            return;
        }
        tell(&[NotifyState::Watchdog]);
    }
}
