//! What is compared when a migration begins: what is cheap to ask, and what nobody else would notice before the guest stands still
//! at the source, or ever.

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

/// Has the destination told what it is like, over the channels of the migration, which are returned.
///
/// # Errors
/// Something differs that must not; or it is warned of something, and the request does not say that it goes on all the same.
pub(crate) async fn may_begin(
    service: &Service,
    request: &MigrationRequest,
    qmp: &Qmp,
    guest: &Guest,
    channels: Vec<Box<dyn Channel>>,
) -> Result<Vec<Box<dyn Channel>>, Failure> {
    let own = Facts {
        host: service.config.name.clone(),
        boot: host::boot(),
        lines: Vec::new(),
        qemu: Some(guest::facts(qmp, Some(guest)).await?),
    };
    let question = Message::Preflight {
        vm: request.vm.clone(),
        host: service.config.name.clone(),
        ram: guest.blocks.iter().map(|block| block.spec.size).sum(),
        probe: false,
    };
    let (channels, theirs) = probe::compare(channels, question).await?;
    let mut lines = compare(&own, &theirs);
    lines.retain(|line| COUNT.contains(&line.check.as_str()));
    refuse(&lines, request.force)?;
    Ok(channels)
}

/// Refuses what fails, and what is warned of unless it is `forced`.
fn refuse(lines: &[Line], forced: bool) -> Result<(), Failure> {
    let worst = lines.iter().max_by_key(|line| line.verdict);
    let Some(line) = worst.filter(|line| line.verdict != Verdict::Pass) else {
        return Ok(());
    };
    let Line {
        check,
        verdict,
        found,
        remedy,
        ..
    } = line;
    if *verdict == Verdict::Fail {
        return Err(operator(format!("{check}: {found}"), remedy.clone()));
    }
    if !forced {
        let remedy = format!("{remedy}; or go on all the same with --force");
        return Err(operator(format!("{check}: {found}"), remedy));
    }
    for line in lines.iter().filter(|line| line.verdict != Verdict::Pass) {
        tracing::warn!(check = line.check, found = line.found, "forced");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use pagecopy::preflight::Whose;

    #[test]
    fn force_goes_past_warnings_and_never_past_failures() {
        let pass = Line::pass("machine", Whose::Both, "the same");
        let warn = Line::warn("cpu", Whose::Both, "more", "use a named model");
        let fail = Line::fail("disk", Whose::Both, "another", "share it");
        let all = |lines: &[&Line]| lines.iter().map(|line| (*line).clone()).collect::<Vec<_>>();
        assert!(refuse(&[], false).is_ok());
        assert!(refuse(&all(&[&pass]), false).is_ok());
        let refused = refuse(&all(&[&pass, &warn]), false).unwrap_err();
        assert!(refused.remedy.contains("--force"), "{refused:?}");
        assert!(refuse(&all(&[&pass, &warn]), true).is_ok());
        let refused = refuse(&all(&[&warn, &fail, &pass]), true).unwrap_err();
        assert!(refused.what.contains("disk: another"), "{refused:?}");
        assert!(!refused.remedy.contains("--force"), "{refused:?}");
    }
}
