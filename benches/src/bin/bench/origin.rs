//! What a record says of the commit and the time.

use std::path::Path;
use std::process::Command;

/// The commit of the sources that this was built from, if they are still there.
pub(crate) fn commit() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Whoever measures as root may have the sources from somebody else.
    let git = |words: &[&str]| {
        said(
            Command::new("git")
                .args(["-c", "safe.directory=*", "-C"])
                .arg(root)
                .args(words),
        )
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    match (commit.as_str(), git(&["status", "--porcelain"]).as_str()) {
        ("", _) => "unknown".to_owned(),
        (commit, "") => commit.to_owned(),
        (commit, _) => format!("{commit}-dirty"),
    }
}

/// The time, in UTC.
pub(crate) fn now() -> String {
    said(Command::new("date").args(["-u", "+%FT%TZ"]))
}

/// What a command prints; nothing when it cannot be called.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout);
    String::from_utf8_lossy(&output.unwrap_or_default())
        .trim()
        .to_owned()
}
