//! What the guest has in its memory and does with it while it is moved.

use std::fmt;
use std::str::FromStr;

/// What fills the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Random words, in all of it.
    Random,
    /// Random words in an eighth of it, nothing in the rest.
    MostlyEmpty,
    /// Words that repeat: `zstd` makes about a fifth of it.
    Text,
}

/// A load: the content of the memory, and how fast and where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    content: Content,
    /// Nine of ten writes go to a tenth of the set.
    hot: bool,
    /// MB/s of pages that are dirtied.
    rate: u32,
}

/// All but this much of RAM, at its start and end, is the guest's to fill, in MiB.
const KEPT_MIB: u64 = 16;
/// The populated part of a mostly empty guest.
const EMPTY_SHARE: u64 = 8;
/// How often the guest says how far it is, in milliseconds: what a dip in its work can be seen by.
const EVERY_MS: u32 = 20;

impl Work {
    /// Whether nothing is written while the guest moves.
    pub fn is_idle(self) -> bool {
        self.rate == 0
    }

    /// RAM of a machine that has about `mib` of content, in MiB.
    pub fn machine_mib(self, mib: u64) -> u64 {
        match self.content {
            Content::MostlyEmpty => mib.saturating_mul(EMPTY_SHARE),
            _ => mib,
        }
    }

    /// How much of `mib` of content the guest fills: all but what is kept at the start and the end.
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    pub fn filled_share(mib: u64) -> f64 {
        mib.saturating_sub(2 * KEPT_MIB) as f64 / mib.max(1) as f64
    }

    /// The guest's command line (`tests/guest/guest.c`) for `mib` of content, of which the first `set` are written.
    pub fn guest(self, mib: u64, set: u64) -> String {
        let fill = match self.content {
            Content::Random | Content::MostlyEmpty => "random",
            Content::Text => "text",
        };
        let pattern = if self.hot { "hot" } else { "uniform" };
        let set = set.min(mib.saturating_sub(2 * KEPT_MIB));
        let end = mib.saturating_sub(KEPT_MIB);
        format!(
            "mem={KEPT_MIB}..{end} fill={fill} rate={} set={set} pattern={pattern} every={EVERY_MS}",
            self.rate
        )
    }

    /// As a person would say it.
    pub fn described(self) -> String {
        let content = match self.content {
            Content::Random => "random words",
            Content::MostlyEmpty => "seven eighths never touched",
            Content::Text => "compressible words",
        };
        match (self.rate, self.hot) {
            (0, _) => format!("{content}, idle"),
            (rate, false) => format!("{content}, {rate} MB/s dirtied"),
            (rate, true) => {
                format!("{content}, {rate} MB/s dirtied, 90 % of it in a tenth of the set")
            }
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = match self.content {
            Content::Random => "",
            Content::MostlyEmpty => "empty",
            Content::Text => "text",
        };
        match (content, self.hot, self.rate) {
            ("", false, 0) => f.write_str("idle"),
            (content, false, 0) => f.write_str(content),
            (content, false, rate) => write!(f, "{content}{rate}"),
            (content, true, rate) => write!(f, "{content}hot{rate}"),
        }
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Work, String> {
        let digits = text.find(|c: char| c.is_ascii_digit());
        let (name, rate) = text.split_at(digits.unwrap_or(text.len()));
        let (name, hot) = match name.strip_suffix("hot") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let content = match name {
            "" | "idle" => Some(Content::Random),
            "empty" => Some(Content::MostlyEmpty),
            "text" => Some(Content::Text),
            _ => None,
        };
        let rate = match rate {
            // Nothing is hot in a guest that writes nothing, and the empty word is no work.
            "" if hot || text.is_empty() => None,
            "" => Some(0),
            _ if name == "idle" => None,
            rate => rate.parse().ok(),
        };
        let work = content
            .zip(rate)
            .map(|(content, rate)| Work { content, hot, rate });
        work.ok_or_else(|| {
            format!(
                "{text:?} is no work: idle, empty, text, or a rate in MB/s with what goes before it, \
                 such as 200, hot800 or text50"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_read_as_it_is_written() {
        for text in [
            "idle",
            "empty",
            "text",
            "50",
            "hot800",
            "text200",
            "empty50",
            "texthot50",
        ] {
            let work: Work = text.parse().expect("work");
            assert_eq!(work.to_string(), text);
        }
        for text in ["", "hot", "idle50", "busy", "50MB", "99999999999"] {
            assert!(text.parse::<Work>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn the_guest_is_told() {
        let work: Work = "hot800".parse().expect("work");
        assert_eq!(
            work.guest(1024, 512),
            "mem=16..1008 fill=random rate=800 set=512 pattern=hot every=20"
        );
        let empty: Work = "empty".parse().expect("work");
        assert_eq!(empty.machine_mib(1024), 8192);
        assert!(empty.is_idle() && !work.is_idle());
        assert!((Work::filled_share(64) - 0.5).abs() < f64::EPSILON);
        assert!(
            empty.guest(64, 512).contains(" set=32 "),
            "no more is written than there is"
        );
    }
}
