//! The destination's orders to QEMU: load the device state, run the guest.
//!
//! QEMU is told of an incoming migration only when the whole device state is in memory and its RAM is whole. Until
//! then it is untouched, so a migration that ends early leaves it as it was, ready for the next.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::outgoing::socket_pair;
use super::status::{failure_words, is_final, query_status, run_guest, wait_for};
use crate::failure::{Failure, qemu};
use crate::qmp::{Qmp, Version};

/// How long QEMU may take to load its devices.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// The name of our descriptor inside QEMU.
const FD_NAME: &str = "pagecopy-device-state";
/// From this version on QEMU can be told to stay when an incoming migration fails, and to say why.
const CAN_STAY: Version = Version {
    major: 9,
    minor: 1,
    micro: 0,
};

/// The guest's way into its QEMU.
#[derive(Debug)]
pub struct Incoming {
    qmp: Arc<Qmp>,
    /// It has loaded a guest, which stands still.
    loaded: AtomicBool,
}

impl Incoming {
    /// For the QEMU behind `qmp`, which waits for a migration and whose settings are in place.
    pub fn new(qmp: Arc<Qmp>) -> Incoming {
        Incoming {
            qmp,
            loaded: AtomicBool::new(false),
        }
    }

    /// Gives QEMU the device state. Returns when it has loaded all of it and stands paused.
    ///
    /// # Errors
    /// QEMU refused, failed or left, in its words.
    pub async fn load(&self, state: &[Bytes]) -> Result<(), Failure> {
        let mut events = self.qmp.subscribe();
        let (ours, theirs) = socket_pair()?;
        // Before a migration comes in, this only sets what -S has set: nobody's `cont` may have undone it meanwhile. What
        // follows is carried out after it, and nobody waits in between: the guest stands still.
        let stop = self.qmp.give("stop", json!({}), None).await?;
        let name = json!({ "fdname": FD_NAME });
        let getfd = self.qmp.give("getfd", name, Some(theirs.as_fd())).await?;
        drop(theirs);
        let mut arguments = json!({ "uri": format!("fd:{FD_NAME}") });
        if self.qmp.version() >= CAN_STAY {
            arguments["exit-on-error"] = json!(false);
        }
        let incoming = self.qmp.give("migrate-incoming", arguments, None).await?;
        stop.answered().await?;
        getfd.answered().await?;
        let begun = incoming.answered().await;
        begun.map_err(Failure::from).map_err(rejected)?;
        let written = write_all(ours, state);
        let ended = wait_for(&self.qmp, &mut events, LOAD_LIMIT, is_final);
        let (written, ended) = tokio::join!(written, ended);
        match ended.map_err(rejected)?.as_str() {
            "completed" => {}
            _ => return Err(rejected(qemu(failure_words(&self.qmp).await, ""))),
        }
        if let Err(error) = written {
            return Err(rejected(qemu(format!("it stopped reading ({error})"), "")));
        }
        let state = query_status(&self.qmp).await?;
        if state.running {
            return Err(qemu(
                "QEMU started the guest by itself after loading it",
                "start the destination QEMU with -S; end both QEMUs' disks' use before anything else runs",
            ));
        }
        self.loaded.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Starts the guest and checks that it runs. May be repeated.
    ///
    /// # Errors
    /// QEMU refused or left, in its words.
    pub async fn run(&self) -> Result<(), Failure> {
        // What it has just said of a guest that it has just loaded it is not asked again. It is the same QEMU: one that
        // is started anew has another connection.
        if !self.loaded.swap(false, Ordering::Relaxed) && self.runs_already().await? {
            return Ok(());
        }
        run_guest(
            &self.qmp,
            "QEMU does not run the guest",
            "see QEMU's log; the guest is whole here, and \"cont\" on QEMU's monitor starts it",
        )
        .await
    }

    /// Whether the guest runs.
    ///
    /// # Errors
    /// There is no guest.
    async fn runs_already(&self) -> Result<bool, Failure> {
        let state = query_status(&self.qmp).await?;
        // `cont` would make a QEMU that waits for a guest run the next one as soon as it is loaded.
        if matches!(state.status.as_str(), "inmigrate" | "prelaunch") {
            return Err(qemu(
                format!(
                    "QEMU does not have the guest: its state is \"{}\"",
                    state.status
                ),
                "it was started anew; the guest is still whole at the source",
            ));
        }
        Ok(state.running)
    }
}

async fn write_all(mut stream: UnixStream, state: &[Bytes]) -> io::Result<()> {
    for piece in state {
        stream.write_all(piece).await?;
    }
    stream.shutdown().await
}

fn rejected(failure: Failure) -> Failure {
    qemu(
        format!(
            "the destination's QEMU did not take the device state: {}",
            failure.what
        ),
        "start the destination's QEMU anew with the same devices, machine type and CPU model as the source's; its log \
         says which device does not fit",
    )
}
