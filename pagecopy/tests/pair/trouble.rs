//! What can go wrong in the pair's world, at any step.

use std::time::Duration;

use pagecopy::engine::{Failure, Fault, destination, journal, source};

use super::{Event, Pair, disk_full, qemu_said_no};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    CancelAtSource,
    CancelAtDestination,
    LinkCut,
    SourceQemuFails,
    SourceHostFails,
    DestinationHostFails,
    DestinationQemuFails,
    /// What was being written to its journal is on disk, or is not.
    SourceCrashes {
        synced: bool,
    },
    DestinationCrashes {
        synced: bool,
    },
}

impl Pair {
    /// It goes wrong now.
    pub fn trouble(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::CancelAtSource => self.tell_source(source::Input::Cancel),
            Trouble::CancelAtDestination => self.tell_destination(destination::Input::Cancel),
            Trouble::LinkCut => {
                self.cut();
                self.tell_source(source::Input::LinkLost(lost()));
                self.tell_destination(destination::Input::LinkLost(lost()));
            }
            Trouble::SourceQemuFails => {
                self.tell_source(source::Input::QemuFailed(qemu_said_no()));
            }
            Trouble::SourceHostFails => self.tell_source(source::Input::HostFailed(disk_full())),
            Trouble::DestinationHostFails => {
                self.tell_destination(destination::Input::HostFailed(disk_full()));
            }
            Trouble::DestinationQemuFails => {
                self.tell_destination(destination::Input::QemuFailed(qemu_said_no()));
            }
            Trouble::SourceCrashes { synced } => self.source_crashes(synced),
            Trouble::DestinationCrashes { synced } => self.destination_crashes(synced),
        }
        self.drain();
    }

    /// The daemon is gone; what QEMU was told goes on.
    fn source_crashes(&mut self, synced: bool) {
        // What slows the guest is a thread of the daemon.
        if self.throttled.last().is_some_and(|percent| *percent > 0) {
            self.throttled.push(0);
        }
        self.cut();
        self.source = None;
        for input in self
            .queue
            .extract_if(.., |_, event| matches!(event, Event::ToSource(_)))
        {
            match input.1 {
                Event::ToSource(source::Input::GuestStopped) => self.source_runs = false,
                Event::ToSource(source::Input::GuestResumed) => self.source_runs = true,
                Event::ToSource(source::Input::Journaled(record)) if synced => {
                    self.source_journal.extend(journal::encode(&record));
                }
                _ => {}
            }
        }
        self.tell_destination(destination::Input::LinkLost(lost()));
        self.after(Duration::from_secs(1), Event::RestartSource);
    }

    fn destination_crashes(&mut self, synced: bool) {
        self.cut();
        self.destination = None;
        for input in self
            .queue
            .extract_if(.., |_, event| matches!(event, Event::ToDestination(_)))
        {
            match input.1 {
                Event::ToDestination(destination::Input::GuestRunning) => {
                    self.destination_runs = true;
                }
                Event::ToDestination(destination::Input::Journaled(record)) if synced => {
                    self.destination_journal.extend(journal::encode(&record));
                }
                _ => {}
            }
        }
        self.tell_source(source::Input::LinkLost(lost()));
    }

    /// What was on its way is lost.
    fn cut(&mut self) {
        self.link = false;
        self.queue.retain(|_, event| {
            !matches!(
                event,
                Event::Land(..)
                    | Event::Reconnect
                    | Event::ReconnectAll
                    | Event::ToSource(source::Input::Message(_))
                    | Event::ToDestination(
                        destination::Input::Message(_)
                            | destination::Input::Barrier { .. }
                            | destination::Input::Left { .. }
                    )
            )
        });
    }
}

fn lost() -> Failure {
    Failure::new(
        Fault::Network,
        "the connection was reset",
        "look at the cable",
    )
}
