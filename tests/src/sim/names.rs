//! Short names of outputs: for the trace, for a plan to say when something goes wrong, and for the count of where daemons
//! died.

use std::fmt;

use pagecopy::engine::journal::Record;
use pagecopy::engine::{destination, source};

use super::plan::Side;

/// The name of an output; of messages and records with what they are, as in `Send(Commit)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    kind: &'static str,
    of: &'static str,
}

impl Name {
    const fn plain(kind: &'static str) -> Name {
        Name { kind, of: "" }
    }

    /// Whether it is written so.
    pub(super) fn is(self, text: &str) -> bool {
        let Some(rest) = text.strip_prefix(self.kind) else {
            return false;
        };
        if self.of.is_empty() {
            return rest.is_empty();
        }
        rest.strip_prefix('(')
            .and_then(|rest| rest.strip_suffix(')'))
            == Some(self.of)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.of.is_empty() {
            f.write_str(self.kind)
        } else {
            write!(f, "{}({})", self.kind, self.of)
        }
    }
}

/// Every output of both engines, as [`Name`] writes it, but for reports, which are for people, and for what is asked and
/// said of pages that differ with `--verify`: no such page is ever found unless a mistake is planted.
pub const OUTPUTS: [(Side, &str); 47] = {
    use Side::{Destination, Source};
    [
        (Source, "Send(Hello)"),
        (Source, "Send(Populate)"),
        (Source, "Send(Ping)"),
        (Source, "Send(Stopped)"),
        (Source, "Send(DeviceState)"),
        (Source, "Send(DeviceStateEnd)"),
        (Source, "Send(Digests)"),
        (Source, "Send(Commit)"),
        (Source, "Send(Closed)"),
        (Source, "Send(Query)"),
        (Source, "Send(Abort)"),
        (Source, "SendOn(Barrier)"),
        (Source, "Journal(CommitIntent)"),
        (Source, "Journal(GuestMoved)"),
        (Source, "Journal(RolledBack)"),
        (Source, "Attach"),
        (Source, "Scan"),
        (Source, "DrainIo"),
        (Source, "LookAgain"),
        (Source, "Throttle"),
        (Source, "Journal(TakenBack)"),
        (Source, "Push"),
        (Source, "StopGuest"),
        (Source, "SaveDeviceState"),
        (Source, "Digest"),
        (Source, "ResumeGuest"),
        (Source, "Detach"),
        (Source, "QuitGuest"),
        (Source, "Connect"),
        (Source, "Finished"),
        (Destination, "Send(Accept)"),
        (Destination, "Send(BarrierReached)"),
        (Destination, "Send(Pong)"),
        (Destination, "Send(Loaded)"),
        (Destination, "Send(Running)"),
        (Destination, "Send(Abort)"),
        (Destination, "Journal(Committed)"),
        (Destination, "Journal(Running)"),
        (Destination, "Journal(Aborted)"),
        (Destination, "Journal(Closed)"),
        (Destination, "Prepare"),
        (Destination, "Allocate"),
        (Destination, "KeepDeviceState"),
        (Destination, "Digest"),
        (Destination, "LoadDeviceState"),
        (Destination, "RunGuest"),
        (Destination, "Finished"),
    ]
};

/// Outputs that only post-copy has, and the steps of fetching a page, which are no engine's.
pub const POSTCOPY_OUTPUTS: [(Side, &str); 20] = {
    use Side::{Destination, Source};
    [
        (Source, "OpenReads"),
        (Source, "Send(Lacking)"),
        (Source, "Send(LackingEnd)"),
        (Source, "Journal(Serving)"),
        (Source, "ConnectAll"),
        (Source, "Send(Serve)"),
        (Source, "Journal(Released)"),
        (Destination, "Arm"),
        (Destination, "Journal(Armed)"),
        (Destination, "StopPulling"),
        (Destination, "Pull"),
        (Destination, "Send(Resumed)"),
        (Destination, "Send(Lacks)"),
        (Destination, "Journal(Whole)"),
        (Destination, "Send(Whole)"),
        (Destination, "Poison"),
        (Destination, "Read"),
        (Destination, "Mark"),
        (Destination, "Map"),
        (Destination, "Release"),
    ]
};

/// A step of fetching a page.
pub(super) fn of_step(step: &'static str) -> Name {
    Name::plain(step)
}

/// The name of a source's output.
pub(super) fn of_source(output: &source::Output) -> Name {
    use source::Output;
    Name::plain(match output {
        Output::Send(message) => {
            return Name {
                kind: "Send",
                of: message.name(),
            };
        }
        Output::SendOn(_, message) => {
            return Name {
                kind: "SendOn",
                of: message.name(),
            };
        }
        Output::Journal(record) => {
            return Name {
                kind: "Journal",
                of: of_record(record),
            };
        }
        Output::Attach => "Attach",
        Output::Scan { .. } => "Scan",
        Output::DrainIo => "DrainIo",
        Output::LookAgain => "LookAgain",
        Output::Throttle { .. } => "Throttle",
        Output::Push { .. } => "Push",
        Output::OpenChannels { .. } => "OpenChannels",
        Output::UseChannels { .. } => "UseChannels",
        Output::CloseChannels { .. } => "CloseChannels",
        Output::StopGuest => "StopGuest",
        Output::SaveDeviceState => "SaveDeviceState",
        Output::Digest => "Digest",
        Output::PageDigests { .. } => "PageDigests",
        Output::ResumeGuest => "ResumeGuest",
        Output::Detach => "Detach",
        Output::QuitGuest => "QuitGuest",
        Output::Connect => "Connect",
        Output::OpenReads => "OpenReads",
        Output::ConnectAll => "ConnectAll",
        Output::Decided(_) => "Decided",
        Output::Report(_) => "Report",
        Output::Finished(_) => "Finished",
    })
}

/// The name of a destination's output.
pub(super) fn of_destination(output: &destination::Output) -> Name {
    use destination::Output;
    Name::plain(match output {
        Output::Send(message) => {
            return Name {
                kind: "Send",
                of: message.name(),
            };
        }
        Output::Journal(record) => {
            return Name {
                kind: "Journal",
                of: of_record(record),
            };
        }
        Output::Prepare { .. } => "Prepare",
        Output::TakeChannels { .. } => "TakeChannels",
        Output::Allocate(_) => "Allocate",
        Output::KeepDeviceState(_) => "KeepDeviceState",
        Output::Digest => "Digest",
        Output::PageDigests { .. } => "PageDigests",
        Output::LoadDeviceState => "LoadDeviceState",
        Output::RunGuest => "RunGuest",
        Output::Arm { .. } => "Arm",
        Output::StopPulling => "StopPulling",
        Output::Pull => "Pull",
        Output::Poison => "Poison",
        Output::Decided(_) => "Decided",
        Output::Report(_) => "Report",
        Output::Finished { .. } => "Finished",
    })
}

fn of_record(record: &Record) -> &'static str {
    match record {
        Record::Begun { .. } => "Begun",
        Record::CommitIntent => "CommitIntent",
        Record::GuestMoved => "GuestMoved",
        Record::RolledBack => "RolledBack",
        Record::TakenBack => "TakenBack",
        Record::Told => "Told",
        Record::Committed => "Committed",
        Record::Running => "Running",
        Record::Aborted => "Aborted",
        Record::Closed => "Closed",
        Record::Serving { .. } => "Serving",
        Record::Released { .. } => "Released",
        Record::Armed { .. } => "Armed",
        Record::Whole { .. } => "Whole",
    }
}
