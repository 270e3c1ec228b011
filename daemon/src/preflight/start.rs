//! What is compared when a migration begins: what is cheap to ask, and what nobody else would notice before the guest stands still
//! at the source, or ever.
//!
//! What would harm the guest ends the migration before it has begun. All else is only told: it may be as its operator wants it, and
//! a guest that could move before there was a comparison can move with it.

use pagecopy::preflight::{Facts, Line, Verdict, compare};
use pagecopy::wire::Message;
use transport::Channel;

use super::{guest, host, probe};
use crate::api::types::MigrationRequest;
use crate::failure::{Failure, operator};
use crate::qemu::Guest;
use crate::qmp::Qmp;
use crate::service::Service;

/// The lines that count here. RAMBlocks are compared when the guest is greeted for.
const COUNT: [&str; 4] = ["machine", "vcpus", "cpu", "disk"];

/// What the source's QEMU is like; nothing of it where there will be nothing to compare it with, since the destination's is made like
/// it. An error is told later, and ends nothing.
pub(crate) async fn own(
    service: &Service,
    request: &MigrationRequest,
    qmp: &Qmp,
    guest: &Guest,
) -> Result<Facts, Failure> {
    let qemu = match request.spawn {
        true => None,
        false => Some(guest::facts(qmp, Some(guest)).await?),
    };
    Ok(Facts {
        host: service.config.name.clone(),
        boot: host::boot(),
        lines: Vec::new(),
        qemu,
    })
}

/// Has the destination told what it is like, over the channels of the migration, which are returned; none where the destination does
/// not know the question, and has ended the connection.
///
/// # Errors
/// Something differs that must not, or the destination does not answer.
pub(crate) async fn may_begin(
    request: &MigrationRequest,
    own: Result<Facts, Failure>,
    channels: Vec<Box<dyn Channel>>,
    tell: impl Fn(String),
) -> Result<Option<Vec<Box<dyn Channel>>>, Failure> {
    if request.spawn && !request.force {
        return Ok(Some(channels));
    }
    let question = Message::Compare {
        vm: request.vm.clone(),
        force: request.force,
    };
    let not_compared = |why: &str| {
        tell(format!(
            "machine type, vCPUs, CPU and disks of both sides were not compared: {why}"
        ));
    };
    let Some((channels, theirs)) = probe::compare(channels, question).await? else {
        not_compared("the destination's pagecopyd is of a version that does not do that");
        return Ok(None);
    };
    if request.spawn {
        return Ok(Some(channels));
    }
    match (own, theirs) {
        (Err(failure), _) => not_compared(&failure.what),
        (_, Err(what)) => not_compared(&format!("the destination's answer is not clear: {what}")),
        (_, Ok(theirs)) if theirs.qemu.is_none() => {
            not_compared("the QEMU there does not answer, or none waits");
        }
        (Ok(own), Ok(theirs)) => {
            let mut lines = compare(&own, &theirs);
            lines.retain(|line| COUNT.contains(&line.check.as_str()));
            for text in judge(&lines)? {
                tell(text);
            }
        }
    }
    Ok(Some(channels))
}

/// Refuses what fails; what is warned of is returned in words.
fn judge(lines: &[Line]) -> Result<Vec<String>, Failure> {
    let of = |verdict| lines.iter().filter(move |line| line.verdict == verdict);
    if let Some(line) = of(Verdict::Fail).next() {
        return Err(operator(line.what(), line.remedy.clone()));
    }
    let told =
        of(Verdict::Warn).map(|line| format!("{}; what to do: {}", line.what(), line.remedy));
    Ok(told.collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use pagecopy::preflight::Whose;

    #[test]
    fn what_fails_is_refused_and_what_is_warned_of_is_told() {
        let pass = Line::pass("machine", Whose::Both, "the same");
        let warn = Line::warn("cpu", Whose::Both, "more", "use a named model");
        let fail = Line::fail("disk", Whose::Both, "another", "share it");
        let all = |lines: &[&Line]| lines.iter().map(|line| (*line).clone()).collect::<Vec<_>>();
        assert!(judge(&[]).unwrap().is_empty());
        assert!(judge(&all(&[&pass])).unwrap().is_empty());
        let told = judge(&all(&[&pass, &warn])).unwrap();
        assert_eq!(told, ["cpu: more; what to do: use a named model"]);
        let refused = judge(&all(&[&warn, &fail, &pass])).unwrap_err();
        assert_eq!(
            (refused.what.as_str(), refused.remedy.as_str()),
            ("disk: another", "share it")
        );
    }
}
