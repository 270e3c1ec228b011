//! What is looked at before a guest moves: what each side has found out about itself ([`Facts`]), both compared
//! ([`compare`]), and what the migration will likely take ([`predict`]).
//!
//! Pure, as the engines are: the daemon asks QEMU, the kernel and the link, and all that is concluded from the answers is
//! concluded here. A peer's facts are hostile bytes until [`Facts::from_text`] has taken them.

mod compare;
mod cpu;
mod disk;
mod facts;
mod predict;

use serde::{Deserialize, Serialize};

pub use self::compare::compare;
pub use self::cpu::{Cpu, Word};
pub use self::disk::{Disk, Storage};
pub use self::facts::{Facts, QemuFacts, clean};
pub use self::predict::{FirstRound, Predicted, Seen, Span, predict};

/// What becomes of a migration by what was looked at.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is as it should be.
    #[default]
    Pass,
    /// It may go wrong, or cannot be said.
    Warn,
    /// It would fail, or harm the guest.
    Fail,
}

impl Verdict {
    /// The verdict in one word.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        }
    }
}

/// Whose matter it is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Whose {
    /// The host that the guest leaves.
    #[default]
    Source,
    /// The host where it arrives.
    Destination,
    /// Both are compared.
    Both,
    /// What is between them.
    Network,
}

impl Whose {
    /// Whose it is in one word.
    pub fn word(self) -> &'static str {
        match self {
            Whose::Source => "source",
            Whose::Destination => "destination",
            Whose::Both => "both",
            Whose::Network => "network",
        }
    }
}

/// One thing that was looked at.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Line {
    /// What was looked at, in one word: `machine`, `cpu`, `memory`, …
    pub check: String,
    /// Whose matter it is.
    pub side: Whose,
    /// What becomes of a migration by it.
    pub verdict: Verdict,
    /// What was found, with its figure.
    pub found: String,
    /// What to do about it; empty where it passes.
    pub remedy: String,
}

impl Line {
    /// It is as it should be.
    pub fn pass(check: &str, side: Whose, found: impl Into<String>) -> Line {
        Line {
            check: check.to_owned(),
            side,
            verdict: Verdict::Pass,
            found: found.into(),
            remedy: String::new(),
        }
    }

    /// It may go wrong.
    pub fn warn(
        check: &str,
        side: Whose,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Line {
        Line {
            verdict: Verdict::Warn,
            remedy: remedy.into(),
            ..Line::pass(check, side, found)
        }
    }

    /// It would fail.
    pub fn fail(
        check: &str,
        side: Whose,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Line {
        Line {
            verdict: Verdict::Fail,
            ..Line::warn(check, side, found, remedy)
        }
    }

    /// What was looked at and what was found, for a person.
    pub fn what(&self) -> String {
        format!("{}: {}", self.check, self.found)
    }
}

/// Bytes for people: whole units where they are whole.
fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let whole = UNITS
        .iter()
        .find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    whole.map_or_else(
        || format!("{bytes} bytes"),
        |(unit, name)| format!("{} {name}", bytes / unit),
    )
}
