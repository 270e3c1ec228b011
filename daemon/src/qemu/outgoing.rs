//! The source's orders to QEMU: stop the guest, save its device state, or take the guest back.
//!
//! QEMU's own `migrate` does the stopping and the saving. Its stream comes to us through one end of a socket pair that
//! is passed by `getfd`, so it needs no path that both processes can see: it works across users, mount namespaces and
//! QEMU's sandbox.
//!
//! [`Outgoing::resume`] may be called at any moment, also while `stop` or `save` are under way: it wins.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pagecopy::limits::{MAX_DEVICE_STATE, MAX_DEVICE_STATE_CHUNK};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::broadcast::Receiver;
use tokio::sync::{Mutex, mpsc};

use super::status::{failure_words, is_final, migration_status, query_status, run_guest, wait_for};
use crate::failure::{Failure, host, qemu};
use crate::log;
use crate::qmp::{Qmp, QmpEvent};

/// How long QEMU may take to stop: it drains and flushes the guest's disks.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to save its devices.
const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to give up a migration.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);
/// States of a guest that a migration stopped. In any other `cont` would do harm: it makes a QEMU that waits for a guest
/// run it as soon as it is loaded.
const STANDS_STILL: [&str; 4] = ["paused", "postmigrate", "finish-migrate", "save-vm"];
/// The name of our descriptor inside QEMU.
const FD_NAME: &str = "pagecopy-device-state";

/// The guest's way out of its QEMU.
#[derive(Debug)]
pub struct Outgoing {
    qmp: Arc<Qmp>,
    /// Set by `resume`: no order that would stop the guest is given any more.
    taken_back: AtomicBool,
    /// Held while orders are given, so that `resume` comes wholly before or wholly after them.
    orders: Mutex<()>,
    /// What `stop` leaves for `save`.
    stopped: Mutex<Option<Stopped>>,
}

#[derive(Debug)]
struct Stopped {
    events: Receiver<QmpEvent>,
    stream: mpsc::UnboundedReceiver<Result<Bytes, Failure>>,
}

impl Outgoing {
    /// For the guest behind `qmp`, whose settings are in place.
    pub fn new(qmp: Arc<Qmp>) -> Outgoing {
        Outgoing {
            qmp,
            taken_back: AtomicBool::new(false),
            orders: Mutex::new(()),
            stopped: Mutex::new(None),
        }
    }

    /// Stops the guest: returns when QEMU is at `pre-switchover`, its disks drained and its RAM final.
    ///
    /// # Errors
    /// QEMU refused, failed or left, or the guest was taken back meanwhile.
    pub async fn stop(&self) -> Result<(), Failure> {
        let mut events = self.qmp.subscribe();
        let stream = {
            let _orders = self.orders.lock().await;
            if self.taken_back.load(Ordering::SeqCst) {
                return Err(taken_back());
            }
            let (ours, theirs) = socket_pair()?;
            self.qmp
                .execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd())
                .await?;
            drop(theirs);
            self.qmp
                .execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") }))
                .await?;
            let (sender, stream) = mpsc::unbounded_channel();
            log::spawn(read_stream(ours, sender));
            stream
        };
        let reached = |status: &str| status == "pre-switchover" || is_final(status);
        match wait_for(&self.qmp, &mut events, STOP_LIMIT, reached)
            .await?
            .as_str()
        {
            "pre-switchover" => {
                *self.stopped.lock().await = Some(Stopped { events, stream });
                Ok(())
            }
            status => Err(self.ended_early(status, "stopping the guest").await),
        }
    }

    /// Lets QEMU save its devices; gives every piece of the stream to `sink`, in order.
    ///
    /// # Errors
    /// QEMU refused, failed or left, or the stream is larger than [`MAX_DEVICE_STATE`].
    pub async fn save(&self, sink: impl Fn(Bytes)) -> Result<(), Failure> {
        let Some(Stopped {
            mut events,
            mut stream,
        }) = self.stopped.lock().await.take()
        else {
            return Err(taken_back());
        };
        {
            let _orders = self.orders.lock().await;
            if self.taken_back.load(Ordering::SeqCst) {
                return Err(taken_back());
            }
            self.qmp
                .execute("migrate-continue", json!({ "state": "pre-switchover" }))
                .await?;
        }
        let forward = async {
            while let Some(piece) = stream.recv().await {
                sink(piece?);
            }
            Ok::<(), Failure>(())
        };
        let completed = wait_for(&self.qmp, &mut events, SAVE_LIMIT, is_final);
        let (forwarded, status) = tokio::join!(forward, completed);
        match status?.as_str() {
            "completed" => forwarded,
            status => Err(self.ended_early(status, "saving the device state").await),
        }
    }

    /// Takes the guest back, whatever QEMU is at, and checks that it runs. May be repeated.
    ///
    /// # Errors
    /// The guest does not run, and why.
    pub async fn resume(&self) -> Result<(), Failure> {
        self.taken_back.store(true, Ordering::SeqCst);
        let _orders = self.orders.lock().await;
        let mut events = self.qmp.subscribe();
        let status = migration_status(&self.qmp).await?;
        if !is_final(&status) {
            self.qmp.execute("migrate_cancel", json!({})).await?;
            // QEMU starts the guest itself, before it reports the end.
            wait_for(&self.qmp, &mut events, CANCEL_LIMIT, is_final).await?;
        }
        let state = query_status(&self.qmp).await?;
        if state.running {
            return Ok(());
        }
        if !STANDS_STILL.contains(&state.status.as_str()) {
            return Err(qemu(
                format!(
                    "QEMU's state is \"{}\": its guest is not the one that was stopped",
                    state.status
                ),
                "see what happened to QEMU; it was not touched",
            ));
        }
        run_guest(
            &self.qmp,
            "QEMU took the guest back but does not run it",
            "see QEMU's log; \"cont\" on its monitor starts the guest",
        )
        .await
    }

    /// Ends QEMU, whose guest runs elsewhere now.
    pub async fn quit(&self) {
        if let Err(error) = self.qmp.execute("quit", json!({})).await {
            tracing::debug!(%error, "QEMU did not answer quit");
        }
    }

    async fn ended_early(&self, status: &str, doing: &str) -> Failure {
        if self.taken_back.load(Ordering::SeqCst) {
            return taken_back();
        }
        let words = if status == "failed" {
            failure_words(&self.qmp).await
        } else {
            "somebody cancelled it".to_owned()
        };
        qemu(
            format!("QEMU's migration {status} while {doing}: {words}"),
            "see QEMU's log; check that no other tool commands this QEMU, then try again",
        )
    }
}

fn taken_back() -> Failure {
    qemu("the guest was taken back", "")
}

/// Reads QEMU's stream to its end, also before anybody wants it: QEMU must never wait for us.
async fn read_stream(
    mut stream: UnixStream,
    pieces: mpsc::UnboundedSender<Result<Bytes, Failure>>,
) {
    let mut total = 0_u64;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(MAX_DEVICE_STATE_CHUNK);
        let mut piece = buffer.split_off(0);
        let mut limited = (&mut stream).take(MAX_DEVICE_STATE_CHUNK as u64);
        let read = limited.read_buf(&mut piece).await;
        let message = match read {
            Ok(0) => return,
            Ok(read) => {
                total += read as u64;
                if total <= MAX_DEVICE_STATE {
                    Ok(piece.split_to(read).freeze())
                } else {
                    Err(too_much())
                }
            }
            Err(error) => Err(qemu(
                format!("QEMU's device state could not be read: {error}"),
                "try again",
            )),
        };
        buffer = piece;
        let failed = message.is_err();
        // Dropping the stream on either end makes QEMU's migration fail, and QEMU take the guest back.
        if pieces.send(message).is_err() || failed {
            return;
        }
    }
}

fn too_much() -> Failure {
    qemu(
        format!(
            "the device state is larger than {} MiB",
            MAX_DEVICE_STATE >> 20
        ),
        "see which device is so large; RAM that is not shared is sent by QEMU and counts here",
    )
}

/// Two connected unix sockets: ours for tokio, theirs to be passed to QEMU.
pub(crate) fn socket_pair() -> Result<(UnixStream, StdUnixStream), Failure> {
    let pair = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok::<_, std::io::Error>((UnixStream::from_std(ours)?, theirs))
    };
    pair().map_err(|error| {
        host(
            format!("no socket pair for the device state: {error}"),
            "raise the limit of open files",
        )
    })
}
