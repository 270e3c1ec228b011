//! Short names of outputs, records and messages: for the trace, and for a plan to say when something goes wrong.

use std::borrow::Cow;

use pagecopy::engine::journal::Record;
use pagecopy::engine::{destination, source};

/// The name of a source's output; of messages and records with what they are.
pub(super) fn of_source(output: &source::Output) -> Cow<'static, str> {
    use source::Output;
    Cow::Borrowed(match output {
        Output::Send(message) | Output::SendOn(_, message) => {
            return Cow::Owned(format!("Send({})", message.name()));
        }
        Output::Journal(record) => return Cow::Owned(format!("Journal({})", of_record(record))),
        Output::Attach => "Attach",
        Output::Scan { .. } => "Scan",
        Output::DrainIo => "DrainIo",
        Output::Push { .. } => "Push",
        Output::LookAgain => "LookAgain",
        Output::StopGuest => "StopGuest",
        Output::SaveDeviceState => "SaveDeviceState",
        Output::Digest => "Digest",
        Output::PageDigests { .. } => "PageDigests",
        Output::ResumeGuest => "ResumeGuest",
        Output::Detach => "Detach",
        Output::QuitGuest => "QuitGuest",
        Output::Connect => "Connect",
        Output::Decided(_) => "Decided",
        Output::Report(_) => "Report",
        Output::Finished(_) => "Finished",
    })
}

/// The name of a destination's output; of messages and records with what they are.
pub(super) fn of_destination(output: &destination::Output) -> Cow<'static, str> {
    use destination::Output;
    Cow::Borrowed(match output {
        Output::Send(message) => return Cow::Owned(format!("Send({})", message.name())),
        Output::Journal(record) => return Cow::Owned(format!("Journal({})", of_record(record))),
        Output::Prepare { .. } => "Prepare",
        Output::Allocate(_) => "Allocate",
        Output::KeepDeviceState(_) => "KeepDeviceState",
        Output::Digest => "Digest",
        Output::PageDigests { .. } => "PageDigests",
        Output::LoadDeviceState => "LoadDeviceState",
        Output::RunGuest => "RunGuest",
        Output::Report(_) => "Report",
        Output::Finished { .. } => "Finished",
    })
}

/// The name of a record.
pub(super) fn of_record(record: &Record) -> &'static str {
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
    }
}
